"""Preflight of parameter dtypes on an Accelerator: before the first step, and before DDP counts on them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_amp.events import EventKind
from hf_amp.scaling.half_parameters import settle
from hf_amp.scaling.master_weights import MasterWeights, widen_state
from hf_amp.session import AmpSession


def settle_parameters(
    accelerator: Accelerator,
    session: AmpSession,
    models: Iterable[nn.Module],
    optimizers: Iterable[torch.optim.Optimizer],
) -> None:
    """Settles what becomes of half-precision parameters, now and whenever `accelerator` prepares more.

    Args:
        models: those that are prepared already.
        optimizers: those that are prepared already, unwrapped.

    Raises:
        AttachError: `half_parameters` forbids what a model has, or it cannot be converted any more.
    """
    masters = session.scaler.master_weights
    known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
    settled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    converted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    evaluating: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def settle_model(wrapped: nn.Module, fixed: bool) -> None:
        model = accelerator.unwrap_model(wrapped)
        if model in settled:
            return
        event = settle(model, session.config, session.plan.default, known, masters, fixed)
        settled.add(model)
        if event is not None:
            session.record(event)
            if event.kind is EventKind.PARAMETERS_CONVERTED:
                converted.add(model)

    def settle_optimizer(optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model in [m for m in evaluating if any(id(p) in held for p in m.parameters())]:
            # A Trainer prepares so what it evaluates before it trains, and what transformers has distributed.
            evaluating.discard(model)
            session.train(model)
            settle_model(model, fixed=False)
        known.add(optimizer)
        if masters is not None:
            masters.adopt(optimizer)
        for model in converted:
            widen_state(optimizer, model.parameters())

    # Inside DDP a change of dtype would cut parameters off from the reduction of their gradients. accelerate lists
    # models as they were before it wrapped them.
    in_ddp = accelerator.num_processes > 1

    def release(masters: MasterWeights) -> None:
        masters.release(restore=not in_ddp)
        if in_ddp and converted:
            session.note(
                EventKind.HALF_PARAMETERS,
                "parameters stay FP16 after detach, because DistributedDataParallel counts on it: to go on in FP32, convert "
                "the model and wrap it again.",
            )

    if masters is not None:
        session.changes.call_on_undo(functools.partial(release, masters))
    for optimizer in optimizers:
        settle_optimizer(optimizer)
    for model in models:
        settle_model(model, fixed=in_ddp)
    prepare_model, prepare_optimizer = accelerator.prepare_model, accelerator.prepare_optimizer

    @functools.wraps(prepare_model)
    def settle_and_prepare_model(
        model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        if evaluation_mode:
            evaluating.add(accelerator.unwrap_model(model))
        else:
            settle_model(model, fixed=isinstance(model, DistributedDataParallel))
        return prepare_model(model, device_placement, evaluation_mode)

    @functools.wraps(prepare_optimizer)
    def settle_and_prepare_optimizer(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        # Before, because preparing loads the optimizer's state, which rounds it to what its parameters are.
        settle_optimizer(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer)
        return prepare_optimizer(optimizer, *args, **kwargs)

    session.changes.set_attribute(accelerator, "prepare_model", settle_and_prepare_model)
    session.changes.set_attribute(accelerator, "prepare_optimizer", settle_and_prepare_optimizer)
