"""What became of one optimizer step, as known on the host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step.

    Attributes:
        applied: whether the optimizer ran; where not, parameters and optimizer state did not move.
        scale: the scale that the gradients' backward used.
        loss_finite: whether every loss behind the gradients was finite.
        grad_norm: 2-norm of the unscaled gradients before clipping; None where unknown or not finite.
        grad_amax: largest magnitude of the same; None likewise.
        underflow_fraction: share of scaled gradient elements that are zero or subnormal; None where not sampled.
        inf_elements: infinite gradient elements, counted on skipped steps only.
        nan_elements: NaN gradient elements, likewise.
    """

    applied: bool
    scale: float
    loss_finite: bool
    grad_norm: float | None = None
    grad_amax: float | None = None
    underflow_fraction: float | None = None
    inf_elements: int = 0
    nan_elements: int = 0
