"""Changes to instances that can be undone: what `attach` does and `detach` takes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


class PatchLog:
    """A log of changes to instances, undone in reverse order. Classes and modules are never touched."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set_attribute(self, instance: Any, name: str, value: Any) -> None:
        """Sets `instance.name`; undoing gives back the former value, or removes the attribute.

        Where somebody else has replaced the attribute in the meantime, theirs is left alone.
        """
        attributes = vars(instance)
        former = attributes.get(name, _ABSENT)
        setattr(instance, name, value)

        def undo() -> None:
            if attributes.get(name, _ABSENT) is not value:
                return
            if former is _ABSENT:
                delattr(instance, name)
            else:
                setattr(instance, name, former)

        self._undo.append(undo)

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Registers what takes back a change that the caller has made, such as a hook handle's `remove`."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Takes everything back, newest first. Harmless when called again."""
        while self._undo:
            self._undo.pop()()
