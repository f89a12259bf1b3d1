"""`AmpSession`: scaling, fallback and monitoring of one run, wired together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.config import MixedPrecisionConfig
from hf_amp.events import AmpEvent, Cause, EventKind
from hf_amp.fallback.apply import CurrentPrecision
from hf_amp.fallback.cause import Diagnosis, non_finite_names
from hf_amp.fallback.examiner import SkippedStep
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.fallback.plan_keeper import PlanKeeper
from hf_amp.fallback.transition import Transition
from hf_amp.forward_context import ForwardContext
from hf_amp.hardware import Hardware
from hf_amp.journal import Journal
from hf_amp.monitoring.hopeless import Finding, HopeWatch
from hf_amp.monitoring.module_monitor import ModuleMonitor
from hf_amp.monitoring.monitor import PrecisionMonitor
from hf_amp.monitoring.pace import Pace
from hf_amp.precision import NumberFormat, PrecisionMode
from hf_amp.reversible import ReversibleChanges
from hf_amp.scaling.boundary import Boundary, Treatment
from hf_amp.scaling.outcome import StepOutcome
from hf_amp.scaling.scaler import AdvancedGradScaler


class AmpSession(Journal):
    """What hf_amp does and knows in one run. Made by `attach` and `MixedPrecisionCallback`.

    Attributes:
        config: the options in force.
        scaler: the gradient scaler; in FP32 and BF16 it scales nothing and only guards.
        asked_for: the precision that the Trainer or Accelerator was given, where the plan begins.
        hardware: what the device can run.
        first_step: what the scaler's first decided step is called in events; 1, or later in a resumed run.
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
        self.first_step = 1
        self.folds_clipping = False
        self.described_as: str | None = None
        self.changes = ReversibleChanges()
        self.asked_for = mode
        self._keeper = PlanKeeper(config, mode, hardware, step=lambda: scaler.decided_steps + 1)
        self.changes.call_on_undo(self._keeper.remove)
        self.monitor = PrecisionMonitor()
        self.hope = HopeWatch(config.patience)
        self.pace = Pace(hardware.device)
        self._modules = ModuleMonitor(config.monitoring_interval)
        self._at_floor = False
        self._tell_monitor_of_formats()
        scaler.observers.append(self._record_step)
        scaler.not_sampled = lambda: self._keeper.runner.wide_parameters
        scaler.companions.update(monitor=self.monitor, hope=self.hope, fallback=self._keeper, pace=self.pace)
        if config.monitor_modules and config.enable_monitoring:
            scaler.passengers.append(self._look_at_modules)
            self.changes.call_on_undo(self._modules.end_close_look)

    # ---- what people read -----------------------------------------------------------------------------------

    @property
    def plan(self) -> PrecisionPlan:
        """Which precision runs where, now."""
        return self._keeper.plan

    def metrics(self) -> dict[str, float]:
        """The catalogue's names and their newest values; see `monitoring/metrics.py`. No host read. From any thread."""
        with self.lock:
            return {**self.monitor.metrics(), **self.pace.metrics()}

    def module_metrics(self) -> dict[str, dict[str, float]]:
        """Name of a figure → qualified module name → newest value; empty without `monitor_modules`. No host read."""
        with self.lock:
            return self._modules.by_module()

    def what_runs(self) -> str:
        """One phrase: the precision of the run, and what that means on this device."""
        if self.described_as is not None:
            return self.described_as
        if self.plan.default in (PrecisionMode.MIXED, PrecisionMode.FP16):
            return self.hardware.describe_fp16(self.config.emulate)
        return f"{self.plan.default.value} on {self.hardware.name}"

    # ---- what integrations call -----------------------------------------------------------------------------

    def adopt(self, model: nn.Module, entry_point: nn.Module | None = None) -> None:
        """Lets `model` follow the plan, and a skipped step of it be diagnosed, without keeping it alive.

        Args:
            model: the model itself, unwrapped.
            entry_point: what is called in its place, such as a DistributedDataParallel or compiled module around it.
        """
        if self._look_at_modules in self.scaler.passengers:
            self._modules.adopt(model, self.scaler.decided_steps)
        self.changes.call_on_undo(
            self._keeper.adopt(model, entry_point if entry_point is not None else model)
        )
        self._tell_monitor_of_formats()

    def repeat_no_forward(self) -> None:
        """Looks for causes in weights and batches only: a forward pass would run, and move, another library's scales."""
        self._keeper.examiner.repeats_forwards = False

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
        and the gradients of the adopted models are cleared. Several processes cannot recover so: the others wait in
        backward for the one that failed.
        """
        withdrawn = self._keeper.recover_from(error)
        if withdrawn is None:
            return False
        self.scaler.abandon_step()
        for model in self._keeper.runner.models():
            model.zero_grad(set_to_none=True)
        self._follow(withdrawn, None, None)
        return True

    def non_finite_parameters(self) -> list[str]:
        """Qualified names of the parameters of adopted models that hold non-finite values. One host read."""
        return non_finite_names(
            (name, p)
            for name, p in self._keeper.runner.named_parameters()
            if p.is_floating_point() and p.element_size() > 1  # FP8 knows no isfinite
        )

    def tell(self, finding: Finding | None) -> None:
        """Records what the watch over the run's hope has found, if anything."""
        if finding is not None:
            self.record(AmpEvent(self.newest_step, finding.kind, finding.cause, message=finding.message))

    def circumstances(self) -> dict[str, Any]:
        """What a log begins with: the precision and the options in force, as plain data."""
        return {"precision": self.plan.default.value, "config": self.config.to_dict()}

    def log_to(self, folder: str | Path) -> None:
        """Writes events, and what `log_metrics` gives, into `folder`, for `hf-amp report`, until `detach`.

        For loops of your own, on one process; a Trainer's callback does it in `output_dir`.

        Raises:
            OSError: the folder cannot be written to.
        """
        from hf_amp.monitoring.sinks.jsonl import FILE_NAME, JsonLinesSink  # loads structlog

        sink = JsonLinesSink(Path(folder) / FILE_NAME, self.run_id, rank=0)
        self.begin_log(sink.write, f"training starts: {self.what_runs()}.", **self.circumstances())

        def end() -> None:
            self.note(EventKind.TRAINING_ENDED, "training ends.", **self.metrics())
            self.end_log(sink.write)
            sink.close()

        self.changes.call_on_undo(end)

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
        if self._record_step in self.scaler.observers:
            self.scaler.observers.remove(self._record_step)
            self.scaler.passengers.clear()
            ForwardContext.leave_interrupted()
            self.changes.undo()
            self.note(
                EventKind.DETACHED,
                "hf_amp is detached; what it had changed is as before, upcast parameters excepted.",
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

    # ---- one optimizer step ---------------------------------------------------------------------------------

    def _record_step(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        ForwardContext.leave_interrupted()
        with self.lock:
            self._record(outcome, optimizer)

    def _record(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        step = self.first_step + outcome.attempt - 1
        self.newest_step = step
        self.monitor.record_lost_updates(outcome.lost_update_fraction)
        self.monitor.record_losses(outcome.losses, outcome.non_finite_losses)
        step_seconds = self.pace.step_decided(NumberFormat.of(self.plan.default).name)
        self._modules.take(id(optimizer), outcome.carried)
        if outcome.applied:
            self.monitor.record_applied(
                outcome.scale, outcome.grad_norm, outcome.grad_amax, outcome.underflow_fraction
            )
            self._at_floor = False
            self._follow(self._keeper.note_applied(step_seconds, self.scaler.ranks_agree), None, None)
            self.tell(self.hope.record_applied(outcome.zero_gradients, outcome.loss_finite, outcome.scale))
            return
        next_scale = self.scaler.get_scale()
        diagnosis = self._diagnose(outcome, next_scale, optimizer)
        self.monitor.record_skipped(diagnosis.cause, next_scale, outcome.inf_elements, outcome.nan_elements)
        self.record(
            AmpEvent(
                step=step,
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
        self._tell_of_floor(step, outcome, next_scale)
        fraction = outcome.non_finite_fraction(_gradient_elements(optimizer))
        self._follow(self._keeper.note_skipped(diagnosis, fraction), diagnosis.cause, outcome.scale)
        self.tell(self.hope.record_skipped(diagnosis.cause))

    def _diagnose(
        self, outcome: StepOutcome, next_scale: float, optimizer: torch.optim.Optimizer
    ) -> Diagnosis:
        # A finite loss shows that the scale is to blame, but only where there is one.
        loss_finite = None if self.scaler.guards_only and outcome.loss_finite else outcome.loss_finite
        parameters = self._named_parameters(optimizer)
        state = [
            (f"{key} of {name}", value)
            for name, parameter in parameters
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        ]
        skip = SkippedStep(outcome.attempt, loss_finite, outcome.scale, next_scale, parameters, state)
        return self._keeper.examiner.examine(skip, agree=self.scaler.ranks_agree)

    def _tell_of_floor(self, step: int, outcome: StepOutcome, next_scale: float) -> None:
        if not outcome.loss_finite or outcome.scale > self.config.min_scale or self._at_floor:
            return
        self._at_floor = True
        self.record(
            AmpEvent(
                step=step,
                kind=EventKind.SCALE_AT_FLOOR,
                cause=Cause.UNKNOWN,
                before=outcome.scale,
                after=next_scale,
                message="the gradients overflow even at the smallest scale, so the scale is not the cause; "
                "train in BF16 or FP32 and look for activations beyond 65504.",
            )
        )

    def _follow(self, transition: Transition | None, cause: Cause | None, skipped_at: float | None) -> None:
        """Tells of a change of plan, and sees to the scale, which was not to blame for it.

        Args:
            skipped_at: the scale of the skipped step that led to the change; None where the plan goes back.
        """
        if transition is None:
            return
        keeper, before, after = self._keeper, transition.before, transition.after
        self.monitor.record_plan(len(after.modules))
        self._tell_monitor_of_formats()
        if skipped_at is not None:
            self.monitor.record_fallback()
            self.scaler.set_scale(skipped_at)
            if before.default is not after.default and keeper.scale_at_rest is None:
                keeper.scale_at_rest = skipped_at
        elif keeper.scale_at_rest is not None and after.default is self.asked_for:
            self.scaler.set_scale(min(keeper.scale_at_rest, self.scaler.get_scale()))
            keeper.scale_at_rest = None
        self.record(
            AmpEvent(
                step=self.newest_step,
                kind=EventKind.PRECISION_CHANGED,
                cause=cause,
                before=before.precision_of(transition.modules).value,
                after=after.precision_of(transition.modules).value,
                modules=transition.modules,
                message=transition.message,
            )
        )

    def _look_at_modules(self, boundary: Boundary, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
        return self._modules.ride_along(
            id(optimizer),
            lambda: [name for name, p in self._named_parameters(optimizer) if p.grad is not None],
            boundary.gradients,
            boundary.scale,
            scaled=boundary.treatment is Treatment.FOLD,
            guards=boundary.treatment is Treatment.CHECK,
            decided_steps=self.scaler.decided_steps,
        )

    def _tell_monitor_of_formats(self) -> None:
        sizes = ((name, p.numel()) for name, p in self._keeper.runner.named_parameters())
        self.monitor.record_formats(self.plan.format_shares(sizes))

    def _named_parameters(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        names = {p: name for name, p in self._keeper.runner.named_parameters()}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return [(names.get(p, f"parameter {index}"), p) for index, p in enumerate(held)]


def _gradient_elements(optimizer: torch.optim.Optimizer) -> int:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(p.grad.numel() for p in held if p.grad is not None)
