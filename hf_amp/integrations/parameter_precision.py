"""Preflight of parameter dtypes on an Accelerator: before the first step, and before DDP counts on them."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_amp.events import EventKind
from hf_amp.integrations.upstream import prepared_models, prepared_optimizers
from hf_amp.scaling.half_parameters import settle
from hf_amp.scaling.master_weights import MasterWeights, widen_state
from hf_amp.session import AmpSession


class SettledParameters:
    """Settles what becomes of half-precision parameters, now and whenever the accelerator prepares more.

    Args:
        accelerator: with what it has prepared already.
        session: whose config decides.

    Raises:
        AttachError: `half_parameters` forbids what a model has, or it cannot be converted any more.
    """

    def __init__(self, accelerator: Accelerator, session: AmpSession) -> None:
        self._accelerator, self._session = accelerator, session
        self._masters = session.scaler.master_weights
        # Inside DDP a change of dtype would cut parameters off from the reduction of their gradients. accelerate lists
        # models as they were before it wrapped them.
        self._in_ddp = accelerator.num_processes > 1
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._settled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._converted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._evaluating: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        if self._masters is not None:
            session.changes.call_on_undo(functools.partial(self._release, self._masters))
        for optimizer in prepared_optimizers(accelerator):
            self._settle_optimizer(optimizer.optimizer)
        for model in prepared_models(accelerator):
            self._settle_model(model, fixed=self._in_ddp)
        self._settle_what_is_prepared()

    def _settle_what_is_prepared(self) -> None:
        prepare_model, prepare_optimizer = (
            self._accelerator.prepare_model,
            self._accelerator.prepare_optimizer,
        )

        @functools.wraps(prepare_model)
        def settle_and_prepare_model(
            model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
        ) -> Any:
            if evaluation_mode:
                self._evaluating.add(self._accelerator.unwrap_model(model))
            else:
                self._settle_model(model, fixed=isinstance(model, DistributedDataParallel))
            return prepare_model(model, device_placement, evaluation_mode)

        @functools.wraps(prepare_optimizer)
        def settle_and_prepare_optimizer(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # Before, because preparing loads the optimizer's state, which rounds it to what its parameters are.
            self._settle_optimizer(
                optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
            )
            return prepare_optimizer(optimizer, *args, **kwargs)

        changes = self._session.changes
        changes.set_attribute(self._accelerator, "prepare_model", settle_and_prepare_model)
        changes.set_attribute(self._accelerator, "prepare_optimizer", settle_and_prepare_optimizer)

    def _settle_model(self, wrapped: nn.Module, fixed: bool) -> None:
        model, session = self._accelerator.unwrap_model(wrapped), self._session
        if model in self._settled:
            return
        event = settle(model, session.config, session.plan.default, self._optimizers, self._masters, fixed)
        self._settled.add(model)
        if event is not None:
            session.record(event)
            if event.kind is EventKind.PARAMETERS_CONVERTED:
                self._converted.add(model)

    def _settle_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model in [m for m in self._evaluating if any(id(p) in held for p in m.parameters())]:
            # A Trainer prepares so what it evaluates before it trains, and what transformers has distributed.
            self._evaluating.discard(model)
            self._session.take_as_trained(model)
            self._settle_model(model, fixed=False)
        self._optimizers.add(optimizer)
        if self._masters is not None:
            self._masters.adopt(optimizer)
        for model in self._converted:
            widen_state(optimizer, model.parameters())

    def _release(self, masters: MasterWeights) -> None:
        masters.release(restore=not self._in_ddp)
        if self._in_ddp and self._converted:
            self._session.note(
                EventKind.HALF_PARAMETERS,
                "parameters stay FP16 after detach, because DistributedDataParallel counts on it: to go on in FP32, convert "
                "the model and wrap it again.",
            )
