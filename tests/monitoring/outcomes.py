"""Steps as a scaler would report them, for monitors."""

from __future__ import annotations

from hf_amp import Cause, PrecisionMonitor
from hf_amp.events import StepOutcome


def record_applied(
    monitor: PrecisionMonitor,
    scale: float,
    grad_norm: float | None = None,
    grad_amax: float | None = None,
    underflow_fraction: float | None = None,
) -> None:
    """One applied step."""
    monitor.after_step(
        StepOutcome(1, True, scale, grad_norm=grad_norm, grad_amax=grad_amax, underflow_fraction=underflow_fraction)
    )


def record_skipped(
    monitor: PrecisionMonitor,
    cause: Cause,
    next_scale: float,
    inf_elements: int | None = None,
    nan_elements: int | None = None,
) -> None:
    """One skipped step."""
    outcome = StepOutcome(1, False, next_scale, inf_elements=inf_elements, nan_elements=nan_elements)
    monitor.after_step(outcome, cause, next_scale)
