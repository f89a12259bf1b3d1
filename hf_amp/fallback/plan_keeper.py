"""Keeps the plan: what chooses it, the models that run under it, and both as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_amp.config import MixedPrecisionConfig
from hf_amp.fallback.apply import PlanRunner, PrecisionEntry
from hf_amp.fallback.cause import Diagnosis
from hf_amp.fallback.controller import Fallback, FallbackState, StepFacts
from hf_amp.fallback.examiner import Examiner
from hf_amp.fallback.ladder import ladder_of
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.fallback.recorder import ForwardRecorder
from hf_amp.fallback.speed import SpeedTrial
from hf_amp.fallback.transition import Transition, transition_between
from hf_amp.hardware import Hardware
from hf_amp.plain import Positive, read
from hf_amp.precision import PrecisionMode
from hf_amp.statistics import agreement


class PlanKeeper:
    """Decides what to do about skipped steps, and makes the models follow.

    Args:
        config: the options of the fallback.
        mode: the precision that the run asked for.
        hardware: what the device can run.
        step: gives the number of the optimizer step that forward passes now belong to.

    Attributes:
        asked_for: the precision that the run asked for, where the plan begins.
        runner: the models.
        recorder: what they were called with.
        examiner: finds the causes.
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
        self.asked_for = mode
        self.runner = PlanRunner(PrecisionEntry(hardware.device, emulate), mode)
        self.recorder = ForwardRecorder(step, self.runner)
        self.examiner = Examiner(self.runner, self.recorder, config.hysteresis)
        half = mode is PrecisionMode.FP16 or config.half_parameters == "master_weights"
        # The CPU has no kernels that mix FP32 with half-precision parameters, as autocast makes of others.
        self._acts = config.automatic_fallback and not (half and hardware.device == "cpu" and not emulate)
        self._fallback = Fallback(
            ladder_of(mode, hardware, emulate),
            config.fallback_threshold,
            config.fallback_window,
            config.recovery_steps,
        )
        self._state = self._fallback.init_state()
        dynamic = config.precision_mode is PrecisionMode.DYNAMIC
        self._trial = SpeedTrial(self._fallback.ladder) if dynamic else None
        self.scale_at_rest: float | None = None
        self._newest: Transition | None = None

    @property
    def plan(self) -> PrecisionPlan:
        """Which precision runs where."""
        return self._state.plan

    def adopt(self, model: nn.Module, entry_point: nn.Module, is_trained: bool = True) -> Callable[[], None]:
        """Lets `model` follow the plan and its calls through `entry_point` be repeated; returns what undoes the latter."""
        self.runner.adopt(model, is_trained)
        return self.recorder.watch(entry_point, model)

    def note_applied(self, step_seconds: float | None = None, agree: bool = False) -> Transition | None:
        """One applied step; what it lets the plan go back to, or, in a speed trial, on to.

        Args:
            step_seconds: wall-clock time since the step before; None where that is not known.
            agree: in a speed trial, count the slowest rank's time. One all-reduce and one host read a step of the trial.
        """
        self.examiner.scale_skips = 0
        self._newest = None
        if self._trial is None or self._trial.running is None:
            return self._decide(StepFacts())
        if agree and agreement.is_needed():
            step_seconds = self._slowest(step_seconds)
        if step_seconds is not None:
            self._trial.note(step_seconds)
        return self._continue_trial(self._trial)

    def _slowest(self, step_seconds: float | None) -> float | None:
        """The longest time of any rank; None where one does not know its own."""
        local = torch.tensor([step_seconds or 0.0, float(step_seconds is None)], device=self.runner.device)
        longest, is_unknown = agreement.largest_elements_over_ranks(local)
        return None if is_unknown else longest

    def note_skipped(self, diagnosis: Diagnosis, non_finite_fraction: float) -> Transition | None:
        """One skipped step; what is done about it. Nothing, where the plan has cured it already, or none can."""
        if diagnosis.is_cured or diagnosis.fails_in_fp32:
            return None
        facts = StepFacts(diagnosis.cause, diagnosis.modules, non_finite_fraction)
        if self._trial is not None and self._trial.running is not None:
            next_state = self._fallback.next_state(self._state, facts)
            if next_state.plan.default is not self.plan.default:
                self._trial.reject()
                return self._continue_trial(self._trial)
        return self._decide(facts)

    def put_back_statistics(self, step: int) -> tuple[str, ...]:
        """Puts back running statistics that skipped step `step` has made non-finite; names of the modules that had them."""
        norms = set(self.recorder.put_back_statistics(step))
        return tuple(name for name, module in self.runner.named_modules() if module in norms) if norms else ()

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
        emulated = " FP16 was emulated: its time says nothing of a GPU." if self.runner.entry.emulate else ""
        return Transition(
            before,
            self.plan,
            (),
            f"{chosen.value} is the fastest stable precision here: {times} a step.{emulated}",
        )

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
        transition = transition_between(former, self._state, facts, self._fallback)
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
            "scale_skips": self.examiner.scale_skips,
            "scale_at_rest": self.scale_at_rest,
            "trial": self._trial.state_dict() if self._trial is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`, plan included. A default that this run cannot have is left behind.

        Raises:
            StateError: it is no such state; nothing has changed then.
        """
        state = FallbackState.from_plain(state_dict)
        beside: _Beside = read(_Beside, state_dict, "fallback")
        self._fallback.restored(state)
        if self._trial is not None and beside.trial is not None:
            self._trial.load_state_dict(beside.trial)
            self._fallback = replace(self._fallback, ladder=self._trial.choices())
        self._state = self._fallback.restored(state)
        self.examiner.scale_skips = beside.scale_skips
        self.scale_at_rest = beside.scale_at_rest
        self.runner.apply(self.plan)


@dataclass
class _Beside:
    """What a checkpoint holds beside the controller's state."""

    scale_skips: int
    scale_at_rest: Positive | None
    trial: dict[str, Any] | None
