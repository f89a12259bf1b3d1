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
"""How much larger than expected the gradient of an outlier is taken to be: a factor of 256, about half of what FP16
has between its limit and 1. Lower bound measured by the 64-fold outliers of `tests/benchmarks`."""
STEP_BITS = 2.0
"""How far the scale rises in one step, and how far a limit that proved too high is lowered."""
TOLERATED_UNDERFLOW = 0.01
"""Underflow fraction above the smallest one seen, from which all that holds the scale down fades `DROP_BITS` times as
fast."""


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
    limit: Tensor
    """What x + log2(scale) must stay below: FP16's limit, or less where activation gradients overflow first."""
    proven: Tensor
    """Largest (expected x) + log2(scale) at which a step was clean since the last outlier; -inf where none."""
    suspected: Tensor
    """What x an outlier, which was never seen because it overflowed, is taken to have had; -inf where none."""
    overflowed_at: Tensor
    """log2(scale) of the newest overflow that is not explained yet; -inf where none."""
    underflow_fraction: Tensor
    """Newest sample."""
    least_underflow: Tensor
    """Smallest sample: what no scale cures, such as the gradients of embeddings that no token used."""


@dataclass(frozen=True)
class AdaptiveScale:
    """Scale = the largest power of two under which the gradients to be expected stay inside FP16.

    What is to be expected is the largest of these estimates of the quantile 1 - budget of x = log2(gradient amax):

    - mean + z sigma, with the normal quantile z (3.09 for 1e-3). Source: OpenSeq2Seq, `LogMaxScaler`.
    - the largest x of the last 1/budget to 2/budget clean steps, whatever the distribution: among n + 1 exchangeable
      draws the newest is the largest with probability 1/(n + 1). Outliers that come back are remembered.
    - an outlier that overflowed, `DROP_BITS` above the rest, until a clean step shows how large it is.

    An overflow never enters the moments. One that they do not explain teaches one of two things. Where x + log2(scale)
    was higher than any clean step has proven to be sound, activation gradients leave the range before weight
    gradients do, and the limit is lowered by up to `STEP_BITS`. Otherwise the batch was an outlier. Both fade by
    `budget` bits a step, so that probing costs no more than the budget. Underflow pulls the scale up: while it is
    `TOLERATED_UNDERFLOW` above the least that was seen, they fade, and the window of the peak passes, 8 times as fast.
    A non-finite loss changes nothing: no scale cures it.
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
        unknown = ("peak", "former_peak", "proven", "suspected", "overflowed_at")
        start = dict.fromkeys(AdaptiveState._fields, 0.0) | dict.fromkeys(unknown, -math.inf)
        start |= {"scale": self.init_scale, "limit": LIMIT_BITS, "least_underflow": 1.0}
        return AdaptiveState(**{name: scalar(v, torch.float32, device) for name, v in start.items()})

    def next_state(self, state: AdaptiveState, observation: Observation) -> AdaptiveState:
        overflow = observation.found_inf > 0
        x = observation.grad_amax.log2()
        seen = ~overflow & x.isfinite()
        at_fault = overflow & (observation.loss_non_finite == 0)
        log_scale = state.scale.log2()
        sampled = observation.underflow_fraction
        state = state._replace(
            underflow_fraction=torch.where(sampled.isnan(), state.underflow_fraction, sampled),
            least_underflow=torch.fmin(state.least_underflow, sampled),
        )
        state = self._learned_from_clean(state, x, seen, log_scale)
        expected = self._expected(state)
        state = state._replace(
            proven=torch.where(seen, torch.maximum(state.proven, expected + log_scale), state.proven)
        )
        state = self._learned_from_overflow(state, at_fault, log_scale, expected)

        expected = torch.maximum(expected, state.suspected)
        target = (state.limit - MARGIN_BITS - expected).floor()
        target = torch.minimum(target, log_scale + STEP_BITS)
        blind = at_fault & (state.weight == 0)  # nothing is known of the gradients yet
        target = torch.where(blind, log_scale - DROP_BITS, target)
        target = torch.where(seen | at_fault, target, log_scale)
        return state._replace(scale=target.exp2().clamp(self.min_scale, self.max_scale))

    def _expected(self, state: AdaptiveState) -> Tensor:
        """Upper quantile of x; not finite before the first clean step."""
        mean = state.mean / state.weight
        sigma = (state.square / state.weight - mean.square()).clamp(min=0).sqrt()
        normal = mean + NormalDist().inv_cdf(1 - self.overflow_budget) * sigma
        peak = torch.maximum(torch.maximum(state.peak, state.former_peak), state.suspected)
        return torch.maximum(normal, peak)

    def _learned_from_clean(
        self, state: AdaptiveState, x: Tensor, seen: Tensor, log_scale: Tensor
    ) -> AdaptiveState:
        """Takes x into moments and peak where it was `seen`; lets what overflows taught fade."""
        was_blind = state.weight == 0
        x = torch.where(seen, x, -math.inf)
        past = torch.where(seen, MEMORY, 1.0)
        known = torch.where(seen, x, 0.0)
        peak = torch.maximum(state.peak, x)
        excess = state.underflow_fraction - state.least_underflow
        pull = torch.where(excess > TOLERATED_UNDERFLOW, DROP_BITS, 1.0) * seen
        steps = state.window_steps + pull
        full = steps >= 1 / self.overflow_budget

        would_have_been = x + state.overflowed_at  # of this clean gradient at the scale that overflowed
        explained = would_have_been > state.limit
        too_high = was_blind & (would_have_been <= state.limit) & would_have_been.isfinite()
        fade = pull * self.overflow_budget
        limit = (state.limit + fade).clamp(max=LIMIT_BITS)
        limit = torch.where(too_high, would_have_been - STEP_BITS, limit)
        gone = explained | too_high
        return state._replace(
            weight=past * state.weight + (1 - past),
            mean=past * state.mean + (1 - past) * known,
            square=past * state.square + (1 - past) * known.square(),
            peak=torch.where(full, -math.inf, peak),
            former_peak=torch.where(full, peak, state.former_peak),
            window_steps=torch.where(full, 0.0, steps),
            limit=limit,
            suspected=torch.where(gone, -math.inf, state.suspected - fade),
            overflowed_at=torch.where(gone, -math.inf, state.overflowed_at),
        )

    def _learned_from_overflow(
        self, state: AdaptiveState, at_fault: Tensor, log_scale: Tensor, expected: Tensor
    ) -> AdaptiveState:
        """Lowers the limit, or suspects an outlier, where an overflow is not explained by what was expected."""
        blind = state.weight == 0
        reached = expected + log_scale
        unexplained = at_fault & ~blind & (reached <= state.limit)
        too_high = unexplained & (reached > state.proven + MARGIN_BITS)
        outlier = unexplained & ~too_high
        lower = torch.maximum(state.proven, reached - STEP_BITS)
        return state._replace(
            limit=torch.where(too_high, torch.minimum(lower, state.limit), state.limit),
            proven=torch.where(outlier, -math.inf, state.proven),
            suspected=torch.where(outlier, expected + DROP_BITS, state.suspected),
            overflowed_at=torch.where(outlier | (at_fault & blind), log_scale, state.overflowed_at),
        )
