"""Keeps hold of the batches of the newest step, so that a step that went wrong can be looked at again."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

KEPT_FORWARDS = 64
"""Forward passes of one step that are kept, the newest ones; references to the arguments only, never copies."""
KEPT_STEPS = 2
"""Steps kept: the newest, and the one before, whose verdict PERFORMANCE_OPTIMIZED learns one step late."""


class RecordedForward(NamedTuple):
    """One forward pass of a whole model: which, and on what."""

    model: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class ForwardRecorder:
    """Notes what models are called with while gradients are on: one forward hook on each outermost module.

    Args:
        step: gives the number of the optimizer step that forward passes now belong to.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self._kept: dict[int, deque[tuple[weakref.ref[nn.Module], tuple[Any, ...], dict[str, Any]]]] = {}

    def watch(self, entry_point: nn.Module, model: nn.Module) -> Callable[[], None]:
        """Notes calls of `entry_point`, which is `model` or wraps it, from now on; returns what undoes it."""
        note = _Note(self._keep, weakref.ref(model))
        handle = entry_point.register_forward_pre_hook(note, with_kwargs=True)
        return handle.remove

    def _keep(
        self, model: weakref.ref[nn.Module], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        step = self._step()
        if step not in self._kept:
            self._kept = {old: calls for old, calls in self._kept.items() if step - KEPT_STEPS < old < step}
            self._kept[step] = deque(maxlen=KEPT_FORWARDS)
        self._kept[step].append((model, arguments, options))

    def forwards_of(self, step: int) -> list[RecordedForward]:
        """The forward passes behind optimizer step `step`, oldest first.

        Where a step had none of its own, as the second of two optimizers, those of the step before.
        """
        steps = [kept for kept in self._kept if kept <= step]
        if not steps:
            return []
        return [
            RecordedForward(model, arguments, options)
            for reference, arguments, options in self._kept[max(steps)]
            if (model := reference()) is not None
        ]

    def forget(self) -> None:
        """Lets go of everything."""
        self._kept.clear()


class _Note:
    """The hook that notes the calls of one model. Copies of the model, such as an EMA, carry one that notes nothing."""

    def __init__(self, keep: Callable[..., None], model: weakref.ref[nn.Module]) -> None:
        self._keep = keep
        self._model = model

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._keep(self._model, arguments, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _note_nothing, ()


def _note_nothing() -> Callable[..., None]:
    return _silent


def _silent(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What a copied model calls in place of the recorder."""
