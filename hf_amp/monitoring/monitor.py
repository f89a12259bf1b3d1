"""`PrecisionMonitor`: what precision does to a run, on the host, at no host read of its own."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import BatchError
from hf_amp.events import Cause
from hf_amp.monitoring.precision_record import ERROR_OF_CAUSE, PrecisionRecord
from hf_amp.monitoring.streaming import LossMean
from hf_amp.plain import NotNegative, Positive, read_fields
from hf_amp.precision import FP16_FORMAT, FP32_FORMAT, NumberFormat, PrecisionMode


@dataclasses.dataclass
class PrecisionMonitor:
    """Counts steps and errors, and keeps the newest figures. Constant size, however long the run.

    A session feeds it by itself with what a step boundary read. In a loop of your own call `update_metrics` after every
    `scaler.update()`.

    Args:
        config: options; None for the defaults.

    Raises:
        ConfigError: `config` is something else.
    """

    config: dataclasses.InitVar[MixedPrecisionConfig | None] = None
    applied_steps: int = 0
    skipped_by_cause: Counter[str] = dataclasses.field(default_factory=Counter)
    scale: Positive | None = None
    grad_norm: NotNegative | None = None
    grad_amax: NotNegative | None = None
    underflow_fraction: NotNegative | None = None
    lost_update_fraction: NotNegative | None = None
    inf_elements: int | None = None
    nan_elements: int | None = None
    transitions: int = 0
    modules_in_fp32: int = 0
    losses: int = 0
    non_finite_losses: int = 0
    losses_before_window: int = 0
    non_finite_losses_before_window: int = 0
    eval_non_finite_batches: int | None = None
    record: PrecisionRecord = dataclasses.field(default_factory=PrecisionRecord)

    def __post_init__(self, config: MixedPrecisionConfig | None) -> None:
        config = MixedPrecisionConfig.or_default(config, "PrecisionMonitor")
        mode = (config.precision_mode or PrecisionMode.MIXED) if config.enabled else PrecisionMode.FP32
        self.record_formats({NumberFormat.of(mode).name: 1.0})
        self._loss_mean = LossMean()
        self._newest_attempt = 0

    # ---- what a run tells -----------------------------------------------------------------------------------

    def record_applied(
        self,
        scale: float,
        grad_norm: float | None,
        grad_amax: float | None,
        underflow_fraction: float | None,
    ) -> None:
        """One applied step. None stands for what was not measured; a sampled figure keeps its last value."""
        self.applied_steps += 1
        self.record.add_step(scale)
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
        self.record.add_step(next_scale)
        self.record_numerical_error(ERROR_OF_CAUSE[cause], self.record.steps)
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

    def record_formats(self, shares: Mapping[str, float]) -> None:
        """From the next step on: name of a number format → share of the parameters that are used in it."""
        self.record.format_shares = dict(shares)

    def record_fallback(self) -> None:
        """Modules, or the whole model, have left their precision."""
        self.record.fallback_count += 1

    def record_memory(self, savings: float) -> None:
        """From the next step on: share of training memory that precision saves over FP32; negative where it costs."""
        self.record.memory_savings = savings

    def record_numerical_error(self, kind: str, step: int) -> None:
        """One numerical error of any kind at optimizer step `step`, such as ("gradient_overflow", 12)."""
        self.record.add_error(kind, step)

    # ---- a loop of your own ---------------------------------------------------------------------------------

    def update_metrics(self, scaler: torch.amp.GradScaler, loss: Tensor | float, step: int) -> None:
        """Takes one step into account, after `scaler.update()`. No host read with an `AdvancedGradScaler`.

        A stock scaler tells no skips and has its scale read from the host: a fall of the scale counts as one skip.

        Args:
            scaler: what decided the step.
            loss: number or tensor with one element, any real dtype and device; its mean is in `get_precision_stats`.
            step: number of the optimizer step; not needed, because steps are counted here.

        Raises:
            BatchError: the loss has more than one element.
        """
        self._loss_mean.add(_single_element(loss))
        advanced: Any = scaler
        if getattr(advanced, "companions", {}).get("monitor") is self:
            return  # a session tells the rest
        if hasattr(advanced, "last_outcome"):
            self._record_newest_outcome(advanced)
        elif scaler.is_enabled():
            # It decays to 0, which has no logarithm.
            self._record_stock(max(scaler.get_scale(), FP32_FORMAT.smallest_subnormal))

    def _record_newest_outcome(self, scaler: Any) -> None:
        outcome = scaler.last_outcome
        if outcome is None or outcome.attempt == self._newest_attempt:
            return
        self._newest_attempt = outcome.attempt
        if outcome.applied:
            self.record_applied(
                outcome.scale, outcome.grad_norm, outcome.grad_amax, outcome.underflow_fraction
            )
            return
        cause = Cause.SCALE if outcome.loss_finite else Cause.UNKNOWN
        self.record_skipped(cause, outcome.scale, outcome.inf_elements, outcome.nan_elements)

    def _record_stock(self, scale: float) -> None:
        if self.scale is not None and scale < self.scale:
            self.record_skipped(Cause.UNKNOWN, scale, None, None)
        else:
            self.record_applied(scale, None, None, None)

    # ---- what people read -----------------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """Skipped steps of every cause."""
        return sum(self.skipped_by_cause.values())

    def metrics(self) -> dict[str, float]:
        """Catalogue name → value; finite numbers only. What is not known is absent."""
        steps = self.applied_steps + self.skipped_steps
        figures: dict[str, float | None] = {
            "scale": self.scale,
            "scale_volatility_bits": self.record.log2_scale.deviation if self.record.steps > 1 else None,
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
            "non_finite_loss_fraction": self.non_finite_loss_fraction,
            "eval_non_finite_batches": self.eval_non_finite_batches,
            "memory_saving_fraction": self.record.memory_savings,
        }
        return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}

    def _headroom_bits(self) -> float | None:
        if not self.grad_amax or not self.scale:
            return None
        bits = math.log2(FP16_FORMAT.largest) - math.log2(self.grad_amax) - math.log2(self.scale)
        # A step was applied in which the largest gradient was beyond FP16: then it is not held in FP16.
        return bits if bits >= 0 else None

    @property
    def non_finite_loss_fraction(self) -> float | None:
        """Share of the losses since `begin_window` that were not finite; None where there was none."""
        losses = self.losses - self.losses_before_window
        return (self.non_finite_losses - self.non_finite_losses_before_window) / losses if losses else None

    def get_precision_stats(self) -> dict[str, Any]:
        """The run so far. Reads the host, for the losses.

        Returns:
            `fp16_usage_rate`: share of steps in FP16; where modules are in FP32, a step counts for the share of the
            parameters outside of them. `usage_by_format`: the same for every number format. `avg_memory_savings`:
            share of training memory that precision saves over FP32, mean over steps; negative where it costs memory, NaN
            where not measured. `numerical_errors`: (kind, step) of the newest 1,000; `numerical_error_counts`: all, by
            kind. `fallback_count`, `applied_steps`, `skipped_steps`. `skip_rate`, and `avg_loss` of the finite losses
            given to `update_metrics`: NaN where there are none; `non_finite_losses` among them. `gradient_scale`:
            `current`, `min`, `max`, `geometric_mean` (None before the first step); `volatility_bits`: standard
            deviation over steps of log2(scale); `changes`, and `history`: (step, scale) of at most 256 of them.
        """
        avg_loss, non_finite_losses = self._loss_mean.read()
        steps = self.applied_steps + self.skipped_steps
        return {
            **self.record.stats(),
            "applied_steps": self.applied_steps,
            "skipped_steps": self.skipped_steps,
            "skip_rate": self.skipped_steps / steps if steps else math.nan,
            "avg_loss": avg_loss,
            "non_finite_losses": non_finite_losses,
        }

    # ---- checkpoint -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Every field, as numbers, strings, None, lists and mappings."""
        return {**dataclasses.asdict(self), "skipped_by_cause": dict(self.skipped_by_cause)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`; fields it does not have keep their values.

        Raises:
            StateError: it is no such state; nothing has changed then.
        """
        vars(self).update(read_fields(PrecisionMonitor, state_dict, "monitor"))


def _single_element(loss: Tensor | float) -> Tensor:
    if not isinstance(loss, Tensor):
        return torch.tensor(float(loss), device="cpu")
    if loss.numel() != 1:
        raise BatchError(
            f"PrecisionMonitor.update_metrics got a loss of shape {tuple(loss.shape)}: pass a number or a tensor with "
            "one element, such as loss.mean()."
        )
    return loss.detach().reshape(())
