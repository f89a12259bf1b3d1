"""Why a step was skipped, found only after it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hf_amp.events import Cause, mentioned
from hf_amp.fallback.apply import CurrentPrecision, PlanRunner
from hf_amp.fallback.locate import ForwardFindings, locate
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.nested import tensors_in
from hf_amp.precision import NumberFormat
from hf_amp.statistics import snapshot
from hf_amp.statistics.gradients import is_sharded

SCALE_IS_CURING = (
    "the gradients left the range of FP16 although the loss was finite; a smaller scale cures that. Normal in the "
    "first steps of a run; nothing to do."
)


class Diagnosis(NamedTuple):
    """Why a step was skipped.

    Attributes:
        cause: the cause.
        message: a sentence that says what to do.
        modules: qualified names of the modules to blame.
        is_shown: whether it was seen; otherwise it is what remains when nothing else is, which another rank may have seen.
        fails_in_fp32: whether the whole model was seen to fail in FP32 as well, so that no change of precision cures it.
    """

    cause: Cause
    message: str
    modules: tuple[str, ...] = ()
    is_shown: bool = True
    fails_in_fp32: bool = False

    @property
    def is_cured(self) -> bool:
        """Whether the plan in force, under which the step did not run yet, is what it lacked: nothing is left to do."""
        return self.cause is Cause.ACTIVATION and not self.is_shown


_CURED_ALREADY = Diagnosis(
    Cause.ACTIVATION,
    "a forward value left the range of its format before the newest change of precision took effect, under which the same "
    "batch gives finite values; nothing to do.",
    is_shown=False,
)


def poison_in(
    parameters: Iterable[tuple[str, Tensor]],
    forwards: Sequence[RecordedForward],
    optimizer_state: Iterable[tuple[str, Tensor]] = (),
) -> Diagnosis | None:
    """What was not finite before a step whose gradients were not: the parameters, or the batch. None where neither.

    A finite loss does not rule that out: functions that saturate hide it. Costs a read of both. It is not shown where
    another forward pass may have made what this one was given, as a generator does for its discriminator.

    Args:
        parameters: (qualified name, parameter) of what the optimizer holds.
        forwards: the forward passes behind the gradients.
        optimizer_state: (name, tensor) of its state, which is looked at only where the parameters are not finite: a
            state that was poisoned, as by a damaged checkpoint, gets into them with the next step.
    """
    poisoned = non_finite_names(parameters)
    if poisoned:
        state = non_finite_names(optimizer_state)
        also = f", and so does the optimizer's state ({state[0]})" if state else ""
        return Diagnosis(
            Cause.WEIGHTS,
            f"{len(poisoned)} parameters already hold non-finite values, {poisoned[0]} among them{also}; no step can "
            "mend that. Go back to the last good checkpoint.",
        )
    for index, forward in enumerate(forwards):
        bad = _bad_input(forward) if forward.is_intact else None
        if bad is None:
            continue
        described, x = bad
        if x.grad_fn is not None:
            return Diagnosis(
                Cause.UNKNOWN,
                f"a forward pass was given what {described}, which this step had computed before: look at what computes it.",
                is_shown=False,
            )
        cure = "; no precision can cure that. Mend"
        if x.dtype == torch.float16:
            cure = ", in FP16. Where a frozen model computes that in FP16, run it in FP32 or BF16; otherwise mend"
        return Diagnosis(
            Cause.INPUT,
            f"the batch {described}{cure} the data, or drop such batches.",
            is_shown=all(earlier.model is forward.model for earlier in forwards[:index]),
        )
    return None


def diagnose(
    loss_finite: bool | None,
    forwards: Sequence[RecordedForward],
    runner: PlanRunner,
) -> Diagnosis:
    """Looks closer at a step whose gradients were not finite, although all was that they were made from.

    Costs one more forward pass per micro-batch until one shows the cause.

    Args:
        loss_finite: whether every loss behind the gradients was finite before scaling; None where that is no sign of
            the scale, because nothing is scaled (BF16, FP32).
        forwards: the forward passes behind the gradients.
        runner: the models, and the plan in force.
    """
    findings = []
    for forward in forwards:
        found = locate(forward, runner.current)
        findings.append(found)
        if found.overflowing:
            prefix = runner.name_of(forward.model)
            return _activation(tuple(joined(prefix, name) for name in found.overflowing), runner.current)
        if found.unsound is not None:
            return _unsound(found, forward, runner.name_of(forward.model))
    ran_before = any(forward.plan not in (None, runner.plan) for forward in forwards)
    return _nothing_found(loss_finite, findings, ran_before)


def message_elsewhere(agreed: Diagnosis, current: CurrentPrecision) -> str:
    """What a rank that has seen nothing of `agreed` tells of it: its own batch, loss and labels may be sound."""
    if agreed.is_cured:
        what = _CURED_ALREADY.message
    elif agreed.cause is Cause.ACTIVATION:
        what = _activation(agreed.modules, current).message
    else:
        what = _ELSEWHERE[agreed.cause]
    return f"found by another rank, whose console says more: {what}"


_ELSEWHERE = {
    Cause.SCALE: SCALE_IS_CURING,
    Cause.INPUT: "the batch there holds inf or NaN; no precision can cure that. Mend the data, or drop such batches.",
    Cause.WEIGHTS: "parameters there hold non-finite values; no step can mend that. Go back to the last good checkpoint.",
    Cause.LOSS: "the model's outputs are finite there, its loss is not: look at the loss function and at the labels there.",
    Cause.UNKNOWN: "the cause there has no name. Look at the batch there and at the loss function, and for activations "
    "beyond 65504.",
}


def joined(prefix: str, name: str) -> str:
    """The qualified name of what is called `name` inside of the model `prefix`."""
    return ".".join(filter(None, (prefix, name)))


def _activation(names: tuple[str, ...], current: CurrentPrecision) -> Diagnosis:
    which = mentioned([name or "the model's own forward" for name in names])
    left = NumberFormat.of(current.mode)
    return Diagnosis(
        Cause.ACTIVATION,
        f"a forward value left the range of {left.name} (±{left.largest:g}) in {which}, from finite inputs; no scale "
        "can cure that, a wider range does.",
        names,
    )


def _unsound(found: ForwardFindings, forward: RecordedForward, prefix: str) -> Diagnosis:
    if found.only_loss:
        return Diagnosis(
            Cause.LOSS, f"the model's outputs are finite, its loss is not: {_why_loss(forward)}."
        )
    where = joined(prefix, found.unsound or "") or "the model's own forward"
    return Diagnosis(
        Cause.UNKNOWN,
        f"{where} gives non-finite values from finite ones in FP32 too, so precision is not to blame: look there for a "
        "division by zero, a log or root of zero, or an empty mean; or everything has grown, as with too high a learning rate.",
        fails_in_fp32=True,
    )


def _why_loss(forward: RecordedForward) -> str:
    labels = [x for name, x in _named_inputs(forward) if "label" in name and not x.is_floating_point()]
    if labels and snapshot.read({"any": torch.stack([(x >= 0).any() for x in labels]).any()})["any"] == 0:
        return "every label of the batch is ignored (-100), and a mean over none is NaN; mend the data"
    return "look at the loss function (log or division by zero) and at this step's labels"


def _nothing_found(
    loss_finite: bool | None, findings: Sequence[ForwardFindings], ran_before: bool
) -> Diagnosis:
    failed = next((found.error for found in findings if found.error), None)
    if loss_finite:
        return Diagnosis(Cause.SCALE, SCALE_IS_CURING)
    if failed is not None or not findings:
        why = f"failed ({failed})" if failed else "is not possible: no forward pass is there to repeat"
        return Diagnosis(
            Cause.UNKNOWN,
            f"a closer look {why}. Look at this step's batch (NaN, empty inputs, every label ignored), at the loss "
            "function, and for activations beyond 65504.",
            is_shown=False,
        )
    if ran_before:
        return _CURED_ALREADY
    if loss_finite is None:
        return Diagnosis(
            Cause.UNKNOWN,
            "the forward pass is sound, the gradients are not, and there is no loss scale to blame. Look at the loss "
            "function, and for a root or division at zero, whose derivative is infinite.",
            is_shown=False,
        )
    if not any(found.returns_loss and found.draws for found in findings):
        return Diagnosis(
            Cause.LOSS,
            "the model's outputs are finite, the loss made from them is not: look at the loss function (log or "
            "division by zero) and at this step's labels.",
            is_shown=False,
        )
    return Diagnosis(
        Cause.UNKNOWN,
        "the loss was not finite, but the same batch gives finite values now: dropout may have drawn otherwise, or the loss "
        "is made outside of the model. Look at the loss function and at this step's labels.",
        is_shown=False,
    )


def non_finite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of those that hold inf or NaN, in order; of a sharded one, in this rank's part. One host read.

    FP8, which knows no `isfinite`, is passed over.
    """

    def held(x: Tensor) -> Tensor:
        if is_sharded(x):
            return cast(Tensor, cast(Any, x).to_local())
        return x._values() if x.is_sparse else x

    with torch.no_grad():
        flags = {name: ~held(x).isfinite().all() for name, x in tensors if x.element_size() > 1}
    return [name for name, flag in snapshot.read(flags).items() if flag] if flags else []


def _named_inputs(forward: RecordedForward) -> list[tuple[str, Tensor]]:
    """(name, tensor) of every tensor that the model was called with, positional ones under their parameter's name."""

    names = list(inspect.signature(type(forward.model).forward).parameters)[1:]
    positional: dict[str, Any] = dict(zip(names, forward.arguments, strict=False))
    return list(tensors_in({**positional, **forward.options}))


def _bad_input(forward: RecordedForward) -> tuple[str, Tensor] | None:
    """What is wrong with the first bad tensor of the batch, and that tensor. One host read."""
    inputs = {name: x for name, x in _named_inputs(forward) if x.is_floating_point()}
    if not inputs:
        return None
    flags: dict[str, Tensor] = {}
    for name, x in inputs.items():
        flags[f"NaN {name}"] = x.isnan().any()
        # Additive attention masks hold -inf by design.
        masks = "mask" in name or "bias" in name
        flags[f"inf {name}"] = (x.isposinf() if masks else x.isinf()).any()
    for key, flag in snapshot.read(flags).items():
        if flag:
            kind, name = key.split(" ", 1)
            return f"holds {kind} in {name}", inputs[name]
    return None
