"""One console line when something happened, none when nothing did."""

from __future__ import annotations

import logging

from hf_amp.events import AmpEvent, EventKind, printable

_log = logging.getLogger("hf_amp")


class Console:
    """The sink of one run: the standard logger "hf_amp", a warning where an event needs attention, else a debug line.

    Skips alike in a row warn at the 1st, 2nd, 4th, 8th, … of them; the others are debug lines.
    """

    def __init__(self) -> None:
        self._newest: AmpEvent | None = None
        self._in_a_row = 0

    def write(self, event: AmpEvent) -> None:
        """Logs one event."""
        self._count(event)
        repeats = bool(self._in_a_row & (self._in_a_row - 1))
        level = logging.WARNING if event.kind.needs_attention and not repeats else logging.DEBUG
        change = (
            f" {event.before:g} -> {event.after:g}:"
            if isinstance(event.before, float) and isinstance(event.after, float) and event.before != event.after
            else ""
        )
        row = f" ({self._in_a_row} like it in a row)" if self._in_a_row > 1 else ""
        _log.log(level, "%s:%s %s%s", event.headline(), change, printable(event.message), row)

    def _count(self, event: AmpEvent) -> None:
        """How many skips alike there have been in a row, this one included; 1 for whatever else."""
        before, self._newest = self._newest, event
        alike = (
            before is not None
            and event.kind is before.kind is EventKind.STEP_SKIPPED
            and (event.cause, event.modules) == (before.cause, before.modules)
            and event.step == before.step + 1
        )
        self._in_a_row = self._in_a_row + 1 if alike else 1


def summarise(sentence: str, something_happened: bool) -> None:
    """Logs the summary of a run: a warning where something happened, else an INFO line."""
    _log.log(logging.WARNING if something_happened else logging.INFO, "%s", sentence)
