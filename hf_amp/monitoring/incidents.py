"""What a log tells of: what needed attention, and changes of precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_amp.options import is_real


@dataclass
class Incident:
    """What needed attention, alike events together.

    Attributes:
        event: name of its kind, as in the log.
        cause: name of the cause; "" where there is none.
        modules: qualified names of the modules concerned.
        first_step: optimizer step of the first.
        last_step: optimizer step of the newest.
        count: how many.
        message: the newest one's sentence, with what to do.
        before: the value that the newest one changed.
        after: what it changed to.
    """

    event: str
    cause: str
    modules: tuple[str, ...]
    first_step: int
    last_step: int
    count: int
    message: str
    before: float | str | None = None
    after: float | str | None = None


@dataclass(frozen=True)
class PrecisionChange:
    """A change of precision as a log tells of it: of the modules named, or of the whole model where none is."""

    step: int
    before: str
    after: str
    modules: tuple[str, ...]
    cause: str
    message: str


def cause_of(line: Mapping[str, Any]) -> str:
    return str(line.get("cause") or "")


def plain_value(value: Any) -> float | str | None:
    """A finite number, text or None; anything else as text."""
    return value if value is None or is_real(value) else str(value)


def precision_change_of(line: Mapping[str, Any]) -> PrecisionChange:
    return PrecisionChange(
        step=line["step"],
        before=str(line.get("before")),
        after=str(line.get("after")),
        modules=tuple(map(str, line.get("modules") or ())),
        cause=cause_of(line),
        message=str(line.get("message", "")),
    )
