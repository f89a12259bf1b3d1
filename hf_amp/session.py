"""`AmpSession`: scaling, fallback and monitoring of one run, wired together."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from hf_amp.after_step import AfterStep
from hf_amp.config import MixedPrecisionConfig
from hf_amp.events import AmpEvent, EventKind
from hf_amp.fallback.apply import CurrentPrecision
from hf_amp.fallback.cause import non_finite_names
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.fallback.plan_keeper import PlanKeeper
from hf_amp.forward_context import ForwardContext
from hf_amp.hardware import Hardware
from hf_amp.journal import Journal
from hf_amp.monitoring.pace import Pace
from hf_amp.precision import PrecisionMode
from hf_amp.reversible import ReversibleChanges
from hf_amp.scaling.scaler import AdvancedGradScaler
from hf_amp.statistics import agreement

_trains: weakref.WeakKeyDictionary[nn.Module, Callable[[], AmpSession | None]] = weakref.WeakKeyDictionary()
"""The session that has trained a model last, weakly."""


class AmpSession(Journal):
    """What hf_amp does and knows in one run. Made by `attach` and `MixedPrecisionCallback`.

    Attributes:
        config: the options in force.
        scaler: the gradient scaler; in FP32 and BF16 it scales nothing and only guards.
        asked_for: the precision that the Trainer or Accelerator was given, where the plan begins.
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
        self.changes = ReversibleChanges()
        self.asked_for = mode
        self._keeper = PlanKeeper(config, mode, hardware, step=lambda: scaler.decided_steps + 1)
        self.changes.call_on_undo(self._keeper.remove)
        self._after_step = AfterStep(self, config, scaler, self._keeper, Pace(hardware.device))
        self.monitor, self.hope = self._after_step.monitor, self._after_step.hope
        self.pace, self._modules = self._after_step.pace, self._after_step.modules
        scaler.observers.append(self._after_step.decided)
        scaler.not_sampled = lambda: self._keeper.runner.wide_parameters
        scaler.companions.update(monitor=self.monitor, hope=self.hope, fallback=self._keeper, pace=self.pace)
        if config.monitor_modules and config.enable_monitoring:
            scaler.passengers.append(self._after_step.look_at_modules)
            self.changes.call_on_undo(self._modules.end_close_look)

    # ---- what people read -----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<AmpSession {self.run_id}: {self.what_runs()}, step {self.newest_step}>"

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

    def adopt(self, model: nn.Module, entry_point: nn.Module | None = None, is_trained: bool = True) -> None:
        """Lets `model` follow the plan, and a skipped step of it be diagnosed, without keeping it alive.

        Args:
            model: the model itself, unwrapped.
            entry_point: what is called in its place, such as a DistributedDataParallel or compiled module around it.
            is_trained: False for one that only evaluates, such as a reference model: the plan covers it, and what it does
                to the loss is told, but its parameters are none of the run's; `take_as_trained` takes that back.
        """
        if is_trained:
            self.take_over(model)
        self.changes.call_on_undo(
            self._keeper.adopt(model, entry_point if entry_point is not None else model, is_trained)
        )
        if is_trained:
            self._see_trained(model)

    def take_over(self, model: nn.Module) -> None:
        """Detaches the session that has trained `model` so far: its plan would be in force under the one of this session."""
        former = _trains.get(model, lambda: None)()
        if former is not None and former is not self:
            former._detach(
                f"another session trains this {type(model).__name__} from now on: hf_amp is detached here"
            )
        _trains[model] = weakref.ref(self)

    def take_as_trained(self, model: nn.Module) -> None:
        """Goes on with an adopted `model` as one that is trained. Harmless where it is."""
        if self._keeper.runner.evaluates(model):
            self.take_over(model)
            self._keeper.runner.adopt(model)
            self._see_trained(model)

    def _see_trained(self, model: nn.Module) -> None:
        if self._after_step.look_at_modules in self.scaler.passengers:
            self._modules.adopt(model, self.scaler.decided_steps)
        self._after_step.see_models()

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
        if not (on_any_rank and self.scaler.ranks_agree and agreement.is_needed()):
            return here
        names = [name for name, _ in runner.named_parameters()]
        flags = torch.tensor([float(name in here) for name in names], device=runner.device)
        found = agreement.largest_elements_over_ranks(flags)
        return [name for name, flag in zip(names, found, strict=True) if flag]

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
        self._detach("hf_amp is detached")

    @property
    def is_attached(self) -> bool:
        """Whether neither `detach` nor another session on a model of this one has ended it."""
        return self._after_step.decided in self.scaler.observers

    def _detach(self, why: str) -> None:
        if self.is_attached:
            self.scaler.observers.remove(self._after_step.decided)
            passengers, ours = self.scaler.passengers, self._after_step.look_at_modules
            passengers[:] = [ask for ask in passengers if ask != ours]
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
