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
MARGIN_BITS = 0.5
"""Distance kept from the limit, so that a flat distribution rounded down to a power of two lands 0.5 to 1.5 below."""
DROP_BITS = 8.0
"""What the scale falls by on an overflow: half of what FP16 has between 1 and its limit."""
STEP_BITS = 2.0
"""How far the scale rises in one step, and how far it stays below one that has overflowed."""
MEMORY = 0.99
"""Weight of the past in the running moments. Source: OpenSeq2Seq, `LogMaxScaler` (beta 0.99)."""
OUTLIER_BITS = 6.0
"""Room kept for an outlier that was never seen: 64 times the typical gradient, as in `tests/benchmarks`."""
SMOOTHING = 0.2
"""Weight of a sample in the scale that underflow asks for; samples are noisy by a bit or two."""
SURPRISE_BITS = 4.0
"""How far a sample must ask for more than those before, so that it counts at once."""


class AdaptiveState(NamedTuple):
    """State of `AdaptiveScale`. All of shape [], float32; x is log2 of a step's gradient amax, bits are log2."""

    scale: Tensor
    mean: Tensor
    """Running mean of x over clean steps."""
    variance: Tensor
    """Running variance of x."""
    rate: Tensor
    """Weight of the next x in both: 1, 1/2, 1/3 and so on down to 1 - `MEMORY`."""
    peak: Tensor
    """Largest x of the present window; -inf where none."""
    former_peak: Tensor
    """Largest x of the window before."""
    window_steps: Tensor
    """Clean steps in the present window."""
    limit: Tensor
    """What x + log2(scale) must stay below."""
    wanted: Tensor
    """log2 of the scale from which on hardly anything underflows; -inf before the first sample."""


@dataclass(frozen=True)
class AdaptiveScale:
    """The smallest scale at which hardly anything underflows, as far as overflow allows; never smaller than it need be.

    Three numbers, all powers of two, of which the middle one is taken:

    - the *ceiling*, under which the gradients to be expected stay below the limit. Expected is the larger of mean +
      z sigma of x = log2(gradient amax), with the normal quantile z of 1 - budget (source: OpenSeq2Seq,
      `LogMaxScaler`), and the peak: the largest x of the last 1/budget to 2/budget clean steps. Among n + 1
      exchangeable draws the newest is the largest with probability 1/(n + 1), whatever the distribution.
    - what underflow *wants*: the scale at which a share of 2^-11 of a sample of elements is still subnormal. Exact
      zeros, which no scale cures, do not count.
    - the *room* for an outlier: `DROP_BITS` below the ceiling of mean + z sigma. A higher scale than underflow wants
      buys nothing, and is skipped by the first outlier.

    An overflow at a scale counts as an x that explains it by `STEP_BITS`, in the peak alone: it never enters the moments,
    the limit that it teaches (activation gradients overflow first) is forgotten with the peak, and probing costs no
    more than the budget. The scale falls by `DROP_BITS` and climbs back in a few steps. Where a clean step has x +
    log2(scale) above FP16's limit, the largest gradients are not held in FP16 (embeddings), and that is the limit
    until the next overflow. A non-finite loss changes nothing: no scale cures it.
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
        unknown = dict.fromkeys(("peak", "former_peak", "wanted"), -math.inf)
        start = dict.fromkeys(AdaptiveState._fields, 0.0) | unknown
        start |= {"scale": self.init_scale, "rate": 1.0, "limit": LIMIT_BITS - MARGIN_BITS}
        return AdaptiveState(**{name: scalar(v, torch.float32, device) for name, v in start.items()})

    def next_state(self, state: AdaptiveState, observation: Observation) -> AdaptiveState:
        bits = state.scale.log2()
        clean = (observation.grad_amax > 0).logical_and_(observation.found_inf == 0)
        at_fault = (observation.found_inf > 0).logical_and_(observation.loss_non_finite == 0)
        x = torch.where(clean, observation.grad_amax.log2(), -math.inf)
        if observation.wanted_scale is not None:
            state = state._replace(wanted=self._wanted(state.wanted, observation.wanted_scale, clean))
        state = self._with_moments(state, x, clean)
        state = self._with_limit(state, x + bits, at_fault)
        state, peak = self._with_peak(state, x, bits, clean, at_fault)

        usual = state.mean + NormalDist().inv_cdf(1 - self.overflow_budget) * state.variance.sqrt()
        below = state.limit - usual
        room = state.limit - OUTLIER_BITS - state.mean
        target = torch.minimum(state.limit - peak, torch.maximum(room, state.wanted))
        target = torch.minimum(torch.minimum(target, below).floor_(), bits + STEP_BITS)
        target = torch.where(clean, target, bits - DROP_BITS * at_fault)
        return state._replace(scale=target.exp2_().clamp_(self.min_scale, self.max_scale))

    def _wanted(self, wanted: Tensor, sampled: Tensor, clean: Tensor) -> Tensor:
        sampled = sampled.log2()
        smooth = torch.where(sampled > wanted + SURPRISE_BITS, sampled, wanted + SMOOTHING * (sampled - wanted))
        return torch.where(clean & sampled.isfinite(), smooth, wanted)

    def _with_moments(self, state: AdaptiveState, x: Tensor, clean: Tensor) -> AdaptiveState:
        """Source of the update: West (1979), for exponential weights."""
        rate = state.rate * clean
        delta = torch.where(clean, x - state.mean, 0.0)
        step = rate * delta
        return state._replace(
            mean=state.mean + step,
            variance=(1 - rate) * (state.variance + step * delta),
            rate=(state.rate / (1 + rate)).clamp_(min=1 - MEMORY),
        )

    def _with_limit(self, state: AdaptiveState, reached: Tensor, at_fault: Tensor) -> AdaptiveState:
        proven = torch.where(reached > LIMIT_BITS, torch.maximum(state.limit, reached), state.limit)
        return state._replace(limit=torch.where(at_fault, LIMIT_BITS - MARGIN_BITS, proven))

    def _with_peak(
        self, state: AdaptiveState, x: Tensor, bits: Tensor, clean: Tensor, at_fault: Tensor
    ) -> tuple[AdaptiveState, Tensor]:
        """The windows with x in them, and the largest x of both."""
        explained = state.limit + STEP_BITS - bits
        peak = torch.maximum(state.peak, torch.where(at_fault, explained, x))
        steps = state.window_steps + clean
        full = steps >= 1 / self.overflow_budget
        windows = state._replace(
            peak=torch.where(full, -math.inf, peak),
            former_peak=torch.where(full, peak, state.former_peak),
            window_steps=torch.where(full, 0.0, steps),
        )
        return windows, torch.maximum(peak, state.former_peak)
