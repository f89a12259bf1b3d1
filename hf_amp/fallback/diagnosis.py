"""Why a step was skipped, found only after it was."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_amp.errors import in_one_line
from hf_amp.events import Cause, counted_names, join_names
from hf_amp.fallback.module_precision import CurrentPrecision, PlanRunner, holds_shards
from hf_amp.fallback.one_block import BlockGradients, lost_at, lost_at_any_scale, power_that_serves
from hf_amp.fallback.operators import MOVES_ONLY, BadOperator
from hf_amp.fallback.recorder import KEPT_BYTES, KEPT_FORWARDS, OBJECTS_DEEP, ForwardRecorder, RecordedForward
from hf_amp.fallback.replay import BackwardFindings, ReplayFindings, replay, replay_backward, take_part
from hf_amp.fallback.sharded import Lockstep, beyond_gathered_format
from hf_amp.precision import FP16_FORMAT, HALF_DTYPES, SMALLEST_SCALE
from hf_amp.statistics import all_reduce_max_to_host, are_finite, is_distributed, local_part, to_host
from hf_amp.tree import tensors_in

SCALE_WILL_FIX_IT = (
    "the gradients left the range of FP16 although the loss was finite; a smaller scale cures that. Normal in the first "
    "steps of a run; nothing to do."
)


class Diagnosis(NamedTuple):
    """Why a step was skipped.

    Attributes:
        cause: the cause.
        message: a sentence that says what to do.
        modules: qualified names of the modules to blame.
        confirmed: whether it was seen; otherwise it is what remains when nothing else is, which another rank may have seen.
    """

    cause: Cause
    message: str
    modules: tuple[str, ...] = ()
    confirmed: bool = True

    @property
    def severity(self) -> int:
        """Where ranks find different causes the largest stands; different for whatever else a diagnosis can be."""
        facts = self.cause.facts
        return facts.severity if self.confirmed else facts.severity_unconfirmed

    @property
    def already_fixed(self) -> bool:
        """Whether the plan in force, under which the step did not run yet, is what it lacked: nothing is left to do."""
        return self.cause is Cause.ACTIVATION and not self.confirmed


_EVERY = [Diagnosis(cause, "", (), confirmed) for cause, confirmed in product(Cause, (True, False))]
_BY_SEVERITY = {found.severity: found for found in _EVERY}

_RANKS = 2**16
"""More than there are: a severity and a rank make one number."""
_SEEN_ELSEWHERE = Diagnosis(Cause.UNKNOWN, "nothing was found here.", confirmed=False)
_ALREADY_FIXED = Diagnosis(
    Cause.ACTIVATION,
    "the step ran before the newest change of precision took effect, and a value left the range of its format. Now the same "
    "batch gives finite values: nothing to do.",
    confirmed=False,
)


def non_finite_source(
    parameters: Iterable[tuple[str, Tensor]],
    forwards: Sequence[RecordedForward],
    optimizer_state: Iterable[tuple[str, Tensor]] = (),
    applied_before: str = "",
) -> Diagnosis | None:
    """What was not finite before a step whose gradients were not: the parameters, or the batch. None where neither.

    A finite loss does not rule that out: functions that saturate hide it. Costs a read of both. It is not shown where
    another forward pass may have made what this one was given, as a generator does for its discriminator.

    Args:
        parameters: (qualified name, parameter) of what the optimizer holds.
        forwards: the forward passes behind the gradients.
        optimizer_state: (name, tensor) of its state, which is looked at only where the parameters are not finite: a
            state that was made non-finite, as by a damaged checkpoint, gets into them with the next step.
        applied_before: a sentence on the newest step that moved the parameters; "" where there was none.
    """
    non_finite = non_finite_names(parameters)
    if non_finite:
        state = non_finite_names(optimizer_state)
        also = f", and in the optimizer's state ({join_names(state)})" if state else ""
        return Diagnosis(
            Cause.WEIGHTS,
            f"inf or NaN was in {counted_names(non_finite)} before this step{also}, and no step can correct that. "
            f"{applied_before}Go back to the last good checkpoint.",
        )
    for index, forward in enumerate(forwards):
        bad = _bad_input(forward) if forward.is_intact else None
        if bad is None:
            continue
        described, x = bad
        if x.grad_fn is not None:
            return Diagnosis(
                Cause.UNKNOWN,
                f"a forward pass was called with {described}, which this step had computed before: look at the code that computes it.",
                confirmed=False,
            )
        cure = "; no precision can cure that. Fix"
        if x.dtype == torch.float16:
            cure = ", in FP16. Where a frozen model computes that in FP16, run it in FP32 or BF16; otherwise fix"
        return Diagnosis(
            Cause.INPUT,
            f"the batch holds {described}{cure} the data, or drop such batches.",
            confirmed=all(earlier.model is forward.model for earlier in forwards[:index]),
        )
    return None


def diagnose(loss_finite: bool | None, forwards: Sequence[RecordedForward], runner: PlanRunner) -> Diagnosis:
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
        found = replay(forward, runner.current)
        findings.append(found)
        if found.overflowing:
            return _left_format(found, runner.name_of(forward.model), runner.current)
        if found.first_non_finite is not None:
            return _non_finite_in_fp32(found, forward, runner.name_of(forward.model))
    return _nothing_found(loss_finite, findings, _ran_before(forwards, runner))


def _ran_before(forwards: Sequence[RecordedForward], runner: PlanRunner) -> bool:
    """Whether any of them ran in another plan than the one in force."""
    return any(forward.plan not in (None, runner.plan) for forward in forwards)


def joined(prefix: str, name: str) -> str:
    """The qualified name of what is called `name` inside of the model `prefix`."""
    return ".".join(filter(None, (prefix, name)))


def _left_format(found: ReplayFindings, prefix: str, current: CurrentPrecision) -> Diagnosis:
    """Modules whose output is not finite in the run's precision and is in FP32: for want of range, or of bits."""
    names = tuple(joined(prefix, name) for name in found.overflowing)
    operators = [op for name in found.overflowing if (op := found.operator_of(name))]
    if not operators or any(op.left_range for op in operators):
        left, inside = current.mode.number_format, "" if all(names) else " in the model's own forward"
        return Diagnosis(
            Cause.ACTIVATION,
            f"a forward value left the range of {left.name} (±{left.largest:g}){inside}, from finite inputs. No loss scale cures "
            f"that; a wider format does.{_first_of([op for op in operators if op.left_range])}",
            names,
        )
    inside = joined(prefix, operators[0].module)
    where = "" if inside in names else f" in {inside}"
    return Diagnosis(
        Cause.ROUNDING,
        f"rounding to {current.mode.number_format.name} made inf or NaN{where}, although no value left its range. No loss scale cures "
        f"that; FP32, which has more bits, does.{_first_of(operators)}",
        names,
    )


