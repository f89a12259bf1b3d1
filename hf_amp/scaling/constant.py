"""CONSTANT: one scale throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.scaling.policy import Observation, scalar


class ConstantState(NamedTuple):
    """State of `ConstantScale`."""

    scale: Tensor
    """float32, shape []."""


@dataclass(frozen=True)
class ConstantScale:
    """Keeps `init_scale`. Overflowing steps are skipped all the same."""

    init_scale: float

    @classmethod
    def from_config(cls, config: MixedPrecisionConfig) -> ConstantScale:
        return cls(init_scale=config.init_scale)

    def init_state(self, device: torch.device) -> ConstantState:
        return ConstantState(scale=scalar(self.init_scale, torch.float32, device))

    def next_state(self, state: ConstantState, observation: Observation) -> ConstantState:
        return state
