"""Statistics of streams of numbers, in constant space however long the stream."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from hf_amp.plain import AtLeastOne, Modest, NotNegative
from hf_amp.statistics import snapshot
from hf_amp.statistics.transfer import moved


@dataclasses.dataclass
class RunningStatistics:
    """Count, mean, spread and range.

    Source: Welford, "Note on a method for calculating corrected sums of squares and products", 1962.
    """

    count: int = 0
    mean: Modest = 0.0
    squares: NotNegative = 0.0
    """Sum of squared distances from the mean."""
    smallest: Modest | None = None
    largest: Modest | None = None

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


_BUCKETS_PER_DOUBLING = 64


class Quantiles:
    """Quantiles of positive numbers, each within 0.6% of the true one (half a bucket of a 64th of a doubling)."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0

    def add(self, value: float) -> None:
        """Takes one positive number into account."""
        bucket = math.floor(math.log2(value) * _BUCKETS_PER_DOUBLING) if value > 0 else -(2**12)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self._total += 1

    def at(self, share: float) -> float:
        """The number below which `share` of all lie; NaN where there are none."""
        passed = 0
        for bucket in sorted(self._counts):
            passed += self._counts[bucket]
            if passed >= share * self._total:
                return float(2.0 ** ((bucket + 0.5) / _BUCKETS_PER_DOUBLING))
        return math.nan


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
    """Mean of losses that stay on their device until somebody asks.

    At most 64 tensors of shape [] are held, copies of what was given, which may be written to again: compiled code that
    runs as a CUDA graph does so. Then they become one sum. No host read but in `read`.
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
        losses = torch.stack([moved(loss, device) for loss in self._held])
        losses = losses.float() if losses.device.type == "mps" else losses.double()
        self._held = []
        finite = losses.isfinite()
        totals = torch.stack([losses.where(finite, 0.0).sum(), finite.sum(), (~finite).sum()])
        self._totals = totals if self._totals is None else moved(self._totals, device) + totals

    def read(self) -> tuple[float, int]:
        """Mean of the finite losses (NaN where there are none), and how many were not finite. Reads the host."""
        self._fold()
        if self._totals is None:
            return math.nan, 0
        total, finite, non_finite = snapshot.read_all(list(self._totals))
        return (total / finite if finite else math.nan), int(non_finite)