def _first_of(operators: Sequence[BadOperator]) -> str:
    return f" First seen in {operators[0].what}." if operators else ""


def _non_finite_in_fp32(found: ReplayFindings, forward: RecordedForward, prefix: str) -> Diagnosis:
    operator = found.operator_of(found.first_non_finite or "") or found.operator_of("")
    what = f" First seen in {operator.what}." if operator else ""
    first = found.first_non_finite or (operator.module if operator else "")  # a -inf, which might have been a mask
    if found.only_loss and first == found.first_non_finite:
        why = (operator and operator.hint) or _why_loss(forward)
        return Diagnosis(Cause.LOSS, f"the model's outputs are finite, its loss is not: {why}.{what}")
    name = joined(prefix, first)
    why = (operator and operator.hint) or (
        "look there for a division by zero, a log or root of zero, an empty mean, or growth by too high a learning rate"
    )
    return Diagnosis(
        Cause.MODEL,
        f"{'the module' if name else 'the model itself'} makes inf or NaN from finite values in FP32 too, so precision is not the "
        f"cause: {why}.{what}",
        (name,),
    )


def _why_loss(forward: RecordedForward) -> str:
    labels = [x for name, x in _named_inputs(forward) if "label" in name and not x.is_floating_point()]
    if labels and to_host({"any": torch.stack([(x >= 0).any() for x in labels]).any()})["any"] == 0:
        return "every label of the batch is ignored (-100), and a mean over none is NaN; fix the data"
    return "look at the loss function (log or division by zero) and at this step's labels"


