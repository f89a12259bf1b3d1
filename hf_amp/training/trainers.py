"""Three trainers of one step each, with PyTorch alone or with an Accelerator."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_amp.config import COUNT, POSITIVE, MixedPrecisionConfig, one_of, or_none, safe_repr
from hf_amp.device import RandomState, default_device, devices_of, peak_bytes, probe
from hf_amp.errors import AttachError, BatchError, ConfigError
from hf_amp.events import AmpEvent, Cause, EventKind, StepOutcome
from hf_amp.fallback.plan import common_to_ranks
from hf_amp.monitoring.memory import MemoryEstimate, StoredForBackward, resident_bytes
from hf_amp.monitoring.monitor import PrecisionMonitor
from hf_amp.monitoring.throughput import PerformanceTracker
from hf_amp.precision import PrecisionMode, ScalingStrategy
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.session import AmpSession, unwrapped
from hf_amp.statistics import held_by
from hf_amp.training.batch import LossFunction, batch_to_device, check_belongs_together, compute_loss, samples_in


class Stepping:
    """The moves of one training step, under one session, with PyTorch alone: the session's scaler, autocast and
    DistributedDataParallel's own reduction.

    Args:
        config: options.
        fuses_clipping: divide and clip in the optimizer's step; nothing may read gradients in between.

    Attributes:
        session: another one once a model on another device is bound.
        device: where the models are.

    Raises:
        ConfigError: an option needs an Accelerator.
    """

    def __init__(self, config: MixedPrecisionConfig, fuses_clipping: bool) -> None:
        config.refuse(
            {"communication_precision"},
            "without an Accelerator the communication of DistributedDataParallel is yours: call "
            "model.register_comm_hook(None, fp16_compress_hook), or pass accelerator=",
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
        with cast_region(self.device, keeps_casts=not self.session.config.memory_efficient), self.session.autocast():
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
        return nn.utils.clip_grad_norm_(list(held_by(optimizer)), max_norm)

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

    def __init__(self, config: MixedPrecisionConfig, accelerator: Any) -> None:
        from hf_amp.integrations.accelerate import attach, session_of

        attached = session_of(accelerator)
        # The two options that this loop follows itself, and `attach` cannot.
        followed = dataclasses.replace(config, memory_efficient=False, gradient_accumulation_friendly=False)
        self.session = attached or attach(accelerator, followed)
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


def rewinding(model: nn.Module) -> Callable[[], None]:
    """Takes what a forward pass of `model` changes back to now, any number of times: buffers (running statistics) and random
    generators (dropout).

    Copies the buffers, on their devices. No GPU-CPU sync.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    random_state = RandomState.now(devices_of(model))

    @torch.no_grad()
    def rewind() -> None:
        for buffer, former in buffers:
            buffer.copy_(former)
        random_state.restore()

    return rewind


class Trained(NamedTuple):
    """What a step trains, with what.

    Attributes:
        size: batches in the window.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFunction | None
    size: int


@dataclass
class Window:
    """Batches that are accumulated into one optimizer step.

    Attributes:
        batches: so far, as they were given.
        rewind: takes model and random generators back to before the first; None where no step is run again.
        retries: how often the step was run again.
        norm: of the gradients before clipping, shape []; None where nothing is clipped.
        cause: of the newest skip; None after an applied step.
    """

    rewind: Callable[[], None] | None
    batches: list[Any] = field(default_factory=list)
    retries: int = 0
    norm: Tensor | None = None
    cause: Cause | None = None

    def may_retry(self) -> bool:
        """Whether another run of the same data may succeed where the newest was skipped."""
        return self.rewind is not None and self.cause is not None and self.retries < self.cause.facts.retries


class MemoryCalibration:
    """Watches the first forward pass under a plan, and gives the monitor its estimate after the first applied step.

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
        self._stored = StoredForBackward(model.parameters()) if _can_be_watched(model) else None
        return self._stored or nullcontext()

    def report(self) -> dict[str, int] | None:
        """The newest estimate in bytes, and on CUDA the peak of the fullest device that the model is on; None before it."""
        if self.estimate is None:
            return None
        peak = peak_bytes(self._devices)
        return dataclasses.asdict(self.estimate) | ({} if peak is None else {"max_memory_allocated": peak})

    def finish(self, model: nn.Module, optimizer: torch.optim.Optimizer, monitor: PrecisionMonitor) -> None:
        """After an applied step, which has made the optimizer's state."""
        if self._stored is None:
            return
        resident, fp32_resident = resident_bytes(model, optimizer)
        self.estimate = MemoryEstimate(resident, self._stored.stored_bytes, fp32_resident, self._stored.fp32_bytes)
        self._stored = None
        self._devices = devices_of(model)
        monitor.record_memory(self.estimate.savings)


