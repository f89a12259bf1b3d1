"""A scaler's state as plain data: a superset of what `torch.amp.GradScaler` saves, readable by it and from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import StateError
from hf_amp.scaling.policy import ScaleState
from hf_amp.statistics import snapshot

STOCK_OPTIONS = ("growth_factor", "backoff_factor", "growth_interval")
_VERSION = 1


def to_plain(config: MixedPrecisionConfig, fields: Mapping[str, float]) -> dict[str, Any]:
    """The saved form: the stock scaler's five entries, and under "hf_amp" what only our policies have."""
    return {
        "scale": fields["scale"],
        **{name: getattr(config, name) for name in STOCK_OPTIONS},
        "_growth_tracker": int(fields.get("growth_tracker", 0)),
        "hf_amp": {
            "version": _VERSION,
            "strategy": config.scaling_strategy.value,
            "policy": dict(fields),
        },
    }


def from_plain(saved: Mapping[str, Any], config: MixedPrecisionConfig) -> dict[str, float]:
    """Policy fields out of a saved form, ours or stock. Fields of another strategy are left out.

    Raises:
        StateError: it is no scaler's state, a newer version wrote it, or its scale is no number.
    """
    if not isinstance(saved, Mapping) or "scale" not in saved:
        raise StateError(
            "not a gradient scaler's state: expected what state_dict() of torch.amp.GradScaler or AdvancedGradScaler "
            f"gives, got {_shown(saved)}. A disabled scaler saves an empty one; start without loading it."
        )
    scale = saved["scale"]
    if not _is_number(scale):
        raise StateError(
            f"the saved scale is {scale!r}, not a number: the file is damaged; load another one."
        )
    ours = saved.get("hf_amp", {})
    if ours.get("version", _VERSION) > _VERSION:
        raise StateError(
            f"the scaler state has version {ours['version']}, this hf_amp reads up to {_VERSION}: update hf_amp."
        )
    fields = {"scale": float(scale), "growth_tracker": saved.get("_growth_tracker", 0)}
    if ours.get("strategy") == config.scaling_strategy.value:
        fields = {**ours["policy"], **fields}
    wrong = next((name for name, value in fields.items() if not _is_number(value)), None)
    if wrong is not None:
        raise StateError(
            f"the saved {wrong} is {ascii(fields[wrong])[:60]}, not a number: the file is damaged; load another one."
        )
    return fields


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def read_fields(state: ScaleState) -> dict[str, float]:
    """A policy state's fields as numbers. One host read."""
    return snapshot.read(state._asdict())


def restored(state: ScaleState, fields: Mapping[str, float]) -> Any:
    """`state` with those of its fields replaced that `fields` names; dtype and device stay."""
    return state._replace(
        **{
            name: torch.full_like(tensor, fields[name])
            for name, tensor in state._asdict().items()
            if name in fields
        }
    )


def _shown(saved: Any) -> str:
    if isinstance(saved, Mapping):
        return "a mapping with the keys " + (", ".join(map(str, saved)) or "(none)")
    return type(saved).__name__
