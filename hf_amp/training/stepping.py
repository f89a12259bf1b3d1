"""Who runs backward, clipping and the optimizer of one step: PyTorch alone, or an `accelerate.Accelerator`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_amp.config import MixedPrecisionConfig
from hf_amp.device import default_device, probe
from hf_amp.errors import ConfigError
from hf_amp.fallback.plan import common_to_ranks
from hf_amp.session import AmpSession, unwrapped


class Stepping:
    """The moves of one training step, under one session, with PyTorch alone: the session's scaler, autocast and
    DistributedDataParallel's own reduction.

    Args:
        config: options.
        fuses_clipping: divide and clip in the optimizer's step; nobody may look at gradients in between.

    Attributes:
        session: another one once a model on another device is bound.
        device: where the models are.

    Raises:
        ConfigError: an option needs an Accelerator.
    """

    accumulates_itself = False
    """Whether somebody else decides where an accumulation window ends."""

    def __init__(self, config: MixedPrecisionConfig, fuses_clipping: bool) -> None:
        if config.communication_precision is not None:
            raise ConfigError(
                f"MixedPrecisionConfig(communication_precision={config.communication_precision.value}): without an Accelerator "
                "the communication of DistributedDataParallel is yours; leave it out and call "
                "model.register_comm_hook(None, fp16_compress_hook), or pass accelerator=."
            )
        self.device = default_device()
        self.session = AmpSession.on_device(config, self.device, ranks_agree=False)
        scaler = self.session.scaler
        self._fuses_clipping = fuses_clipping and not scaler.no_scaling and scaler.is_enabled()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()  # models and optimizers of the session

    def bind(self, model: nn.Module) -> None:
        """`model` is run next. Called before every run of a model."""
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
            self.session = AmpSession(session.config, session.scaler, session.requested_mode, hardware)
            session.scaler.load_progress(progress)
            self._known.clear()
        self.device = device
        if distributed:
            self.session.scaler.ranks_agree = True
        self.session.register_model(unwrapped(model), entry_point=model)
        self._known.add(model)

    def bind_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` trains `model`, which is bound, next. Called before every such run."""
        if optimizer not in self._known and self.session.scaler.is_enabled():
            self.session.register_optimizer(model, optimizer)
            self._known.add(optimizer)

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[bool]:
        """Around forward and backward of one micro-batch; gives whether a step follows. `last`: the window ends with it."""
        waits = self.session.config.gradient_accumulation_friendly and not last
        with model.no_sync() if waits and isinstance(model, DistributedDataParallel) else nullcontext():
            yield last

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Around the forward pass and the loss."""
        with (
            cast_region(self.device, keeps_casts=not self.session.config.memory_efficient),
            self.session.autocast(),
        ):
            yield

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """Adds gradients of `loss`, shape [], divided by the number of `micro_batches` in the window."""
        self.session.scaler.scale(loss / micro_batches if micro_batches > 1 else loss).backward()

    def clip(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Limits the 2-norm of the gradients; returns it as it was before, shape []."""
        scaler = self.session.scaler
        if self._fuses_clipping:
            return scaler.clip_grad_norm_(optimizer, max_norm)
        scaler.unscale_(optimizer)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return nn.utils.clip_grad_norm_(held, max_norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Applies the gradients, or skips them, and chooses the next scale."""
        self.session.scaler.step(optimizer)
        self.session.scaler.update()

    def close(self) -> None:
        """Gives model, optimizer and accelerator their former state."""
        self.session.detach()


class AcceleratedStepping(Stepping):
    """An Accelerator that prepared model and optimizer, with hf_amp attached to it.

    Gradient accumulation is the Accelerator's: its number of steps, its synchronisation.
    """

    accumulates_itself = True

    def __init__(self, config: MixedPrecisionConfig, accelerator: Any) -> None:
        from hf_amp.integrations.accelerate import attach, session_of

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

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        # prepare() has put the model's forward into its own context
        with cast_region(self.device, keeps_casts=not self._config.memory_efficient):
            yield

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


def cast_region(device: torch.device, keeps_casts: bool) -> torch.autocast:
    """A region that itself casts nothing, around ones that do.

    Args:
        keeps_casts: parameters that autocast has cast stay cast until this region ends, rather than until the inner
            one does. False: each is cast again for every use and freed after it.
    """
    return torch.autocast(device.type, enabled=False, cache_enabled=keeps_casts)
