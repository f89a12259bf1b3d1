"""What others look up of an optimizer's step in `torch.amp.GradScaler`, beside its methods: under the stock names.

Accelerate's FSDP loading, fairscale and loops that several libraries share read these private attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from hf_amp.errors import ScalerError
from hf_amp.scaling.step import GradientStep, PendingSteps, StepState, Unscale
from hf_amp.statistics import collect, total_amax


class OptimizerStates(MutableMapping[int, Any]):
    """Id of an optimizer → "stage" and "found_inf_per_device" of its step since the last update, as in the stock class.

    The tensor in it is the one that the step is decided by, so that ranks may reduce their verdicts into it. An entry can
    be deleted, which makes the next `unscale_` start anew, but not written: that is an error.
    """

    def __init__(self, pending: PendingSteps) -> None:
        self._pending = pending

    def __getitem__(self, key: int) -> Mapping[str, Any]:
        record = self._pending.unobserved().get(key)
        return _ReadOnlyEntry(stage=_stage(record), found_inf_per_device=found_inf_per_device(record))

    def __setitem__(self, key: int, value: Any) -> None:
        raise not_writable()

    def __delitem__(self, key: int) -> None:
        self._pending.forget(key)

    def __iter__(self) -> Iterator[int]:
        return iter(self._pending.unobserved())

    def __contains__(self, key: object) -> bool:
        return key in self._pending.unobserved()

    def __len__(self) -> int:
        return len(self._pending.unobserved())


class _ReadOnlyEntry(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise not_writable()


def found_inf_per_device(record: GradientStep | None) -> dict[Any, Tensor]:
    """The verdict on all devices' gradients, by the device that it is on; empty where there are none. No GPU-CPU sync."""
    if record is None or not record.has_gradients:
        return {}
    verdict = record.verdict()
    return {verdict.device: verdict}


def found_inf_now(optimizer: torch.optim.Optimizer, device: torch.device | str) -> dict[Any, Tensor]:
    """The same, of `optimizer`'s gradients as they are, on `device`. No GPU-CPU sync."""
    gradients = collect(optimizer)
    if not gradients:
        return {}
    found = (~total_amax(gradients, torch.device(device)).isfinite()).float()
    return {found.device: found}


def not_writable() -> ScalerError:
    return ScalerError(
        "_per_optimizer_states can be read here, not written: to start an optimizer's step anew, delete its entry "
        "(_per_optimizer_states.pop(id(optimizer), None)), or all of them (abandon_step())."
    )


def _stage(record: GradientStep | None) -> OptState:
    stepped = record is not None and record.state is StepState.STEPPED
    if record is None or (record.unscale is Unscale.FUSED and not stepped):
        return OptState.READY
    return OptState.STEPPED if stepped else OptState.UNSCALED
