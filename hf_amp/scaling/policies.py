"""Scale policies: what chooses the next loss scale. CONSTANT and DYNAMIC are here, ADAPTIVE in `adaptive.py`.

A policy is a frozen dataclass with its options and two pure functions over tensors of shape [], `init_state` and `next_state`. The scaler runs them on the CPU:
the host knows each step by then.
The registry of strategies is `hf_amp.precision.ScalingStrategy`: one line a strategy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from hf_amp.config import LARGEST_COUNT, MixedPrecisionConfig
from hf_amp.precision import ScalingStrategy


class Observation(NamedTuple):
    """What one step boundary showed. All of shape [], float32, on the device of the state."""

    found_inf: Tensor
    """Above 0 where a gradient element was not finite."""
    loss_non_finite: Tensor
    """Above 0 where a loss was not finite; 0 where the scaler saw none."""
    grad_amax: Tensor
    """Largest magnitude of the unscaled gradients; not finite on an overflow, 0 where it was not taken."""
    wanted_scale: Tensor | None = None
    """The scale at which hardly any gradient element underflows; 0 where none is seen, None where it was not sampled."""
    known_clean: bool = False
    """Whether the host knows already that nothing was wrong and `grad_amax` is above 0, which spares work."""


class ScalePolicy(Protocol):
    """Chooses the next scale. Implementations are pure, never wait for the device, and keep the scale finite and in bounds."""

    needs_amax: ClassVar[bool]
    """Whether `Observation.grad_amax` must be there at every step."""
    needs_underflow: ClassVar[bool]
    """Whether `Observation.wanted_scale` must be sampled every few steps."""
    ranges: ClassVar[Mapping[str, tuple[float, float]]]
    """Field of the state other than `scale` → what it can be, both ends included; nothing else is loaded."""

    def init_state(self, device: torch.device) -> Any:
        """The state before the first step, on `device`: a NamedTuple of tensors of shape [], of which `scale` (float32) is one."""

    def next_state(self, state: Any, observation: Observation) -> Any:
        """The state after one step boundary; a new object, never the old one changed in place."""


def policy_of(strategy: ScalingStrategy, config: MixedPrecisionConfig) -> ScalePolicy:
    """The policy of `strategy`, with the options of `config` that are its fields, which bear the same names."""
    module, _, name = strategy.policy.rpartition(".")
    policy = getattr(import_module(module), name)
    options = {option.name: getattr(config, option.name) for option in dataclasses.fields(policy)}
    return cast(ScalePolicy, policy(**options))


_CPU = torch.device("cpu")


def scalar(value: float, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> Tensor:
    """A tensor of shape [], on the host where nothing is said, whatever `torch.set_default_device` says."""
    return torch.full((), value, dtype=dtype, device=device)


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

    def init_state(self, device: torch.device) -> ConstantState:
        return ConstantState(scale=scalar(self.init_scale, torch.float32, device))

    def next_state(self, state: ConstantState, observation: Observation) -> ConstantState:
        return state


class DynamicState(NamedTuple):
    """State of `DynamicScale`. All of shape []."""

    scale: Tensor
    """float32."""
    growth_tracker: Tensor
    """int32; clean steps since the last overflow or growth."""
    hysteresis_left: Tensor
    """int32; the overflow that finds it at 1 backs off. It stays at 1 until a growth."""


@dataclass(frozen=True)
class DynamicScale:
    """The rule of `torch.amp.GradScaler`, with a floor, a ceiling, and hysteresis.

    Source: `torch.amp.GradScaler.update` for backoff and growth, at `growth_interval` clean steps and not beyond it, which stops short
    of the ceiling rather than exceed it; DeepSpeed's `DynamicLossScaler` for hysteresis.
    """

    init_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    hysteresis: int
    min_scale: float
    max_scale: float

    needs_amax: ClassVar[bool] = False
    needs_underflow: ClassVar[bool] = False
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "growth_tracker": (0, LARGEST_COUNT),
        "hysteresis_left": (1, LARGEST_COUNT),
    }

    def init_state(self, device: torch.device) -> DynamicState:
        return DynamicState(
            scale=scalar(self.init_scale, torch.float32, device),
            growth_tracker=scalar(0, torch.int32, device),
            hysteresis_left=scalar(self.hysteresis, torch.int32, device),
        )

    def next_state(self, state: DynamicState, observation: Observation) -> DynamicState:
        if observation.known_clean and self.hysteresis == 1:
            clean_steps = state.growth_tracker + 1
            grows = clean_steps == self.growth_interval
            return state._replace(
                scale=self._grown(state.scale, grows), growth_tracker=clean_steps.masked_fill(grows, 0)
            )
        overflow = observation.found_inf > 0
        clean_steps = (state.growth_tracker + 1).masked_fill(overflow, 0)
        grows = clean_steps == self.growth_interval
        backs_off = overflow & (state.hysteresis_left <= 1) if self.hysteresis > 1 else overflow
        left = (state.hysteresis_left - overflow.int()).clamp(min=1)
        lower = (state.scale * self.backoff_factor).clamp(min=self.min_scale)
        return DynamicState(
            scale=torch.where(backs_off, lower, self._grown(state.scale, grows)),
            growth_tracker=clean_steps.masked_fill(grows, 0),
            hysteresis_left=torch.where(grows, self.hysteresis, left),
        )

    def _grown(self, scale: Tensor, grows: Tensor) -> Tensor:
        higher = scale * self.growth_factor
        return torch.where(grows & (higher <= self.max_scale), higher, scale)
