"""DYNAMIC: back off on overflow, grow after enough clean steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.options import LARGEST_COUNT
from hf_amp.scaling.policy import Observation, options_for, scalar


class DynamicState(NamedTuple):
    """State of `DynamicScale`. All of shape []."""

    scale: Tensor
    """float32."""
    growth_tracker: Tensor
    """int32; clean steps since the last overflow or growth."""
    hysteresis_left: Tensor
    """int32; the overflow that finds it at 1 backs off. It stays at 1 until refilled."""
    steps_since_change: Tensor
    """int32; steps since the scale last changed."""
    overflows_since_change: Tensor
    """int32; overflowing ones among them."""


@dataclass(frozen=True)
class DynamicScale:
    """The rule of `torch.amp.GradScaler`, with a floor, a ceiling, hysteresis and tolerance.

    Source: `torch.amp.GradScaler.update` for backoff and growth, which stops short of the ceiling rather than
    exceed it; DeepSpeed's `DynamicLossScaler` for hysteresis and its two refill rules; fairseq's
    `DynamicLossScaler` for the tolerated rate of overflows since the last change.
    """

    init_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    hysteresis: int
    consecutive_hysteresis: bool
    overflow_tolerance: float
    min_scale: float
    max_scale: float

    needs_amax: ClassVar[bool] = False
    needs_underflow: ClassVar[bool] = False
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "growth_tracker": (0, LARGEST_COUNT),
        "hysteresis_left": (1, LARGEST_COUNT),
        "steps_since_change": (0, LARGEST_COUNT),
        "overflows_since_change": (0, LARGEST_COUNT),
    }

    @classmethod
    def from_config(cls, config: MixedPrecisionConfig) -> DynamicScale:
        return cls(**options_for(cls, config))

    def init_state(self, device: torch.device) -> DynamicState:
        return DynamicState(
            scale=scalar(self.init_scale, torch.float32, device),
            growth_tracker=scalar(0, torch.int32, device),
            hysteresis_left=scalar(self.hysteresis, torch.int32, device),
            steps_since_change=scalar(0, torch.int32, device),
            overflows_since_change=scalar(0, torch.int32, device),
        )

    def next_state(self, state: DynamicState, observation: Observation) -> DynamicState:
        if observation.known_clean and self.hysteresis == 1 and self.overflow_tolerance == 0:
            clean_steps = state.growth_tracker + 1
            grows = clean_steps >= self.growth_interval
            return state._replace(
                scale=self._grown(state.scale, grows), growth_tracker=clean_steps.masked_fill(grows, 0)
            )
        overflow = observation.found_inf > 0
        clean_steps = (state.growth_tracker + 1).masked_fill(overflow, 0)
        grows = clean_steps >= self.growth_interval
        backs_off = overflow
        if self.hysteresis > 1:
            backs_off = backs_off & (state.hysteresis_left <= 1)
            state = self._with_hysteresis(state, overflow, grows)
        if self.overflow_tolerance > 0:
            steps = state.steps_since_change + 1
            overflows = state.overflows_since_change + overflow
            backs_off = backs_off & (overflows >= self.overflow_tolerance * steps)
            state = state._replace(
                steps_since_change=torch.where(backs_off | grows, 0, steps),
                overflows_since_change=torch.where(backs_off | grows, 0, overflows),
            )
        lower = (state.scale * self.backoff_factor).clamp(min=self.min_scale)
        return state._replace(
            scale=torch.where(backs_off, lower, self._grown(state.scale, grows)),
            growth_tracker=clean_steps.masked_fill(grows, 0),
        )

    def _grown(self, scale: Tensor, grows: Tensor) -> Tensor:
        higher = scale * self.growth_factor
        return torch.where(grows & (higher <= self.max_scale), higher, scale)

    def _with_hysteresis(self, state: DynamicState, overflow: Tensor, grows: Tensor) -> DynamicState:
        left = (state.hysteresis_left - overflow.int()).clamp(min=1)
        refills = ~overflow if self.consecutive_hysteresis else grows
        return state._replace(hysteresis_left=torch.where(refills, self.hysteresis, left))
