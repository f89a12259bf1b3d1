"""The optimizers of an accelerator: the session's scaler decides their steps, and skips are reported truthfully."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from hf_amp.errors import AttachError
from hf_amp.integrations._compat import (
    forget_skip,
    prepared_optimizers,
    replace_scaler,
    steps_in_backward,
)
from hf_amp.scaling.optimizer_step import RefuseScaledStep
from hf_amp.session import AmpSession


class PreparedOptimizers:
    """The optimizers whose steps the session's scaler decides: all of them, prepared or to be. Keeps none alive.

    Args:
        accelerator: still with its own scaler, which the optimizers get back when the session is detached.
        session: whose scaler they get.

    Attributes:
        registered: the prepared optimizers.
    """

    def __init__(self, accelerator: Accelerator, session: AmpSession) -> None:
        self.registered: weakref.WeakSet[AcceleratedOptimizer] = weakref.WeakSet()
        self._scaler = session.scaler
        self._former_scaler = accelerator.scaler
        self._refuse_scaled_step = RefuseScaledStep(session.scaler)
        self._on_undo = session.patches.on_undo
        self._steps: weakref.WeakKeyDictionary[AcceleratedOptimizer, _Steps] = weakref.WeakKeyDictionary()
        session.patches.on_undo(self._give_back)
        for prepared in prepared_optimizers(accelerator):
            self.register(prepared)

    @contextmanager
    def without_scaler(self) -> Iterator[None]:
        """The optimizers as they are without a scaler, for steps that are not training's.

        Saving or loading the sharded state of an optimizer steps it on gradients of zero (accelerate#4289).
        """
        for optimizer in self.registered:
            replace_scaler(optimizer, None)
        try:
            yield
        finally:
            for optimizer in self.registered:
                replace_scaler(optimizer, self._scaler)

    def register(self, optimizer: AcceleratedOptimizer) -> None:
        """Has the session's scaler decide `optimizer`'s steps. Harmless when called again."""
        if optimizer in self.registered:
            return
        _refuse_steps_in_backward(optimizer.optimizer)
        self.registered.add(optimizer)
        self._scaler.watch(optimizer.optimizer)
        if not self._scaler.no_scaling:
            handle = optimizer.optimizer.register_step_pre_hook(self._refuse_scaled_step)
            self._on_undo(handle.remove)
        if optimizer.scaler is not self._scaler:
            replace_scaler(optimizer, self._scaler)
        former = vars(optimizer).get("step")
        ours = _step_reporting_skips(former)
        optimizer.step = MethodType(ours, optimizer)
        self._steps[optimizer] = _Steps(former, ours)

    def _give_back(self) -> None:
        for optimizer in self.registered:
            replace_scaler(optimizer, self._former_scaler)
            forget_skip(optimizer)
            former, ours = self._steps[optimizer]
            if getattr(vars(optimizer)["step"], "__func__", None) is not ours:
                continue  # a learning-rate scheduler has wrapped it since
            del optimizer.step
            if former is not None:
                optimizer.step = former


def _refuse_steps_in_backward(optimizer: torch.optim.Optimizer) -> None:
    if steps_in_backward(optimizer):
        raise AttachError(
            f"{type(optimizer).__name__} takes its steps inside of backward, where nothing can look at the gradients first: "
            "hf_amp can neither scale, skip nor count them. Take an optimizer that steps after backward (in a Trainer, "
            "optim='galore_adamw' for 'galore_adamw_layerwise'), or leave hf_amp out."
        )


class _Steps(NamedTuple):
    former: Callable[..., Any] | None
    """What a learning-rate scheduler has put in the place of the optimizer's own `step`; None for that one."""
    ours: Callable[..., Any]


def _step_reporting_skips(former: Callable[..., Any] | None) -> Callable[..., Any]:
    """A `step` for a prepared optimizer, for which a micro-step that ends no accumulation window is not a skipped one.

    Upstream keeps the verdict of the last window until the next one ends (accelerate#2828).
    """

    def step(optimizer: AcceleratedOptimizer, *args: Any, **kwargs: Any) -> Any:
        if not optimizer.gradient_state.sync_gradients:
            forget_skip(optimizer)
        if former is not None:
            return former(*args, **kwargs)
        return type(optimizer).step(optimizer, *args, **kwargs)

    return step
