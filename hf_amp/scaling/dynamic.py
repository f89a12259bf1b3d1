"""DYNAMIC: back off on overflow, grow after enough clean steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.scaling.policy import Observation, scalar


class DynamicState(NamedTuple):
    """State of `DynamicScale`. All of shape []."""

    scale: Tensor
    """float32."""
    growth_tracker: Tensor
    """int32; clean steps since the last overflow or growth."""
    hysteresis_left: Tensor
    """int32; the overflow that brings this to 0 backs off. It stays at 1 until refilled."""


@dataclass(frozen=True)
class DynamicScale:
    """The rule of `torch.amp.GradScaler`, with a floor, a ceiling and hysteresis.

    Source: `torch.amp.GradScaler.update` for backoff and growth, which stops short of the ceiling rather than
    exceed it; DeepSpeed's `DynamicLossScaler` for hysteresis and its two refill rules.
    """

    init_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    hysteresis: int
    consecutive_hysteresis: bool
    min_scale: float
    max_scale: float

    @classmethod
    def from_config(cls, config: MixedPrecisionConfig) -> DynamicScale:
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    def init_state(self, device: torch.device) -> DynamicState:
        return DynamicState(
            scale=scalar(self.init_scale, torch.float32, device),
            growth_tracker=scalar(0, torch.int32, device),
            hysteresis_left=scalar(self.hysteresis, torch.int32, device),
        )

    def next_state(self, state: DynamicState, observation: Observation) -> DynamicState:
        overflow = observation.found_inf > 0
        backs_off = overflow & (state.hysteresis_left <= 1)
        clean_steps = torch.where(overflow, 0, state.growth_tracker + 1)
        grows = clean_steps >= self.growth_interval

        lower = (state.scale * self.backoff_factor).clamp(min=self.min_scale)
        higher = state.scale * self.growth_factor
        higher = torch.where(higher <= self.max_scale, higher, state.scale)
        scale = torch.where(backs_off, lower, torch.where(grows, higher, state.scale))

        refills = ~overflow if self.consecutive_hysteresis else grows
        left = torch.where(overflow, state.hysteresis_left - 1, state.hysteresis_left).clamp(min=1)
        return DynamicState(
            scale=scale,
            growth_tracker=torch.where(grows, 0, clean_steps),
            hysteresis_left=torch.where(refills, self.hysteresis, left),
        )
