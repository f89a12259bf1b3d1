"""`AdvancedMixedPrecisionManager`: whole epochs of training and validation, and what became of them."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import AttachError, BatchError, StateError
from hf_amp.monitoring.rewind import keep_or_go_back
from hf_amp.precision import PrecisionMode, ScalingStrategy
from hf_amp.serialization import load_file, parse
from hf_amp.statistics import to_host, to_host_list
from hf_amp.training.batch import LossFunction, check_is_model, samples_in
from hf_amp.training.trainers import (
    DynamicMixedPrecisionTrainer,
    PerformanceOptimizedMixedPrecisionTrainer,
    StandardMixedPrecisionTrainer,
)

_STATE = "hf_amp_manager"
_LOSSES_HELD = 256
"""Tensors, which then become one."""
_SECONDS_BETWEEN_LOSSES = 1.0


class EpochLosses:
    """The losses of an epoch, on their device until its end.

    Attributes:
        batches: how many there were.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._samples: list[int] = []
        self._started = time.perf_counter()
        self._losses: list[Tensor] = []

    def add(self, losses: Sequence[Tensor], batches: Sequence[Any]) -> None:
        """The losses of some batches, each of shape []; copied, because a CUDA graph writes the next ones there. No GPU-CPU sync."""
        self.batches += len(batches)
        self._samples += [samples_in(batch) for batch in batches]
        self._losses += [loss.reshape(1).clone() for loss in losses]
        if len(self._losses) >= _LOSSES_HELD:
            self._losses = [torch.cat(self._losses)]

    def figures(self) -> dict[str, Any]:
        """Losses, mean over the finite ones by samples, counts and speed. One GPU-CPU sync."""
        losses = to_host_list(self._losses)
        seconds = time.perf_counter() - self._started
        finite = [(loss, samples) for loss, samples in zip(losses, self._samples, strict=True) if math.isfinite(loss)]
        weight = sum(samples for _, samples in finite)
        total = sum(self._samples)
        return {
            "losses": losses,
            "loss": sum(loss * samples for loss, samples in finite) / weight if weight else math.nan,
            "batches": self.batches,
            "samples": total,
            "non_finite_losses": len(losses) - len(finite),
            "seconds": seconds,
            "samples_per_second": total / seconds,
        }


