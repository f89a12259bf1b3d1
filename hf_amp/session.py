"""`AmpSession`: scaling, fallback and monitoring of one run, wired together."""

from __future__ import annotations

import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.config import MixedPrecisionConfig
from hf_amp.device import Hardware
from hf_amp.events import AmpEvent, Cause, EventKind, join_names
from hf_amp.fallback.controller import FallbackController, PrecisionChange
from hf_amp.fallback.diagnosis import Diagnosis, SkippedStep, non_finite_names
from hf_amp.fallback.module_precision import CurrentPrecision, ForwardContext
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.monitoring.modules import ModuleMonitor
from hf_amp.monitoring.monitor import PrecisionMonitor
from hf_amp.monitoring.sinks.console import Console, headline
from hf_amp.monitoring.stall import Finding, StallDetector
from hf_amp.monitoring.throughput import ThroughputMonitor
from hf_amp.patch_log import PatchLog
from hf_amp.precision import NumberFormat, PrecisionMode
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.scaling.step import GradientStep, StepOutcome, Unscale
from hf_amp.statistics import all_reduce_max_to_host, is_distributed

EVENTS_KEPT = 10_000
"""Newest events that a session keeps; the JSON-lines log has all."""

INCIDENTS_A_LOG_ENTRY = 3
"""Incidents that one log entry names; the JSON-lines log has all."""


class EventRecorder:
    """The part of `AmpSession` that knows nothing of precision: events, and where they go.

    Attributes:
        run_id: names the run in logs.
        sinks: called with every event.
        first_step: what the scaler's first decided step is called in events; 1, or later in a resumed run.
        newest_step: number of the newest optimizer step that is known; 0 before the first.
        lock: held while what people read is changed, so that other threads read it between two steps.
    """

    def __init__(self) -> None:
        self.run_id = uuid.uuid4().hex[:12]
        self.sinks: list[Callable[[AmpEvent], None]] = [Console().write]
        self.first_step = 1
        self.newest_step = 0
        self.lock = threading.RLock()
        self._events: deque[AmpEvent] = deque(maxlen=EVENTS_KEPT)
        self._unlogged: deque[AmpEvent] = deque(maxlen=INCIDENTS_A_LOG_ENTRY)
        self._unwritten: deque[AmpEvent] | None = deque(maxlen=EVENTS_KEPT)

    @property
    def events(self) -> Sequence[AmpEvent]:
        """What happened, oldest first; at most the newest 10,000."""
        with self.lock:
            return tuple(self._events)

    def record(self, event: AmpEvent) -> None:
        """Gives one event to every sink, and to the session's list unless it only repeats figures."""
        if event.kind is not EventKind.METRICS:
            with self.lock:
                self._events.append(event)
        if event.kind.needs_attention:
            self._unlogged.append(event)
        if self._unwritten is not None:
            self._unwritten.append(event)
        for sink in self.sinks:
            sink(event)

    def note(self, kind: EventKind, message: str, **figures: Any) -> None:
        """Records an event of the newest step that has no cause and changes no value."""
        self.record(AmpEvent(self.newest_step, kind, message=message, figures=figures))

    def tell(self, finding: Finding | None) -> None:
        """Records what the watch over the run's hope has found, if anything."""
        if finding is not None:
            self.record(AmpEvent(self.newest_step, finding.kind, finding.cause, message=finding.message))

    def begin_log(self, write: Callable[[AmpEvent], None], message: str, **figures: Any) -> None:
        """Makes `write` a sink: it gets that training starts, what happened before while no log was open, and all to come."""
        self.sinks.append(write)
        before, self._unwritten = self._unwritten, None
        self.note(EventKind.TRAINING_STARTED, message, **figures)
        for event in before or ():
            write(event)

    def end_log(self, write: Callable[[AmpEvent], None]) -> None:
        """Takes `write` out of the sinks; what happens from now on is kept for the next log."""
        self.sinks.remove(write)
        self._unwritten = deque(maxlen=EVENTS_KEPT)

    def unlogged_incidents(self) -> str:
        """What needed attention since the last call, for one log entry: the newest three; "" where nothing did."""
        reported = "; ".join(headline(event) for event in self._unlogged)
        self._unlogged.clear()
        return reported


@dataclass
class _Judged:
    """What was found of a skipped step, and done about it.

    Attributes:
        diagnosis: why it was skipped.
        transition: the change of plan that this has led to; None where it has led to none.
        backward: number of the backward behind it, for whose other optimizers the same holds.
        optimizers: `id` of those that it holds for so far.
    """

    diagnosis: Diagnosis
    change: PrecisionChange | None
    backward: int
    optimizers: set[int]


