"""Observations made by hand, and a device whose gradients overflow where we say."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from hf_amp import MixedPrecisionConfig, ScalingStrategy
from hf_amp.precision import FP16_FORMAT
from hf_amp.scaling.adaptive import LIMIT_BITS
from hf_amp.scaling.policies import Observation, ScalePolicy, policy_of


def observed(
    overflow: bool = False, loss_finite: bool = True, amax: float = 1.0, wanted: float | None = None
) -> Observation:
    """An observation; the amax of an overflowing step is inf, as it is in FP16. `wanted`: what underflow asks for."""
    values = (float(overflow), float(not loss_finite), math.inf if overflow else amax)
    return Observation(*(torch.tensor(value) for value in values), None if wanted is None else torch.tensor(wanted))


def scales_under(policy: ScalePolicy, overflows: Iterable[bool], loss_finite: bool = True) -> list[float]:
    """The scale after each of a row of steps."""
    state, scales = policy.init_state(torch.device("cpu")), []
    for overflow in overflows:
        state = policy.next_state(state, observed(overflow, loss_finite))
        scales.append(state.scale.item())
    return scales


def simulate(
    log_amax: Iterable[float], *, gap_bits: float = 0.0, spread_bits: float = 0.0, **options: float
) -> tuple[list[int], list[float]]:
    """ADAPTIVE on gradients of these magnitudes (log2). Returns the skipped steps, and log2(scale) at each step.

    A step overflows where log_amax + log2(scale) exceeds FP16's limit less `gap_bits`, which stands for activation
    gradients that are larger than weight gradients. Every tenth step is sampled: the elements that matter reach down
    to `spread_bits` below the largest one, and ask for the scale that makes them normal numbers.
    """
    policy = policy_of(ScalingStrategy.ADAPTIVE, MixedPrecisionConfig(**options))
    state, skipped, bits = policy.init_state(torch.device("cpu")), [], []
    for step, x in enumerate(log_amax):
        bits.append(math.log2(state.scale.item()))
        overflow = x + bits[-1] > LIMIT_BITS - gap_bits
        if overflow:
            skipped.append(step)
        wanted = None if step % 10 else FP16_FORMAT.smallest_normal * 2.0 ** (spread_bits - x)
        state = policy.next_state(state, observed(overflow, amax=2.0**x, wanted=wanted))
    return skipped, bits
