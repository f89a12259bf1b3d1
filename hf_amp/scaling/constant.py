"""CONSTANT: one scale throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.scaling.policy import Observation, options_for, scalar


class ConstantState(NamedTuple):
    """State of `ConstantScale`."""

    scale: Tensor
    """float32, shape []."""


@dataclass(frozen=True)
class ConstantScale:
    """Keeps `init_scale`. Overflowing steps are skipped all the same."""

    init_scale: float

    needs_amax: ClassVar[bool] = False
    needs_underflow: ClassVar[bool] = False
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}

    @classmethod
    def from_config(cls, config: MixedPrecisionConfig) -> ConstantScale:
        return cls(**options_for(cls, config))

    def init_state(self, device: torch.device) -> ConstantState:
        return ConstantState(scale=scalar(self.init_scale, torch.float32, device))

    def next_state(self, state: ConstantState, observation: Observation) -> ConstantState:
        return state
