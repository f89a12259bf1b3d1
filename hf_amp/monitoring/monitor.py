"""`PrecisionMonitor`: the newest figures of a run, on the host, at no host read of its own."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

from hf_amp.config import FP16_FORMAT
from hf_amp.events import Cause


@dataclasses.dataclass
class PrecisionMonitor:
    """Counts steps and keeps the newest figures. Constant size, however long the run.

    Fed with what a step boundary read; `metrics` is a dictionary look-up away at any time.
    """

    applied_steps: int = 0
    skipped_by_cause: Counter[str] = dataclasses.field(default_factory=Counter)
    scale: float | None = None
    grad_norm: float | None = None
    grad_amax: float | None = None
    underflow_fraction: float | None = None
    lost_update_fraction: float | None = None
    inf_elements: int | None = None
    nan_elements: int | None = None
    transitions: int = 0
    modules_in_fp32: int = 0
    losses: int = 0
    non_finite_losses: int = 0
    losses_before_window: int = 0
    non_finite_losses_before_window: int = 0
    eval_non_finite_batches: int | None = None

    def record_applied(
        self,
        scale: float,
        grad_norm: float | None,
        grad_amax: float | None,
        underflow_fraction: float | None,
    ) -> None:
        """One applied step. None stands for what was not measured; a sampled figure keeps its last value."""
        self.applied_steps += 1
        self.scale, self.grad_norm = scale, grad_norm
        if grad_amax is not None:
            self.grad_amax = grad_amax
        if underflow_fraction is not None:
            self.underflow_fraction = underflow_fraction

    def record_lost_updates(self, fraction: float | None) -> None:
        """What a sampled step did not change; known with the step after it, applied or not. None: no news."""
        if fraction is not None:
            self.lost_update_fraction = fraction

    def record_skipped(
        self, cause: Cause, next_scale: float, inf_elements: int | None, nan_elements: int | None
    ) -> None:
        """One skipped step, which has no gradient norm to tell."""
        self.skipped_by_cause[cause.value] += 1
        self.scale, self.grad_norm, self.grad_amax = next_scale, None, None
        self.inf_elements, self.nan_elements = inf_elements, nan_elements

    def record_plan(self, modules_in_fp32: int) -> None:
        """One change of plan."""
        self.transitions += 1
        self.modules_in_fp32 = modules_in_fp32

    def record_losses(self, losses: int, non_finite: int) -> None:
        """The losses (micro-batches) of one step, applied or skipped."""
        self.losses += losses
        self.non_finite_losses += non_finite

    def begin_window(self) -> None:
        """Makes `non_finite_loss_fraction` start anew: what was seen so far has been logged."""
        self.losses_before_window = self.losses
        self.non_finite_losses_before_window = self.non_finite_losses

    @property
    def skipped_steps(self) -> int:
        """Skipped steps of every cause."""
        return sum(self.skipped_by_cause.values())

    def metrics(self) -> dict[str, float]:
        """Catalogue name → value; finite numbers only. What is not known is absent."""
        steps = self.applied_steps + self.skipped_steps
        figures: dict[str, float | None] = {
            "scale": self.scale,
            "applied_steps": self.applied_steps,
            "skipped_steps": self.skipped_steps,
            **{
                f"skipped_steps_{cause.lower()}": count
                for cause, count in sorted(self.skipped_by_cause.items())
            },
            "skip_rate": self.skipped_steps / steps if steps else None,
            "grad_norm": self.grad_norm,
            "grad_amax": self.grad_amax,
            "headroom_bits": self._headroom_bits(),
            "underflow_fraction": self.underflow_fraction,
            "lost_update_fraction": self.lost_update_fraction,
            "inf_elements": self.inf_elements,
            "nan_elements": self.nan_elements,
            "transitions": self.transitions,
            "modules_in_fp32": self.modules_in_fp32,
            "non_finite_losses": self.non_finite_losses if self.losses else None,
            "non_finite_loss_fraction": self._non_finite_loss_fraction(),
            "eval_non_finite_batches": self.eval_non_finite_batches,
        }
        return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}

    def _headroom_bits(self) -> float | None:
        if not self.grad_amax or not self.scale:
            return None
        return math.log2(FP16_FORMAT.largest) - math.log2(self.grad_amax) - math.log2(self.scale)

    def _non_finite_loss_fraction(self) -> float | None:
        losses = self.losses - self.losses_before_window
        return (self.non_finite_losses - self.non_finite_losses_before_window) / losses if losses else None

    def state_dict(self) -> dict[str, Any]:
        """Every field, as numbers, None and one flat mapping."""
        return {**dataclasses.asdict(self), "skipped_by_cause": dict(self.skipped_by_cause)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`; fields it does not have keep their values."""
        for name in (option.name for option in dataclasses.fields(self)):
            if name in state_dict:
                setattr(self, name, state_dict[name])
        self.skipped_by_cause = Counter(self.skipped_by_cause)
