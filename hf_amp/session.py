"""`AmpSession`: one run, from a step's outcome to events. It wires scaling, fallback and monitoring together.

Reading order: `on_step` is what follows from one optimizer step; `register_model` is how a model joins the run.
"""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import functools
import logging
import math
import platform
import sys
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_amp.capture import NOT_CAPTURED, can_be_captured, captured, save_capture, unscaled
from hf_amp.choose import watch_float8
from hf_amp.config import MixedPrecisionConfig
from hf_amp.device import Hardware, peak_bytes, probe
from hf_amp.errors import AttachError, ConfigError, StateError, in_one_line
from hf_amp.events import LOG_FILE, AmpEvent, Cause, EventKind, EventRecorder, StepOutcome, counted_names, join_names
from hf_amp.fallback.controller import FallbackController, PrecisionChange
from hf_amp.fallback.diagnosis import Diagnosis, SkippedStep, joined, non_finite_names
from hf_amp.fallback.module_precision import CurrentPrecision, ForwardContext
from hf_amp.fallback.plan import PrecisionPlan, common_to_ranks
from hf_amp.fallback.sharded import leave_casts_to_autocast
from hf_amp.monitoring.energy import EnergyMeter
from hf_amp.monitoring.frozen import FrozenDetector, HalfParameter, remedies_in_words
from hf_amp.monitoring.modules import LOST, ModuleMonitor
from hf_amp.monitoring.monitor import PrecisionMonitor
from hf_amp.monitoring.rewind import Rewinder
from hf_amp.monitoring.sinks.console import Console, say
from hf_amp.monitoring.stall import StallDetector
from hf_amp.monitoring.throughput import ThroughputMonitor
from hf_amp.patch_log import PatchLog, takes_hooks
from hf_amp.precision import BF16_FORMAT, FP16_FORMAT, HALF_DTYPES, PrecisionMode
from hf_amp.report.reader import RunHistory, read_run, this_process
from hf_amp.report.verdict import LAST_LOSSES, verdict_on
from hf_amp.scaling.left_out import LEFT_OUT, ended_in_words, join_left_out_steps
from hf_amp.scaling.master_weights import convert_parameters
from hf_amp.scaling.optimizer_step import LOST_OF_EACH, install_refusal
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.scaling.step import GradientStep, Unscale
from hf_amp.schedule import ScheduledPrecision
from hf_amp.serialization import parse
from hf_amp.statistics import (
    all_reduce_max_to_host,
    elements_of,
    held_by,
    is_distributed,
    is_main_process,
    is_sharded,
    to_device,
)

_log = logging.getLogger("hf_amp")
_trained_by: weakref.WeakKeyDictionary[nn.Module, Callable[[], AmpSession | None]] = weakref.WeakKeyDictionary()
"""The session that has trained a model last, weakly."""


@dataclass
class _Finding:
    """What was found of a skipped step, and done about it; the same for all optimizers of its backward."""

    diagnosis: Diagnosis
    change: PrecisionChange | None
    backward: int
    optimizers: set[int]
    """`id` of those that it holds for so far."""


