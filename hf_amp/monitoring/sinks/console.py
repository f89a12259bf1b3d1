"""One console line when something happened, none when nothing did."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from hf_amp.events import AmpEvent, EventKind, printable

_log = logging.getLogger("hf_amp")


class Console:
    """The sink of one run: the standard logger "hf_amp", a warning where an event needs attention, else a debug line.

    Events alike, which are those of one cause (or message) in the same modules, warn at the 1st, 2nd, 4th, 8th, … of them;
    the others are debug lines.
    """

    def __init__(self) -> None:
        self._times: Counter[tuple[Any, ...]] = Counter()

    def write(self, event: AmpEvent) -> None:
        """Logs one event."""
        changed_to = event.after if event.kind is EventKind.PRECISION_CHANGED else None
        alike = (event.kind, event.cause or event.message, event.modules, changed_to)
        self._times[alike] += event.kind.needs_attention
        times = self._times[alike]
        repeats = bool(times & (times - 1))
        level = logging.WARNING if event.kind.needs_attention and not repeats else logging.DEBUG
        change = (
            f" {event.before:g} -> {event.after:g}:"
            if isinstance(event.before, float) and isinstance(event.after, float) and event.before != event.after
            else ""
        )
        so_far = f" ({times} like it so far)" if times > 1 else ""
        _log.log(level, "%s:%s %s%s", event.headline(), change, printable(event.message), so_far)


def summarise(sentence: str, something_happened: bool) -> None:
    """Logs the summary of a run: a warning where something happened, else an INFO line."""
    _log.log(logging.WARNING if something_happened else logging.INFO, "%s", sentence)
