"""What every scaling strategy is: a frozen dataclass with two functions over 0-d device tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.scaling.boundary import Boundary


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


def observation_of(boundaries: Sequence[Boundary]) -> Observation:
    """What the boundaries of one update showed together: the worst of them. At least one. No host read."""
    first = boundaries[0].found_inf
    known_clean = all(boundary.known_clean for boundary in boundaries)

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
        found_inf=certainly(largest([b.found_inf for b in boundaries])),
        loss_non_finite=certainly(largest([b.loss_non_finite for b in boundaries])),
        grad_amax=certainly(largest([b.amax for b in boundaries])),
        wanted_scale=largest([b.wanted_scale for b in boundaries]),
        known_clean=known_clean,
    )


def options_for(policy: type[Any], config: MixedPrecisionConfig) -> dict[str, Any]:
    """The options of `config` that are fields of the dataclass `policy`, which bear the same names."""
    return {option.name: getattr(config, option.name) for option in dataclasses.fields(policy)}


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of shape []."""
    return torch.full((), value, dtype=dtype, device=device)
