"""Plain data out of a checkpoint, checked against the types of the records that it goes into."""

from __future__ import annotations

import enum
import types
import typing
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import torch

from hf_amp.config import Allowed, is_real, safe_repr
from hf_amp.errors import StateError

LARGEST_EXACT = 2**53
"""Whole numbers up to here are exact in FP64, which `to_host` carries them in; no run takes as many steps."""

_COUNT = Allowed(
    f"a whole number from 0 to {LARGEST_EXACT}",
    lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= LARGEST_EXACT,
)
_BY_TYPE: dict[Any, Allowed] = {
    bool: Allowed("True or False", lambda v: isinstance(v, bool)),
    int: _COUNT,
    float: Allowed("a finite number", is_real),
    str: Allowed("text", lambda v: isinstance(v, str)),
    type(None): Allowed("None", lambda v: v is None),
}

NotNegative = Annotated[float, Allowed("a finite number from 0 on", lambda v: is_real(v) and v >= 0)]
Positive = Annotated[float, Allowed("a positive finite number", lambda v: is_real(v) and v > 0)]
Log2Value = Annotated[
    float, Allowed("a number between -1024 and 1024, as log2 in FP64 is", lambda v: is_real(v) and abs(v) < 1024)
]
AtLeastOne = Annotated[int, Allowed("a whole number from 1 on", lambda v: _COUNT.accepts(v) and v >= 1)]


def parse(kind: Any, value: Any, where: str) -> Any:
    """`value` as a new object of the type `kind`, which may be nested; an `int` is a count, a `float` is finite.

    Args:
        where: what the value is called in the error.

    Raises:
        StateError: it is none; says where, what is there, and what belongs there.
    """
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _accepted(arguments[1], arguments[0], value, where)
    if kind in _BY_TYPE:
        return _accepted(_BY_TYPE[kind], kind, value, where)
    if origin in (types.UnionType, typing.Union):
        kinds = [other for other in arguments if other is not type(None)]
        return None if value is None and len(kinds) < len(arguments) else parse(kinds[0], value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**parse_fields(kind, value, where))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if isinstance(value, str) and value in [member.value for member in kind]:
            return kind(value)
        raise _damaged(where, value, "one of " + ", ".join(str(member.value) for member in kind))
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(origin, arguments, value, where)
    return _sequence(origin, arguments, value, where)


def parse_fields(record: type[Any], value: Any, where: str) -> dict[str, Any]:
    """Those fields of the dataclass `record` that the mapping `value` has, checked; others in it are left alone.

    Raises:
        StateError: it is no mapping, a field is of another type, or one is missing that has no default.
    """
    if not isinstance(value, Mapping):
        raise _damaged(where, value, "a mapping")
    for option in fields(record):
        if option.name not in value and option.default is MISSING and option.default_factory is MISSING:
            raise _damaged(f"{where}[{option.name!r}]", "missing", "a value")
    hints = typing.get_type_hints(record, include_extras=True)
    return {
        option.name: parse(hints[option.name], value[option.name], f"{where}[{option.name!r}]")
        for option in fields(record)
        if option.name in value
    }


def _accepted(allowed: Allowed, kind: Any, value: Any, where: str) -> Any:
    if not allowed.accepts(value):
        raise _damaged(where, value, allowed)
    return float(value) if kind is float else value


def _mapping(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _damaged(where, value, "a mapping")
    key_kind, value_kind = arguments if len(arguments) == 2 else (*arguments, int)  # a Counter has no second
    found = {
        parse(key_kind, key, f"a key of {where}"): parse(value_kind, item, f"{where}[{safe_repr(key)}]")
        for key, item in value.items()
    }
    return Counter(found) if origin is Counter else types.MappingProxyType(found) if origin is Mapping else found


def _sequence(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    fixed = origin is tuple and arguments[-1] is not Ellipsis
    if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(arguments)):
        raise _damaged(where, value, f"a list of {len(arguments)}" if fixed else "a list")
    kinds = arguments if fixed else [arguments[0]] * len(value)
    return origin(parse(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _damaged(where: str, value: Any, allowed: str) -> StateError:
    text = safe_repr(value)
    text = text if len(text) <= 200 else f"{text[:200]}…"
    return StateError(f"{where} is {text}, where {allowed} belongs: the state is damaged; load another one.")


def load_file(path: str | Path) -> Any:
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