class AfterStep:
    """Counts every step that the scaler has decided; a skipped one gets a cause, and whatever is done about it is told.

    Args:
        journal: where events go.
        config: the options in force.
        scaler: decides the steps, and has its scale put right where the plan changes.
        keeper: decides on the plan.
        pace: how fast the run goes.

    Attributes:
        monitor: counts and newest figures.
        hope: whether anything can be learned yet.
        modules: figures by module.
    """

    def __init__(
        self,
        journal: EventRecorder,
        config: MixedPrecisionConfig,
        scaler: AdvancedGradScaler,
        keeper: FallbackController,
        throughput: ThroughputMonitor,
    ) -> None:
        self.monitor = PrecisionMonitor()
        self.stall = StallDetector(config.patience)
        self.throughput = throughput
        self.modules = ModuleMonitor(config.monitoring_interval)
        self._journal = journal
        self._min_scale = config.min_scale
        self._scaler = scaler
        self._keeper = keeper
        self._at_floor = False
        self._judged: _Judged | None = None
        self.note_models()

    def decided(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        """An observer of the scaler: takes in what became of one step of `optimizer`."""
        ForwardContext.leave_interrupted()
        with self._journal.lock:
            self._record(outcome, optimizer)

    def collect_module_statistics(
        self, record: GradientStep, optimizer: torch.optim.Optimizer
    ) -> Mapping[str, Tensor]:
        """A passenger of the scaler: what is to come to the host by module. No host read."""
        return self.modules.collect(
            id(optimizer),
            lambda: [name for name, p in self._named_parameters(optimizer) if p.grad is not None],
            record.gradients,
            record.scale,
            scaled=record.unscale is Unscale.FUSED,
            guards=record.unscale is Unscale.NONE,
            decided_steps=self._scaler.decided_steps,
        )

    def follow(self, change: PrecisionChange | None, cause: Cause | None, skipped_at: float | None) -> None:
        """Tells of a change of plan, and sees to the scale where the whole model leaves FP16 or comes back.

        Args:
            skipped_at: the scale of the skipped step that led to the change; None where the plan goes back.
        """
        if change is None:
            return
        keeper, before, after = self._keeper, change.before, change.after
        self.monitor.record_plan(len(after.modules))
        self.note_models()
        if skipped_at is not None:
            self.monitor.record_fallback()
            if before.default is not after.default and keeper.scale_at_rest is None:
                keeper.scale_at_rest = skipped_at
        elif keeper.scale_at_rest is not None and after.default is keeper.requested_mode:
            self._scaler.set_scale(min(keeper.scale_at_rest, self._scaler.get_scale()))
            keeper.scale_at_rest = None
        self._journal.record(
            AmpEvent(
                step=self._journal.newest_step,
                kind=EventKind.PRECISION_CHANGED,
                cause=cause,
                before=before.precision_of(change.modules).value,
                after=after.precision_of(change.modules).value,
                modules=change.modules,
                message=change.message,
            )
        )

    def note_models(self) -> None:
        """A model has come, or the plan has changed: where parameters are, and what share of them runs in which format."""
        runner = self._keeper.runner
        parameters = list(runner.named_parameters())
        # A model that is offloaded for now trains where the run is.
        if devices := {p.device for _, p in parameters if p.device.type == runner.entry.device_type}:
            self.throughput.devices = devices
        sizes = ((name, p.numel()) for name, p in parameters)
        self.monitor.record_formats(self._keeper.plan.format_shares(sizes))

    def _record(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        self._journal.newest_step = self._journal.first_step + outcome.attempt - 1
        self.monitor.record_lost_updates(outcome.lost_update_fraction)
        self.monitor.record_losses(outcome.losses, outcome.non_finite_losses)
        step_seconds = self.throughput.step_decided(NumberFormat.of(self._keeper.plan.default).name)
        self.modules.take(id(optimizer), outcome.extras)
        if outcome.applied:
            self._record_applied(outcome, step_seconds)
        else:
            self._record_skipped(outcome, optimizer)

    def _record_applied(self, outcome: StepOutcome, step_seconds: float | None) -> None:
        self.monitor.record_applied(
            outcome.scale, outcome.grad_norm, outcome.grad_amax, outcome.underflow_fraction
        )
        self._at_floor = False
        self.follow(self._keeper.note_applied(step_seconds, self._scaler.ranks_agree), None, None)
        self._journal.tell(
            self.stall.record_applied(
                outcome.zero_gradients, outcome.loss_finite, outcome.scale, outcome.has_gradients
            )
        )

    def _record_skipped(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        next_scale = self._scaler.get_scale()
        norms = self._keeper.restore_buffers(outcome.attempt)
        judged = self._judge(outcome, next_scale, optimizer)
        diagnosis = judged.diagnosis
        if judged.change or diagnosis.already_fixed:
            next_scale = outcome.scale  # which was not to blame
            self._scaler.set_scale(next_scale)
        self.monitor.record_skipped(diagnosis.cause, next_scale, outcome.inf_elements, outcome.nan_elements)
        self._journal.record(
            AmpEvent(
                step=self._journal.newest_step,
                kind=EventKind.STEP_SKIPPED,
                cause=diagnosis.cause,
                before=outcome.scale,
                after=next_scale,
                modules=diagnosis.modules,
                message=diagnosis.message,
                figures={
                    "inf_elements": outcome.inf_elements,
                    "nan_elements": outcome.nan_elements,
                    "losses": outcome.losses,
                    "non_finite_losses": outcome.non_finite_losses,
                },
            )
        )
        self._tell_of_statistics(norms)
        self._tell_of_floor(outcome, next_scale)
        if len(judged.optimizers) == 1:  # a change of plan is told once for all of a backward
            self.follow(judged.change, diagnosis.cause, outcome.scale)
        self._journal.tell(self.stall.record_skipped(diagnosis.cause))

    def _judge(self, outcome: StepOutcome, next_scale: float, optimizer: torch.optim.Optimizer) -> _Judged:
        """What is found of the step and done about it, or was for another optimizer of the same backward."""
        former = self._judged
        if former and former.backward == outcome.backward and id(optimizer) not in former.optimizers:
            former.optimizers.add(id(optimizer))
            return former
        diagnosis = self._diagnose(outcome, next_scale, optimizer)
        elements = sum(p.grad.numel() for _, p in self._named_parameters(optimizer) if p.grad is not None)
        change = self._keeper.note_skipped(diagnosis, outcome.non_finite_fraction(elements))
        self._judged = _Judged(diagnosis, change, outcome.backward, {id(optimizer)})
        return self._judged

    def _diagnose(
        self, outcome: StepOutcome, next_scale: float, optimizer: torch.optim.Optimizer
    ) -> Diagnosis:
        # A finite loss shows that the scale is to blame, but only where there is one.
        loss_finite = None if self._scaler.no_scaling and outcome.loss_finite else outcome.loss_finite
        parameters = self._named_parameters(optimizer)
        state = (
            (f"{key} of {name}", value)
            for name, parameter in parameters
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        )
        skip = SkippedStep(outcome.attempt, loss_finite, outcome.scale, next_scale, parameters, state)
        return self._keeper.diagnoser.explain(skip, agree=self._scaler.ranks_agree)

    def _tell_of_statistics(self, norms: tuple[str, ...]) -> None:
        if not norms:
            return
        self._journal.record(
            AmpEvent(
                step=self._journal.newest_step,
                kind=EventKind.BUFFERS_RESTORED,
                modules=norms,
                message=f"the running statistics of {join_names(norms)} were not finite after the skipped "
                "step: they are again what they were before it.",
            )
        )

    def _tell_of_floor(self, outcome: StepOutcome, next_scale: float) -> None:
        if not outcome.loss_finite or outcome.scale > self._min_scale or self._at_floor:
            return
        self._at_floor = True
        self._journal.record(
            AmpEvent(
                step=self._journal.newest_step,
                kind=EventKind.SCALE_AT_FLOOR,
                cause=Cause.UNKNOWN,
                before=outcome.scale,
                after=next_scale,
                message="the gradients overflow even at the smallest scale, so the scale is not the cause; "
                "train in BF16 or FP32 and look for activations beyond 65504.",
            )
        )

    def _named_parameters(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        names = {p: name for name, p in self._keeper.runner.named_parameters()}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return [(names.get(p, f"parameter {index} of the optimizer"), p) for index, p in enumerate(held)]


_trains: weakref.WeakKeyDictionary[nn.Module, Callable[[], AmpSession | None]] = weakref.WeakKeyDictionary()
"""The session that has trained a model last, weakly."""


class AmpSession(EventRecorder):
    """What hf_amp does and knows in one run. Made by `attach` and `MixedPrecisionCallback`.

    Attributes:
        config: the options in force.
        scaler: the gradient scaler; in FP32 and BF16 it scales nothing and only guards.
        requested_mode: the precision that the Trainer or Accelerator was given, where the plan begins.
        hardware: what the device can run.
        folds_clipping: whether clipping by norm may fold into the optimizer step: nobody looks at gradients before it.
        monitor: counts and newest figures.
        hope: whether anything can be learned yet.
        changes: what was changed on the instances attached to; undone by `detach`.
        pace: how fast the run goes.
        described_as: one phrase for what runs, where it is not the plan alone; None where it is.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig,
        scaler: AdvancedGradScaler,
        mode: PrecisionMode,
        hardware: Hardware,
    ) -> None:
        super().__init__()
        self.config = config
        self.scaler = scaler
        self.hardware = hardware
        self.folds_clipping = False
        self.described_as: str | None = None
        self.changes = PatchLog()
        self.requested_mode = mode
        self._keeper = FallbackController(config, mode, hardware, step=lambda: scaler.decided_steps + 1)
        self.changes.on_undo(self._keeper.remove)
        self._after_step = AfterStep(self, config, scaler, self._keeper, ThroughputMonitor(hardware.device))
        self.monitor, self.stall = self._after_step.monitor, self._after_step.stall
        self.throughput, self._modules = self._after_step.throughput, self._after_step.modules
        scaler.observers.append(self._after_step.decided)
        scaler.not_sampled = lambda: self._keeper.runner.fp32_parameters
        scaler.stateful.update(
            monitor=self.monitor, stall=self.stall, fallback=self._keeper, throughput=self.throughput
        )
        if config.monitor_modules and config.enable_monitoring:
            scaler.step_hooks.append(self._after_step.collect_module_statistics)
            self.changes.on_undo(self._modules.remove_hooks)

    # ---- what people read -----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<AmpSession {self.run_id}: {self.describe()}, step {self.newest_step}>"

    @property
    def plan(self) -> PrecisionPlan:
        """Which precision runs where, now."""
        return self._keeper.plan

    def metrics(self) -> dict[str, float]:
        """The catalogue's names and their newest values; see `monitoring/metrics.py`. No host read. From any thread."""
        with self.lock:
            return {**self.monitor.metrics(), **self.throughput.metrics()}

    def module_metrics(self) -> dict[str, dict[str, float]]:
        """Name of a figure → qualified module name → newest value; empty without `monitor_modules`. No host read."""
        with self.lock:
            return self._modules.by_module()

    def describe(self) -> str:
        """One phrase: the precision of the run, and what that means on this device."""
        if self.described_as is not None:
            return self.described_as
        if self.plan.default in (PrecisionMode.MIXED, PrecisionMode.FP16):
            return self.hardware.describe_fp16(self.config.emulate)
        return f"{self.plan.default.value} on {self.hardware.name}"

    # ---- what integrations call -----------------------------------------------------------------------------

    def register_model(
        self, model: nn.Module, entry_point: nn.Module | None = None, is_trained: bool = True
    ) -> None:
        """Lets `model` follow the plan, and a skipped step of it be diagnosed, without keeping it alive.

        Args:
            model: the model itself, unwrapped.
            entry_point: what is called in its place, such as a DistributedDataParallel or compiled module around it.
            is_trained: False for one that only evaluates, such as a reference model: the plan covers it, and what it does
                to the loss is told, but its parameters are none of the run's; `mark_trainable` takes that back.
        """
        if is_trained:
            self.detach_previous_session(model)
        self.changes.on_undo(
            self._keeper.register_model(model, entry_point if entry_point is not None else model, is_trained)
        )
        if is_trained:
            self._note_trained(model)

    def detach_previous_session(self, model: nn.Module) -> None:
        """Detaches the session that has trained `model` so far: its plan would be in force under the one of this session."""
        former = _trains.get(model, lambda: None)()
        if former is not None and former is not self:
            former._detach(
                f"another session trains this {type(model).__name__} from now on: hf_amp is detached here"
            )
        _trains[model] = weakref.ref(self)

    def mark_trainable(self, model: nn.Module) -> None:
        """Goes on with an adopted `model` as one that is trained. Harmless where it is."""
        if self._keeper.runner.evaluates(model):
            self.detach_previous_session(model)
            self._keeper.runner.register_model(model)
            self._note_trained(model)

    def _note_trained(self, model: nn.Module) -> None:
        if self._after_step.collect_module_statistics in self.scaler.step_hooks:
            self._modules.register_model(model, self.scaler.decided_steps)
        self._after_step.note_models()

    def disable_replay(self) -> None:
        """Looks for causes in weights and batches only: a forward pass would run, and move, another library's scales."""
        self._keeper.diagnoser.repeats_forwards = False

    @property
    def current_precision(self) -> CurrentPrecision:
        """Gives, at every call, a new context of the plan's default as it is by then."""
        return self._keeper.runner.current

    def follow_default(self, change: Callable[[PrecisionMode], None]) -> None:
        """Has `change` called with every new default of the plan, for models that do not enter it by themselves."""
        self._keeper.runner.on_default_change.append(change)

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which a forward pass runs in the plan's default precision, for loops without accelerate."""
        return self.current_precision()

    def recover(self, error: BaseException) -> bool:
        """Whether the step that raised `error` can be tried again, because the plan that caused it is withdrawn.

        That is where memory ran out under a plan that had just widened precision: the former plan is in force again,
        and the gradients of the adopted models are cleared. Try again after the `except` clause, not in it: the traceback
        of `error` keeps alive what has filled the memory. Several processes cannot recover so: the others wait in backward
        for the one that failed.
        """
        withdrawn = self._keeper.recover_from(error)
        if withdrawn is None:
            return False
        self.scaler.abandon_step()
        for model in self._keeper.runner.models():
            model.zero_grad(set_to_none=True)
        self._after_step.follow(withdrawn, None, None)
        return True

    def non_finite_parameters(self, on_any_rank: bool = False) -> list[str]:
        """Qualified names of the parameters of adopted models that hold non-finite values. One host read.

        Args:
            on_any_rank: those of all ranks, which may hold shards and must all call it; one all-reduce and one more host
                read where there are several.
        """
        runner = self._keeper.runner
        here = non_finite_names(runner.named_parameters())
        if not (on_any_rank and self.scaler.ranks_agree and is_distributed()):
            return here
        names = [name for name, _ in runner.named_parameters()]
        flags = torch.tensor([float(name in here) for name in names], device=runner.device)
        found = all_reduce_max_to_host(flags)
        return [name for name, flag in zip(names, found, strict=True) if flag]

    def run_metadata(self) -> dict[str, Any]:
        """What a log begins with: the precision and the options in force, as plain data."""
        return {"precision": self.plan.default.value, "config": self.config.to_dict()}

    def log_to(self, folder: str | Path) -> None:
        """Writes events, and what `log_metrics` gives, into `folder`, for `hf-amp report`, until `detach`.

        For loops of your own, on one process; a Trainer's callback does it in `output_dir`.

        Raises:
            OSError: the folder cannot be written to.
        """
        from hf_amp.events import LOG_FILE
        from hf_amp.monitoring.sinks.jsonl import JsonLinesSink  # loads structlog

        sink = JsonLinesSink(Path(folder) / LOG_FILE, self.run_id, rank=0)
        self.begin_log(sink.write, f"training starts: {self.describe()}.", **self.run_metadata())

        def end() -> None:
            self.note(EventKind.TRAINING_ENDED, "training ends.", **self.metrics())
            self.end_log(sink.write)
            sink.close()

        self.changes.on_undo(end)

    def log_metrics(self, step: int | None = None, **figures: float) -> None:
        """Writes the newest metrics into the log, with `figures` of the caller's beside them, such as the loss.

        Called at every logging step by the Trainer integration; a loop of your own calls it as often as it logs. No
        host read.

        Args:
            step: optimizer step that they are of; None for the newest that is known.
        """
        known = {**figures, **self.metrics(), **self._modules.unlogged()}
        self.record(AmpEvent(self.newest_step if step is None else step, EventKind.METRICS, figures=known))

    def begin_at(self, completed_steps: int) -> None:
        """Makes step numbers in events go on from `completed_steps`, which a resumed run has behind it."""
        self.first_step = completed_steps + 1 - self.scaler.decided_steps
        self.newest_step = completed_steps

    def detach(self) -> None:
        """Gives everything that was attached to its former state. Harmless when called again."""
        self._detach("hf_amp is detached")

    @property
    def is_attached(self) -> bool:
        """Whether neither `detach` nor another session on a model of this one has ended it."""
        return self._after_step.decided in self.scaler.observers

    def _detach(self, why: str) -> None:
        if self.is_attached:
            self.scaler.observers.remove(self._after_step.decided)
            step_hooks, ours = self.scaler.step_hooks, self._after_step.collect_module_statistics
            step_hooks[:] = [ask for ask in step_hooks if ask != ours]
            ForwardContext.leave_interrupted()
            self.changes.undo()
            self.note(
                EventKind.DETACHED, f"{why}; what it had changed is as before, upcast parameters excepted."
            )

    def __enter__(self) -> AmpSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()