def _nothing_found(loss_finite: bool | None, findings: Sequence[ReplayFindings], ran_before: bool) -> Diagnosis:
    failed = next((found.error for found in findings if found.error), None)
    if loss_finite:
        return Diagnosis(Cause.SCALE, SCALE_WILL_FIX_IT)
    if failed is not None or not findings:
        why = f"failed ({failed})" if failed else "is not possible: no forward pass is there to repeat"
        seen = "the loss was not finite, and " if loss_finite is False else ""
        return Diagnosis(
            Cause.UNKNOWN,
            f"{seen}replaying the step {why}. Look at this step's batch (NaN, empty inputs, every label ignored), at the loss "
            "function, and for activations beyond 65504.",
            confirmed=False,
        )
    if ran_before:
        return _ALREADY_FIXED
    if loss_finite is None:
        return Diagnosis(
            Cause.UNKNOWN,
            "the forward pass is finite, the gradients are not, and there is no loss scale to blame. Look at the loss "
            "function, and for a root or division at zero, whose derivative is infinite.",
            confirmed=False,
        )
    if not any(found.returns_loss and found.draws for found in findings):
        return Diagnosis(
            Cause.LOSS,
            "the loss was not finite, but the model's outputs are finite when its forward pass is repeated. Look at the loss function (log "
            "or division by zero), at this step's labels, and at code that changes weights within a step, as an adversarial step does.",
            confirmed=False,
        )
    return Diagnosis(
        Cause.UNKNOWN,
        "the loss was not finite, but the same batch gives finite values when the forward pass is repeated. Perhaps dropout drew other "
        "numbers, the model counts its calls, or the loss is made outside of it. Look at the loss function and at this step's labels.",
        confirmed=False,
    )


def non_finite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of those that hold inf or NaN, in order; of a sharded one, in this rank's part. One GPU-CPU sync."""
    with torch.no_grad():
        held = {name: x._values() if (x := local_part(tensor.detach())).is_sparse else x for name, tensor in tensors}
    return [name for name, finite in zip(held, are_finite(list(held.values())), strict=True) if not finite]


def _named_inputs(forward: RecordedForward) -> list[tuple[str, Tensor]]:
    """(name, tensor) of every tensor that the model was called with, positional ones under their parameter's name."""

    names = list(inspect.signature(type(forward.model).forward).parameters)[1:]
    positional: dict[str, Any] = dict(zip(names, forward.arguments, strict=False))
    found = tensors_in({**positional, **forward.options}, depth=OBJECTS_DEEP)
    return [(name, local_part(x)) for name, x in found]


def _bad_input(forward: RecordedForward) -> tuple[str, Tensor] | None:
    """What is wrong with the first bad tensor of the batch, and that tensor. One GPU-CPU sync."""
    inputs = {name: x for name, x in _named_inputs(forward) if x.is_floating_point()}
    if not inputs:
        return None
    flags: dict[str, Tensor] = {}
    for name, x in inputs.items():
        flags[f"NaN {name}"] = x.isnan().any()
        # Additive attention masks hold -inf by design.
        masks = "mask" in name or "bias" in name
        flags[f"inf {name}"] = (x.isposinf() if masks else x.isinf()).any()
    for key, flag in to_host(flags).items():
        if flag:
            kind, name = key.split(" ", 1)
            return f"{kind} in {name}", inputs[name]
    return None


_OUTSIDE = "Not confirmed: backward could not be repeated in full; the loss is made outside of the model, or the batch was written into."
_BY_TORCH_FUNC = (
    "torch.func has called the model (grad, vmap, functional_call), and such calls cannot be repeated: look at what they were "
    "given, or call the model itself on it once, which names the cause."
)
_NOT_KEPT = (
    f"the newest forward passes of the step are finite, and those before them are not kept (at most {KEPT_FORWARDS} are, and "
    f"{KEPT_BYTES // 2**30} GiB of batches). Look at this step's batch and loss function, and for activations beyond 65504."
)


_SAME_VALUES = f"{MOVES_ONLY}|(Cat|Expand|Gather|Index|IndexSelect|MaskedSelect|Stack)Backward"
"""Operators that give what they were given, as slices of logits that are made FP32 then."""
_SINGULAR = "(R?[Ss]qrt|Log(1P|2|10)?|Acos|Asin|Reciprocal|.*Norm|.*Svd|.*Eigh?)Backward"
"""Operators whose derivative is infinite or undefined somewhere."""


