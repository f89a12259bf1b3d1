"""`PrecisionMonitor`: what precision does to a run, on the host, without a GPU-CPU sync of its own."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.device import widest_float
from hf_amp.errors import BatchError
from hf_amp.events import Cause, StepOutcome
from hf_amp.precision import FP16_FORMAT, FP32_FORMAT, PrecisionMode
from hf_amp.serialization import AtLeastOne, Log2Value, NotNegative, Positive, parse_fields
from hf_amp.statistics import to_device, to_host_list


@dataclasses.dataclass
class RunningStatistics:
    """Count, mean, spread and range.

    Source: Welford, "Note on a method for calculating corrected sums of squares and products", 1962.
    """

    count: int = 0
    mean: Log2Value = 0.0
    squares: NotNegative = 0.0
    """Sum of squared distances from the mean."""
    smallest: Log2Value | None = None
    largest: Log2Value | None = None

    def add(self, value: float) -> None:
        """Takes one finite number into account."""
        self.count += 1
        distance = value - self.mean
        self.mean += distance / self.count
        self.squares += distance * (value - self.mean)
        if self.smallest is None or value < self.smallest:
            self.smallest = value
        if self.largest is None or value > self.largest:
            self.largest = value

    @property
    def deviation(self) -> float:
        """Standard deviation of what was seen; 0 before the second number."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


_POINTS_KEPT = 256


@dataclasses.dataclass
class History:
    """Where a step-wise constant value changed: at most 256 points, thinned evenly when there are more."""

    points: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    every: AtLeastOne = 1
    """Of this many changes one is kept."""
    changes: int = 0

    def add(self, step: int, value: float) -> None:
        """Notes `value` at `step` where it is another than before. Call it with every step, or with changes only."""
        if self.changes % self.every == 0:
            if len(self.points) >= _POINTS_KEPT:
                self.points = self.points[::2]
                self.every *= 2
            self.points.append((step, value))
        self.changes += 1


_LOSSES_HELD = 64


class LossMean:
    """Mean of losses that stay on their device until they are read.

    At most 64 tensors of shape [] are held, copies of what was given, which may be written to again: compiled code that
    runs as a CUDA graph does so. Then they become one sum. No GPU-CPU sync but in `read`.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._totals: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Takes a detached loss of shape [], on any device, into account."""
        self._held.append(loss.clone())
        if len(self._held) == _LOSSES_HELD:
            self._fold()

    def _fold(self) -> None:
        if not self._held:
            return
        known = self._held if self._totals is None else [self._totals, *self._held]
        device = next((x.device for x in known if x.device.type != "cpu"), known[0].device)
        losses = torch.stack([to_device(loss, device) for loss in self._held])
        losses = losses.to(widest_float(losses.device))
        self._held = []
        finite = losses.isfinite()
        totals = torch.stack([losses.where(finite, 0.0).sum(), finite.sum(), (~finite).sum()])
        self._totals = totals if self._totals is None else to_device(self._totals, device) + totals

    def read(self) -> tuple[float, int]:
        """Mean of the finite losses (NaN where there are none), and how many were not finite. One GPU-CPU sync."""
        self._fold()
        if self._totals is None:
            return math.nan, 0
        total, finite, non_finite = to_host_list(list(self._totals))
        return (total / finite if finite else math.nan), int(non_finite)


ERRORS_KEPT = 1000
"""Newest numerical errors that are kept one by one; all are counted."""
KINDS_KEPT = 100
"""Kinds of numerical errors that are counted apart; further ones count as "other"."""