class AdvancedMixedPrecisionManager:
    """Runs epochs over a trainer that the config chooses: `DynamicMixedPrecisionTrainer` for `precision_mode` DYNAMIC,
    `PerformanceOptimizedMixedPrecisionTrainer` for `scaling_strategy` PERFORMANCE_OPTIMIZED, else
    `StandardMixedPrecisionTrainer`.

    Works with plain models, DataParallel, DistributedDataParallel, and what an Accelerator has prepared. A context
    manager: leaving it is `cleanup`.

    Args:
        config: options; None for the defaults.
        loss_fn: (outputs, targets) → loss, for models that return none.
        accelerator: an `accelerate.Accelerator` that has prepared model and optimizer; None for PyTorch alone.
        on_overflow, accumulation_steps, clip_norm: as in `StandardMixedPrecisionTrainer`.

    Attributes:
        trainer: runs the steps; its `session` holds metrics and events.
        epochs: epochs that were trained to their end.

    Raises:
        ConfigError: `config` is something else, or contradicts the accelerator.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig | None = None,
        *,
        loss_fn: LossFunction | None = None,
        accelerator: Any = None,
        on_overflow: str = "skip",
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
    ) -> None:
        config = MixedPrecisionConfig.or_default(config, type(self).__name__)
        self.trainer = _trainer_class(config)(
            config,
            loss_fn=loss_fn,
            accelerator=accelerator,
            on_overflow=on_overflow,
            accumulation_steps=accumulation_steps,
            clip_norm=clip_norm,
        )
        self.config = self.trainer.config
        self.epochs = 0
        self._cleaned_up = False

    def train_epoch(
        self,
        dataloader: Iterable[Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Any = None,
        loss_fn: LossFunction | None = None,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """Trains on every batch once, in training mode. What is left over at the end is a smaller window of its own.

        Losses are read from the device at the end of the epoch, and for the progress bar at most once a second.

        Args:
            dataloader: gives batches; see `hf_amp.training.batch.compute_loss` for their forms.
            scheduler: LR scheduler that counts optimizer steps: stepped after every applied one, so that a skip does
                not move the schedule, unless the device alone knows of it yet (PERFORMANCE_OPTIMIZED, fused). One that wants a metric you step yourself, after `validate_epoch`.
            loss_fn: overrides the manager's.
            progress: whether to show a bar on stderr; None shows it in a terminal only.

        Returns:
            `losses`: one number a batch, as is, NaN included. `loss`: mean of the finite ones, NaN where there are
            none. `batches`, `samples`, `steps`, `applied_steps`, `skipped_steps`, `non_finite_losses`, `seconds`,
            `samples_per_second`, `scale`, `precision_mode`, `epoch`: the epoch's own, counted from 1.

        Raises:
            BatchError: the dataloader is empty, or a batch is wrong.
            AttachError: model and optimizer do not belong together, or the manager was cleaned up.
        """
        from tqdm.auto import tqdm  # a dependency of transformers and datasets

        check_is_model(model)
        applied_before, skipped_before = self._counters()
        losses, shown_at = EpochLosses(), -math.inf
        model.train()
        disable = None if progress is None else not progress
        bar = tqdm(dataloader, desc=f"epoch {self.epochs + 1}", unit="batch", file=sys.stderr, disable=disable)
        batches = iter(bar)
        with bar:
            while window := list(islice(batches, self.trainer.accumulation_steps)):
                result = self.trainer.train_window(window, model, optimizer, loss_fn)
                if scheduler is not None and result["stepped"] and not result["skipped"]:
                    scheduler.step()
                losses.add(result["losses"], window)
                if self.config.on_stalled == "rewind":
                    before = self._counters()
                    keep_or_go_back(self.trainer.session, model, optimizer, scheduler)
                    applied_before += self._counters()[0] - before[0]  # what was left out was taken all the same
                    skipped_before += self._counters()[1] - before[1]
                if not bar.disable and time.monotonic() - shown_at >= _SECONDS_BETWEEN_LOSSES:
                    shown_at = time.monotonic()
                    bar.set_postfix_str(_newest(result), refresh=False)
        if not losses.batches:
            raise BatchError(
                "the dataloader gave no batch: check its dataset, sampler and drop_last; a generator can be used once only."
            )
        self.trainer.scaler.flush()
        self.epochs += 1
        applied, skipped = self._counters()
        return {
            **losses.figures(),
            "steps": applied + skipped - applied_before - skipped_before,
            "applied_steps": applied - applied_before,
            "skipped_steps": skipped - skipped_before,
            "scale": result["scale"],
            "precision_mode": self.trainer.session.plan.default,
            "epoch": self.epochs,
        }

    def validate_epoch(
        self, dataloader: Iterable[Any], model: nn.Module, *, loss_fn: LossFunction | None = None
    ) -> dict[str, Any]:
        """Loss on every batch once, in evaluation mode and the precision of training, without gradients.

        The model's modes are as before afterwards. One GPU-CPU sync, at the end.

        Returns:
            `loss`: mean over samples of the batches with a finite loss, NaN where there are none; `losses`: one number
            a batch; `batches`, `samples`, `non_finite_losses`, which nothing hides.

        Raises:
            BatchError: the dataloader is empty, or a batch is wrong.
            AttachError: the model is no `torch.nn.Module`, or the manager was cleaned up.
        """
        check_is_model(model)
        modes = [(module, module.training) for module in model.modules()]
        losses = EpochLosses()
        model.eval()
        try:
            with torch.no_grad():
                for batch in dataloader:
                    losses.add([self.trainer.evaluate(batch, model, loss_fn)], [batch])
        finally:
            for module, training in modes:
                module.training = training
        if not losses.batches:
            raise BatchError("the dataloader gave no batch to validate on: check its dataset, sampler and drop_last.")
        return losses.figures()

    def get_training_stats(self) -> dict[str, Any]:
        """The run so far, over all epochs; can be read after `cleanup` too. Waits for the device.

        Returns:
            `precision_stats`: see `PrecisionMonitor.get_precision_stats`, with the newest `memory` estimate in bytes.
            `performance_stats`: see `PerformanceTracker.get_stats`. `epochs`; `description`: one phrase for what ran.
        """
        precision = self.trainer.precision_monitor.get_precision_stats()
        return {
            "precision_stats": {**precision, "memory": self.trainer.memory.report()},
            "performance_stats": self.trainer.performance_tracker.get_stats(),
            "epochs": self.epochs,
            "description": self.trainer.session.describe(),
        }

    def _counters(self) -> tuple[int, int]:
        """Applied and skipped steps so far."""
        monitor = self.trainer.precision_monitor
        return monitor.applied_steps, monitor.skipped_steps

    def state_dict(self) -> dict[str, Any]:
        """Scale, policy, plan, counters and statistics, between two steps; model and optimizer are yours to save.

        Numbers, strings, lists and mappings only. Waits for the device.
        """
        return {_STATE: 1, "epochs": self.epochs, "scaler": self.trainer.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`, before the first step or later.

        Raises:
            StateError: it is not a manager's state; nothing has changed then.
        """
        if not isinstance(state_dict, dict) or state_dict.get(_STATE) != 1:
            shown = ", ".join(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise StateError(
                f"not the state of a manager, but {shown or 'an empty mapping'}: pass what state_dict() gave; a scaler's state "
                "goes into trainer.scaler.load_state_dict."
            )
        epochs = parse(int, state_dict.get("epochs"), "epochs")
        scaler = parse(dict[str, Any], state_dict.get("scaler"), "scaler")
        if scaler:  # that of a disabled one is empty
            self.trainer.scaler.load_state_dict(scaler)
        self.epochs = epochs

    def save(self, path: str | Path) -> None:
        """Writes `state_dict` to a file, whole or not at all."""
        path = Path(path)
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(self.state_dict(), unfinished)
        os.replace(unfinished, path)

    def load(self, path: str | Path) -> None:
        """Continues from a file that `save` wrote. No code in it is run.

        Raises:
            StateError: it cannot be read, or is something else.
        """
        self.load_state_dict(load_file(path))

    def cleanup(self) -> None:
        """Gives model, optimizer and Accelerator their former state; statistics can still be read.

        Raises:
            AttachError: it was called before. Leaving a `with` block calls it only where that has not been done.
        """
        if self._cleaned_up:
            raise AttachError(
                "this manager was cleaned up before, and nothing is attached any more; get_training_stats() still works. "
                "Call cleanup() once, or use the manager in a with statement."
            )
        self._cleaned_up = True
        self.trainer.cleanup()

    def __enter__(self) -> AdvancedMixedPrecisionManager:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._cleaned_up:
            self.cleanup()


def _newest(result: dict[str, Any]) -> str:
    """What the progress bar shows of an optimizer step. One GPU-CPU sync."""
    scale = "" if result["scale"] is None else f", scale={result['scale']:g}"
    return f"loss={to_host({'loss': result['loss']})['loss']:.4f}{scale}"


def _trainer_class(config: MixedPrecisionConfig) -> type[StandardMixedPrecisionTrainer]:
    if config.precision_mode is PrecisionMode.DYNAMIC:
        return DynamicMixedPrecisionTrainer
    if config.scaling_strategy is ScalingStrategy.PERFORMANCE_OPTIMIZED:
        return PerformanceOptimizedMixedPrecisionTrainer
    return StandardMixedPrecisionTrainer