def _derivative_outside(outputs: Sequence[str], operations: Iterable[Any]) -> Diagnosis:
    names = join_names(sorted({node.name() for node in operations if re.match(_SINGULAR, node.name())}))
    return Diagnosis(
        Cause.DERIVATIVE,
        f"the loss was finite, but its derivative with respect to the model's "
        f"{join_names([f'output {path}'.strip() for path in outputs])} is not. Look at the code outside of the model that makes "
        f"the loss, for a root of zero or a division by zero{f' (its backward runs {names})' if names else ''}.",
    )


def _gives(node: Any, *dtypes: torch.dtype) -> bool:
    """Whether the operation behind this node of a graph has given a tensor of one of these dtypes."""
    return any(held.dtype in dtypes for held in node._input_metadata)


def _may_need_less(forward: RecordedForward, operations: Iterable[Any]) -> bool:
    """Whether inf came to an FP16 output without an operation that makes it: the loss may need a scale below 1. GPU-CPU syncs."""
    came = [g for g in forward.output_gradients.values() if g is not None and g.dtype == torch.float16]
    is_singular = any(re.match(_SINGULAR, node.name()) for node in operations)
    return not is_singular and any(bool(local_part(g).isinf().any()) for g in came)


class SkippedStep(NamedTuple):
    """What is known of a skipped step before anybody looks closer.

    Attributes:
        step: its number, as the recorder counts.
        loss_finite: whether every loss behind the gradients was finite; None where there is no scale to blame.
        scale: the scale of its backward.
        next_scale: what the policy has made of it.
        parameters: (qualified name, parameter) of what the optimizer holds.
        optimizer_state: (name, tensor) of its state; looked at only where parameters are not finite.
        applied_before: as in `non_finite_source`.
    """

    step: int
    loss_finite: bool | None
    scale: float
    next_scale: float
    parameters: Sequence[tuple[str, Tensor]]
    optimizer_state: Iterable[tuple[str, Tensor]] = ()
    applied_before: str = ""


