"""ADAPTIVE: the scale from what the gradients are, so that an overflow is as rare as the budget says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_amp.config import FP16_FORMAT, MixedPrecisionConfig
from hf_amp.scaling.policy import Observation, options_for, scalar

LIMIT_BITS = math.log2(FP16_FORMAT.largest)
MEMORY = 0.99
"""Weight of the past in the running moments. Source: OpenSeq2Seq, `LogMaxScaler` (beta 0.99)."""
MARGIN_BITS = 0.5
"""Distance kept from the limit, so that a flat distribution rounded down to a power of two lands 0.5 to 1.5 below."""
DROP_BITS = 8.0
"""How far an overflow that nothing explains lowers the scale: about half of FP16's normal range below 1 (2^-14)."""
GROWTH_BITS = 2.0
"""How far the scale rises in one step, because activation gradients may have a ceiling that has not been met yet."""
TOLERATED_UNDERFLOW = 0.01
"""Underflow fraction above which a learned ceiling fades `DROP_BITS` times as fast."""


class AdaptiveState(NamedTuple):
    """State of `AdaptiveScale`. All of shape [], float32; magnitudes in bits (log2)."""

    scale: Tensor
    weight: Tensor
    """Sum of the weights in the moments; 0 before the first clean step."""
    mean: Tensor
    """Weighted sum of x = log2(gradient amax) over clean steps."""
    square: Tensor
    """Weighted sum of x squared."""
    peak: Tensor
    """Largest x of the present window."""
    former_peak: Tensor
    """Largest x of the window before."""
    window_steps: Tensor
    """Clean steps in the present window."""
    ceiling: Tensor
    """Learned bound of log2(scale); inf where none."""
    overflowed_at: Tensor
    """log2(scale) of the overflow that taught the ceiling; -inf where none."""
    clean_at: Tensor
    """log2(scale) of the newest clean step; -inf before the first."""
    underflow_fraction: Tensor
    """Newest sample."""


@dataclass(frozen=True)
class AdaptiveScale:
    """Scale = the largest power of two under which the gradients to be expected stay inside FP16.

    What is to be expected is the larger of two estimates of the quantile 1 - budget of x = log2(gradient amax):

    - mean + z sigma, with the normal quantile z (3.09 for 1e-3). Source: OpenSeq2Seq, `LogMaxScaler`.
    - the largest x of the last 1/budget to 2/budget clean steps, whatever the distribution: among n + 1 exchangeable
      draws the newest is the largest with probability 1/(n + 1). Outliers that come back are remembered.

    An overflow never enters these statistics. One that they do not explain, because activation gradients left the
    range before weight gradients did or because the batch was an outlier, teaches a ceiling: the scale of the step
    before if it had just grown, else `DROP_BITS` lower. The ceiling rises by `budget` bits a step (by 8 budget
    while the underflow fraction is above `TOLERATED_UNDERFLOW`), so that probing it costs no more than the budget;
    it goes once a clean step shows a gradient that would have caused the overflow. A non-finite loss changes
    nothing: no scale cures it.
    """

    init_scale: float
    min_scale: float
    max_scale: float
    overflow_budget: float

    needs_amax: ClassVar[bool] = True
    needs_underflow: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: MixedPrecisionConfig) -> AdaptiveScale:
        return cls(**options_for(cls, config))

    def init_state(self, device: torch.device) -> AdaptiveState:
        start = dict.fromkeys(AdaptiveState._fields, 0.0) | {
            "scale": self.init_scale,
            "peak": -math.inf,
            "former_peak": -math.inf,
            "ceiling": math.inf,
            "overflowed_at": -math.inf,
            "clean_at": -math.inf,
        }
        return AdaptiveState(**{name: scalar(v, torch.float32, device) for name, v in start.items()})

    def next_state(self, state: AdaptiveState, observation: Observation) -> AdaptiveState:
        overflow = observation.found_inf > 0
        x = observation.grad_amax.log2()
        seen = ~overflow & x.isfinite()
        log_scale = state.scale.log2()
        sampled = observation.underflow_fraction
        state = state._replace(
            underflow_fraction=torch.where(sampled.isnan(), state.underflow_fraction, sampled),
            clean_at=torch.where(overflow, state.clean_at, log_scale),
        )
        state = self._with_distribution(state, x, seen)
        expected = self._expected(state)
        at_fault = overflow & (observation.loss_non_finite == 0)
        state = self._with_ceiling(state, at_fault, seen, expected, log_scale)

        target = torch.minimum(LIMIT_BITS - expected - MARGIN_BITS, state.ceiling).floor()
        target = torch.minimum(target, log_scale + GROWTH_BITS)
        target = torch.where(seen | at_fault, target, log_scale)
        return state._replace(scale=target.exp2().clamp(self.min_scale, self.max_scale))

    def _with_distribution(self, state: AdaptiveState, x: Tensor, seen: Tensor) -> AdaptiveState:
        """Takes x into the moments and the windowed peak where it was `seen`."""
        past = torch.where(seen, MEMORY, 1.0)
        known = torch.where(seen, x, 0.0)
        peak = torch.where(seen, torch.maximum(state.peak, x), state.peak)
        steps = state.window_steps + seen
        full = steps >= 1 / self.overflow_budget
        return state._replace(
            weight=past * state.weight + (1 - past),
            mean=past * state.mean + (1 - past) * known,
            square=past * state.square + (1 - past) * known.square(),
            peak=torch.where(full, -math.inf, peak),
            former_peak=torch.where(full, peak, state.former_peak),
            window_steps=torch.where(full, 0.0, steps),
        )

    def _expected(self, state: AdaptiveState) -> Tensor:
        """Upper quantile of x; -inf before the first clean step."""
        mean = state.mean / state.weight
        sigma = (state.square / state.weight - mean.square()).clamp(min=0).sqrt()
        normal = mean + NormalDist().inv_cdf(1 - self.overflow_budget) * sigma
        peak = torch.maximum(state.peak, state.former_peak)
        return torch.where(state.weight > 0, torch.maximum(normal, peak), -math.inf)

    def _with_ceiling(
        self,
        state: AdaptiveState,
        at_fault: Tensor,
        seen: Tensor,
        expected: Tensor,
        log_scale: Tensor,
    ) -> AdaptiveState:
        """Learns a ceiling from an overflow that `expected` does not explain; lets it fade, or go, on clean steps."""
        unexplained = at_fault & (expected + log_scale <= LIMIT_BITS)
        had_grown = state.clean_at.isfinite() & (state.clean_at < log_scale)
        lower = torch.where(had_grown, state.clean_at, log_scale - DROP_BITS)
        pull = torch.where(state.underflow_fraction > TOLERATED_UNDERFLOW, DROP_BITS, 1.0)
        risen = state.ceiling + pull * self.overflow_budget * seen
        overflowed_at = torch.where(unexplained, log_scale, state.overflowed_at)
        explained_since = seen & (expected + overflowed_at > LIMIT_BITS)
        ceiling = torch.where(unexplained, torch.minimum(state.ceiling, lower), risen)
        return state._replace(
            ceiling=torch.where(explained_since, math.inf, ceiling),
            overflowed_at=torch.where(explained_since, -math.inf, overflowed_at),
        )
