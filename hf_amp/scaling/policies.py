"""What every scaling strategy is: a frozen dataclass with two functions over 0-d device tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_amp.config import LARGEST_COUNT, MixedPrecisionConfig
from hf_amp.scaling.step import GradientStep


class Observation(NamedTuple):
    """What one step boundary showed. All of shape [], float32, on the scaler's device."""

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


class ScaleState(Protocol):
    """A policy's memory: a NamedTuple of tensors of shape [], of which `scale` (float32) is one."""

    @property
    def scale(self) -> Tensor: ...

    def _asdict(self) -> dict[str, Any]: ...

    def _replace(self, **fields: Any) -> Any: ...


class ScalePolicy(Protocol):
    """Chooses the next scale. Implementations are pure, read no host, and keep the scale finite and in bounds."""

    needs_amax: ClassVar[bool]
    """Whether `Observation.grad_amax` must be there at every step."""
    needs_underflow: ClassVar[bool]
    """Whether `Observation.wanted_scale` must be sampled every few steps."""
    ranges: ClassVar[Mapping[str, tuple[float, float]]]
    """Field of the state other than `scale` → what it can be, both ends included; nothing else is loaded."""

    def init_state(self, device: torch.device) -> Any:
        """The state before the first step, on `device`."""

    def next_state(self, state: Any, observation: Observation) -> Any:
        """The state after one step boundary; a new object, never the old one changed in place."""


def observation_of(records: Sequence[GradientStep]) -> Observation:
    """What the boundaries of one update showed together: the worst of them. At least one. No host read."""
    first = records[0].found_inf
    known_clean = all(record.known_clean for record in records)

    def largest(values: list[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        if len(known) < 2:
            return known[0] if known else None
        return torch.stack(known).amax()

    def certainly(value: Tensor | None) -> Tensor:
        if value is not None:
            return value
        return first if known_clean else torch.zeros_like(first)

    return Observation(
        found_inf=certainly(largest([b.found_inf for b in records])),
        loss_non_finite=certainly(largest([b.loss_non_finite for b in records])),
        grad_amax=certainly(largest([b.amax for b in records])),
        wanted_scale=largest([b.wanted_scale for b in records]),
        known_clean=known_clean,
    )


def options_for(policy: type[Any], config: MixedPrecisionConfig) -> dict[str, Any]:
    """The options of `config` that are fields of the dataclass `policy`, which bear the same names."""
    return {option.name: getattr(config, option.name) for option in dataclasses.fields(policy)}


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of shape []."""
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

    @classmethod
    def from_config(cls, config: MixedPrecisionConfig) -> ConstantScale:
        return cls(**options_for(cls, config))

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