def _can_be_watched(model: nn.Module) -> bool:
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        return False
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        return False
    # Neither by torch.compile(module) nor by module.compile().
    return not any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())


_LOOP_KEYWORDS = {"on_overflow": one_of("skip", "retry"), "accumulation_steps": COUNT, "clip_norm": or_none(POSITIVE)}


class StandardMixedPrecisionTrainer:
    """Autocast and loss scaling around one step at a time; by default what a hand-written loop over `torch.autocast`
    and `torch.amp.GradScaler` does, to the last bit.

    Args:
        config: options; None for the defaults.
        loss_fn: (outputs, targets) → loss, for models that return none.
        accelerator: an `accelerate.Accelerator` that has prepared model and optimizer; None for PyTorch alone.
        on_overflow: "skip" loses the batches of a skipped step; "retry" runs them again under the scale or plan that the skip
            has led to, from the same random numbers and running statistics, as long as a smaller scale or another plan may
            cure it. Copies the model's buffers in every step.
        accumulation_steps: batches whose gradients are averaged into one optimizer step; an Accelerator has its own.
        clip_norm: what the 2-norm of the unscaled gradients is clipped to; None for not.

    Attributes:
        performance_tracker: step times and throughput.

    Raises:
        ConfigError: `config` is something else, or contradicts the accelerator.
    """

    _fuses_clipping = False

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
        self.config = self._adjusted(MixedPrecisionConfig.or_default(config, type(self).__name__))
        self.loss_fn = loss_fn
        self.on_overflow, self.clip_norm = on_overflow, clip_norm
        self.accumulation_steps = accumulation_steps
        self._check_options(accelerated=accelerator is not None)
        fuses = self._fuses_clipping if self.config.fold_clipping is None else self.config.fold_clipping
        self._stepping = (
            Stepping(self.config, fuses) if accelerator is None else AcceleratedStepping(self.config, accelerator)
        )
        self.performance_tracker = PerformanceTracker(self.config, self._stepping.device)
        self.memory = MemoryCalibration(self.config.enable_monitoring)
        self._trained: tuple[weakref.ref[Any], ...] = ()
        self._window: Window | None = None
        self._closed = False

    def _adjusted(self, config: MixedPrecisionConfig) -> MixedPrecisionConfig:
        """What this trainer makes of the options."""
        return config

    def _check_options(self, accelerated: bool) -> None:
        for name, allowed in _LOOP_KEYWORDS.items():
            value = getattr(self, name)
            if not allowed.accepts(value):
                raise ConfigError(
                    f"{type(self).__name__}({name}={safe_repr(value)}): {name} must be {allowed}; leave it out for the default."
                )
        if accelerated and self.accumulation_steps != 1:
            raise ConfigError(
                f"{type(self).__name__}(accumulation_steps={self.accumulation_steps}): an Accelerator accumulates by itself; "
                "pass Accelerator(gradient_accumulation_steps=...) and leave the option out."
            )
        if self.on_overflow == "retry" and self.config.scaling_strategy.defers:
            raise ConfigError(
                f"{type(self).__name__}(on_overflow='retry') with scaling_strategy="
                f"{self.config.scaling_strategy.value}: its verdicts come one step late, when the batch is no longer there; use ADAPTIVE, "
                "or leave on_overflow out for the default (skip)."
            )

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

    def train_step(
        self, batch: Any, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: LossFunction | None = None
    ) -> dict[str, Any]:
        """Forward and backward of one batch, and, with every `accumulation_steps`-th one, an optimizer step.

        Gradients are cleared before a window's first batch, not after the step (`memory_efficient`: right after it).
        Where anything raises, the window is thrown away, and the next batch begins a new one. GPU-CPU syncs are
        those of the scaler: one with an optimizer step, or none.

        Args:
            batch: mapping, (inputs, targets) or tensor, on any device; see `hf_amp.training.batch.compute_loss`.
            model: plain, or in DataParallel or DistributedDataParallel.
            optimizer: of that model.
            loss_fn: overrides the trainer's.

        Returns:
            `loss`: of this batch, detached tensor of shape [], on the device. `precision_mode`: of the run now.
            `stepped`: whether an optimizer step was decided. `skipped`: whether it was skipped; None where the device
            has not reported yet. `cause`: of the skip. `scale`: that the newest step used; None before the first.
            `grad_norm`: before clipping; number or tensor of shape [], None where unknown or skipped. `retries`: how
            often the step was run again. `step_seconds`: duration of the newest step that is known.

        Raises:
            AttachError: model and optimizer do not belong together, or `cleanup` was called.
            BatchError: the batch or what came of it cannot be trained on, or another model's step is not finished.
        """
        size = self.accumulation_steps
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
        if self._window is not None and not isinstance(self._stepping, AcceleratedStepping):
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
        """Loss of one batch in the precision of training, shape []; call it under `torch.no_grad()`. No GPU-CPU sync."""
        self._bind_model(model)
        with self._stepping.forward_context():
            return compute_loss(model, batch_to_device(batch, self._stepping.device), loss_fn or self.loss_fn)

    def _train(self, batch: Any, trained: Trained) -> dict[str, Any]:
        self._bind(trained.model, trained.optimizer)
        if self._window is None:
            self.performance_tracker.start_step()
            trained.optimizer.zero_grad(set_to_none=True)
            self._window = Window(rewinding(trained.model) if self.on_overflow == "retry" else None)
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
        except Exception as error:
            if not self.session.recover(error):
                raise
        # Outside of the handler, whose traceback keeps alive what has filled the memory.
        while loss is None or (steps and window.may_retry()):
            # All of the window under the scale or plan that the failure has led to, as if for the first time.
            window.retries += 1
            if window.rewind is not None:
                window.rewind()
            trained.optimizer.zero_grad(set_to_none=True)
            loss = self._run(window.batches, window, trained, steps)
        return loss

    def _run(self, batches: Sequence[Any], window: Window, trained: Trained, steps: bool) -> Tensor:
        """Forward and backward of `batches`, and the optimizer's step where one is due; the last one's loss."""
        for batch in batches:
            batch = batch_to_device(batch, self._stepping.device)
            with self.memory.around_forward(trained.model), self._stepping.forward_context():
                loss = compute_loss(trained.model, batch, trained.loss_fn)
            self._stepping.backward(loss, trained.size)
        if steps:
            window.cause = None
            if self.clip_norm is not None:
                window.norm = self._stepping.clip(trained.model, trained.optimizer, self.clip_norm)
            self._stepping.step(trained.optimizer)
        return loss.detach()

    def _end_window(self, window: Window, trained: Trained) -> None:
        self._window = None
        if not self.scaler.is_enabled():
            self.precision_monitor.after_step(StepOutcome(0, applied=True, scale=1.0))
        if window.cause is None:
            self.memory.finish(trained.model, trained.optimizer, self.precision_monitor)
        if self.config.memory_efficient:
            trained.optimizer.zero_grad(set_to_none=True)
        samples = sum(map(samples_in, window.batches))
        self.performance_tracker.end_step(samples, self.session.plan.default.number_format.name)

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
            f"training starts: {self.session.describe()}.",
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


