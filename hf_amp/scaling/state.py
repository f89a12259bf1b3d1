"""A scaler's state as plain data: a superset of what `torch.amp.GradScaler` saves, readable by it and from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from hf_amp.config import Allowed, MixedPrecisionConfig, is_real, safe_repr
from hf_amp.errors import ConfigError, StateError
from hf_amp.serialization import parse

STOCK_OPTIONS = ("growth_factor", "backoff_factor", "growth_interval")
_VERSION = 2

_PARTS_OF_VERSION_1 = {"monitor": "monitor", "hope": "stall", "fallback": "fallback", "pace": "throughput"}
_FIELDS_OF_VERSION_1 = {
    "transitions": "precision_changes",
    "hopeless": "stalled",
    "quiet_steps": "clean_steps",
    "uncured": "unresolved",
    "suspects": "unknown_steps",
    "trial": "autotuner",
}
"""What version 1, of hf_amp 0.1, called the parts of a run's progress, and fields in them."""

# A stock scale that grew or died is inf or 0, and clamped.
_Scale = Annotated[
    float, Allowed("a number from 0 on", lambda v: (is_real(v) and v >= 0) or (isinstance(v, float) and v == math.inf))
]


def to_state_dict(config: MixedPrecisionConfig, fields: Mapping[str, float]) -> dict[str, Any]:
    """The saved form: the stock scaler's five entries, and under "hf_amp" what only our policies have."""
    return {
        "scale": fields["scale"],
        **{name: getattr(config, name) for name in STOCK_OPTIONS},
        "_growth_tracker": int(fields.get("growth_tracker", 0)),
        "hf_amp": {"version": _VERSION, "strategy": config.scaling_strategy.value, "policy": dict(fields)},
    }


def from_state_dict(
    saved: Mapping[str, Any], config: MixedPrecisionConfig, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """Policy fields out of a saved form, ours or stock. Fields of another strategy are left out.

    Args:
        ranges: what the policy's fields can be.

    Raises:
        StateError: it is no scaler's state, a newer version wrote it, or a number in it is not usable.
    """
    if not isinstance(saved, Mapping) or "scale" not in saved:
        keys = f"a mapping with the keys {', '.join(map(str, saved)) or '(none)'}" if isinstance(saved, Mapping) else ""
        raise StateError(
            "not a gradient scaler's state: expected what state_dict() of torch.amp.GradScaler or AdvancedGradScaler "
            f"gives, got {keys or type(saved).__name__}. A disabled scaler saves an empty one; start without loading it."
        )
    stock: _Stock = parse(_Stock, saved, "the scaler state")
    if stock.hf_amp.version > _VERSION:
        raise StateError(
            f"the scaler state has version {stock.hf_amp.version}, this hf_amp reads up to {_VERSION}: update hf_amp."
        )
    fields = {"growth_tracker": stock._growth_tracker}
    if stock.hf_amp.strategy == config.scaling_strategy.value:
        fields = {**stock.hf_amp.policy, **fields}
    for name, (low, high) in ranges.items():
        value = fields.get(name, low)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise StateError(
                f"the scaler state has {name}={safe_repr(value)}, which must lie in [{low}, {high}]: the file is damaged; "
                "load another one."
            )
    return {**{name: fields[name] for name in ranges if name in fields}, "scale": stock.scale}


def other_options(saved: Mapping[str, Any], config: MixedPrecisionConfig) -> dict[str, Any]:
    """The growth and backoff options of `saved` that are not `config`'s.

    Raises:
        StateError: one of them is not usable.
    """
    try:
        options = dataclasses.replace(config, **{name: saved[name] for name in STOCK_OPTIONS if name in saved})
    except ConfigError as error:
        raise StateError(f"the scaler state holds an option that cannot be: {error}") from error
    return {name: value for name in STOCK_OPTIONS if (value := getattr(options, name)) != getattr(config, name)}


@dataclass
class _Own:
    version: int = _VERSION
    strategy: str = ""
    policy: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Stock:
    scale: _Scale
    _growth_tracker: int = 0
    hf_amp: _Own = field(default_factory=_Own)


def upgraded(progress: dict[str, Any]) -> dict[str, Any]:
    """The counters and stateful parts that a run has saved, under today's names: what version 1 wrote is renamed."""
    parts = progress.get("companions")
    if not isinstance(parts, Mapping):
        return progress
    renamed = {
        _PARTS_OF_VERSION_1.get(part, part): {
            _FIELDS_OF_VERSION_1.get(name, name): value for name, value in fields.items()
        }
        if isinstance(fields, Mapping)
        else fields
        for part, fields in parts.items()
    }
    return {**{name: value for name, value in progress.items() if name != "companions"}, "stateful": renamed}


def restored(state: Any, fields: Mapping[str, float]) -> Any:
    """`state` with those of its fields replaced that `fields` names; dtype and device stay."""
    return state._replace(
        **{name: torch.full_like(tensor, fields[name]) for name, tensor in state._asdict().items() if name in fields}
    )
