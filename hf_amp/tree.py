"""Tensors inside of what modules take and return: tuples, lists, mappings, named tuples and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(dotted path, tensor) of every tensor in `value`.

    Other objects, such as caches and batches of graphs, are looked into where `depth` says how many of them deep. Their private
    attributes are left out of paths.
    """
    if isinstance(value, Tensor):
        yield name, value
        return
    items, objects = list(_items(value)), 0
    if not items and depth and hasattr(value, "__dict__") and not callable(value):
        items, objects = list(vars(value).items()), 1
    for path, item in items:
        shown = () if objects and path.startswith("_") else (path,)
        yield from tensors_in(item, ".".join(filter(None, (name, *shown))), depth - objects)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in `value`, in the same order."""
    return [x for _, x in tensors_in(value)]


def map_tensors(convert: Callable[[Tensor], Tensor], value: Any, depth: int = 0) -> Any:
    """`value` with every tensor converted, in tuples, lists and mappings of its own; their types stay.

    Dataclasses and other objects, such as caches, are passed on as they are, but where `depth` says how many of them deep they
    are copied too.
    """
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(convert, item, depth) for item in value))
    if type(value) in (list, tuple):
        return type(value)(map_tensors(convert, item, depth) for item in value)
    if isinstance(value, (dict, UserDict)):
        own = copy.copy(value)
        for key, item in value.items():
            own[key] = map_tensors(convert, item, depth)
        return own
    if not depth or not hasattr(value, "__dict__") or callable(value):
        return value
    own = copy.copy(value)
    vars(own).update({name: map_tensors(convert, item, depth - 1) for name, item in vars(value).items()})
    return own


def replace_tensors(convert: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its tensors converted in place: lists, mappings and dataclasses stay the objects that they are.

    What cannot be changed in place (tuples, frozen dataclasses) is replaced where something in it is converted.
    """
    if isinstance(value, Tensor):
        return convert(value)
    replaced = {path: (old, replace_tensors(convert, old)) for path, old in _items(value)}  # such as can be compiled
    changed = {path: new for path, (old, new) in replaced.items() if new is not old}
    if not changed:
        return value
    if isinstance(value, tuple):
        items = [changed.get(str(index), item) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        value[:] = [changed.get(str(index), item) for index, item in enumerate(value)]
    elif isinstance(value, MutableMapping):
        for key in [key for key in value if str(key) in changed]:
            value[key] = changed[str(key)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        if value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return dataclasses.replace(value, **changed)
        for name, item in changed.items():
            setattr(value, name, item)
    return value


def copy_containers(value: Any, depth: int = 0) -> Any:
    """`value` in containers of its own, as `map_tensors` makes them, which what others add to theirs does not reach.

    Tensors are shared.
    """
    return map_tensors(lambda tensor: tensor, value, depth)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
