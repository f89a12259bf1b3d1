"""`AfterStep`: what follows from one optimizer step, from its outcome to events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_amp.config import MixedPrecisionConfig
from hf_amp.events import AmpEvent, Cause, EventKind, mentioned
from hf_amp.fallback.cause import Diagnosis
from hf_amp.fallback.examiner import SkippedStep
from hf_amp.fallback.plan_keeper import PlanKeeper
from hf_amp.fallback.transition import Transition
from hf_amp.forward_context import ForwardContext
from hf_amp.journal import Journal
from hf_amp.monitoring.hopeless import HopeWatch
from hf_amp.monitoring.module_monitor import ModuleMonitor
from hf_amp.monitoring.monitor import PrecisionMonitor
from hf_amp.monitoring.pace import Pace
from hf_amp.precision import NumberFormat
from hf_amp.scaling.boundary import Boundary, Treatment
from hf_amp.scaling.outcome import StepOutcome
from hf_amp.scaling.scaler import AdvancedGradScaler


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
    transition: Transition | None
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
        journal: Journal,
        config: MixedPrecisionConfig,
        scaler: AdvancedGradScaler,
        keeper: PlanKeeper,
        pace: Pace,
    ) -> None:
        self.monitor = PrecisionMonitor()
        self.hope = HopeWatch(config.patience)
        self.pace = pace
        self.modules = ModuleMonitor(config.monitoring_interval)
        self._journal = journal
        self._min_scale = config.min_scale
        self._scaler = scaler
        self._keeper = keeper
        self._at_floor = False
        self._judged: _Judged | None = None
        self.see_models()

    def decided(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        """An observer of the scaler: takes in what became of one step of `optimizer`."""
        ForwardContext.leave_interrupted()
        with self._journal.lock:
            self._record(outcome, optimizer)

    def look_at_modules(self, boundary: Boundary, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
        """A passenger of the scaler: what is to come to the host by module. No host read."""
        return self.modules.ride_along(
            id(optimizer),
            lambda: [name for name, p in self._named_parameters(optimizer) if p.grad is not None],
            boundary.gradients,
            boundary.scale,
            scaled=boundary.treatment is Treatment.FOLD,
            guards=boundary.treatment is Treatment.CHECK,
            decided_steps=self._scaler.decided_steps,
        )

    def follow(self, transition: Transition | None, cause: Cause | None, skipped_at: float | None) -> None:
        """Tells of a change of plan, and sees to the scale where the whole model leaves FP16 or comes back.

        Args:
            skipped_at: the scale of the skipped step that led to the change; None where the plan goes back.
        """
        if transition is None:
            return
        keeper, before, after = self._keeper, transition.before, transition.after
        self.monitor.record_plan(len(after.modules))
        self.see_models()
        if skipped_at is not None:
            self.monitor.record_fallback()
            if before.default is not after.default and keeper.scale_at_rest is None:
                keeper.scale_at_rest = skipped_at
        elif keeper.scale_at_rest is not None and after.default is keeper.asked_for:
            self._scaler.set_scale(min(keeper.scale_at_rest, self._scaler.get_scale()))
            keeper.scale_at_rest = None
        self._journal.record(
            AmpEvent(
                step=self._journal.newest_step,
                kind=EventKind.PRECISION_CHANGED,
                cause=cause,
                before=before.precision_of(transition.modules).value,
                after=after.precision_of(transition.modules).value,
                modules=transition.modules,
                message=transition.message,
            )
        )

    def see_models(self) -> None:
        """A model has come, or the plan has changed: where parameters are, and what share of them runs in which format."""
        runner = self._keeper.runner
        parameters = list(runner.named_parameters())
        # A model that is offloaded for now trains where the run is.
        if devices := {p.device for _, p in parameters if p.device.type == runner.entry.device_type}:
            self.pace.devices = devices
        sizes = ((name, p.numel()) for name, p in parameters)
        self.monitor.record_formats(self._keeper.plan.format_shares(sizes))

    def _record(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        self._journal.newest_step = self._journal.first_step + outcome.attempt - 1
        self.monitor.record_lost_updates(outcome.lost_update_fraction)
        self.monitor.record_losses(outcome.losses, outcome.non_finite_losses)
        step_seconds = self.pace.step_decided(NumberFormat.of(self._keeper.plan.default).name)
        self.modules.take(id(optimizer), outcome.carried)
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
            self.hope.record_applied(
                outcome.zero_gradients, outcome.loss_finite, outcome.scale, outcome.has_gradients
            )
        )

    def _record_skipped(self, outcome: StepOutcome, optimizer: torch.optim.Optimizer) -> None:
        next_scale = self._scaler.get_scale()
        norms = self._keeper.put_back_statistics(outcome.attempt)
        judged = self._judge(outcome, next_scale, optimizer)
        diagnosis = judged.diagnosis
        if judged.transition or diagnosis.is_cured:
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
            self.follow(judged.transition, diagnosis.cause, outcome.scale)
        self._journal.tell(self.hope.record_skipped(diagnosis.cause))

    def _judge(self, outcome: StepOutcome, next_scale: float, optimizer: torch.optim.Optimizer) -> _Judged:
        """What is found of the step and done about it, or was for another optimizer of the same backward."""
        former = self._judged
        if former and former.backward == outcome.backward and id(optimizer) not in former.optimizers:
            former.optimizers.add(id(optimizer))
            return former
        diagnosis = self._diagnose(outcome, next_scale, optimizer)
        elements = sum(p.grad.numel() for _, p in self._named_parameters(optimizer) if p.grad is not None)
        transition = self._keeper.note_skipped(diagnosis, outcome.non_finite_fraction(elements))
        self._judged = _Judged(diagnosis, transition, outcome.backward, {id(optimizer)})
        return self._judged

    def _diagnose(
        self, outcome: StepOutcome, next_scale: float, optimizer: torch.optim.Optimizer
    ) -> Diagnosis:
        # A finite loss shows that the scale is to blame, but only where there is one.
        loss_finite = None if self._scaler.guards_only and outcome.loss_finite else outcome.loss_finite
        parameters = self._named_parameters(optimizer)
        state = (
            (f"{key} of {name}", value)
            for name, parameter in parameters
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        )
        skip = SkippedStep(outcome.attempt, loss_finite, outcome.scale, next_scale, parameters, state)
        return self._keeper.examiner.examine(skip, agree=self._scaler.ranks_agree)

    def _tell_of_statistics(self, norms: tuple[str, ...]) -> None:
        if not norms:
            return
        self._journal.record(
            AmpEvent(
                step=self._journal.newest_step,
                kind=EventKind.STATISTICS_PUT_BACK,
                modules=norms,
                message=f"the running statistics of {mentioned(norms)} were not finite after the skipped "
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
