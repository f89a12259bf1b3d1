"""Keeps hold of the batches of the newest step, so that a step that went wrong can be looked at again, and of what running
statistics were before it, so that they can be put back."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hf_amp.eager import eager
from hf_amp.fallback.batch_norm_statistics import BatchNormStatistics, norms_of
from hf_amp.nested import in_own_containers, tensors_in
from hf_amp.random_state import RandomState

KEPT_FORWARDS = 64
"""Forward passes of one step that are kept, the newest ones; references to the arguments only, never copies."""
KEPT_STEPS = 2
"""Steps kept: the newest, and the one before, whose verdict PERFORMANCE_OPTIMIZED learns one step late."""


class RecordedForward(NamedTuple):
    """One forward pass of a whole model: which, and on what.

    Attributes:
        is_intact: whether the batch is still what it was: neither the model, nor a loader that reuses its memory, has
            written into it since.
        random_state: what dropout drew from on the CPU and on the batch's devices; None where that is not known.
    """

    model: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    is_intact: bool = True
    random_state: RandomState | None = None


class _Kept(NamedTuple):
    """The same, without keeping the model alive, and with the version of every tensor of the batch."""

    model: weakref.ref[nn.Module]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    versions: tuple[int, ...]
    random_state: RandomState | None


class ForwardRecorder:
    """Notes what models are called with while gradients are on: one forward hook on each outermost module.

    Before the first call of a training model in a step it copies the model's running statistics, if it has any.

    Args:
        step: gives the number of the optimizer step that forward passes now belong to.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self._kept: dict[int, deque[_Kept]] = {}
        self._overfull: set[int] = set()
        self._norms: dict[weakref.ref[nn.Module], list[weakref.ref[nn.Module]]] = {}
        self._gathered: dict[int, dict[weakref.ref[nn.Module], BatchNormStatistics]] = {}

    def watch(self, entry_point: nn.Module, model: nn.Module) -> Callable[[], None]:
        """Notes calls of `entry_point`, which is `model` or wraps it, from now on; returns what undoes it."""
        reference = weakref.ref(model)
        if norms := norms_of(model):
            self._norms[reference] = norms
        note = _Note(self._note, reference)
        handle = entry_point.register_forward_pre_hook(note, with_kwargs=True)
        return handle.remove

    def _note(
        self, model: weakref.ref[nn.Module], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        step = self._step()
        if model in self._norms:
            self._gather(step, model)
        if torch.is_grad_enabled():
            self._keep(step, model, arguments, options)

    def _gather(self, step: int, reference: weakref.ref[nn.Module]) -> None:
        model = reference()
        if model is None or not model.training or reference in self._gathered.get(step, {}):
            return
        if step not in self._gathered:
            self._gathered = _with_room_for(step, self._gathered)
            self._gathered[step] = {}
        self._gathered[step][reference] = BatchNormStatistics(self._norms[reference])

    def _keep(
        self,
        step: int,
        model: weakref.ref[nn.Module],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        if step not in self._kept:
            self._kept = _with_room_for(step, self._kept)
            self._overfull &= self._kept.keys()
            self._kept[step] = deque(maxlen=KEPT_FORWARDS)
        if len(self._kept[step]) == KEPT_FORWARDS:
            self._overfull.add(step)
        # A model may add its outputs to its batch: they are no data, and would be kept alive.
        arguments, options = in_own_containers((arguments, options))
        tensors = _tensors(arguments, options)
        kept = _Kept(model, arguments, options, _versions(tensors), _random_state(tensors))
        self._kept[step].append(kept)

    def forwards_of(self, step: int) -> list[RecordedForward]:
        """The forward passes behind optimizer step `step`, oldest first.

        Where a step had none of its own, as the second of two optimizers, those of the step before.
        """
        return [
            RecordedForward(
                model,
                kept.arguments,
                kept.options,
                is_intact=kept.versions == _versions(_tensors(kept.arguments, kept.options)),
                random_state=kept.random_state,
            )
            for kept in self._kept.get(_newest(self._kept, step), ())
            if (model := kept.model()) is not None
        ]

    def has_let_go(self, step: int) -> bool:
        """Whether there were more forward passes behind optimizer step `step` than are kept."""
        return _newest(self._kept, step) in self._overfull

    def put_back_statistics(self, step: int) -> list[nn.Module]:
        """Puts back running statistics that are not finite after optimizer step `step`, and were before it.

        Returns the modules that had them. One host read for each model that has any.
        """
        gathered = self._gathered.get(_newest(self._gathered, step), {})
        return [norm for statistics in gathered.values() for norm in statistics.put_back()]

    def forget(self) -> None:
        """Lets go of everything."""
        self._kept.clear()
        self._overfull.clear()
        self._gathered.clear()


_T = TypeVar("_T")


def _newest(by_step: Iterable[int], step: int) -> int:
    """The newest of the steps up to `step`; one that there never is where there is none."""
    return max((known for known in by_step if known <= step), default=-1)


def _with_room_for(step: int, by_step: dict[int, _T]) -> dict[int, _T]:
    """The entries that are kept beside one for `step`."""
    return {old: entry for old, entry in by_step.items() if step - KEPT_STEPS < old < step}


def _tensors(arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    return [x for _, x in tensors_in((arguments, options))]


def _versions(tensors: list[Tensor]) -> tuple[int, ...]:
    """How often each tensor has been written into. Source: `torch.Tensor._version`, which autograd checks as well."""
    return tuple(0 if x.is_inference() else x._version for x in tensors)


def _random_state(batch: list[Tensor]) -> RandomState | None:
    """What dropout will draw from; None while a CUDA graph is captured, when a generator may not be asked."""
    devices = {x.device for x in batch}
    if any(device.type == "cuda" for device in devices) and torch.cuda.is_current_stream_capturing():
        return None
    return RandomState.now(devices)


class _Note:
    """The hook that notes the calls of one model. Copies of the model, such as an EMA, carry one that notes nothing."""

    def __init__(self, note: Callable[..., None], model: weakref.ref[nn.Module]) -> None:
        self._note = note
        self._model = model

    @eager
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._note(self._model, arguments, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _note_nothing, ()


def _note_nothing() -> Callable[..., None]:
    return _silent


def _silent(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What a copied model calls in place of the recorder."""
