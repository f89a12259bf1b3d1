"""Keeps the plan: what chooses it, the models that run under it, and both as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_amp.config import MixedPrecisionConfig, PrecisionMode
from hf_amp.events import Cause
from hf_amp.fallback.apply import PlanRunner, PrecisionEntry
from hf_amp.fallback.cause import SCALE_IS_CURING, Diagnosis, diagnose, joined, non_finite_names
from hf_amp.fallback.controller import Fallback, FallbackState, StepFacts
from hf_amp.fallback.locate import parameters_overflowing_unscaled
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.fallback.recorder import ForwardRecorder, RecordedForward
from hf_amp.fallback.speed import SpeedTrial
from hf_amp.hardware import Hardware
from hf_amp.statistics import agreement

SCALE_SKIPS_BEFORE_A_LOOK = 3
"""Overflows in a row with a finite loss after which the step is looked at all the same: an infinite activation can hide
behind a saturating function, and a derivative can be infinite by itself."""
_GRAVITY = (Cause.UNKNOWN, Cause.SCALE, Cause.LOSS, Cause.ACTIVATION, Cause.INPUT, Cause.WEIGHTS)
"""Where ranks see different causes, the last of these stands: the others only see its traces."""


class Transition(NamedTuple):
    """One change of plan.

    Attributes:
        before: the plan until now.
        after: the plan from the next forward pass on.
        modules: qualified names of the modules that change; empty for the whole model.
        message: one sentence for people.
    """

    before: PrecisionPlan
    after: PrecisionPlan
    modules: tuple[str, ...]
    message: str


def ladder_of(mode: PrecisionMode, hardware: Hardware) -> tuple[PrecisionMode, ...]:
    """The precisions that a whole run can fall back to, from `mode` to the widest: BF16 where there are units for it."""
    if mode in (PrecisionMode.MIXED, PrecisionMode.FP16):
        middle = (PrecisionMode.BF16,) if hardware.bf16 == "native" else ()
        return (mode, *middle, PrecisionMode.FP32)
    return (mode, PrecisionMode.FP32) if mode is PrecisionMode.BF16 else (mode,)


class PlanKeeper:
    """Diagnoses skipped steps, decides what to do about them, and makes the models follow.

    Args:
        config: the options of the fallback.
        mode: the precision that the run asked for.
        hardware: what the device can run.
        step: gives the number of the optimizer step that forward passes now belong to.

    Attributes:
        runner: the models.
        recorder: what they were called with.
        scale_at_rest: the loss scale when the whole model left the precision that the run asked for; None while it is
            there. What the scale has grown to meanwhile says nothing about FP16.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig,
        mode: PrecisionMode,
        hardware: Hardware,
        step: Callable[[], int],
    ) -> None:
        on_cpu_in_fp16 = hardware.device == "cpu" and mode in (PrecisionMode.MIXED, PrecisionMode.FP16)
        emulate = config.emulate and on_cpu_in_fp16
        self.runner = PlanRunner(PrecisionEntry(hardware.device, emulate), mode)
        self.recorder = ForwardRecorder(step)
        half = mode is PrecisionMode.FP16 or config.half_parameters == "master_weights"
        # The CPU has no kernels that mix FP32 with half-precision parameters, as autocast makes of others.
        self._acts = config.automatic_fallback and not (half and hardware.device == "cpu" and not emulate)
        self._patience_with_scale = SCALE_SKIPS_BEFORE_A_LOOK + config.hysteresis
        self._fallback = Fallback(
            ladder_of(mode, hardware),
            config.fallback_threshold,
            config.fallback_window,
            config.recovery_steps,
        )
        self._state = self._fallback.init_state()
        dynamic = config.precision_mode is PrecisionMode.DYNAMIC
        self._trial = SpeedTrial(self._fallback.ladder) if dynamic else None
        self.scale_at_rest: float | None = None
        self._scale_skips = 0
        self._newest: Transition | None = None

    @property
    def plan(self) -> PrecisionPlan:
        """Which precision runs where."""
        return self._state.plan

    def adopt(self, model: nn.Module, entry_point: nn.Module) -> Callable[[], None]:
        """Lets `model` follow the plan and its calls through `entry_point` be repeated; returns what undoes the latter."""
        self.runner.adopt(model)
        return self.recorder.watch(entry_point, model)

    def note_applied(self, step_seconds: float | None = None) -> Transition | None:
        """One applied step; what it lets the plan go back to, or, in a speed trial, on to.

        Args:
            step_seconds: wall-clock time since the step before; None where that is not known.
        """
        self._scale_skips = 0
        self._newest = None
        if self._trial is None or self._trial.running is None:
            return self._decide(StepFacts())
        if step_seconds is not None:
            self._trial.note(step_seconds)
        return self._continue_trial(self._trial)

    def note_skipped(self, diagnosis: Diagnosis, non_finite_fraction: float) -> Transition | None:
        """One skipped step; what is done about it."""
        self._scale_skips = self._scale_skips + 1 if diagnosis.cause is Cause.SCALE else 0
        facts = StepFacts(diagnosis.cause, diagnosis.modules, non_finite_fraction)
        if self._trial is not None and self._trial.running is not None:
            next_state = self._fallback.next_state(self._state, facts)
            if next_state.plan.default is not self.plan.default:
                self._trial.reject()
                return self._continue_trial(self._trial)
        return self._decide(facts)

    def _continue_trial(self, trial: SpeedTrial) -> Transition | None:
        """Enters the next candidate, or the fastest when all are through."""
        before, running = self.plan, trial.running
        chosen = running or trial.fastest()
        if running is None:
            self._fallback = replace(self._fallback, ladder=trial.choices())
        if chosen is before.default and running is not None:
            return None
        self._state = replace(self._state, plan=before.with_default(chosen), quiet_steps=0)
        self.runner.apply(self.plan)
        if running is not None:
            return Transition(before, self.plan, (), f"measuring the step time in {chosen.value}.")
        times = ", ".join(f"{s * 1000:.1f} ms in {mode.value}" for mode, s in trial.step_seconds().items())
        return Transition(
            before, self.plan, (), f"{chosen.value} is the fastest stable precision here: {times} a step."
        )

    def diagnose(
        self, step: int, loss_finite: bool | None, parameters: Iterable[tuple[str, Tensor]], agree: bool
    ) -> Diagnosis:
        """Why optimizer step `step` was skipped.

        A finite loss shows that forward was sound, and nothing is looked at, until that has not helped for a while.

        Args:
            agree: exchange what was found with the other ranks, which all call this for the same step.
        """
        if loss_finite and not self._looks_closer():
            return Diagnosis(Cause.SCALE, SCALE_IS_CURING)
        forwards = self.recorder.forwards_of(step)
        try:
            found = diagnose(loss_finite, parameters, forwards, self.runner.current, self.runner.name_of)
            if found.cause is Cause.SCALE:
                found = self._without_scale(forwards) or found
        except Exception as error:  # a rank that fails here must not keep the others waiting
            found = Diagnosis(Cause.UNKNOWN, f"a closer look failed ({type(error).__name__}: {error}).")
        return self._agreed(found) if agree and agreement.is_needed() else found

    def _agreed(self, found: Diagnosis) -> Diagnosis:
        """The gravest cause, and all modules, that any rank has found. One all-reduce, one host read."""
        names = [name for name, _ in self.runner.named_modules()]
        device = next((p.device for model in self.runner.models() for p in model.parameters()), None)
        local = [float(_GRAVITY.index(found.cause)), *(float(name in found.modules) for name in names)]
        gravest, *blamed = agreement.largest_elements_over_ranks(torch.tensor(local, device=device))
        cause = _GRAVITY[int(gravest)]
        modules = tuple(name for name, flag in zip(names, blamed, strict=True) if flag)
        if cause is found.cause and set(modules) == set(found.modules):
            return found
        return Diagnosis(cause, f"another rank has found the cause. Here: {found.message}", modules)

    def _looks_closer(self) -> bool:
        """Whether it is time to doubt that a smaller scale cures: at the 4th, 8th, 16th, … such skip in a row."""
        count = self._scale_skips + 1
        return count > SCALE_SKIPS_BEFORE_A_LOOK and count & (count - 1) == 0

    def _without_scale(self, forwards: Sequence[RecordedForward]) -> Diagnosis | None:
        """The diagnosis of a backward that overflows without a scale too; None where none is seen to."""
        for forward in forwards:
            broken = parameters_overflowing_unscaled(forward, self.runner.current)
            if broken:
                prefix = self.runner.name_of(forward.model)
                return self._backward_overflow([joined(prefix, name) for name in broken], "without a scale")
        return None

    def _backward_overflow(self, parameters: Iterable[str], when: str) -> Diagnosis:
        """Names the module where backward, which runs from the last to the first, met the first bad value."""
        owners = {name.rpartition(".")[0] for name in parameters}
        known = [name for name, _ in self.runner.named_modules() if name in owners]
        where = f"The first gradient that is not finite is that of {known[-1]}" if known else "Look"
        return Diagnosis(
            Cause.UNKNOWN,
            f"the loss was finite, but backward overflows {when} as well. {where}: look there for a root or a division "
            "at zero, whose derivative is infinite.",
            tuple(known[-1:]),
        )

    def doubt_scale(
        self, diagnosis: Diagnosis, scale: float, next_scale: float, gradients: Iterable[tuple[str, Tensor]]
    ) -> Diagnosis:
        """`diagnosis`, unless it is that of a scale which cures nothing: at most 1, or no longer being lowered.

        Args:
            gradients: (qualified parameter name, gradient).
        """
        held = next_scale >= scale and self._scale_skips > self._patience_with_scale
        if diagnosis.cause is not Cause.SCALE or not (scale <= 1 or held):
            return diagnosis
        return self._backward_overflow(non_finite_names(gradients), f"at a scale of {scale:g}")

    def recover_from(self, error: BaseException) -> Transition | None:
        """Goes back to the plan before the newest change, if `error` is an out-of-memory that the change has caused.

        None where it is something else, or where a step was applied since: then the change was not to blame.
        """
        if self._newest is None or not isinstance(error, torch.OutOfMemoryError):
            return None
        failed, self._newest = self._newest, None
        self._state = self._fallback.withdrawn(self._state, failed.before)
        self.runner.apply(self.plan)
        return Transition(
            failed.after,
            failed.before,
            failed.modules,
            f"there was not enough memory for {failed.after.describe()}: back to {failed.before.describe()}. Lower the "
            "batch size, or turn gradient checkpointing on, so that the fallback has room.",
        )

    def _decide(self, facts: StepFacts) -> Transition | None:
        if not self._acts:
            return None
        former = self._state
        self._state = self._fallback.next_state(former, facts)
        if self.plan == former.plan:
            return None
        self.runner.apply(self.plan)
        transition = _transition(former, self._state, facts, self._fallback)
        self._newest = transition if facts.cause is not None else None
        return transition

    def remove(self) -> None:
        """Takes every context back and lets go of the batches."""
        self.runner.remove()
        self.recorder.forget()

    def state_dict(self) -> dict[str, Any]:
        """The controller's state: numbers, strings, lists and mappings of them."""
        return {
            **self._state.to_plain(),
            "scale_skips": self._scale_skips,
            "scale_at_rest": self.scale_at_rest,
            "trial": self._trial.state_dict() if self._trial is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`, plan included. A default that this run cannot have is left behind."""
        if self._trial is not None and state_dict["trial"] is not None:
            self._trial.load_state_dict(state_dict["trial"])
            if self._trial.running is None:
                self._fallback = replace(self._fallback, ladder=self._trial.choices())
        self._state = self._fallback.restored(FallbackState.from_plain(state_dict))
        self._scale_skips = state_dict["scale_skips"]
        self.scale_at_rest = state_dict["scale_at_rest"]
        self.runner.apply(self.plan)


def _transition(
    former: FallbackState, state: FallbackState, facts: StepFacts, fallback: Fallback
) -> Transition:
    before, after = former.plan, state.plan
    if before.default is not after.default:
        names: tuple[str, ...] = ()
        who = "the model"
    else:
        names = tuple(
            sorted(set(before.modules) ^ set(after.modules), key=[*before.modules, *after.modules].index)
        )
        who = f"{len(names)} module{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
    if facts.cause is None:
        wait = former.quiet_steps + 1
        message = f"after {wait} quiet steps {who} goes back: {before.describe()} → {after.describe()}."
    else:
        patience = fallback.patience(state, names[0] if names else "")
        message = (
            f"{who} leaves its precision: {before.describe()} → {after.describe()}; tried again after {patience} quiet "
            "steps."
        )
    return Transition(before, after, names, message)