@dataclasses.dataclass
class PrecisionRecord:
    """Sums and streaming statistics over steps, applied and skipped."""

    format_shares: dict[str, float] = dataclasses.field(default_factory=dict)
    """Share of the parameters that are used in each number format, from the next step on."""
    memory_savings: float | None = None
    """Share of training memory that precision saves over FP32, from the next step on; None where not measured."""
    steps: int = 0
    steps_by_format: dict[str, float] = dataclasses.field(default_factory=dict)
    """Steps in each number format; a step in several counts for each with its share."""
    fallback_count: int = 0
    error_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    newest_errors: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    scale: Positive | None = None
    log2_scale: RunningStatistics = dataclasses.field(default_factory=RunningStatistics)
    scale_history: History = dataclasses.field(default_factory=History)
    savings: RunningStatistics = dataclasses.field(default_factory=RunningStatistics)

    def add_step(self, scale: float) -> None:
        """One decided step, and the scale after it."""
        self.steps += 1
        for name, share in self.format_shares.items():
            self.steps_by_format[name] = self.steps_by_format.get(name, 0.0) + share
        if self.memory_savings is not None:
            self.savings.add(self.memory_savings)
        self.log2_scale.add(math.log2(scale))
        if scale != self.scale:
            self.scale = scale
            self.scale_history.add(self.steps, scale)

    def stats(self) -> dict[str, Any]:
        """The part of `PrecisionMonitor.get_precision_stats` that is summed up here."""
        seen = self.log2_scale
        usage = {name: share / max(1, self.steps) for name, share in self.steps_by_format.items()}
        newest = math.nan if self.memory_savings is None else self.memory_savings
        return {
            "fp16_usage_rate": usage.get(FP16_FORMAT.name, 0.0),
            "usage_by_format": usage,
            "avg_memory_savings": self.savings.mean if self.savings.count else newest,
            "numerical_errors": list(self.newest_errors),
            "numerical_error_counts": dict(self.error_counts),
            "fallback_count": self.fallback_count,
            "gradient_scale": {
                "current": self.scale,
                "min": None if seen.smallest is None else 2.0**seen.smallest,
                "max": None if seen.largest is None else 2.0**seen.largest,
                "geometric_mean": 2.0**seen.mean if seen.count else None,
                "volatility_bits": seen.deviation,
                "changes": max(0, self.scale_history.changes - 1),
                "history": list(self.scale_history.points),
            },
        }


