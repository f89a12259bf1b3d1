"""One console line when something happened, none when nothing did."""

from __future__ import annotations

import logging

from hf_amp.events import AmpEvent
from hf_amp.monitoring.visible import visible

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
    unnamed = [name for name in event.modules if name not in event.message]
    where = f" in {', '.join(unnamed)}" if unnamed else ""
    text = visible(f"{event.kind.value}{cause}{where}:{change} {event.message}")
    _log.log(level, "step %d: %s", event.step, text)
