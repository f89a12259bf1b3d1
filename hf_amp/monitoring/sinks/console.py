"""A console line where a run starts, where it ends, and when something happened."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hf_amp.events import AmpEvent, EventKind, RepeatLimit, printable
from hf_amp.statistics import is_main_process

_log = logging.getLogger("hf_amp")


class Console:
    """The sink of one run: the standard logger "hf_amp", a warning where an event needs attention, else a debug line.

    Events alike are those of one cause (or message) in the same modules; what `RepeatLimit` does not show is a debug line.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = RepeatLimit(clock)

    def write(self, event: AmpEvent) -> None:
        """Logs one event."""
        changed_to = event.after if event.kind is EventKind.PRECISION_CHANGED else None
        alike = (event.kind, event.cause or event.message, event.modules, changed_to)
        times, shows = self._limit.count(alike) if event.kind.needs_attention else (1, False)
        speaks = event.kind is EventKind.FORWARD_RAISED or is_main_process()  # all else is the same on all ranks
        level = logging.WARNING if shows and speaks else logging.DEBUG
        change = (
            f" {event.before:g} -> {event.after:g}:"
            if isinstance(event.before, float) and isinstance(event.after, float) and event.before != event.after
            else ""
        )
        so_far = f" ({times} like it so far)" if times > 1 else ""
        _log.log(level, "%s:%s %s%s", event.headline(), change, printable(event.message), so_far)


def say(sentence: str) -> None:
    """Logs what every run says, at its start and at its end: a warning, because Python shows nothing below unless told to."""
    _log.warning("hf_amp: %s", printable(sentence))
