"""Who runs backward, clipping and the optimizer of one step: PyTorch alone, or an `accelerate.Accelerator`."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_amp.config import MixedPrecisionConfig
from hf_amp.device import probe
from hf_amp.errors import ConfigError
from hf_amp.fallback.plan import common_to_ranks
from hf_amp.precision import PrecisionMode
from hf_amp.scaling.master_weights import convert_parameters
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.session import AmpSession


class Stepping(Protocol):
    """The moves of one training step, under one session."""

    session: AmpSession
    device: torch.device

    def bind(self, model: nn.Module) -> None:
        """`model` is run next. Called before every run of a model."""

    def bind_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` trains `model`, which is bound, next. Called before every such run."""

    def micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager[bool]:
        """Around forward and backward of one micro-batch; gives whether a step follows. `last`: the window ends with it."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """Around the forward pass and the loss."""

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """Adds gradients of `loss`, shape [], divided by the number of `micro_batches` in the window."""

    def clip(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Limits the 2-norm of the gradients; returns it as it was before, shape []."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Applies the gradients, or skips them, and chooses the next scale."""

    def close(self) -> None:
        """Gives model, optimizer and accelerator their former state."""


class PlainStepping:
    """PyTorch alone: the session's scaler, autocast and DistributedDataParallel's own reduction.

    Args:
        config: options.
        folds_clipping: divide and clip in the optimizer's step; nobody may look at gradients in between.

    Raises:
        ConfigError: an option needs an Accelerator.
    """

    def __init__(self, config: MixedPrecisionConfig, folds_clipping: bool) -> None:
        if config.communication_precision is not None:
            raise ConfigError(
                f"MixedPrecisionConfig(communication_precision={config.communication_precision.value}): without an Accelerator "
                "the communication of DistributedDataParallel is yours; leave it out and call "
                "model.register_comm_hook(None, fp16_compress_hook), or pass accelerator=."
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        requested_mode = config.precision_mode
        if requested_mode in (None, PrecisionMode.DYNAMIC):
            requested_mode = PrecisionMode.MIXED
        self._mode = requested_mode if config.enabled and requested_mode else PrecisionMode.FP32
        scaler = AdvancedGradScaler(dataclasses.replace(config, precision_mode=self._mode), self.device)
        self.session = AmpSession(config, scaler, self._mode, probe(self.device))
        self._folds_clipping = folds_clipping and not scaler.no_scaling and scaler.is_enabled()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()  # models and optimizers of the session

    def bind(self, model: nn.Module) -> None:
        device, session = next((p.device for p in model.parameters()), self.device), self.session
        if model in self._known and device.type == self.device.type and session.is_attached:
            self.device = device
            return
        distributed = isinstance(model, DistributedDataParallel)
        hardware = common_to_ranks(probe(device), device) if distributed else probe(device)
        # So far this machine's fastest device, and no other machine, was supposed; and another session may train the model.
        differs = device.type != self.device.type or (distributed and hardware.bf16 != session.hardware.bf16)
        if differs or not session.is_attached:
            progress = session.scaler.progress()  # a checkpoint's, where one was loaded
            session.detach()
            self.session = AmpSession(session.config, session.scaler, self._mode, hardware)
            session.scaler.load_progress(progress)
            self._known.clear()
        self.device = device
        if distributed:
            scaler = self.session.scaler
            scaler.config = dataclasses.replace(scaler.config, sync_grad_scaler=True)
        self.session.register_model(unwrapped(model), entry_point=model)
        self._known.add(model)

    def bind_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        session, masters = self.session, self.session.scaler.master_weights
        if optimizer in self._known or not session.scaler.is_enabled():
            return
        # Inside DDP a change of dtype would cut parameters off from the reduction of their gradients.
        fixed = isinstance(model, DistributedDataParallel)
        if masters is not None:
            masters.register_optimizer(optimizer)
            session.changes.on_undo(functools.partial(masters.release, restore=not fixed))
        event = convert_parameters(
            unwrapped(model), session.config, session.plan.default, [optimizer], masters, fixed
        )
        if event is not None:
            session.record(event)
        self._known.add(optimizer)

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[bool]:
        waits = self.session.config.gradient_accumulation_friendly and not last
        with model.no_sync() if waits and isinstance(model, DistributedDataParallel) else nullcontext():
            yield last

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with (
            cast_region(self.device, keeps_casts=not self.session.config.memory_efficient),
            self.session.autocast(),
        ):
            yield

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        self.session.scaler.scale(loss / micro_batches if micro_batches > 1 else loss).backward()

    def clip(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        scaler = self.session.scaler
        if self._folds_clipping:
            return scaler.clip_grad_norm_(optimizer, max_norm)
        scaler.unscale_(optimizer)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return nn.utils.clip_grad_norm_(held, max_norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.session.scaler.step(optimizer)
        self.session.scaler.update()

    def close(self) -> None:
        self.session.detach()


class AcceleratedStepping:
    """An Accelerator that prepared model and optimizer, with hf_amp attached to it.

    Gradient accumulation is the Accelerator's: its number of steps, its synchronisation.
    """

    def __init__(self, config: MixedPrecisionConfig, accelerator: Any) -> None:
        from hf_amp.integrations.accelerate import attach, session_of

        if config.accumulation_steps != 1:
            raise ConfigError(
                f"MixedPrecisionConfig(accumulation_steps={config.accumulation_steps}): an Accelerator "
                "accumulates by itself; pass Accelerator(gradient_accumulation_steps=...) and leave the option out."
            )
        attached = session_of(accelerator)
        self.session = attached or attach(accelerator, config.without_loop_options())
        self.device = accelerator.device
        self._owns_session = attached is None
        self._accelerator = accelerator
        self._config = config

    def bind(self, model: nn.Module) -> None:
        pass  # prepare() has done it

    def bind_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        pass  # so here

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[bool]:
        with self._accelerator.accumulate(model):
            yield self._accelerator.sync_gradients

    def forward_context(self) -> AbstractContextManager[Any]:
        # prepare() has put the model's forward into its own context
        return cast_region(self.device, keeps_casts=not self._config.memory_efficient)

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        self._accelerator.backward(loss)

    def clip(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        norm: Tensor = self._accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def close(self) -> None:
        if self._owns_session:
            self.session.detach()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DataParallel or DistributedDataParallel, whose names have no `module.` before them."""
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        return cast(nn.Module, model.module)
    return model


def cast_region(device: torch.device, keeps_casts: bool) -> torch.autocast:
    """A region that itself casts nothing, around ones that do.

    Args:
        keeps_casts: parameters that autocast has cast stay cast until this region ends, rather than until the inner
            one does. False: each is cast anew for every use and freed after it.
    """
    return torch.autocast(device.type, enabled=False, cache_enabled=keeps_casts)
