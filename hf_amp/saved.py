"""What a checkpoint holds: read without running code that is in it, and checked before any of it is taken up."""

from __future__ import annotations

import enum
import sys
import types
import zipfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin

import torch

from hf_amp.errors import StateError


def read(path: str | Path) -> Any:
    """The content of a file that `torch.save` wrote, on the CPU.

    `torch.load` does not look at the checksums that `torch.save` writes, so that a flipped bit would pass for another
    number; here they are compared, unless `torch.serialization.set_crc32_options` says that none are written.

    Raises:
        StateError: the file is damaged, cut off, something else, or would run code.
    """
    try:
        if torch.serialization.get_crc32_options() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise unrelated trees
        why = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
        raise StateError(
            f"{path}: cannot be read as a saved state ({why}): it is damaged, cut off or something else. Load another "
            "checkpoint."
        ) from error


def check(kind: type, saved: Any) -> None:
    """Compares what was saved of an instance of the dataclass `kind` with the annotations of its fields.

    Fields that are missing are not looked for, and others are left alone.

    Raises:
        StateError: a field has another type.
    """
    if not isinstance(saved, Mapping):
        raise StateError(f"the saved {kind.__name__} is a {type(saved).__name__}: the file is damaged.")
    for field in fields(kind):
        if field.name in saved and not _fits(saved[field.name], _annotation(kind, field.type)):
            raise StateError(
                f"the saved {kind.__name__}.{field.name} is {ascii(saved[field.name])[:60]}, but must be {field.type}: the "
                "file is damaged, or not hf_amp's. Load another checkpoint."
            )


def _annotation(kind: type, annotation: Any) -> Any:
    return eval(annotation, vars(sys.modules[kind.__module__])) if isinstance(annotation, str) else annotation


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is what plain data makes of a `kind`: lists for tuples, mappings for dataclasses, values for enums.

    Whatever is saved as an int is a count.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple and Ellipsis not in inner:
        return isinstance(value, (list, tuple)) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(item, inner[0]) for item in value)
    if issubclass(origin, Mapping):
        of_values = inner[1] if len(inner) > 1 else int  # Counter[str]
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(item, of_values) for key, item in value.items()
        )
    if is_dataclass(origin):
        check(cast(type, origin), value)
        return True
    if issubclass(origin, enum.Enum):
        return isinstance(value, str) and value in {member.value for member in origin}
    if isinstance(value, bool):
        return origin is bool
    if isinstance(value, int):
        return (0 if origin is int else -(2**63)) <= value < 2**63 and origin in (int, float)
    return isinstance(value, origin)
