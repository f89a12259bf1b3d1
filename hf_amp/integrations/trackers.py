"""Metrics into whatever the accelerator's trackers are: TensorBoard, W&B and the others."""

from __future__ import annotations

import functools
from typing import Any

from accelerate import Accelerator

from hf_amp.monitoring.metrics import LOG_PREFIX
from hf_amp.session import AmpSession


def merge_metrics_into_logs(accelerator: Accelerator, session: AmpSession) -> None:
    """Makes `accelerator.log` add the session's metrics, with `amp/` before their names, to what the loop logs.

    They ride in the first call after an optimizer step; further calls at the same step, such as an evaluation's,
    are left as they are. No host read.
    """
    log = accelerator.log
    told = 0

    @functools.wraps(log)
    def log_with_metrics(values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        nonlocal told
        if session.scaler.decided_steps != told:
            told = session.scaler.decided_steps
            values = {**values, **{LOG_PREFIX + name: value for name, value in session.metrics().items()}}
        log(values, *args, **kwargs)

    session.changes.set_attribute(accelerator, "log", log_with_metrics)