_LIKE_ATTRIBUTES = (  # metrics
    "scale", "applied_steps", "skipped_steps", "grad_norm", "grad_amax", "underflow_fraction", "lost_update_fraction", "fp8_output_error",
    "inf_elements", "nan_elements", "precision_changes", "modules_in_fp32", "non_finite_loss_fraction", "eval_non_finite_batches",
)  # fmt: skip


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
    fp8_output_error: NotNegative | None = None
    inf_elements: int | None = None
    nan_elements: int | None = None
    precision_changes: int = 0
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
        self.record_formats({mode.number_format.name: 1.0})
        self._loss_mean = LossMean()
        self._newest_attempt = 0

    def after_step(self, outcome: StepOutcome, cause: Cause | None = None, next_scale: float | None = None) -> None:
        """One step. What was not measured in it keeps its last value; a skipped step has no norm.

        Args:
            cause: why it was skipped; None where it was applied.
            next_scale: the scale of the next step, where it was skipped.
        """
        self.losses += outcome.losses
        self.non_finite_losses += outcome.non_finite_losses
        if outcome.lost_update_fraction is not None:
            self.lost_update_fraction = outcome.lost_update_fraction
        kept = 0.0 if outcome.zero_gradients else self.grad_norm or None  # whether it is 0 is known of each step
        self.grad_norm = kept if outcome.grad_norm is None and cause is None else outcome.grad_norm
        if cause is None:
            self.applied_steps += 1
            self.scale = outcome.scale
            if outcome.grad_amax is not None:
                self.grad_amax = outcome.grad_amax
            if (share := outcome.underflow_fraction) is not None:
                self.underflow_fraction = None if math.isnan(share) else share
        else:
            self.skipped_by_cause[cause.value] += 1
            self.scale = outcome.scale if next_scale is None else next_scale
            self.grad_amax = None
            self.inf_elements, self.nan_elements = outcome.inf_elements, outcome.nan_elements
        self.record.add_step(self.scale)
        if cause is not None:
            self.record_numerical_error(cause.facts.error, self.record.steps)

    def record_plan(self, modules_in_fp32: int, is_fallback: bool) -> None:
        """One change of plan. `is_fallback`: modules, or the whole model, have left their precision."""
        self.precision_changes += 1
        self.modules_in_fp32 = modules_in_fp32
        self.record.fallback_count += is_fallback

    def begin_window(self) -> None:
        """Makes `non_finite_loss_fraction` start over: what was seen so far has been logged."""
        self.losses_before_window = self.losses
        self.non_finite_losses_before_window = self.non_finite_losses

    def record_formats(self, shares: Mapping[str, float]) -> None:
        """From the next step on: name of a number format → share of the parameters that are used in it."""
        self.record.format_shares = dict(shares)

    def record_memory(self, savings: float) -> None:
        """From the next step on: share of training memory that precision saves over FP32; negative where it costs."""
        self.record.memory_savings = savings

    def record_numerical_error(self, kind: str, step: int) -> None:
        """One numerical error of any kind at optimizer step `step`, such as ("gradient_overflow", 12)."""
        record = self.record
        if kind not in record.error_counts and len(record.error_counts) >= KINDS_KEPT:
            kind = "other"
        record.error_counts[kind] = record.error_counts.get(kind, 0) + 1
        record.newest_errors = [*record.newest_errors[1 - ERRORS_KEPT :], (kind, step)]

    def update_metrics(self, scaler: torch.amp.GradScaler, loss: Tensor | float, step: int) -> None:
        """Takes one step into account, after `scaler.update()`. No GPU-CPU sync with an `AdvancedGradScaler`.

        A stock scaler reports no skips, and reading its scale is a GPU-CPU sync: a fall of the scale counts as one skip.

        Args:
            scaler: what decided the step.
            loss: number or tensor with one element, any real dtype and device; its mean is in `get_precision_stats`.
            step: number of the optimizer step; not needed, because steps are counted here.

        Raises:
            BatchError: the loss has more than one element.
        """
        self._loss_mean.add(_single_element(loss))
        advanced: Any = scaler
        if getattr(advanced, "stateful", {}).get("monitor") is self:
            return  # a session records the rest
        if hasattr(advanced, "last_outcome"):
            outcome: StepOutcome | None = advanced.last_outcome
            if outcome is not None and outcome.attempt != self._newest_attempt:
                self._newest_attempt = outcome.attempt
                skipped_for = Cause.SCALE if outcome.loss_finite else Cause.UNKNOWN
                self.after_step(outcome, None if outcome.applied else skipped_for)
        elif scaler.is_enabled():
            scale = max(scaler.get_scale(), FP32_FORMAT.smallest_subnormal)  # it decays to 0, which has no logarithm
            applied = self.scale is None or scale >= self.scale
            self.after_step(StepOutcome(0, applied, scale), None if applied else Cause.UNKNOWN)

    @property
    def skipped_steps(self) -> int:
        """Skipped steps of every cause."""
        return sum(self.skipped_by_cause.values())

    def metrics(self) -> dict[str, float]:
        """Catalogue name → value; finite numbers only. What is not known is absent."""
        steps = self.applied_steps + self.skipped_steps
        figures: dict[str, float | None] = {
            **{name: getattr(self, name) for name in _LIKE_ATTRIBUTES},
            **{f"skipped_steps_{cause.lower()}": count for cause, count in sorted(self.skipped_by_cause.items())},
            "scale_volatility_bits": self.record.log2_scale.deviation if self.record.steps > 1 else None,
            "skip_rate": self.skipped_steps / steps if steps else None,
            "headroom_bits": self._headroom_bits(),
            "non_finite_losses": self.non_finite_losses if self.losses else None,
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
        """The run so far. One GPU-CPU sync, for the losses.

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

    def state_dict(self) -> dict[str, Any]:
        """Every field, as numbers, strings, None, lists and mappings."""
        return {**dataclasses.asdict(self), "skipped_by_cause": dict(self.skipped_by_cause)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`; fields it does not have keep their values.

        Raises:
            StateError: it is no such state; nothing has changed then.
        """
        vars(self).update(parse_fields(PrecisionMonitor, state_dict, "monitor"))


def _single_element(loss: Tensor | float) -> Tensor:
    if not isinstance(loss, Tensor):
        return torch.tensor(float(loss), device="cpu")
    if loss.numel() != 1:
        raise BatchError(
            f"PrecisionMonitor.update_metrics got a loss of shape {tuple(loss.shape)}: pass a number or a tensor with "
            "one element, such as loss.mean()."
        )
    return loss.detach().reshape(())
