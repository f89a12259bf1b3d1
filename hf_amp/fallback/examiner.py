"""Examines a skipped step: how close a look it takes, what doubts there are of the scale, and that all ranks agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_amp.events import Cause
from hf_amp.fallback.apply import PlanRunner
from hf_amp.fallback.cause import (
    SCALE_IS_CURING,
    Diagnosis,
    diagnose,
    joined,
    message_elsewhere,
    non_finite_names,
    poison_in,
)
from hf_amp.fallback.locate import parameters_overflowing_unscaled
from hf_amp.fallback.recorder import KEPT_FORWARDS, ForwardRecorder, RecordedForward
from hf_amp.statistics import agreement

SCALE_SKIPS_BEFORE_A_LOOK = 3
"""Overflows in a row with a finite loss after which the step is looked at all the same: an infinite activation can hide
behind a saturating function, and a derivative can be infinite by itself."""
_NOT_KEPT = (
    f"the newest {KEPT_FORWARDS} forward passes of the step are sound, and those before them are not kept. Look at this "
    "step's batch and loss function, and for activations beyond 65504."
)
_GRAVITY = (
    (Cause.LOSS, False, False),
    (Cause.UNKNOWN, False, False),
    (Cause.SCALE, True, False),
    (Cause.ACTIVATION, False, False),
    (Cause.UNKNOWN, True, True),
    *(
        (cause, True, False)
        for cause in (Cause.UNKNOWN, Cause.LOSS, Cause.ACTIVATION, Cause.INPUT, Cause.WEIGHTS)
    ),
)
"""Where ranks find different causes, the last of these stands: the others only see its traces. (Cause, whether shown, whether
FP32 fails as well)."""


class SkippedStep(NamedTuple):
    """What is known of a skipped step before anybody looks closer.

    Attributes:
        step: its number, as the recorder counts.
        loss_finite: whether every loss behind the gradients was finite; None where there is no scale to blame.
        scale: the scale of its backward.
        next_scale: what the policy has made of it.
        parameters: (qualified name, parameter) of what the optimizer holds.
        optimizer_state: (name, tensor) of its state; looked at only where parameters are not finite.
    """

    step: int
    loss_finite: bool | None
    scale: float
    next_scale: float
    parameters: Sequence[tuple[str, Tensor]]
    optimizer_state: Iterable[tuple[str, Tensor]] = ()

    def bad_gradients(self) -> list[str]:
        """Names of the parameters whose gradients hold inf or NaN. One host read."""
        return non_finite_names((name, p.grad) for name, p in self.parameters if p.grad is not None)


class Examiner:
    """Finds the causes of skipped steps.

    Args:
        runner: the models.
        recorder: what they were called with.
        hysteresis: overflows before the scale backs off.

    Attributes:
        scale_skips: skips in a row that were put down to the scale.
        repeats_forwards: whether a forward pass may be run again to see what it does.
    """

    def __init__(self, runner: PlanRunner, recorder: ForwardRecorder, hysteresis: int) -> None:
        self._runner = runner
        self._recorder = recorder
        self._patience = SCALE_SKIPS_BEFORE_A_LOOK + hysteresis
        self.scale_skips = 0
        self.repeats_forwards = True

    def examine(self, skip: SkippedStep, agree: bool) -> Diagnosis:
        """Why a step was skipped.

        Where parameters and batch are finite, a finite loss shows that forward was sound, and it is not repeated until a
        smaller scale has not helped for a while.

        Args:
            agree: exchange what was found with the other ranks, which all call this for the same step.
        """
        diagnosis = self._naming_gradient(skip, self._doubting_scale(skip, self._diagnose(skip, agree)))
        self.scale_skips = self.scale_skips + 1 if diagnosis.cause is Cause.SCALE else 0
        return diagnosis

    def _diagnose(self, skip: SkippedStep, agree: bool) -> Diagnosis:
        try:
            found = self._found(skip)
        except Exception as error:  # a rank that fails here must not keep the others waiting
            why = f"a closer look failed ({type(error).__name__}: {error})."
            found = Diagnosis(Cause.UNKNOWN, why, is_shown=False)
        return self._agreed(found) if agree and agreement.is_needed() else found

    def _found(self, skip: SkippedStep) -> Diagnosis:
        forwards = self._recorder.forwards_of(skip.step)
        poison = poison_in(skip.parameters, forwards, skip.optimizer_state)
        if poison is not None and poison.is_shown:
            return poison
        if poison is None and skip.loss_finite and not self._looks_closer():
            return Diagnosis(Cause.SCALE, SCALE_IS_CURING)
        forwards = forwards if self.repeats_forwards else []
        found = diagnose(skip.loss_finite, forwards, self._runner)
        if poison is not None:
            return found if found.cause is Cause.ACTIVATION else poison._replace(is_shown=True)
        if found.cause is Cause.SCALE:
            return self._without_scale(forwards) or found
        if found.is_shown:
            return found
        found = self._in_evaluations(skip) or found
        if not (found.is_shown or found.is_cured) and forwards and self._recorder.has_let_go(skip.step):
            return Diagnosis(Cause.UNKNOWN, _NOT_KEPT, is_shown=False)
        return found

    def _in_evaluations(self, skip: SkippedStep) -> Diagnosis | None:
        """What models that only evaluate are seen to do to the loss; None where nothing is."""
        evaluations = self._recorder.evaluations_of(skip.step) if self.repeats_forwards else []
        weights = [
            (joined(self._runner.name_of(model), name), p)
            for model in dict.fromkeys(evaluation.model for evaluation in evaluations)
            for name, p in model.named_parameters()
        ]
        poisoned = non_finite_names(weights)
        if poisoned:
            return Diagnosis(
                Cause.WEIGHTS,
                f"the loss is made from a model that is not trained, and {len(poisoned)} of its parameters hold non-finite "
                f"values, {poisoned[0]} among them; no step can mend that. Load it anew, in a format that holds its weights.",
            )
        found = diagnose(skip.loss_finite, evaluations, self._runner)
        return found if found.is_shown or found.is_cured else None

    def _agreed(self, found: Diagnosis) -> Diagnosis:
        """The gravest cause, and all modules, that any rank has found. One all-reduce, one host read."""
        names = [name for name, _ in self._runner.named_modules()]
        local = [
            float(_GRAVITY.index((found.cause, found.is_shown, found.fails_in_fp32))),
            *(float(name in found.modules) for name in names),
        ]
        gravest, *blamed = agreement.largest_elements_over_ranks(
            torch.tensor(local, device=self._runner.device)
        )
        cause, is_shown, fails_in_fp32 = _GRAVITY[int(gravest)]
        modules = tuple(name for name, flag in zip(names, blamed, strict=True) if flag)
        agreed = Diagnosis(cause, found.message, modules, is_shown, fails_in_fp32)
        if agreed._replace(modules=found.modules) == found and set(modules) == set(found.modules):
            return found
        if not found.is_shown:
            return agreed._replace(message=message_elsewhere(agreed, self._runner.current))
        return agreed._replace(message=f"another rank has found the cause. Here: {found.message}")

    def _looks_closer(self) -> bool:
        """Whether it is time to doubt that a smaller scale cures: at the 4th, 8th, 16th, … such skip in a row."""
        count = self.scale_skips + 1
        return count > SCALE_SKIPS_BEFORE_A_LOOK and count & (count - 1) == 0

    def _without_scale(self, forwards: Sequence[RecordedForward]) -> Diagnosis | None:
        """The diagnosis of a backward that overflows without a scale too; None where none is seen to."""
        for forward in forwards:
            broken = parameters_overflowing_unscaled(forward, self._runner.current)
            if broken:
                prefix = self._runner.name_of(forward.model)
                return self._backward_overflow([joined(prefix, name) for name in broken], "without a scale")
        return None

    def _backward_overflow(self, parameters: Iterable[str], when: str) -> Diagnosis:
        """Names the module where backward, which runs from the last to the first, met the first bad value."""
        first = self._first_in_backward(parameters)
        where = f"The first gradient that is not finite is that of {first}" if first else "Look"
        return Diagnosis(
            Cause.UNKNOWN,
            f"the loss was finite, but backward overflows {when} as well. {where}: look there for a root or a division "
            "at zero, whose derivative is infinite.",
            (first,) if first in dict(self._runner.named_modules()) else (),
        )

    def _first_in_backward(self, parameters: Iterable[str]) -> str | None:
        """The module that is last in order among those that own `parameters`; the parameter where it is the model's own."""
        owners = {name.rpartition(".")[0]: name for name in parameters}
        known = [owners[name] for name, _ in self._runner.named_modules() if name in owners]
        return known[-1].rpartition(".")[0] or known[-1] if known else None

    def _doubting_scale(self, skip: SkippedStep, diagnosis: Diagnosis) -> Diagnosis:
        """`diagnosis`, unless it is that of a scale which cures nothing: at most 1, or no longer being lowered."""
        held = skip.next_scale >= skip.scale and self.scale_skips > self._patience
        if diagnosis.cause is not Cause.SCALE or not (skip.scale <= 1 or held):
            return diagnosis
        return self._backward_overflow(skip.bad_gradients(), f"at a scale of {skip.scale:g}")

    def _naming_gradient(self, skip: SkippedStep, diagnosis: Diagnosis) -> Diagnosis:
        """`diagnosis`, with where backward overflowed where there is no scale to blame and nothing else to go by."""
        if diagnosis.cause is not Cause.UNKNOWN or diagnosis.modules or skip.loss_finite is not None:
            return diagnosis
        first = self._first_in_backward(skip.bad_gradients())
        if first is None:
            return diagnosis
        return diagnosis._replace(
            message=f"{diagnosis.message} The first gradient that is not finite is that of {first}."
        )
