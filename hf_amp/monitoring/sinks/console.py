"""One console line when something happened, none when nothing did."""

from __future__ import annotations

import logging

from hf_amp.events import AmpEvent
from hf_amp.monitoring.visible import visible

_log = logging.getLogger("hf_amp")


def headline(event: AmpEvent) -> str:
    """What happened, why and where: "step 3: step_skipped (ACTIVATION) in h.0.mlp". One line, nothing hidden in it."""
    cause = f" ({event.cause.value})" if event.cause else ""
    where = f" in {', '.join(event.modules)}" if event.modules else ""
    return visible(f"step {event.step}: {event.kind.value}{cause}{where}")


def write(event: AmpEvent) -> None:
    """Logs `event` to the standard logger "hf_amp": a warning where it needs attention, else a debug line."""
    level = logging.WARNING if event.kind.needs_attention else logging.DEBUG
    change = (
        f" {event.before:g} -> {event.after:g}:"
        if isinstance(event.before, float) and isinstance(event.after, float)
        else ""
    )
    _log.log(level, "%s:%s %s", headline(event), change, visible(event.message))


def summarise(sentence: str, something_happened: bool) -> None:
    """Logs the summary of a run: a warning where something happened, else an INFO line."""
    _log.log(logging.WARNING if something_happened else logging.INFO, "%s", sentence)
