"""What others look up of an optimizer's step in the stock scaler, beside its methods: under the stock names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import ScalerError
from hf_amp.scaling.boundary import Boundary, Treatment
from hf_amp.scaling.loss import SeenLosses
from hf_amp.scaling.open_steps import OpenSteps
from hf_amp.scaling.scale_keeper import ScaleKeeper
from hf_amp.statistics.gradients import collect, total_amax


class StepKeeper(ScaleKeeper):
    """The part of `AdvancedGradScaler` that tells which steps are open."""

    def __init__(self, config: MixedPrecisionConfig | None, device: torch.device | str) -> None:
        self._open = OpenSteps()
        self._losses = SeenLosses()
        super().__init__(config, device)

    def abandon_step(self) -> None:
        """Forgets losses and gradients of a step that will not be taken, after an exception in forward or backward."""
        self._open.abandon()
        self._losses = SeenLosses()

    def _losses_behind(self, optimizer: torch.optim.Optimizer) -> SeenLosses:
        """Those of the newest backward passes, which may have been other optimizers' too; none where nobody showed them."""
        return SeenLosses() if self._open.is_scaled_by_hand(optimizer) else self._losses

    def _is_within_step(self) -> bool:
        return bool(self._open)

    def is_waiting(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `optimizer`'s gradients may be scaled now: a backward has begun since its last step, and it is not stepping."""
        return self._open.is_waiting(optimizer)

    @property
    def _per_optimizer_states(self) -> Any:
        return OptimizerStates(self._open)

    @_per_optimizer_states.setter
    def _per_optimizer_states(self, value: Mapping[int, Any]) -> None:
        if value:
            raise _not_written()
        self.abandon_step()

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Looks at the gradients once more, for what has happened to them since `unscale_`. No host read."""
        boundary = self._open.current(optimizer)
        if boundary is None:
            return _found_inf_now(optimizer, self._device)
        boundary.recheck(optimizer)
        return _found_inf_per_device(boundary)


class OptimizerStates(MutableMapping[int, Any]):
    """Id of an optimizer → "stage" and "found_inf_per_device" of its step since the last update, as in the stock class.

    The tensor in it is the one that the step is decided by, so that ranks may reduce their verdicts into it. An entry can
    be deleted, which makes the next `unscale_` start anew, but not written: that is an error.
    """

    def __init__(self, open_steps: OpenSteps) -> None:
        self._open = open_steps

    def __getitem__(self, key: int) -> Mapping[str, Any]:
        boundary = self._open.unobserved().get(key)
        return _EntryOf(stage=_stage(boundary), found_inf_per_device=_found_inf_per_device(boundary))

    def __setitem__(self, key: int, value: Any) -> None:
        raise _not_written()

    def __delitem__(self, key: int) -> None:
        self._open.forget(key)

    def __iter__(self) -> Iterator[int]:
        return iter(self._open.unobserved())

    def __contains__(self, key: object) -> bool:
        return key in self._open.unobserved()

    def __len__(self) -> int:
        return len(self._open.unobserved())


class _EntryOf(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise _not_written()


def _found_inf_per_device(boundary: Boundary | None) -> dict[Any, Tensor]:
    """The verdict on all devices' gradients, by the scale's device; empty where there are none. No host read."""
    if boundary is None or not boundary.has_gradients:
        return {}
    if boundary.inferred and not boundary.stepped:
        boundary.verify()
    return {boundary.found_inf.device: boundary.found_inf}


def _found_inf_now(optimizer: torch.optim.Optimizer, device: torch.device | str) -> dict[Any, Tensor]:
    """The same, of `optimizer`'s gradients as they are, on `device`. No host read."""
    gradients = collect(optimizer)
    if not gradients:
        return {}
    found = (~total_amax(gradients, torch.device(device)).isfinite()).float()
    return {found.device: found}


def _stage(boundary: Boundary | None) -> OptState:
    if boundary is None or (boundary.treatment is Treatment.FOLD and not boundary.stepped):
        return OptState.READY
    return OptState.STEPPED if boundary.stepped else OptState.UNSCALED


def _not_written() -> ScalerError:
    return ScalerError(
        "_per_optimizer_states can be read here, not written: to start an optimizer's step anew, delete its entry "
        "(_per_optimizer_states.pop(id(optimizer), None)), or all of them (abandon_step())."
    )
