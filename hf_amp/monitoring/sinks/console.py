"""A console line where a run starts, where it ends, and when something happened."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hf_amp.events import AmpEvent, EventKind, printable

_log = logging.getLogger("hf_amp")
SECONDS_BETWEEN_REPEATS = 10.0
"""Between two lines for events alike."""


class Console:
    """The sink of one run: the standard logger "hf_amp", a warning where an event needs attention, else a debug line.

    Of events alike, which are those of one cause (or message) in the same modules, the first is shown, and then no more than
    one each time that their number has doubled and ten seconds have passed; the others are debug lines.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: Counter[tuple[Any, ...]] = Counter()
        self._shown: dict[tuple[Any, ...], tuple[int, float]] = {}  # how many there were, and when

    def write(self, event: AmpEvent) -> None:
        """Logs one event."""
        changed_to = event.after if event.kind is EventKind.PRECISION_CHANGED else None
        alike = (event.kind, event.cause or event.message, event.modules, changed_to)
        self._times[alike] += event.kind.needs_attention
        times = self._times[alike]
        count, since = self._shown.get(alike, (0, -math.inf))
        now = self._clock()
        shows = event.kind.needs_attention and times >= 2 * count and now >= since + SECONDS_BETWEEN_REPEATS
        if shows:
            self._shown[alike] = (times, now)
        level = logging.WARNING if shows else logging.DEBUG
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
