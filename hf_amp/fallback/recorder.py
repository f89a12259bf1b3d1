"""Keeps hold of the batches of the newest step, so that a step that went wrong can be looked at again."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_amp.eager import eager
from hf_amp.fallback.apply import PlanRunner
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.nested import tensors_in
from hf_amp.random_state import RandomState

KEPT_FORWARDS = 64
"""Forward passes of one step that are kept, the newest ones; references to the arguments only, never copies."""
KEPT_EVALUATIONS = 8
"""The same of models that only evaluate, such as a reference model; few, because a long evaluation also runs them."""
KEPT_STEPS = 2
"""Steps kept: the newest, and the one before, whose verdict PERFORMANCE_OPTIMIZED learns one step late."""


class RecordedForward(NamedTuple):
    """One forward pass of a whole model: which, and on what.

    Attributes:
        is_intact: whether the batch is still what it was: neither the model, nor a loader that reuses its memory, has
            written into it since.
        random_state: what dropout drew from on the CPU and on the batch's devices; None where that is not known.
        plan: what it ran under; None where that is not known.
    """

    model: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    is_intact: bool = True
    random_state: RandomState | None = None
    plan: PrecisionPlan | None = None


class _Kept(NamedTuple):
    """The same, without keeping the model alive, and with the version of every tensor of the batch."""

    model: weakref.ref[nn.Module]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    versions: tuple[int, ...]
    random_state: RandomState | None
    plan: PrecisionPlan


class ForwardRecorder:
    """Notes what models are called with while gradients are on: one forward hook on each outermost module.

    Of models that only evaluate, it notes calls without gradients.

    Args:
        step: gives the number of the optimizer step that forward passes now belong to.
        runner: the models; says which of them only evaluate, and which plan they run under.
    """

    def __init__(self, step: Callable[[], int], runner: PlanRunner) -> None:
        self._step = step
        self._runner = runner
        self._kept: dict[int, deque[_Kept]] = {}
        self._evaluations: dict[int, deque[_Kept]] = {}

    def watch(self, entry_point: nn.Module, model: nn.Module) -> Callable[[], None]:
        """Notes calls of `entry_point`, which is `model` or wraps it, from now on; returns what undoes it."""
        note = _Note(self._note, weakref.ref(model))
        handle = entry_point.register_forward_pre_hook(note, with_kwargs=True)
        return handle.remove

    def _note(
        self, reference: weakref.ref[nn.Module], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        if torch.is_grad_enabled():
            calls = self._calls_of_step(self._kept, KEPT_FORWARDS)
        elif (model := reference()) is not None and self._runner.evaluates(model):
            calls = self._calls_of_step(self._evaluations, KEPT_EVALUATIONS)
        else:
            return
        tensors = _tensors(arguments, options)
        seen = _versions(tensors), _random_state(tensors), self._runner.plan
        calls.append(_Kept(reference, arguments, options, *seen))

    def _calls_of_step(self, kept: dict[int, deque[_Kept]], most: int) -> deque[_Kept]:
        step = self._step()
        if step not in kept:
            for calls in (self._kept, self._evaluations):
                for old in [old for old in calls if not step - KEPT_STEPS < old <= step]:
                    del calls[old]
            kept[step] = deque(maxlen=most)
        return kept[step]

    def forwards_of(self, step: int) -> list[RecordedForward]:
        """The forward passes behind optimizer step `step`, oldest first.

        Where a step had none of its own, as the second of two optimizers, those of the step before.
        """
        return _forwards_of(step, self._kept)

    def evaluations_of(self, step: int) -> list[RecordedForward]:
        """The same of models that only evaluate, whose outputs the loss may be made from."""
        return _forwards_of(step, self._evaluations)

    def forget(self) -> None:
        """Lets go of everything."""
        self._kept.clear()
        self._evaluations.clear()


def _forwards_of(step: int, calls: dict[int, deque[_Kept]]) -> list[RecordedForward]:
    steps = [kept for kept in calls if kept <= step]
    if not steps:
        return []
    return [
        RecordedForward(
            model,
            kept.arguments,
            kept.options,
            is_intact=kept.versions == _versions(_tensors(kept.arguments, kept.options)),
            random_state=kept.random_state,
            plan=kept.plan,
        )
        for kept in calls[max(steps)]
        if (model := kept.model()) is not None
    ]


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