class DynamicMixedPrecisionTrainer(StandardMixedPrecisionTrainer):
    """The standard trainer under `PrecisionMode.DYNAMIC`: the session chooses among FP16, BF16 and FP32 while training,
    and every change is an event.

    Args:
        config: options; `precision_mode` DYNAMIC, MIXED (where it starts in any case) or None.
        loss_fn, accelerator, on_overflow, accumulation_steps, clip_norm: as in the standard trainer.

    Raises:
        ConfigError: `precision_mode` leaves no choice.
    """

    def _adjusted(self, config: MixedPrecisionConfig) -> MixedPrecisionConfig:
        if config.precision_mode not in (None, PrecisionMode.MIXED, PrecisionMode.DYNAMIC):
            raise ConfigError(
                f"{type(self).__name__}(precision_mode={config.precision_mode.value}): this trainer chooses the precision; "
                "leave precision_mode out, or use StandardMixedPrecisionTrainer."
            )
        return dataclasses.replace(config, precision_mode=PrecisionMode.DYNAMIC)


class PerformanceOptimizedMixedPrecisionTrainer(DynamicMixedPrecisionTrainer):
    """Times every precision that is stable on this device in the first steps, and goes on in the fastest; scales by
    PERFORMANCE_OPTIMIZED, and clips within the optimizer's step.

    What was chosen, and the times that it was chosen by, are an event. Emulated FP16 cannot be the fastest: on a CPU its
    half kernels are timed, which leaves FP32 where it has no units for them.

    Args:
        config: options; `precision_mode` DYNAMIC, MIXED (where it starts in any case) or None; any `scaling_strategy`
            and `emulate`.
        loss_fn, accelerator, on_overflow, accumulation_steps, clip_norm: as in the standard trainer.

    Raises:
        ConfigError: `precision_mode` leaves no choice.
    """

    _fuses_clipping = True

    def _adjusted(self, config: MixedPrecisionConfig) -> MixedPrecisionConfig:
        return dataclasses.replace(
            super()._adjusted(config), scaling_strategy=ScalingStrategy.PERFORMANCE_OPTIMIZED, emulate=False
        )
