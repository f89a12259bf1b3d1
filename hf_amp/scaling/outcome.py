"""What became of one optimizer step, as known on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step.

    Attributes:
        attempt: number of the step among all that the scaler decided, from 1.
        applied: whether the optimizer moved anything; where not, parameters and optimizer state are as before.
        scale: the scale that the gradients' backward used.
        loss_finite: whether every loss behind the gradients was finite; None where the scaler saw no loss.
        backward: number of the backward that made the gradients; the same for optimizers that step from one.
        losses: how many losses (micro-batches) the scaler saw behind the gradients, each told of in one step alone, where one
            backward makes gradients for several optimizers.
        non_finite_losses: how many of them were not finite; with several processes, on the worst of them.
        zero_gradients: whether there are gradients and every element of them is exactly zero: nothing is learned.
        has_gradients: whether any parameter had a gradient.
        grad_norm: 2-norm of the unscaled gradients before clipping; None where unknown or not finite.
        grad_amax: largest magnitude of the same; None likewise.
        underflow_fraction: share of scaled gradient elements that are zero or subnormal; None where not sampled.
        lost_update_fraction: share of low-precision parameter elements that the newest sampled step, an earlier one, did
            not change; None where none was sampled since the last outcome.
        inf_elements: infinite gradient elements of a skipped step, as they are when it is decided: a plain clip before
            has made all of them NaN, a folded one has not. None where not counted.
        nan_elements: NaN gradient elements, likewise.
        carried: what the scaler's `passengers` asked for, by the names of `snapshot.read`.
    """

    attempt: int
    applied: bool
    scale: float
    backward: int = 0
    loss_finite: bool | None = None
    losses: int = 0
    non_finite_losses: int = 0
    zero_gradients: bool = False
    has_gradients: bool = True
    grad_norm: float | None = None
    grad_amax: float | None = None
    underflow_fraction: float | None = None
    lost_update_fraction: float | None = None
    inf_elements: int | None = None
    nan_elements: int | None = None
    carried: Mapping[str, float] = field(default_factory=dict)

    def non_finite_fraction(self, elements: int) -> float:
        """Share of the step's gradient `elements` that are not finite; 1 where they were not counted."""
        if self.inf_elements is None or self.nan_elements is None or not elements:
            return 1.0
        return (self.inf_elements + self.nan_elements) / elements