class AmpSession(EventRecorder):
    """What hf_amp does and knows in one run. Made by `attach`, `MixedPrecisionCallback` and `AmpSession.for_model`.

    Args:
        config: the options in force.
        scaler: decides the steps; in FP32 and BF16 it scales nothing and is the finite check alone.
        mode: the precision that the Trainer or Accelerator was given, where the plan begins.
        hardware: what the device can run.
        description: one phrase for what runs, where it is not the plan alone; None where it is.

    Attributes:
        requested_mode: `mode`.
        folds_clipping: whether clipping by norm may be fused into the optimizer step: nobody looks at gradients before it.
        total_steps: optimizer steps of the run, in which fractions of `precision_schedule` count; a Trainer sets it.
        monitor: counts and newest figures.
        stall: whether anything can be learned yet.
        throughput: how fast the run goes.
        rewinder: which checkpoints are good, and whether to go back to one.
        on_fault: goes back where an integration does so inside of a step; None where it does not.
        patches: what was changed on the instances attached to; undone by `detach`.
        without_scaler: makes a context in which prepared optimizers take steps that are not training's.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig,
        scaler: AdvancedGradScaler,
        mode: PrecisionMode,
        hardware: Hardware,
        description: str | None = None,
    ) -> None:
        super().__init__([Console().write])
        self.config = config
        self.scaler = scaler
        self.hardware = hardware
        self.requested_mode = mode
        self.folds_clipping = False
        self.patches = PatchLog()
        self.without_scaler: Callable[[], AbstractContextManager[None]] = nullcontext
        self.monitor = PrecisionMonitor()
        self.monitor.scale = scaler.get_scale()  # known before the first step, and on the host
        self.stall = StallDetector(config.patience)
        self.throughput = ThroughputMonitor(device=hardware.device)
        self.rewinder = Rewinder(config)
        self.on_fault: Callable[[], bool] | None = None
        self._description = description
        self._modules = ModuleMonitor(config.monitoring_interval)
        self._frozen = FrozenDetector()
        self.total_steps = config.total_steps
        self._schedule_due: int | None = None
        self._energy: EnergyMeter | None = None
        self._fallback = FallbackController(config, mode, hardware, scaler)
        self._finding: _Finding | None = None
        self._fallback.recorder.on_error = self._explain_error
        self._fallback.on_withdrawn = lambda change: self._report_change(change, cause=None)
        self._queued_in: dict[int, PrecisionMode] = {}  # attempt → the plan's default when its forward pass began
        self._at_floor = self._loss_is_lost = False
        self._applied: dict[int, int] = {}  # the newest step that has moved what an optimizer, by its `id`, holds
        self._zeros_tried_at = 0.0
        self._excepthook: functools.partial[None] | None = None
        self._runs = self._at_exit = self._speaks = False
        self._log: Path | None = None
        self._losses: deque[tuple[int, float]] = deque(maxlen=LAST_LOSSES + 1)
        self._close_log: Callable[[], None] | None = None
        self._warned_of_no_log = False
        # parameters of no known optimizer, and their versions
        self._unheld: dict[str, tuple[Tensor, int]] | None = None
        self.patches.on_undo(self._fallback.remove)
        scaler.observers.append(self.on_step)
        if config.precision_schedule is not None and config.enabled:
            scaler.after_update = self._follow_schedule_when_due
        scaler.discard_forwards = self._fallback.recorder.discard
        scaler.is_replaying = lambda: self._fallback.recorder.is_paused
        scaler.note_loss = self._note_loss
        scaler.not_sampled = lambda: self._fallback.runner.fp32_parameters
        scaler.stateful.update(
            monitor=self.monitor,
            stall=self.stall,
            fallback=self._fallback,
            throughput=self.throughput,
            frozen=self._frozen,
        )
        if config.on_stalled == "rewind" or config.loss_spikes:
            scaler.stateful["rewind"] = self.rewinder
        if config.loss_spikes:
            scaler.watch_loss = self.rewinder.note
            scaler.step_hooks.append(self.rewinder.collect)
        if config.monitor_modules and config.enable_monitoring:
            scaler.step_hooks.append(self._module_statistics)
            self.patches.on_undo(self._modules.remove_hooks)
        self._note_models()

    @classmethod
    def for_model(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any = None, **options: Any
    ) -> AmpSession:
        """A session for a loop without accelerate: written by hand, Lightning Fabric, torchtitan.

        The model's forward pass runs in the plan's precision from now on; a loss that is made outside of the model belongs
        inside of `session.autocast()`. The loop steps by `session.scaler`::

            session.scaler.scale(loss).backward()
            session.scaler.step(optimizer)
            session.scaler.update()

        Args:
            model: plain, sharded by FSDP2 or tensor parallel, or in DataParallel or DistributedDataParallel; on its device. Of
                FSDP1's no forward pass is repeated: causes are looked for in weights and batches.
            optimizer: of that model; before its first step.
            config: a `MixedPrecisionConfig`, a mapping of options, or the path of a YAML or JSON file; None for the defaults.
            options: options as keywords, in place of a config.

        Raises:
            ConfigError: an option is wrong.
            AttachError: the model has half-precision parameters that `half_parameters` does not allow.
        """
        config = MixedPrecisionConfig.from_any(config, options, "AmpSession.for_model")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        session = cls.on_device(config, device, is_distributed())
        if config.on_stalled == "rewind":
            raise ConfigError(_NO_CHECKPOINTS)
        if config.enabled:
            inner = unwrapped(model)
            session.register_model(inner, entry_point=model)
            context = ForwardContext(session.current_precision)
            half = any(p.dtype in HALF_DTYPES for p in inner.parameters())
            is_upcast = half and session.requested_mode is PrecisionMode.FP32
            everywhere = session._fallback.runner.entry.emulate or is_upcast
            session.patches.on_undo(context.install(inner, everywhere=everywhere))
            session.patches.on_undo(join_left_out_steps(session.scaler, model, session.note))
            session.register_optimizer(model, optimizer)
            session.patches.on_undo(install_refusal(optimizer, session.scaler.is_waiting))
        session.note(EventKind.ATTACHED, f"hf_amp is attached: {session.describe()}.")
        return session

    @classmethod
    def on_device(cls, config: MixedPrecisionConfig, device: torch.device, ranks_agree: bool) -> AmpSession:
        """A session without models yet, in the precision that `config` asks for: FP16 where it asks for none."""
        requested = config.precision_mode
        if requested in (None, PrecisionMode.DYNAMIC):
            requested = PrecisionMode.MIXED
        mode = requested if config.enabled and requested else PrecisionMode.FP32
        scaler = AdvancedGradScaler(dataclasses.replace(config, precision_mode=mode), device)
        scaler.ranks_agree = scaler.ranks_agree or ranks_agree
        hardware = probe(device)
        return cls(config, scaler, mode, common_to_ranks(hardware, device) if ranks_agree else hardware)

    def __repr__(self) -> str:
        return f"<AmpSession {self.run_id}: {self.describe()}, step {self.newest_step}>"

    @property
    def plan(self) -> PrecisionPlan:
        """Which precision runs where, now."""
        return self._fallback.plan

    def metrics(self) -> dict[str, float]:
        """The catalogue's names and their newest values; see `monitoring/metrics.py`. No GPU-CPU sync. From any thread."""
        with self.lock:
            peak = peak_bytes(self._devices)
            memory = {} if peak is None else {"memory_bytes": float(peak)}
            energy = {} if self._energy is None else self._energy.metrics(self.monitor.applied_steps)
            return self.monitor.metrics() | self.throughput.metrics() | self.rewinder.metrics() | memory | energy

    def module_metrics(self) -> dict[str, dict[str, float]]:
        """Name of a figure → qualified module name → newest value; empty without `monitor_modules`. No GPU-CPU sync."""
        with self.lock:
            return self._modules.by_module()

    def describe(self) -> str:
        """One phrase: the precision of the run, and what that means on this device."""
        if not self.config.enabled:
            return "without hf_amp, which the config disables"
        if self._description is not None:
            return self._description
        return self.hardware.describe(self.plan.default, self.config.emulate) + self._fallback.runner.limits

    def run_metadata(self) -> dict[str, Any]:
        """What a log begins with: the precision, the options in force, the model, and what it runs on, as plain data."""
        sizes = [(type(m).__name__, sum(p.numel() for p in m.parameters())) for m in self._fallback.runner.models()]
        known = [(name, sys.modules.get(name)) for name in ("torch", "transformers", "accelerate")]
        return {
            "precision": self.plan.default.value,
            "config": self.config.to_dict(),
            "model": ", ".join(f"{name} with {counted(size, 'parameter')}" for name, size in sizes),
            "device": f"{self.hardware.device}: {self.hardware.name}",
            "versions": {
                "hf_amp": str(cast(Any, sys.modules["hf_amp"]).__version__),
                "python": platform.python_version(),
                **{name: str(cast(Any, module).__version__) for name, module in known if module},
            },
            "process": this_process(),
        }

    def follow_schedule(self) -> None:
        """Puts the plan where `precision_schedule` has it after as many steps as there were; every change is an event."""
        completed = self.first_step - 1 + self.scaler.decided_steps
        schedule = self.config.precision_schedule if self.config.enabled else None
        asked = ScheduledPrecision(None, {}, None)
        if schedule is not None:
            asked = schedule.precision_at(completed, self.total_steps)
        self._schedule_due = asked.until
        with self.lock:
            for change in self._fallback.follow_schedule(asked, self.scaler.get_scale()):
                self._report_change(change, None, completed, by_choice=True)
            self._queued_in[self.scaler.decided_steps + 1] = self.plan.default

    def _follow_schedule_when_due(self) -> None:
        if self._schedule_due is not None and self.first_step - 1 + self.scaler.decided_steps >= self._schedule_due:
            self.follow_schedule()

    def on_step(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        """An observer of the scaler: what follows from the outcome of one step of `optimizer`."""
        ForwardContext.leave_interrupted()
        with self.lock:
            self.newest_step = self.first_step + outcome.attempt - 1
            # A verdict that comes late is of a step that was queued before the newest change.
            ran_in = self._queued_in.pop(outcome.attempt, self._fallback.runner.plan.default)
            step_seconds = self.throughput.step_decided(ran_in.number_format.name)
            if outcome.extras:
                self._modules.take(id(optimizer), outcome.extras)
                self._take_lost_updates(outcome, optimizer)
            if outcome.applied:
                self.monitor.after_step(outcome)
                self._at_floor = False
                if change := self._fallback.after_applied(step_seconds, self.scaler.ranks_agree, ran_in):
                    self._report_change(change, cause=None)
                self._applied[id(optimizer)] = 0 if outcome.loss_finite is False else self.newest_step
                why = ""
                if (is_lost := outcome.non_finite_losses > 0) and not self._loss_is_lost:
                    bad = self.non_finite_parameters()
                    found = self._fallback.diagnoser.explain_forwards((), outcome.attempt)
                    where = f"{join_names(found.modules)}: " if found and any(found.modules) else ""
                    why = f"{where}{found.message}" if found and not bad else ""
                    if not outcome.zero_gradients:
                        seen = f" Inf or NaN is in {counted_names(bad)}." if bad else " In a replay: " * bool(why) + why
                        cause = Cause.WEIGHTS if bad else found.cause if found else Cause.LOSS
                        self.record(AmpEvent(self.newest_step, EventKind.LOSS_LOST, cause, message=_LOSS_LOST + seen))
                self._loss_is_lost = is_lost if outcome.losses else self._loss_is_lost
                flushed = outcome.zero_gradients and self._underflows(outcome)
                if stalled := self.stall.after_applied(outcome, self.newest_step, flushed, why):
                    self.record(stalled)
            else:
                self._on_skipped(outcome, optimizer)
            if self.rewinder.watches or self.stall.stalled:
                for event in self.rewinder.after_step(outcome, self.newest_step, self.stall.stalled):
                    self.record(event)
            self._queued_in[self.scaler.decided_steps + 1] = self._fallback.runner.plan.default
            if self._fallback.recorder.one_graph:
                self._fallback.recorder.begin_step()

    def go_back(self, load: Callable[[Any], None], step: int | None = None) -> bool:
        """Goes back to the newest good checkpoint, which `load` loads from its folder; reports whether it did, and says so.

        Between two steps, on all ranks. `step`: what the steps so far are counted as; None for the newest that is known.
        """
        self.scaler.flush()
        at = self.newest_step if step is None else step
        event = self.rewinder.go_back(load, at)
        if event.kind is EventKind.REWOUND:
            self.scaler.abandon_step()
            self.begin_at(at)
            self.throughput.pause()
            self._fallback.recorder.forget()
            self._finding, self._at_floor, self._loss_is_lost = None, False, False
            self._queued_in, self._applied = {}, {}
        self.record(event)
        return event.kind is EventKind.REWOUND

    def begin_run(self, log: Path | None = None) -> None:
        """One console line that says what runs and where the log is. A session does it by itself before its first step."""
        if self._runs:
            return
        for pattern in self.config.fp32_modules if self.config.enabled else ():
            self._check_is_known(pattern, "fp32_modules")
        if (schedule := self.config.precision_schedule) is not None and self.config.enabled:
            runner = self._fallback.runner
            schedule.check_run(self.total_steps, runner.sharded, runner.names_like, self.config.fp32_modules)
            for pattern in schedule.patterns():
                self._check_is_known(pattern, "precision_schedule")
            for sentence in schedule.passed_over(self.total_steps):
                self.note(EventKind.SETUP, sentence)
        self._runs, self._log = True, log
        if self.config.enable_monitoring:
            self._energy = EnergyMeter(self.hardware.device, self.monitor.applied_steps)
        if not self._at_exit:
            self._at_exit = True
            atexit.register(_end_at_exit, weakref.ref(self))
        self._excepthook = functools.partial(_explain_uncaught, weakref.ref(self), sys.excepthook)
        sys.excepthook = self._excepthook
        self._speaks = is_main_process()  # as the process ends, nobody knows any more who else there was
        if self._speaks:
            scaled = self.config.enabled and not self.scaler.no_scaling
            scaling = f", {self.config.scaling_strategy.value}" if scaled else ""
            where = "no log: session.log_to(folder) opens one" if log is None else f"log in {log}"
            say(f"{self.describe()}{scaling}, {where}.")

    def end_run(self, why: str = "training ended") -> None:
        """Says once how the run went, on the console of the main process and in the log. Harmless where none has begun.

        `detach` and the end of the process do it where a Trainer does not.
        """
        if not self._runs:
            return
        self._runs = False
        if self._excepthook is not None and sys.excepthook is self._excepthook:
            sys.excepthook = self._excepthook.args[1]
        self.scaler.flush()
        summary = self.summary() if self.config.enabled else "hf_amp, which the config disables, counted nothing"
        self.note(EventKind.TRAINING_ENDED, f"{why}: {summary}.", **self.metrics())
        if self.config.enabled and self._speaks:
            figures = self._figures_in_words()
            say(f"{why}. Verdict: {self.verdict()}" + (f" At the end: {figures}." if figures else ""))

    def _check_is_known(self, pattern: str, option: str) -> None:
        runner = self._fallback.runner
        if not runner.names_like(pattern):
            known = {name for name, _ in runner.named_modules() if name}
            known |= {type(module).__name__ for _, module in runner.named_modules()}
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ConfigError(f"{option}: no module is called {pattern!r}, by name, as a glob, or by its class{hint}.")

    def show(self) -> Any:
        """The report of the run so far, which a notebook shows where a cell ends with it.

        Raises:
            StateError: the run writes no log.
        """
        from hf_amp.report.page import InlinePage  # loads matplotlib

        if self._log is None:
            raise StateError("this run writes no log to make a report of: call session.log_to(folder) before training.")
        return InlinePage(read_run(self._log))

    def capture(self, step: int, path: str | Path | None = None) -> Path:
        """Writes a file that holds what optimizer step `step`, which is to come, did: for `hf-amp diff` and `hf_amp.compare`.

        Once its gradients are there and before it moves anything, its newest forward pass and backward are repeated, twice; where FSDP2
        shards the model, by all ranks together, all of which must have asked for it.

        Args:
            path: of the file; None for `capture_step_{step}.safetensors` beside the log. Of several ranks each writes its own,
                with `_rank{rank}` in its name.

        Raises:
            StateError: the step is over, there is neither a log nor a path, or parameters are sharded by other means than FSDP2.
        """
        if not all(map(can_be_captured, self._fallback.runner.models())):
            raise StateError(f"session.capture({step}): {NOT_CAPTURED}")
        if step <= self.newest_step or (path is None and self._log is None):
            raise StateError(
                f"session.capture({step}): pass a step to come, from {self.newest_step + 1} on, and a path where there is no log."
            )
        target = Path(path) if path is not None else cast(Path, self._log).parent / f"capture_step_{step}.safetensors"
        if is_distributed():
            target = target.with_stem(f"{target.stem}_rank{torch.distributed.get_rank()}")

        def take(record: GradientStep, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
            if self.first_step + self.scaler.decided_steps >= step:
                self.scaler.step_hooks = [hook for hook in self.scaler.step_hooks if hook is not take]
                self._write_capture(step, target)
            return {}

        self.scaler.step_hooks.append(take)
        return target

    def _write_capture(self, step: int, path: Path) -> None:
        recorder, scale = self._fallback.recorder, self.scaler.get_scale()
        recorder.is_paused = True
        try:
            with self._fallback.diagnoser.in_lockstep(self.scaler.decided_steps + 1):
                forward = unscaled(recorder.newest()[-1], scale)
                group = torch.distributed
                rank, ranks = (group.get_rank(), group.get_world_size()) if is_distributed() else (0, 1)
                trace = captured(forward, self._fallback.runner.current, scale, rank)
            facts = {"step": step, "fp32_modules": sorted(self.plan.modules), "rank": rank, "ranks": ranks}
            save_capture(trace, forward, path, **facts)
            self.note(EventKind.SETUP, f"step {step} was captured in {path}.")
        except Exception as error:  # a full disk, memory, a batch that was written into: training goes on
            self.note(EventKind.SETUP, f"step {step} could not be captured: {in_one_line(error)}.")
        finally:
            recorder.is_paused = False

    def verdict(self) -> str:
        """What the report would say of the run now, in a sentence."""
        run = RunHistory("", Path(), newest_step=self.newest_step)
        for event in self.events:
            run.take(event)
        for step, loss in self._losses:
            run.figures["loss"].add(step, loss)
        for name, value in self.metrics().items():
            run.figures[name].add(self.newest_step, value)
        return verdict_on(run).sentence

    def summary(self) -> str:
        """Steps applied and skipped by cause, changes of precision, final scale, time in each precision: a phrase."""
        monitor = self.monitor
        causes = ", ".join(f"{n} {cause}" for cause, n in sorted(monitor.skipped_by_cause.items()))
        skipped = f"{monitor.skipped_steps:,} skipped" + (f" ({causes})" if causes else "")
        changes = counted(monitor.precision_changes, "change") + " of precision"
        return ", ".join(
            [f"{counted(monitor.applied_steps, 'step')} applied", skipped, changes, self._figures_in_words()]
        )

    def _figures_in_words(self) -> str:
        modules, scale = self.monitor.modules_in_fp32, self.monitor.scale
        parts = [
            *([f"{counted(modules, 'module')} in FP32"] if modules else []),
            *([] if self.scaler.no_scaling or scale is None else [f"scale {scale:g}"]),
            *(f"{seconds:.1f} s in {name}" for name, seconds in sorted(self.throughput.seconds_by_format.items())),
        ]
        return ", ".join(parts)

    def _take_lost_updates(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        """What the newest sampled step of `optimizer`, an earlier one, has lost to rounding, by parameter."""
        shares = elements_of(outcome.extras, LOST_OF_EACH)
        held = [(n, p) for n, p in self._named_parameters(optimizer) if p.dtype in HALF_DTYPES] if shares else []
        if not held or len(held) != len(shares):  # they were converted since
            return
        parameters = [HalfParameter(n, p.numel(), share) for (n, p), share in zip(held, shares, strict=True)]
        if self._module_statistics in self.scaler.step_hooks:
            self._modules.add(LOST, {p.name: p.lost for p in parameters if math.isfinite(p.lost)})
        state = sum(
            value.numel()
            for _, p in held
            for value in optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor) and value.dtype in HALF_DTYPES and value.shape == p.shape
        )
        remedies = remedies_in_words(sum(p.elements for p in parameters), state, any(is_sharded(p) for _, p in held))
        rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
        known = {f"{float(lr):.3g}" for lr in rates if not (isinstance(lr, Tensor) and lr.device.type != "cpu")}
        rate = " ".join(["the learning rate", *([f"({', '.join(sorted(known))})"] if known else [])])
        formats = " and ".join(f.name for f in (FP16_FORMAT, BF16_FORMAT) if any(p.dtype == f.dtype for _, p in held))
        seen = (outcome.lost_update_fraction, parameters, formats, rate, remedies)
        for event in self._frozen.after_look(self.newest_step, *seen):
            self.record(event)
        self.scaler.looks_closely = self._frozen.suspects

    def _note_loss(self, loss: Tensor) -> None:
        """Before a backward. In the first ones, looks whether models and optimizers belong together, and says where not."""
        self.begin_run()
        moved: list[str] = []
        if self._unheld is None:
            named, held = dict(self._fallback.runner.named_parameters()), self.scaler.watched_parameters()
            own, theirs = {id(p) for p in named.values()}, {id(p) for p in held}
            free = {name: p for name, p in named.items() if p.requires_grad and id(p) not in theirs}
            if own and (unknown := sum(id(p) not in own for p in held)):
                why = _REPLACED.format(counted_names(list(free))) if len(free) == unknown else _UNKNOWN_MODEL
                self.note(EventKind.SETUP, f"{unknown} of {len(held)} parameters that optimizers hold{why}")
            self._unheld = {} if self.scaler.no_scaling else {name: (p, p._version) for name, p in free.items()}
        elif moved := [name for name, (p, version) in self._unheld.items() if p._version != version]:
            self.note(EventKind.SETUP, f"no optimizer that hf_amp knows holds {counted_names(moved)}{_UNPREPARED}")
        if moved or not self._unheld or self.scaler.decided_steps > 1:
            self._unheld, self.scaler.note_loss = {}, None
        self._fallback.recorder.note_loss(loss)

    def _underflows(self, outcome: StepOutcome) -> bool:
        """Whether gradients that are all 0 are seen not to be in FP32; tried once a scale."""
        if self.scaler.no_scaling or outcome.scale == self._zeros_tried_at:
            return False
        self._zeros_tried_at = outcome.scale
        return self._fallback.diagnoser.underflows(outcome.attempt, outcome.scale)

    def _on_skipped(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        restored = self._fallback.recorder.restore_buffers(outcome.attempt)
        was_skipped = self._fallback.was_skipped
        finding = self._find_cause(outcome, optimizer)
        diagnosis, cause = finding.diagnosis, finding.diagnosis.cause
        # A loss may be the scale's trace, as after an adversarial step by scaled gradients. Then the next step shows it too.
        is_trace = cause.facts.moves_scale or not (diagnosis.confirmed or (cause is Cause.LOSS and not was_skipped))
        if finding.change or diagnosis.already_fixed or not is_trace or outcome.left_out_by is not None:
            self.scaler.forget_step(outcome)  # the scale was not to blame
        next_scale = self.scaler.get_scale()
        self.monitor.after_step(outcome, cause, next_scale)
        counts = ("inf_elements", "nan_elements", "losses", "non_finite_losses")
        figures = {name: getattr(outcome, name) for name in counts}
        seen = (cause, outcome.scale, next_scale, diagnosis.modules, diagnosis.message, figures)
        self.record(AmpEvent(self.newest_step, EventKind.STEP_SKIPPED, *seen))
        if restored:
            names = self._fallback.runner.names_of(restored)
            which = f"buffers of {join_names([name or 'the model itself' for name in names])} were not finite"
            message = f"{which} after the skipped step: the model's buffers are again what they were before it."
            self.record(AmpEvent(self.newest_step, EventKind.BUFFERS_RESTORED, modules=names, message=message))
        self._report_floor(outcome, next_scale, diagnosis)
        if finding.change and len(finding.optimizers) == 1:  # reported once for all of a backward
            self._report_change(finding.change, cause)
        self.record(self.stall.after_skipped(cause, self.newest_step))

    def _find_cause(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> _Finding:
        """What is found of the step and done about it, or was for another optimizer of the same backward."""
        former = self._finding
        if former and former.backward == outcome.backward and id(optimizer) not in former.optimizers:
            former.optimizers.add(id(optimizer))
            return former
        if outcome.left_out_by is not None:
            left_out = Diagnosis(Cause.UNKNOWN, LEFT_OUT.format(outcome.left_out_by), confirmed=False)
            return _Finding(left_out, None, outcome.backward, {id(optimizer)})
        parameters = self._named_parameters(optimizer)
        state = (
            (f"{key} of {name}", value)
            for name, parameter in parameters
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        )
        # A finite loss shows that the scale is to blame, but only where there is one.
        loss_finite = None if self.scaler.no_scaling and outcome.loss_finite else outcome.loss_finite
        applied, made = self._applied.get(id(optimizer)), ""
        if applied:
            made = f"Step {applied} was applied with finite gradients, so {type(optimizer).__name__}, the optimizer,{_MADE_THEM}"
        scales = (outcome.scale, self.scaler.get_scale())
        skip = SkippedStep(outcome.attempt, loss_finite, *scales, parameters, state, made)
        diagnosis = self._fallback.diagnose(skip, self.scaler.ranks_agree)
        elements = sum(p.grad.numel() for _, p in parameters if p.grad is not None)
        fraction = outcome.non_finite_fraction(elements)
        if self._fallback.runner.sharded and is_distributed():  # each rank has counted its own part
            (fraction,) = all_reduce_max_to_host(torch.tensor([fraction], device=self._fallback.runner.device))
        change = self._fallback.after_skipped(diagnosis, fraction, outcome.scale)
        self._finding = _Finding(diagnosis, change, outcome.backward, {id(optimizer)})
        return self._finding

    def _report_change(
        self, change: PrecisionChange, cause: Cause | None, step: int | None = None, by_choice: bool = False
    ) -> None:
        """Reports a change of plan, and restores the scale where the whole model is back in FP16."""
        if by_choice and not step:  # where the run begins
            self.monitor.modules_in_fp32 = len(change.after.modules)
        else:
            self.monitor.record_plan(len(change.after.modules), is_fallback=cause is not None)
        self._note_models()
        if change.scale_at_rest is not None:
            self.scaler.set_scale(min(change.scale_at_rest, self.scaler.get_scale()))
            self.scaler._growth_tracker = 0  # clean steps in another precision say nothing of a larger scale
        before, after = (plan.precision_of(change.modules).value for plan in (change.before, change.after))
        at = self.newest_step if step is None else step
        figures = {"by_choice": True} if by_choice else {}
        seen = (cause, before, after, change.modules, change.message, figures)
        self.record(AmpEvent(at, EventKind.PRECISION_CHANGED, *seen))

    def _report_floor(self, outcome: StepOutcome, next_scale: float, diagnosis: Diagnosis) -> None:
        if not outcome.loss_finite or outcome.scale > self.config.min_scale or self._at_floor:
            return
        self._at_floor = True
        cause, message = Cause.UNKNOWN, _AT_FLOOR
        if diagnosis.cause is Cause.SCALE and diagnosis.confirmed:
            cause, message = Cause.SCALE, "the scale may not become smaller: lower min_scale, or train in BF16 or FP32."
        seen = (cause, outcome.scale, next_scale, (), message)
        self.record(AmpEvent(self.newest_step, EventKind.SCALE_AT_FLOOR, *seen))

    def _module_statistics(self, record: GradientStep, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
        """A step hook of the scaler: what is to come to the host by module. No GPU-CPU sync."""
        return self._modules.collect(
            id(optimizer),
            lambda: [name for name, p in self._named_parameters(optimizer) if p.grad is not None],
            record.gradients,
            to_device(record.scale, record.device),
            scaled=record.unscale is Unscale.FUSED,
            no_scaling=record.unscale is Unscale.NONE,
            decided_steps=self.scaler.decided_steps,
        )

    def _named_parameters(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        names = {p: name for name, p in self._fallback.runner.named_parameters()}
        held = enumerate(held_by(optimizer))
        return [(names.get(p, f"parameter {index} of the optimizer"), p) for index, p in held]

    def register_model(self, model: nn.Module, entry_point: nn.Module | None = None, is_trained: bool = True) -> None:
        """Lets `model` follow the plan, and a skipped step of it be diagnosed, without keeping it alive.

        Args:
            model: the model itself, unwrapped.
            entry_point: what is called in its place, such as a DistributedDataParallel or compiled module around it.
            is_trained: False for one that only evaluates, such as a reference model: the plan covers it, and what it does
                to the loss is reported, but its parameters are none of the run's; `mark_trainable` takes that back.
        """
        if is_trained:
            self.detach_previous_session(model)
        self._fallback.runner.register_model(model, is_trained)
        called = model if entry_point is None else entry_point
        self.patches.on_undo(self._fallback.recorder.watch(called, model))
        if scripted := [name or "the model" for name, module in model.named_modules() if not takes_hooks(module)]:
            self.note(EventKind.SETUP, f"TorchScript runs {join_names(scripted)} by itself{_SCRIPTED}")
        if is_trained and not self.scaler.no_scaling and self.config.automatic_fallback:
            undo, message = leave_casts_to_autocast(model)
            self.patches.on_undo(undo)
            if message:
                self.note(EventKind.SETUP, message)
        if isinstance(called, nn.parallel.DistributedDataParallel):
            self.patches.set_attribute(called, "join_hook", self._refuse_join)
        if callable(generate := getattr(model, "generate", None)):  # it raises where the logits are NaN

            @functools.wraps(generate)
            def generate_again(*arguments: Any, **options: Any) -> Any:
                while True:
                    plan = self.plan
                    with self._fallback.recorder.generating():
                        try:
                            return generate(*arguments, **options)
                        except Exception as error:
                            if not self._explain_error(error) or self.plan == plan:
                                raise

            self.patches.set_attribute(model, "generate", generate_again)
        if is_trained:
            self._note_trained(model)
        if self.config.precision_schedule is not None:
            self.follow_schedule()
        if change := self._fallback.keep_in_fp32(self.config.fp32_modules):
            self.monitor.modules_in_fp32 = len(change.after.modules)
            self._note_models()
            seen = (change.before.default.value, PrecisionMode.FP32.value, change.modules, change.message)
            self.record(AmpEvent(self.newest_step, EventKind.PRECISION_CHANGED, None, *seen))

    def _refuse_join(self, **options: Any) -> None:
        raise AttachError(
            "torch's Join lets ranks run out of batches one by one, and the others would wait for their verdict: give all ranks "
            "the same number of batches (drop_last, or accelerate's even_batches=True), or detach hf_amp."
        )

    def detach_previous_session(self, model: nn.Module) -> None:
        """Detaches the session that has trained `model` so far: its plan would be in force under the one of this session."""
        former = _trained_by.get(model, lambda: None)()
        if former is not None and former is not self:
            former.detach(f"another session trains this {type(model).__name__} from now on: hf_amp is detached here")
        _trained_by[model] = weakref.ref(self)

    def mark_trainable(self, model: nn.Module) -> None:
        """Goes on with a registered `model` as one that is trained. Harmless where it is."""
        if self._fallback.runner.evaluates(model):
            self.detach_previous_session(model)
            self._fallback.runner.register_model(model)
            self._note_trained(model)

    def register_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Converts `model`'s half-precision parameters as `half_parameters` says, in `optimizer` too, for loops without accelerate.

        Raises:
            AttachError: `half_parameters` forbids what the model has, or it cannot be converted any more.
        """
        masters = self.scaler.master_weights
        # Inside DDP a change of dtype would cut parameters off from the reduction of their gradients.
        fixed = isinstance(model, nn.parallel.DistributedDataParallel)
        if masters is not None:
            masters.register_optimizer(optimizer)
            self.patches.on_undo(lambda: masters.release(restore=not fixed))
        self.scaler.watch(optimizer)
        self.record(convert_parameters(unwrapped(model), self.config, self.plan.default, [optimizer], masters, fixed))

    def _note_trained(self, model: nn.Module) -> None:
        if self._module_statistics in self.scaler.step_hooks:
            self._modules.register_model(model, self.scaler.decided_steps)
        watch_float8(self, model, self._fallback.recorder, self._fallback.runner)
        self._note_models()

    def _note_models(self) -> None:
        """A model has come, or the plan has changed: what share of the parameters runs in which format."""
        sizes = ((name, p.numel()) for name, p in self._fallback.runner.named_parameters())
        self.monitor.record_formats(self.plan.format_shares(sizes))
        self._devices = self._fallback.runner.devices()

    def non_finite_parameters(self, on_any_rank: bool = False, saved_buffers: bool = False) -> list[str]:
        """Qualified names of the parameters of registered models that hold non-finite values. One GPU-CPU sync.

        Args:
            on_any_rank: those of all ranks, which may hold shards and must all call it; one all-reduce and one more sync
                where there are several.
            saved_buffers: those of buffers that forward writes, too, as far as a checkpoint holds them; one more sync a model.
        """
        runner = self._fallback.runner
        here = non_finite_names(runner.named_parameters())
        for model in runner.models() if saved_buffers else ():
            bad = self._fallback.recorder.non_finite_buffers(model)
            here += [joined(runner.name_of(model), name) for name in bad if name in model.state_dict()]
        if not (on_any_rank and self.scaler.ranks_agree and is_distributed()):
            return here
        names = [name for name, _ in runner.named_parameters()]
        names += [joined(runner.name_of(model), name) for model in runner.models() for name, _ in model.named_buffers()]
        found = all_reduce_max_to_host(torch.tensor([float(name in here) for name in names], device=runner.device))
        return [name for name, flag in zip(names, found, strict=True) if flag]

    @property
    def current_precision(self) -> CurrentPrecision:
        """Gives, at every call, a new context of the plan's default as it is by then."""
        return self._fallback.runner.current

    @property
    def is_sharded(self) -> bool:
        """Whether parameters of its models are shards."""
        return self._fallback.runner.sharded

    def follow_default(self, change: Callable[[PrecisionMode], None]) -> None:
        """Has `change` called with every new default of the plan, for models that do not enter it by themselves."""
        self._fallback.runner.on_default_change.append(change)

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which a forward pass runs in the plan's default precision, for loops without accelerate."""
        return self.current_precision()

    def disable_replay(self) -> None:
        """Looks for causes in weights and batches only: a forward pass would run, and move, another library's scales."""
        self._fallback.diagnoser.repeats_forwards = False

    def on_trial(self, patch: Callable[[PatchLog], None]) -> None:
        """Has `patch` called whenever a wider plan is tried out, with what takes changes back in its first forward pass."""
        self._fallback.on_trial = patch

    def recover(self, error: BaseException) -> bool:
        """Whether the step that raised `error` can be tried again, because the plan that caused it has changed.

        That is where memory ran out under a plan that had just widened precision: the former plan is in force again. And
        where forward, or a loss made from it, raised because an overflow made inf or NaN: the modules to blame run in FP32 now.
        The gradients of the registered models are cleared. Try again after the `except` clause, not in it: the traceback of
        `error` keeps alive what has filled the memory. Several processes cannot recover so: the others wait in backward for
        the one that failed.
        """
        if self.scaler.ranks_agree and is_distributed():
            return False
        withdrawn = self._fallback.recover_from(error)
        if withdrawn is not None:
            self._report_change(withdrawn, cause=None)
        elif not self._explain_error(error):
            return False
        self.scaler.abandon_step()
        for model in self._fallback.runner.models():
            model.zero_grad(set_to_none=True)
        return True

    def _explain_error(self, error: BaseException, is_the_end: bool = False) -> bool:
        """Reports an exception that values which are not finite have caused; whether the plan has changed since, for a new try.

        Args:
            is_the_end: nobody has caught it, so that there is no such try.
        """
        if vars(error).get(_EXPLAINED) == self.run_id:
            return self._fallback.newest_change is not None
        if not isinstance(error, Exception) or isinstance(error, torch.OutOfMemoryError):
            return False
        with self.lock:
            ForwardContext.leave_interrupted()
            parameters = self._fallback.runner.named_parameters()
            diagnosis = self._fallback.diagnoser.explain_forwards(parameters)
            if diagnosis is None:
                return False
            vars(error)[_EXPLAINED] = self.run_id  # its `id` would be the next one's
            alone = not is_the_end and not (self.scaler.ranks_agree and is_distributed())
            change = self._fallback.after_skipped(diagnosis, 1.0, self.scaler.get_scale()) if alone else None
            then = " The next try runs under another plan." if change else ""
            if is_the_end and diagnosis.cause.facts.moves_precision and 0 < len(diagnosis.modules) <= 8:
                then = f" Start again with fp32_modules={list(diagnosis.modules)}."
            message = f"{type(error).__name__} was raised: {diagnosis.message}{then}"
            seen = (diagnosis.cause, None, None, diagnosis.modules, message)
            self.record(AmpEvent(self.newest_step + 1, EventKind.FORWARD_RAISED, *seen))
            if change:
                self._report_change(change, diagnosis.cause, self.newest_step + 1)
            return change is not None

    def log_to(self, folder: str | Path) -> None:
        """Writes events, and what `log_metrics` gives, into `folder`, for `hf-amp report`, until `detach`.

        For loops of your own; of several ranks the main process writes. A Trainer's callback does it in `output_dir`.

        Raises:
            OSError: the folder cannot be written to.
        """
        from hf_amp.monitoring.sinks.jsonl import JsonLinesSink  # loads structlog

        if not is_main_process():
            self._unwritten = None
            self.begin_run(Path(folder) / LOG_FILE)
            return
        sink = JsonLinesSink(Path(folder) / LOG_FILE, self.run_id, rank=0)
        self.begin_log(sink.write, f"training starts: {self.describe()}.", **self.run_metadata())
        self.begin_run(sink.path)

        def close() -> None:
            self.end_run()
            self.end_log(sink.write)
            sink.close()

        self._close_log = close

    def log_metrics(self, step: int | None = None, **figures: Any) -> None:
        """Writes the newest metrics into the log, with `figures` of the caller's beside them, such as the loss.

        A loop of your own calls it as often as it logs, after `log_to`. A tensor on a device is a GPU-CPU sync; numbers are none.

        Args:
            step: optimizer step that they are of; None for the newest that is known.
            figures: numbers, or tensors and NumPy scalars with one element; text is kept as it is.

        Raises:
            TypeError: a figure is something else.
        """
        if self._unwritten is not None and not self._warned_of_no_log:
            self._warned_of_no_log = True
            _log.warning(
                "hf_amp: log_metrics before log_to: figures are kept, and written once session.log_to(folder) is called."
            )
        self.record_metrics(step, {name: figure_of(name, value) for name, value in figures.items()})

    def record_metrics(self, step: int | None, figures: Mapping[str, Any]) -> None:
        """`log_metrics` for integrations: whether there is a log is not the caller's business."""
        at = self.newest_step if step is None else step
        if isinstance(loss := figures.get("loss"), (int, float)):
            self._losses.append((at, float(loss)))
        known = {**figures, **self.metrics(), **self._modules.unlogged()}
        self.record(AmpEvent(at, EventKind.METRICS, figures=known))

    def progress(self) -> dict[str, Any]:
        """What a run in any precision goes on from: counters and figures, and the precision that they were made in."""
        return {"precision": self.requested_mode.value, **self.scaler.progress()}

    def load_progress(self, progress: dict[str, Any]) -> str:
        """Goes on from what `progress` gave, but takes no plan that was made for another precision.

        Returns:
            The precision that the saved run was in.

        Raises:
            StateError: something in it cannot be; nothing has changed then.
        """
        saved = parse(dict[str, Any], progress, "the progress")
        precision = str(saved.get("precision", self.requested_mode.value))
        self.scaler.load_progress(saved, same_precision=precision == self.requested_mode.value)
        return precision

    def state_dict(self) -> dict[str, Any]:
        """Everything that a loop without accelerate has to save beside model and optimizer: plain data. One GPU-CPU sync.

        Of several ranks all call it where verdicts are late (PERFORMANCE_OPTIMIZED): they agree on the newest.
        """
        return {"precision": self.requested_mode.value, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`, in the same precision or another.

        Raises:
            StateError: it is no session's state; nothing has changed then.
        """
        saved = parse(dict[str, Any], state_dict, "the session's state")
        scaler = parse(dict[str, Any], saved.get("scaler"), "the session's state['scaler']")
        if saved.get("precision") == self.requested_mode.value:
            self.scaler.load_state_dict(scaler)
        else:
            self.load_progress({"precision": saved.get("precision"), **scaler.get("hf_amp", {})})
        self.begin_at(self.scaler.decided_steps)

    def begin_at(self, completed_steps: int) -> None:
        """Makes step numbers in events go on from `completed_steps`, which a resumed run has behind it."""
        self.first_step = completed_steps + 1 - self.scaler.decided_steps
        self.newest_step = completed_steps
        self.follow_schedule()

    @property
    def is_attached(self) -> bool:
        """Whether neither `detach` nor another session on a model of this one has ended it."""
        return self.on_step in self.scaler.observers

    def detach(self, why: str = "hf_amp is detached") -> None:
        """Gives everything that was attached to its former state; `why` is for the event. Harmless when called again."""
        if self.is_attached:
            self.scaler.observers.remove(self.on_step)
            self.scaler.watch_loss = None
            hooks, ours = self.scaler.step_hooks, (self._module_statistics, self.rewinder.collect)
            hooks[:] = [hook for hook in hooks if hook not in ours]
            ForwardContext.leave_interrupted()
            self.end_run()
            self.patches.undo()
            if self._close_log is not None:
                self._close_log()
                self._close_log = None
            self.note(EventKind.DETACHED, f"{why}; what it had changed is as before, upcast parameters excepted.")

    def __enter__(self) -> AmpSession:
        return self

    def __exit__(self, *raised: object) -> None:
        self.detach()


_EXPLAINED = "_hf_amp_explained_in"
"""What an exception is marked with."""
_AT_FLOOR = (
    "the gradients overflow even at the smallest scale, so the scale is not the cause; train in BF16 or FP32 and look for "
    "activations beyond 65504."
)
_UNKNOWN_MODEL = " belong to no model that hf_amp knows, and follows: pass every model through accelerator.prepare."
_REPLACED = (
    " are no longer the model's: {} have taken their place and do not train. Make the optimizer after that; where accelerate's "
    "FP8 by torchao does it, pass AORecipeKwargs(enable_fsdp_float8_all_gather=False)."
)
_UNPREPARED = (
    ", but the values have changed. If an optimizer of yours changes them, pass it through accelerator.prepare: else it steps on "
    "gradients that are still multiplied by the loss scale. If they are an average of others (EMA), there is nothing to do."
)
_MADE_THEM = " made them non-finite (by a norm or root of 0, as with eps=0), or code that wrote to them after it. "
_NO_CHECKPOINTS = "AmpSession.for_model(on_stalled='rewind'): hf_amp knows no checkpoints there; use a Trainer, hf_amp.attach or a manager."
_LOSS_LOST = "the loss was not finite, but every gradient is, and the step was applied: look at the loss function, and its masks."
_SCRIPTED = ": no module in it is named or put in FP32, and a whole model is not emulated. Loss scaling and the finite check work."


def counted(number: int, noun: str, plural: str = "s") -> str:
    """ "1 step", "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def figure_of(name: str, value: Any) -> float | str:
    """A figure of a loop's own as a log has it."""
    if isinstance(value, (str, bool, int, float)):
        return value
    if getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1):
        number = value.item()  # of a tensor, or of NumPy
        if isinstance(number, (bool, int, float)):
            return number
    raise TypeError(
        f"{name} was logged as a {type(value).__name__}: pass a number, text, or a tensor or NumPy scalar with one element."
    )


def _end_at_exit(session: Callable[[], AmpSession | None]) -> None:
    """At the end of the process: a run that nobody has ended ends here."""
    run = session()
    if run is not None and run.is_attached:
        if is_distributed():  # nothing is exchanged any more: this rank may be the only one that has come so far
            run.scaler.observers.clear()
        run.end_run("the process ended")
        if run._close_log is not None:
            run._close_log()


def _explain_uncaught(session: Callable[[], AmpSession | None], former: Any, kind: Any, error: Any, trace: Any) -> None:
    """Instead of `sys.excepthook`, while a run goes on: says why before Python prints the traceback, as after text generation in FP16."""
    run = session()
    if run is not None and run._runs:
        with suppress(Exception):
            run._explain_error(error, is_the_end=True)
            if is_distributed():
                say(ended_in_words(error, run.newest_step + 1, run._fallback.recorder.without_backward))
    former(kind, error, trace)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, DataParallel or DistributedDataParallel, whose names have nothing of these before them."""
    name = "module" if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else "_orig_mod"
    return unwrapped(cast(Any, model._modules[name])) if name in model._modules else model