class Diagnoser:
    """Finds the causes of skipped steps.

    Args:
        runner: the models.
        recorder: what they were called with.

    Attributes:
        repeats_forwards: whether a forward pass may be run again to see what it does.
    """

    def __init__(self, runner: PlanRunner, recorder: ForwardRecorder) -> None:
        self._runner = runner
        self._recorder = recorder
        self.repeats_forwards = True
        self._non_finite_since: tuple[int, int, Cause] | None = None
        self._fitting: tuple[int, BackwardFindings] | None = None  # n of the newest 2^-n that served; backward in FP32

    def explain(self, skip: SkippedStep, agree: bool) -> Diagnosis:
        """Why a step was skipped.

        Where parameters and batch are finite and the loss is too, backward is repeated without a scale: finite gradients
        show that the scale was to blame.

        Args:
            agree: exchange what was found with the other ranks, which all call this for the same step.
        """
        found = self._diagnose(skip, agree)
        if found.cause is Cause.SCALE and not found.confirmed and skip.scale <= 1:
            what = f"the loss was finite, but backward overflows at a scale of {skip.scale:g} as well, and could not be repeated."
            found = Diagnosis(Cause.UNKNOWN, f"{what} {Cause.UNKNOWN.facts.remedy}", confirmed=False)
        if found.cause is Cause.LOSS and not found.confirmed:
            made = (node for node in self._recorder.operations_outside() if not re.match(_SAME_VALUES, node.name()))
            half = {node.name() for node in made if _gives(node, torch.float16)}
            why = f" The loop makes it in FP16 ({join_names(sorted(half))}): make the loss in FP32, of logits.float()."
            found = found._replace(message=found.message + why * bool(half))
        if not found.confirmed and skip.step == self._recorder.functional_step:
            found = found._replace(message=f"{found.message} {_BY_TORCH_FUNC}")
        return self._naming_gradient(skip, self._naming_state(skip.step, found))

    def _naming_state(self, step: int, found: Diagnosis) -> Diagnosis:
        """`found`, with the skip since which batches are not finite: a state that the model returned may be among them."""
        former = self._non_finite_since
        if found.cause is Cause.INPUT and former and former[0] == step - 1:
            _, since, cause = former
            self._non_finite_since = (step, since, cause)
            return found._replace(
                message=f"{found.message} It follows step {since}, which was skipped ({cause.value}): if that is a state which "
                "the model returned there, such as a hidden state, reset it."
            )
        spoils_outputs = found.cause in (Cause.ACTIVATION, Cause.ROUNDING, Cause.MODEL)
        self._non_finite_since = (step, step, found.cause) if spoils_outputs else None
        return found

    def underflows(self, step: int, scale: float) -> bool:
        """Whether the gradients of `step` are all 0 in a replay as well, and not in FP32: costs two steps without optimizer."""
        forwards = self._recorder.forwards_of(step) if self.repeats_forwards else []

        def moved(in_fp32: bool) -> list[bool]:
            found = [replay_backward(each, self._runner.current, scale, scale, in_fp32) for each in forwards]
            return [bool(each.moved) for each in found if each is not None and not each.is_probe]

        with self.in_lockstep(step):
            return any(moved(in_fp32=True)) and not any(moved(in_fp32=False))

    def in_lockstep(self, step: int) -> AbstractContextManager[None]:
        """Where replays of `step`, which all ranks look at, are collectives: what lets them make them together."""
        if not self._runner.sharded or self._runner.limits:
            return nullcontext()
        forwards = [*self._recorder.forwards_of(step), *self._recorder.evaluations_of(step)]
        sharded = [forward for forward in forwards if holds_shards(forward.model)]
        return Lockstep(self._runner.device, sharded, functools.partial(take_part, self._runner.current)).entered()

    def _diagnose(self, skip: SkippedStep, agree: bool) -> Diagnosis:
        try:
            self._recorder.is_paused = True
            with self.in_lockstep(skip.step):
                found = self._found(skip)
        except Exception as error:  # a rank that fails here must not keep the others waiting
            why = f"looking for the cause failed ({in_one_line(error)})."
            found = Diagnosis(Cause.UNKNOWN, why, confirmed=False)
        finally:
            self._recorder.is_paused = False
        return self._agreed(found) if agree and is_distributed() else found

    def explain_forwards(self, parameters: Iterable[tuple[str, Tensor]], step: int | None = None) -> Diagnosis | None:
        """What is not finite in the forward passes of `step`; without one, in the newest, in or after which something has raised.

        None where nothing is.
        """
        forwards = self._recorder.newest() if step is None else self._recorder.forwards_of(step)
        try:
            self._recorder.is_paused = True
            with nullcontext() if step is None else self.in_lockstep(step):
                found = non_finite_source(parameters, forwards)
                if found is None and forwards and self.repeats_forwards:
                    found = diagnose(None, forwards, self._runner)
        finally:
            self._recorder.is_paused = False
        return found if found is not None and found.confirmed else None

    def _found(self, skip: SkippedStep) -> Diagnosis:
        forwards = self._recorder.forwards_of(skip.step)
        if (lockstep := Lockstep.now()) is not None:
            known = (skip.parameters, forwards, skip.optimizer_state, skip.applied_before)
            source = non_finite_source(*known) or self._in_gathering() or _SEEN_ELSEWHERE
            if lockstep.anyone(source.confirmed):  # a replay would find what others see before it
                return source
        used = self._recorder.forwards_of(skip.step, left_out=False)
        if len(used) < len(forwards):
            found = self._found_in(used, skip)
            if found.confirmed or skip.loss_finite:
                return found
        return self._found_in(forwards, skip)

    def _found_in(self, forwards: Sequence[RecordedForward], skip: SkippedStep) -> Diagnosis:
        source = non_finite_source(skip.parameters, forwards, skip.optimizer_state, skip.applied_before)
        if source is not None and source.confirmed:
            return source
        forwards = forwards if self.repeats_forwards else []
        if source is None and skip.loss_finite:
            return self._in_backward(skip, forwards)
        found = diagnose(skip.loss_finite, forwards, self._runner)
        if found.confirmed and found.cause in (Cause.LOSS, Cause.MODEL):
            found = self._in_fixed_parameters(forwards) or self._in_buffers(forwards) or found
        former = self._non_finite_since
        if source is not None and source.cause is Cause.UNKNOWN and former and former[0] == skip.step - 1:
            return _ALREADY_FIXED if former[2] in (Cause.ACTIVATION, Cause.ROUNDING) else source
        if source is not None:
            is_seen = found.cause in (Cause.ACTIVATION, Cause.ROUNDING, Cause.BUFFER)
            return found if is_seen else source._replace(confirmed=True)
        if found.confirmed:
            return found
        found = self._in_evaluations(skip) or found
        if skip.loss_finite is None and not found.confirmed:
            in_backward = self._in_backward(skip, forwards)
            found = in_backward if in_backward.cause is not Cause.SCALE else found
        if not (found.confirmed or found.already_fixed) and forwards and self._recorder.has_let_go(skip.step):
            return Diagnosis(Cause.UNKNOWN, _NOT_KEPT, confirmed=False)
        return found

    def _in_gathering(self) -> Diagnosis | None:
        """The diagnosis of parameters that FSDP2 makes inf of, as it gathers them in half precision; None where it does not."""
        models = [(self._runner.name_of(model), model) for model in self._runner.models()]
        if not (names := [joined(prefix, name) for prefix, m in models for name in beyond_gathered_format(m)]):
            return None
        return Diagnosis(
            Cause.WEIGHTS,
            f"FSDP gathers parameters in half precision, whose range {counted_names(names)} leave. No module in FP32 cures that: "
            "shard the model with param_dtype=None in its MixedPrecisionPolicy, and autocast casts what it can.",
        )

    def _in_fixed_parameters(self, forwards: Sequence[RecordedForward]) -> Diagnosis | None:
        """The diagnosis of parameters that hold inf or NaN and that this optimizer does not hold; None where none does."""
        models = dict.fromkeys(forward.model for forward in forwards)
        named = ((joined(self._runner.name_of(m), name), p) for m in models for name, p in m.named_parameters())
        return non_finite_source(named, ())

    def _in_buffers(self, forwards: Sequence[RecordedForward]) -> Diagnosis | None:
        """The diagnosis of buffers without whose NaN or inf forward, which is not finite, would be; None where it would not."""
        by_model = {
            forward.model: self._recorder.non_finite_buffers(forward.model, suspects=True) for forward in forwards
        }
        names = [joined(self._runner.name_of(model), name) for model, bad in by_model.items() for name in bad]
        replays = (replay(forward, self._runner.current, by_model[forward.model]) for forward in forwards)
        if not names or any(it.error or it.overflowing or it.first_non_finite is not None for it in replays):
            return None
        return Diagnosis(
            Cause.BUFFER,
            f"inf or NaN was in {counted_names(names, 'buffer')} before this step, and forward uses that; no step can correct it. "
            "Go back to the last good checkpoint, or reset what is named.",
            tuple(dict.fromkeys(name.rpartition(".")[0] for name in names)),
        )

    def _in_evaluations(self, skip: SkippedStep) -> Diagnosis | None:
        """What models that only evaluate are seen to do to the loss; None where nothing is."""
        evaluations = self._recorder.evaluations_of(skip.step) if self.repeats_forwards else []
        weights = [
            (joined(self._runner.name_of(model), name), p)
            for model in dict.fromkeys(evaluation.model for evaluation in evaluations)
            for name, p in model.named_parameters()
        ]
        non_finite = non_finite_names(weights)
        if non_finite:
            return Diagnosis(
                Cause.WEIGHTS,
                f"the loss is made from a model that is not trained, and inf or NaN is in {counted_names(non_finite)} of it; no "
                "step can correct that. Load that model again, in a format that holds its weights.",
            )
        found = diagnose(skip.loss_finite, evaluations, self._runner)
        return found if found.confirmed or found.already_fixed else None

    def _agreed(self, found: Diagnosis) -> Diagnosis:
        """The most severe cause, and all modules, that any rank has found, in its words. One all-reduce, one broadcast, two GPU-CPU syncs."""
        names = [name for name, _ in self._runner.named_modules()]
        by_rank = found.severity * _RANKS + dist.get_rank()  # exact in float32
        local = [float(by_rank), *(float(name in found.modules) for name in names)]
        worst, *blamed = all_reduce_max_to_host(torch.tensor(local, device=self._runner.device))
        severity, rank = divmod(int(worst), _RANKS)
        modules = tuple(name for name, flag in zip(names, blamed, strict=True) if flag)
        said = [found.message]
        dist.broadcast_object_list(said, rank, device=self._runner.device)
        here = f" Here: {found.message}" if found.confirmed else ""
        message = found.message if found.severity == severity else f"found by rank {rank}: {said[0]}{here}"
        return _BY_SEVERITY[severity]._replace(message=message, modules=modules)

    def _in_backward(self, skip: SkippedStep, forwards: Sequence[RecordedForward]) -> Diagnosis:
        """Why gradients are not finite although the loss is: backward is repeated without a scale, with a tiny one, and in FP32."""
        current = self._runner.current
        tried = bool(forwards) and skip.step != self._recorder.functional_step
        for index, forward in reversed(list(enumerate(forwards))):
            with BlockGradients(forward.model) as blocks:
                bad = replay_backward(forward, current, 1.0, skip.scale, first_only=True)
            tried &= bad is not None and not bad.is_probe
            if bad is None or not (bad.parameters or bad.outside):
                if bad and (lost := lost_at_any_scale(forward, current, skip.scale, bad)):
                    return self._gradient_leaves_format(forward, lost)
                continue
            if bad.outside and (bad.is_from_outside or not bad.parameters):
                if not bad.output_is_finite and (hidden := self._hidden_overflow(forward)):
                    return hidden
                operations = self._recorder.operations_outside()
                later = [x for each in forwards[index + 1 :] for _, x in _named_inputs(each)]
                unseen = not bad.is_from_outside or any(x.grad_fn is not None for x in later)
                unseen |= any(g is not None and g.dtype in HALF_DTYPES for g in forward.output_gradients.values())
                by_python = torch.autograd.function.BackwardCFunction
                unseen |= any(isinstance(node, by_python) or _gives(node, *HALF_DTYPES) for node in operations)
                if (unseen and skip.scale > 1) or (skip.scale > SMALLEST_SCALE and _may_need_less(forward, operations)):
                    tried = False
                    continue
                return _derivative_outside(bad.outside, operations)
            return self._large_loss(skip, forward) or self._at_any_scale(skip, forward, bad, blocks)
        if tried and _ran_before(forwards, self._runner):
            again = [replay_backward(forward, current, skip.scale, skip.scale) for forward in forwards]
            if all(found is not None and not (found.parameters or found.outside) for found in again):
                return _ALREADY_FIXED
        if tried or not forwards:
            return Diagnosis(Cause.SCALE, SCALE_WILL_FIX_IT, confirmed=tried)
        self._recorder.keep_more_gradients()
        return Diagnosis(Cause.SCALE, f"{SCALE_WILL_FIX_IT} {_OUTSIDE}", confirmed=False)

    def _at_any_scale(
        self, skip: SkippedStep, forward: RecordedForward, bad: BackwardFindings, blocks: BlockGradients
    ) -> Diagnosis:
        """Why a gradient is not finite without a loss scale: one block is tried, and where that does not show it the whole model."""
        current = self._runner.current
        block = blocks.replay(forward, current, bad)
        leaves = block.in_format if block else None
        in_fp32 = block.in_fp32 if block and (leaves or block.in_fp32.parameters) else None
        if in_fp32 is None:
            in_fp32 = replay_backward(forward, current, 1.0, skip.scale, True, by_operator=True, first_only=True)
        if in_fp32 is not None and in_fp32.parameters:
            return self._derivative(forward, in_fp32)
        if not blocks.outputs_are_finite() and (hidden := self._hidden_overflow(forward)):
            return hidden
        if in_fp32 is None:
            why = "the loss was finite, gradients are not at any scale, and backward could not be repeated in FP32."
            return Diagnosis(Cause.UNKNOWN, f"{why} {Cause.UNKNOWN.facts.remedy}", confirmed=False)
        if leaves is None and (large := self._large_loss(skip, forward, in_fp32)):
            return large
        leaves = leaves or replay_backward(forward, current, 1.0, skip.scale, by_operator=True)
        return self._gradient_leaves_format(forward, leaves or bad)

    def _hidden_overflow(self, forward: RecordedForward) -> Diagnosis | None:
        """The diagnosis of an infinite activation that a function which saturates has hidden from the loss; None where none is."""
        found = diagnose(True, [forward], self._runner)
        return found if found.cause in (Cause.ACTIVATION, Cause.ROUNDING) else None

    def _large_loss(
        self, skip: SkippedStep, forward: RecordedForward, in_fp32: BackwardFindings | None = None
    ) -> Diagnosis | None:
        """A loss that needs a scale below 1: the largest power of two that serves is tried out; None where none does.

        Without `in_fp32` that is the one which an earlier skip of a loss as large has shown, and which is not reached yet.
        """

        def tried(power: int) -> BackwardFindings | None:
            return replay_backward(forward, self._runner.current, 2.0**-power, skip.scale)

        if in_fp32 is not None:
            begin = math.ceil(math.log2((in_fp32.largest or 1.0) / FP16_FORMAT.largest))
            power = power_that_serves(tried, in_fp32, begin)
            self._fitting = None if power is None else (power, in_fp32)
        elif self._fitting is None or skip.scale <= 2.0 ** -self._fitting[0]:
            return None
        else:
            known, former = self._fitting
            found = tried(known)
            is_as_large = found is not None and found.largest > former.largest * 2.0 ** -(known + 1)
            power = known if found and is_as_large and not (found.parameters or lost_at(known, found, former)) else None
        if power is None:
            return None
        return Diagnosis(
            Cause.SCALE,
            "the loss is large: its gradients leave the range of FP16 even without a loss scale. They fit at a scale of "
            f"{2.0**-power:g}, to which hf_amp lowers it in steps. To avoid this, use a mean in place of a sum in the loss, or "
            "normalise the targets.",
        )

    def _derivative(self, forward: RecordedForward, found: BackwardFindings) -> Diagnosis:
        modules, where = self._where_in_backward(forward, found)
        return Diagnosis(
            Cause.DERIVATIVE,
            f"the loss was finite, but its derivative is not, at any scale and in FP32 too. {where}. Look there for a root, a "
            "power or a norm of zero, or a division by zero, also in a branch that torch.where or a mask discards.",
            modules[:1],
        )

    def _gradient_leaves_format(self, forward: RecordedForward, found: BackwardFindings) -> Diagnosis:
        modules, where = self._where_in_backward(forward, found)
        return Diagnosis(
            Cause.ACTIVATION,
            f"the loss was finite, but in backward a gradient leaves the range of {self._runner.current.mode.number_format.name} "
            f"at any loss scale, and in FP32 none does: a wider format cures that. {where}.",
            modules or ("",),
        )

    def _where_in_backward(self, forward: RecordedForward, found: BackwardFindings) -> tuple[tuple[str, ...], str]:
        """The module of the operator, and the one before it, whose parameters get what it gives; and a phrase that says so."""
        prefix, operator = self._runner.name_of(forward.model), found.operator
        first = self._first_in_backward(joined(prefix, name) for name in found.parameters)
        own = [joined(prefix, operator.module)] if operator and operator.module else []
        modules = [name for name in (*own, first or "") if name in dict(self._runner.named_modules())]
        where = f"The first gradient that is not finite is that of {first}"
        return tuple(dict.fromkeys(modules)), f"{where}, made by {operator.what}" if operator else where

    def _first_in_backward(self, parameters: Iterable[str]) -> str | None:
        """The module that is last in order among those that own `parameters`; the parameter where it is the model's own."""
        owners = {name.rpartition(".")[0]: name for name in parameters}
        known = [owners[name] for name, _ in self._runner.named_modules() if name in owners]
        return known[-1].rpartition(".")[0] or known[-1] if known else None

    def _naming_gradient(self, skip: SkippedStep, diagnosis: Diagnosis) -> Diagnosis:
        """`diagnosis`, with where backward overflowed where there is no scale to blame and nothing else to go by."""
        scaled = skip.loss_finite is False or (skip.loss_finite and skip.scale > 1)
        if diagnosis.cause is not Cause.UNKNOWN or diagnosis.modules or scaled:
            return diagnosis
        bad = non_finite_names((name, p.grad) for name, p in skip.parameters if p.grad is not None)
        if (first := self._first_in_backward(bad)) is None:
            return diagnosis
        said = f"{diagnosis.message} The first gradient that is not finite is that of {first}."
        return diagnosis._replace(message=said)
