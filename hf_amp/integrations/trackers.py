"""Metrics into whatever the accelerator's trackers are: TensorBoard, W&B and the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from accelerate import Accelerator

from hf_amp.monitoring.metrics import INCIDENT, LOG_PREFIX
from hf_amp.session import AmpSession, figure_of


def logging_with_metrics(accelerator: Accelerator, session: AmpSession) -> Callable[..., None]:
    """An `accelerator.log` that adds the session's metrics, with `amp/` before their names, to what the loop logs.

    They go into the first call after an optimizer step, with words for what needed attention; further calls at the same
    step, such as an evaluation's, are left as they are. The session's own log gets them too, with the loop's numbers
    that a Trainer logs.
    """
    log = accelerator.log
    reported = 0

    @functools.wraps(log)
    def log_with_metrics(values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        nonlocal reported
        if session.scaler.decided_steps != reported:
            reported = session.scaler.decided_steps
            values = {**values, **log_entry(session, values)}
        log(values, *args, **kwargs)

    return log_with_metrics


def log_entry(session: AmpSession, values: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
    """What the session adds to an entry of training; the session's own log gets it too. No GPU-CPU sync, but one for a loss that
    is a tensor on a device, which trackers ask for as well.

    Args:
        values: the entry of the loop or Trainer, whose loss and learning rate the report shows.
        step: optimizer step that it is of; None for the newest that is known.
    """
    shared = {}
    for name in ("loss", "learning_rate"):
        with suppress(TypeError):  # trackers may take what is no number
            shared[name] = figure_of(name, values.get(name))
    session.record_metrics(step, shared)
    ours = {LOG_PREFIX + name: value for name, value in session.metrics().items()}
    incidents = session.unlogged_incidents()
    return {**ours, INCIDENT: incidents} if incidents else ours
