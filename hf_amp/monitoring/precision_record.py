"""What precision did to a run over all of its steps, in constant space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hf_amp.events import Cause
from hf_amp.monitoring.streaming import History, RunningStatistics
from hf_amp.plain import Positive
from hf_amp.precision import FP16_FORMAT

ERRORS_KEPT = 1000
"""Newest numerical errors that are kept one by one; all are counted."""
KINDS_KEPT = 100
"""Kinds of numerical errors that are told apart; further ones count as "other"."""

ERROR_OF_CAUSE: Mapping[Cause, str] = {
    Cause.SCALE: "gradient_overflow",
    Cause.ACTIVATION: "activation_overflow",
    Cause.INPUT: "non_finite_input",
    Cause.WEIGHTS: "non_finite_weights",
    Cause.LOSS: "non_finite_loss",
    Cause.UNKNOWN: "unknown",
}
"""What a skipped step is called among the numerical errors."""


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

    def add_error(self, kind: str, step: int) -> None:
        """One numerical error."""
        if kind not in self.error_counts and len(self.error_counts) >= KINDS_KEPT:
            kind = "other"
        self.error_counts[kind] = self.error_counts.get(kind, 0) + 1
        self.newest_errors.append((kind, step))
        if len(self.newest_errors) > ERRORS_KEPT:
            del self.newest_errors[0]

    def stats(self) -> dict[str, Any]:
        """The part of `PrecisionMonitor.get_precision_stats` that is summed up here."""
        usage = {name: share / max(1, self.steps) for name, share in self.steps_by_format.items()}
        newest = math.nan if self.memory_savings is None else self.memory_savings
        return {
            "fp16_usage_rate": usage.get(FP16_FORMAT.name, 0.0),
            "usage_by_format": usage,
            "avg_memory_savings": self.savings.mean if self.savings.count else newest,
            "numerical_errors": list(self.newest_errors),
            "numerical_error_counts": dict(self.error_counts),
            "fallback_count": self.fallback_count,
            "gradient_scale": self._scale_stats(),
        }

    def _scale_stats(self) -> dict[str, Any]:
        seen = self.log2_scale
        return {
            "current": self.scale,
            "min": None if seen.smallest is None else 2.0**seen.smallest,
            "max": None if seen.largest is None else 2.0**seen.largest,
            "geometric_mean": 2.0**seen.mean if seen.count else None,
            "volatility_bits": seen.deviation,
            "changes": max(0, self.scale_history.changes - 1),
            "history": list(self.scale_history.points),
        }
