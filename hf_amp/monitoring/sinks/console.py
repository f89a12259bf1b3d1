"""One console line when something happened, none when nothing did."""

from __future__ import annotations

import logging

from hf_amp.events import AmpEvent

_log = logging.getLogger("hf_amp")


def write(event: AmpEvent) -> None:
    """Logs `event` to the standard logger "hf_amp": a warning where it needs attention, else a debug line."""
    level = logging.WARNING if event.kind.needs_attention else logging.DEBUG
    cause = f" ({event.cause.value})" if event.cause else ""
    change = (
        f" {event.before:g} -> {event.after:g}:"
        if isinstance(event.before, float) and isinstance(event.after, float)
        else ""
    )
    message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in event.message)
    _log.log(level, "step %d: %s%s:%s %s", event.step, event.kind.value, cause, change, message)


def summarise(sentence: str, something_happened: bool) -> None:
    """Logs the summary of a run: a warning where something happened, else an INFO line."""
    _log.log(logging.WARNING if something_happened else logging.INFO, "%s", sentence)
