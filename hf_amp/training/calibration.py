"""Estimates memory savings on one step under every plan."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hf_amp.monitoring.memory import MemoryEstimate, StoredForBackward, peak_bytes, resident_bytes
from hf_amp.monitoring.monitor import PrecisionMonitor


class MemoryCalibration:
    """Watches the first forward pass under a plan, and tells the monitor after the first applied step.

    Left alone are models whose forward pass one thread's hooks do not see: compiled, sharded, or on several devices.

    Args:
        enabled: False watches nothing.

    Attributes:
        estimate: the newest; None before.
    """

    def __init__(self, enabled: bool) -> None:
        self.estimate: MemoryEstimate | None = None
        self._devices: set[torch.device] = set()
        self._wanted = enabled
        self._enabled = enabled
        self._stored: StoredForBackward | None = None

    def again(self) -> None:
        """The plan has changed, or a step has failed: watches the next forward pass."""
        self._wanted = self._enabled

    def around_forward(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Context for one forward pass; does nothing unless it is the one to watch."""
        if not self._wanted:
            return nullcontext()
        self._wanted = False
        if not _can_be_watched(model):
            return nullcontext()
        self._stored = StoredForBackward(model.parameters())
        return self._stored

    def report(self) -> dict[str, int] | None:
        """The newest estimate in bytes, and on CUDA the peak of the fullest device that the model is on; None before it."""
        if self.estimate is None:
            return None
        peak = peak_bytes(self._devices)
        measured = {} if peak is None else {"max_memory_allocated": peak}
        return {**dataclasses.asdict(self.estimate), **measured}

    def finish(self, model: nn.Module, optimizer: torch.optim.Optimizer, monitor: PrecisionMonitor) -> None:
        """After an applied step, which has made the optimizer's state."""
        if self._stored is None:
            return
        resident, fp32_resident = resident_bytes(model, optimizer)
        self.estimate = MemoryEstimate(
            resident, self._stored.stored_bytes, fp32_resident, self._stored.fp32_bytes
        )
        self._stored = None
        self._devices = {parameter.device for parameter in model.parameters()}
        monitor.record_memory(self.estimate.savings)


def _can_be_watched(model: nn.Module) -> bool:
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        return False
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        return False
    return not any(_is_compiled(module) for module in model.modules())


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)` or `module.compile()`."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
