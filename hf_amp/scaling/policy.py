"""What every scaling strategy is: a frozen dataclass with two functions over 0-d device tensors."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Observation(NamedTuple):
    """What one step boundary showed. All of shape [], on the scaler's device."""

    found_inf: Tensor
    """float32; above 0 where a gradient element was not finite."""
    loss_finite: Tensor
    """bool; whether every loss since the last update was finite."""


class ScaleState(Protocol):
    """A policy's memory: a NamedTuple of tensors of shape [], of which `scale` (float32) is one."""

    @property
    def scale(self) -> Tensor: ...

    def _asdict(self) -> dict[str, Any]: ...

    def _replace(self, **fields: Any) -> Any: ...


class ScalePolicy(Protocol):
    """Chooses the next scale. Implementations are pure, read no host, and keep the scale finite and in bounds."""

    def init_state(self, device: torch.device) -> Any:
        """The state before the first step, on `device`."""

    def next_state(self, state: Any, observation: Observation) -> Any:
        """The state after one step boundary; a new object, never the old one changed in place."""


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of shape []."""
    return torch.full((), value, dtype=dtype, device=device)
