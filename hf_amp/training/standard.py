"""`StandardMixedPrecisionTrainer`: one training step of mixed precision, from a batch to parameters."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import AttachError, BatchError
from hf_amp.events import AmpEvent, EventKind
from hf_amp.monitoring.monitor import PrecisionMonitor
from hf_amp.monitoring.performance import PerformanceTracker
from hf_amp.precision import NumberFormat
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.session import AmpSession
from hf_amp.training.batch import LossFunction, compute_loss, to_device
from hf_amp.training.binding import check_belongs_together
from hf_amp.training.calibration import MemoryCalibration
from hf_amp.training.rewind import Rewind
from hf_amp.training.stepping import AcceleratedStepping, PlainStepping, Stepping, cast_region
from hf_amp.training.window import Trained, Window


class StandardMixedPrecisionTrainer:
    """Autocast and loss scaling around one step at a time; by default what a hand-written loop over `torch.autocast`
    and `torch.amp.GradScaler` does, to the last bit.

    Args:
        config: options; None for the defaults.
        loss_fn: (outputs, targets) → loss, for models that return none.
        accelerator: an `accelerate.Accelerator` that has prepared model and optimizer; None for PyTorch alone.

    Attributes:
        performance_tracker: step times and throughput.

    Raises:
        ConfigError: `config` is something else, or contradicts the accelerator.
    """

    _folds_clipping = False

    def __init__(
        self,
        config: MixedPrecisionConfig | None = None,
        *,
        loss_fn: LossFunction | None = None,
        accelerator: Any = None,
    ) -> None:
        self.config = self._adjusted(MixedPrecisionConfig.or_default(config, type(self).__name__))
        self.loss_fn = loss_fn
        folds = self._folds_clipping if self.config.fold_clipping is None else self.config.fold_clipping
        self._stepping: Stepping = (
            PlainStepping(self.config, folds)
            if accelerator is None
            else AcceleratedStepping(self.config, accelerator)
        )
        self.performance_tracker = PerformanceTracker(self.config, self._stepping.device)
        self.memory = MemoryCalibration(self.config.enable_monitoring)
        self._trained: tuple[weakref.ref[Any], ...] = ()
        self._window: Window | None = None
        self._closed = False

    def _adjusted(self, config: MixedPrecisionConfig) -> MixedPrecisionConfig:
        """What this trainer makes of the options."""
        return config

    @property
    def session(self) -> AmpSession:
        """What is known of the run: `metrics()`, `events`, `plan`. Another one once a model on another device is seen."""
        return self._stepping.session

    @property
    def scaler(self) -> AdvancedGradScaler:
        """The session's gradient scaler."""
        return self.session.scaler

    @property
    def precision_monitor(self) -> PrecisionMonitor:
        """The session's monitor."""
        return self.session.monitor

    # ---- one step -------------------------------------------------------------------------------------------

    def train_step(
        self,
        batch: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction | None = None,
    ) -> dict[str, Any]:
        """Forward and backward of one batch, and, with every `accumulation_steps`-th one, an optimizer step.

        Gradients are cleared before a window's first batch, not after the step (`memory_efficient`: right after it).
        Where anything raises, the window is thrown away, and the next batch begins a new one. Reads the host as the
        scaler does: once with an optimizer step, or not at all.

        Args:
            batch: mapping, (inputs, targets) or tensor, on any device; see `hf_amp.training.batch.compute_loss`.
            model: plain, or in DataParallel or DistributedDataParallel.
            optimizer: of that model.
            loss_fn: overrides the trainer's.

        Returns:
            `loss`: of this batch, detached tensor of shape [], on the device. `precision_mode`: of the run now.
            `stepped`: whether an optimizer step was decided. `skipped`: whether it was skipped; None where the device
            has not told yet. `cause`: of the skip. `scale`: that the newest step used; None before the first.
            `grad_norm`: before clipping; number or tensor of shape [], None where unknown or skipped. `retries`: how
            often the step was run again. `step_seconds`: duration of the newest step that is known.

        Raises:
            AttachError: model and optimizer do not belong together, or `cleanup` was called.
            BatchError: the batch or what came of it cannot be trained on, or another model's step is not finished.
        """
        size = self.config.accumulation_steps
        return self._train(batch, Trained(model, optimizer, loss_fn or self.loss_fn, size))

    def train_window(
        self,
        batches: Sequence[Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction | None = None,
    ) -> dict[str, Any]:
        """One optimizer step from all of `batches`, however many: `train_step` on each of them, but in one go.

        With `gradient_accumulation_friendly` parameters are cast once for all of them.

        Returns:
            What the last `train_step` returns, and `losses`: one tensor of shape [] for each batch.

        Raises:
            BatchError: there is no batch, or `train_step` has not finished a step; else as `train_step`.
        """
        if not batches:
            raise BatchError("train_window got no batch: pass those of one optimizer step.")
        self._bind(model, optimizer)
        if self._window is not None and isinstance(self._stepping, PlainStepping):
            raise BatchError(
                f"train_window, but {_unfinished(self._window)}: pass the rest to train_step, or use train_window alone."
            )
        trained = Trained(model, optimizer, loss_fn or self.loss_fn, len(batches))
        keeps = self.config.gradient_accumulation_friendly and not self.config.memory_efficient
        losses = []
        with cast_region(self._stepping.device, keeps_casts=True) if keeps else nullcontext():
            for batch in batches:
                result = self._train(batch, trained)
                losses.append(result["loss"])
        return {**result, "losses": losses}

    def evaluate(self, batch: Any, model: nn.Module, loss_fn: LossFunction | None = None) -> Tensor:
        """Loss of one batch in the precision of training, shape []; call it under `torch.no_grad()`. No host read."""
        self._bind_model(model)
        with self._stepping.forward_context():
            return compute_loss(model, to_device(batch, self._stepping.device), loss_fn or self.loss_fn)

    def _train(self, batch: Any, trained: Trained) -> dict[str, Any]:
        self._bind(trained.model, trained.optimizer)
        if self._window is None:
            self._window = self._begin_window(trained)
        window = self._window
        window.batches.append(batch)
        try:
            last = len(window.batches) >= trained.size
            with self._stepping.micro_batch(trained.model, last) as steps:
                loss = self._run_with_retries(window, trained, steps)
        except BaseException:
            self._window = None
            trained.optimizer.zero_grad(set_to_none=True)
            self.scaler.abandon_step()
            self.performance_tracker.drop_step()
            self.memory.again()
            raise
        self.precision_monitor.update_metrics(self.scaler, loss, self.scaler.decided_steps)
        if steps:
            self._end_window(window, trained)
        return self._result(loss, window if steps else None)

    def _run_with_retries(self, window: Window, trained: Trained, steps: bool) -> Tensor:
        loss: Tensor | None = None
        try:
            loss = self._run(window.batches[-1:], window, trained, steps)
        except torch.OutOfMemoryError as error:
            if not self.session.recover(error):
                raise
        # Outside of the handler, whose traceback keeps alive what has filled the memory.
        while loss is None or (steps and window.may_retry()):
            loss = self._run_again(window, trained, steps)
        return loss

    def _run_again(self, window: Window, trained: Trained, steps: bool) -> Tensor:
        """All of the window under the scale or plan that the failure has led to, as if for the first time."""
        window.retries += 1
        if window.rewind is not None:
            window.rewind.rewind()
        trained.optimizer.zero_grad(set_to_none=True)
        return self._run(window.batches, window, trained, steps)

    def _run(self, batches: Sequence[Any], window: Window, trained: Trained, steps: bool) -> Tensor:
        """Forward and backward of `batches`, and the optimizer's step where one is due; the last one's loss."""
        for batch in batches:
            batch = to_device(batch, self._stepping.device)
            with self.memory.around_forward(trained.model), self._stepping.forward_context():
                loss = compute_loss(trained.model, batch, trained.loss_fn)
            self._stepping.backward(loss, trained.size)
        if steps:
            window.cause = None
            if self.config.clip_norm is not None:
                window.norm = self._stepping.clip(trained.model, trained.optimizer, self.config.clip_norm)
            self._stepping.step(trained.optimizer)
        return loss.detach()

    def _begin_window(self, trained: Trained) -> Window:
        self.performance_tracker.start_step()
        trained.optimizer.zero_grad(set_to_none=True)
        return Window(Rewind(trained.model) if self.config.on_overflow == "retry" else None)

    def _end_window(self, window: Window, trained: Trained) -> None:
        self._window = None
        if not self.scaler.is_enabled():
            self.precision_monitor.record_applied(1.0, None, None, None)
        if window.cause is None:
            self.memory.finish(trained.model, trained.optimizer, self.precision_monitor)
        if self.config.memory_efficient:
            trained.optimizer.zero_grad(set_to_none=True)
        self.performance_tracker.end_step(window.samples, NumberFormat.of(self.session.plan.default).name)

    def _result(self, loss: Tensor, window: Window | None) -> dict[str, Any]:
        outcome = self.scaler.last_outcome
        skipped: bool | None = False
        norm: float | Tensor | None = window.norm if window else None
        if window and self.scaler.is_enabled():
            skipped = None
            if outcome and outcome.attempt == self.scaler.decided_steps:
                skipped = not outcome.applied
                norm = norm if outcome.grad_norm is None else outcome.grad_norm
        return {
            "loss": loss,
            "precision_mode": self.session.plan.default,
            "stepped": window is not None,
            "skipped": skipped,
            "cause": window.cause if window and skipped else None,
            "scale": outcome.scale if outcome else None,
            "grad_norm": None if skipped else norm,
            "retries": window.retries if window else 0,
            "step_seconds": self.performance_tracker.newest_step_seconds,
        }

    # ---- a run from its first step to its end ---------------------------------------------------------------

    def _bind(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        same = [reference() for reference in self._trained] == [model, optimizer]
        if not same:
            check_belongs_together(model, optimizer, isinstance(self._stepping, AcceleratedStepping))
            if self._window is not None and all(reference() is not None for reference in self._trained):
                raise BatchError(
                    f"a batch for another model or optimizer ({type(model).__name__}, {type(optimizer).__name__}), but "
                    f"{_unfinished(self._window)}: finish it first. train_window takes all batches of a step at once; "
                    "otherwise use a trainer for each model."
                )
            self._window = None
        self._bind_model(model)
        self._stepping.bind_optimizer(model, optimizer)
        if not same:
            self._trained = (weakref.ref(model), weakref.ref(optimizer))

    def _bind_model(self, model: nn.Module) -> None:
        if self._closed:
            raise AttachError(f"this {type(self).__name__} was cleaned up: make a new one to go on with.")
        self._stepping.bind(model)
        self.performance_tracker.device = self._stepping.device
        if self._note_event in self.session.sinks:
            return
        self.session.sinks.append(self._note_event)
        self.session.note(
            EventKind.TRAINING_STARTED,
            f"training starts: {self.session.what_runs()}.",
            precision=self.session.plan.default.value,
            config=self.config.to_dict(),
        )

    def _note_event(self, event: AmpEvent) -> None:
        if event.kind is EventKind.STEP_SKIPPED and self._window is not None:
            self._window.cause = event.cause
        elif event.kind is EventKind.PRECISION_CHANGED:
            self.memory.again()

    def cleanup(self) -> None:
        """Gives model and accelerator their former state; statistics can still be read. Harmless when called again."""
        if not self._closed:
            self._closed = True
            self._window = None
            self.scaler.flush()
            self._stepping.close()


def _unfinished(window: Window) -> str:
    return f"an optimizer step has begun and is not finished (batches so far: {len(window.batches)})"
