"""ADAPTIVE: the scale from what the gradients are, so that an overflow is as rare as the budget says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_amp.precision import FP16_FORMAT, LARGEST_SCALE
from hf_amp.scaling.policies import Observation, scalar

LIMIT_BITS = math.log2(FP16_FORMAT.largest)
MARGIN_BITS = 0.5
"""Distance kept from the limit, so that a flat distribution rounded down to a power of two lands 0.5 to 1.5 below."""
DROP_BITS = 8.0
"""What the scale falls by on an overflow: half of what FP16 has between 1 and its limit."""
STEP_BITS = 2.0
"""How far the scale rises in one step, and how far it stays below one that has overflowed."""
UNSEEN_BITS = 24.0
"""How far it rises while all gradients are 0: three overflows take that back, if it was for nothing."""
MEMORY = 0.99
"""Weight of the past in the running moments. Source: OpenSeq2Seq, `LogMaxScaler` (beta 0.99)."""
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
    """As large as underflow wants it, and as overflow allows; as far as underflow is content, with room for an outlier.

    A power of two between three numbers: the larger of the last two, but no more than the first.

    - the *ceiling*, under which the gradients to be expected stay below the limit. Expected is the larger of mean + z sigma of
      x = log2(gradient amax), with the normal quantile z of 1 - budget (source: OpenSeq2Seq, `LogMaxScaler`), but no more than the peak +
      `DROP_BITS`, and the peak: the largest x of the last 1/budget to 2/budget clean steps. Among n + 1 exchangeable draws the newest is
      the largest with probability 1/(n + 1), whatever the distribution; of few, among which x has jumped, sigma says nothing.
    - what underflow *wants*: the scale at which no more than a share of 2^-10 of the sampled elements is subnormal.
      Zeros, which no scale cures, do not count.
    - the *room* for an outlier: `outlier_headroom` times the typical gradient. A higher scale than underflow wants buys
      nothing, and the first outlier skips its step.

    An overflow at a scale counts as an x that explains it by `STEP_BITS`, in the peak alone: it never enters the moments,
    what it teaches (activation gradients overflow first) is forgotten with the peak, and probing costs no more than
    the budget. The scale falls by `DROP_BITS` and climbs back, `STEP_BITS` a step. Where a clean step has x +
    log2(scale) above FP16's limit, the largest gradients are not held in FP16 (embeddings), and that is the limit
    until the next overflow. A non-finite loss changes nothing: no scale cures it. Until a gradient other than 0 was seen, all may
    have underflowed: the scale rises.
    """

    init_scale: float
    min_scale: float
    max_scale: float
    overflow_budget: float
    outlier_headroom: float

    needs_amax: ClassVar[bool] = True
    needs_underflow: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "mean": (-1024, 1024),
        "variance": (0, 2**20),
        "rate": (0, 1),
        "peak": (-math.inf, 1024),
        "former_peak": (-math.inf, 1024),
        "window_steps": (0, 2**24),  # where FP32 stops counting
        "limit": (-1024, 1024),
        "wanted": (-math.inf, 1024),
    }

    def init_state(self, device: torch.device) -> AdaptiveState:
        unknown = dict.fromkeys(("peak", "former_peak", "wanted"), -math.inf)
        start = dict.fromkeys(AdaptiveState._fields, 0.0) | unknown
        start |= {"scale": self.init_scale, "rate": 1.0, "limit": LIMIT_BITS - MARGIN_BITS}
        return AdaptiveState(**{name: scalar(v, torch.float32, device) for name, v in start.items()})

    def next_state(self, state: AdaptiveState, observation: Observation) -> AdaptiveState:
        if observation.known_clean:
            return self._after_clean(state, observation)
        overflow = observation.found_inf > 0
        at_fault = overflow & (observation.loss_non_finite == 0)
        clean = ~overflow & (observation.grad_amax > 0)
        otherwise = torch.where(at_fault, torch.stack(self._after_overflow(state)), torch.stack(state))
        after_clean = torch.stack(self._after_clean(state, observation))
        begins = (state.rate == 1) & (observation.grad_amax == 0) & (observation.loss_non_finite == 0) & ~overflow
        higher = torch.minimum(state.scale.log2() + STEP_BITS, state.limit - state.peak)
        higher = higher.clamp(max=math.log2(self.init_scale) + UNSEEN_BITS)
        grown = torch.stack(state._replace(scale=torch.maximum(state.scale, self._scale(higher.floor()))))
        otherwise = torch.where(begins, grown, otherwise)
        return AdaptiveState(*torch.where(clean, after_clean, otherwise).unbind())

    def _after_clean(self, state: AdaptiveState, observation: Observation) -> AdaptiveState:
        x, bits = observation.grad_amax.log2(), state.scale.log2()
        mean, variance, rate = _moments_with(x, state)
        peak = torch.maximum(state.peak, x)
        limit = torch.maximum(state.limit, x + bits)  # proven, where it is above FP16's own
        wanted = _wanted_with(observation.wanted_scale, state.wanted)

        usual = torch.add(mean, variance.sqrt(), alpha=NormalDist().inv_cdf(1 - self.overflow_budget))
        seen = torch.maximum(peak, state.former_peak)
        ceiling = limit - torch.maximum(seen, torch.minimum(usual, seen + DROP_BITS))
        room = limit - mean - math.log2(self.outlier_headroom)
        target = torch.minimum(torch.minimum(ceiling, torch.maximum(room, wanted)).floor_(), bits + STEP_BITS)

        window_steps = state.window_steps + 1
        full = window_steps >= 1 / self.overflow_budget
        return AdaptiveState(
            scale=self._scale(target),
            mean=mean,
            variance=variance,
            rate=rate,
            peak=peak.masked_fill(full, -math.inf),
            former_peak=torch.where(full, peak, state.former_peak),
            window_steps=window_steps.masked_fill(full, 0.0),
            limit=limit,
            wanted=wanted,
        )

    def _after_overflow(self, state: AdaptiveState) -> AdaptiveState:
        bits = state.scale.log2()
        limit = torch.full_like(bits, LIMIT_BITS - MARGIN_BITS)
        return state._replace(
            scale=self._scale(bits - DROP_BITS), peak=torch.maximum(state.peak, limit + STEP_BITS - bits), limit=limit
        )

    def _scale(self, bits: Tensor) -> Tensor:
        return bits.exp2().clamp_(self.min_scale, self.max_scale)


def _moments_with(x: Tensor, state: AdaptiveState) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance with x in them, and the weight of the next x. Source: Welford (1962), with a least weight."""
    difference = x - state.mean
    step = difference * state.rate
    variance = (1 - state.rate) * torch.addcmul(state.variance, step, difference)
    return state.mean + step, variance, (state.rate / (state.rate + 1)).clamp_(min=1 - MEMORY)


def _wanted_with(sampled: Tensor | None, wanted: Tensor) -> Tensor:
    """log2 of the scale that underflow wants, with the newest sample in it."""
    if sampled is None:
        return wanted
    bits = sampled.log2().clamp_(max=math.log2(LARGEST_SCALE))  # inf would be NaN in the next mean
    smoothed = torch.where(bits > wanted + SURPRISE_BITS, bits, wanted + SMOOTHING * (bits - wanted))
    return torch.where(sampled > 0, smoothed, wanted)
