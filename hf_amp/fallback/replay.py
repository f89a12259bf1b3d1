"""Where a forward pass leaves the range of its format: the pass once more, watched, on the batch that went wrong."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp.device import RandomState, devices_of
from hf_amp.emulation import in_backward, notes_kept
from hf_amp.errors import in_one_line
from hf_amp.fallback import sharded
from hf_amp.fallback.module_precision import (
    CurrentPrecision,
    ForwardContext,
    holds_shards,
    is_unit,
    recovers,
    to_float32,
)
from hf_amp.fallback.one_module import BatchWritten, Given, ModuleAlone, call_without_writes
from hf_amp.fallback.operators import BadOperator, OperatorTrace, graph_of, is_reentrant, raised_at
from hf_amp.fallback.recorder import OBJECTS_DEEP, RecordedForward
from hf_amp.fallback.sharded import GatheredGradients, Lockstep
from hf_amp.patch_log import removal, takes_hooks
from hf_amp.precision import PrecisionMode, upcast
from hf_amp.statistics import extremes, is_distributed, local_part, to_host_list
from hf_amp.tree import tensors_in


@dataclass
class ReplayFindings:
    """What a forward pass was seen to do.

    Attributes:
        overflowing: names of the modules whose output is not finite in the run's precision, and is in FP32, in the
            order in which they ran; "" for what the model computes outside of its modules.
        first_non_finite: the first module whose output is not finite in FP32 either; None where none.
        only_loss: whether all that is not finite there is a single number, the loss.
        returns_loss: whether the model returns a single number among its outputs.
        draws: whether the model has drawn random numbers or counts its calls, so that the pass may not have been the same
            as the first.
        operators: module → its first operator that gives what is not finite; where any module does.
        operators_in: the same of what was seen in a module that was run alone, on finite values.
        error: why the pass could not be repeated; None where it could.
        is_inside: whether the whole model in FP32 cures what a module in it makes in FP32 too: a closer look says where.
        output: what the model returns with those modules in FP32, and the graph behind it where gradients were asked for.
    """

    overflowing: list[str] = field(default_factory=list)
    first_non_finite: str | None = None
    only_loss: bool = False
    returns_loss: bool = False
    draws: bool = False
    operators: Mapping[str, BadOperator] = field(default_factory=dict)
    operators_in: dict[str, Mapping[str, BadOperator]] = field(default_factory=dict)
    error: str | None = None
    is_inside: bool = False
    output: Any = None

    def operator_of(self, module: str) -> BadOperator | None:
        """The first operator to blame inside of the module of that name; None where none was seen."""
        inside = (op for name, op in self.operators.items() if f"{name}.".startswith(f"{module}." if module else ""))
        return next(inside, None)


def replay(
    forward: RecordedForward,
    current: CurrentPrecision,
    without: Collection[str] = (),
    by_operator: bool = True,
    gradients: bool = False,
) -> ReplayFindings:
    """Repeats `forward` under the precision of the run and finds which modules leave its range.

    A module whose output is not finite runs once more in FP32. If that cures it, it is to blame, and the pass goes on
    with the FP32 output, so that one pass finds every such module. Nothing of the run changes: no gradients, buffers
    and random state are put back, caches are not used. Dropout draws what it drew.
    Operator by operator such a module is run alone, where what it was given is finite, or else the pass, unless `by_operator` is
    False. Models that differentiate in forward, as
    force fields do, are repeated with gradients on. Reads the host once a module: for steps that went wrong only. Never raises.
    In the buffers named in `without`, 1 stands for whatever is not finite.
    """
    found = _replay_modules(forward, _Replay(forward, current), without, gradients)
    if found.error is not None and not gradients:
        gradients = True
        again = _replay_modules(forward, _Replay(forward, current), without, gradients=True)
        found = found if again.error else again
    if found.is_inside:
        found = _replay_modules(forward, _Replay(forward, current, all_of_them=True), without, gradients)
    blamed = found.overflowing or [name for name in [found.first_non_finite] if name is not None]
    if by_operator and not found.operators_in.keys() >= {*blamed}:
        found.operators = _replay_operators(forward, current, gradients)
    elif by_operator:
        found.operators = {at: op for name in blamed for at, op in found.operators_in[name].items()}
    return found


def take_part(current: CurrentPrecision, wanted: sharded.Pass, forward: RecordedForward) -> None:
    """Makes a pass that another rank of a sharded run wants, with this rank's own batch."""
    variant = bool(wanted.variant)
    if wanted.kind == sharded.MODULES:
        _replay_modules(forward, _Replay(forward, current), (), variant)
    elif wanted.kind == sharded.OPERATORS:
        _replay_operators(forward, current, variant)
    else:
        replay_backward(forward, current, 1.0, 1.0, variant)


def _replay_operators(
    forward: RecordedForward, current: CurrentPrecision, gradients: bool
) -> Mapping[str, BadOperator]:
    """By module, the first operator to blame."""
    trace, model = OperatorTrace(current), forward.model
    sharded.wait_for_turn(sharded.OPERATORS, forward, gradients)
    silent = sharded.silent_while_gathering(model, lambda on: setattr(trace, "is_silent", on))
    with suppress(Exception), nothing_changes(model, gradients), current(), trace.watching(model), silent:
        repeat_forward(forward)
    return trace.found


def _replay_modules(
    forward: RecordedForward, watch: _Replay, without: Collection[str], gradients: bool
) -> ReplayFindings:
    sharded.wait_for_turn(sharded.MODULES, forward, gradients)
    handles = []
    only_end = without and Lockstep.now() is None  # is asked for
    inner = [] if only_end else [each for each in forward.model.named_modules() if each[0] and takes_hooks(each[1])]
    for name, module in inner:
        before, after = watch.look_at(name)
        # In front of others' hooks, which run again with it; of a unit only its forward does.
        handles.append(module.register_forward_pre_hook(before, prepend=not is_unit(module), with_kwargs=True))
        # Before FSDP lets go of what it has gathered.
        handles.append(module.register_forward_hook(after, with_kwargs=True, prepend=is_unit(module)))
    # Torch goes through the hooks of the model itself while it handles what its forward has raised: none may come or go.
    begin, end = watch.look_at("")
    try:
        with nothing_changes(forward.model, gradients), watch.current():
            for x in (attrgetter(name)(forward.model) for name in without):
                x.copy_(x.where(x.isfinite(), 1.0))
            begin(forward.model, forward.arguments, forward.options)
            counters = _counters(forward.model)
            output, watch.findings.draws = repeat_forward(forward)
            watch.findings.draws |= _counters(forward.model) != counters
            cured = end(forward.model, (), {}, output)
            watch.findings.output = output if cured is None else cured
    except BatchWritten as error:
        return ReplayFindings(error=in_one_line(error))
    except Exception as error:  # out of memory, or whatever the model raises on this batch
        watch.findings.error = in_one_line(error) + raised_at(error)
        watch.blame_candidate()
    finally:
        removal(handles)()
    return watch.findings


TINY_SCALE = 2.0**-24
"""So small that no gradient of a loss of ordinary size overflows: FP16's smallest value."""


class BackwardFindings(NamedTuple):
    """What a repeated backward was seen to do.

    Attributes:
        parameters: names of those whose gradients are not finite.
        magnitudes: name of a parameter that has a gradient → its largest.
        operator: the first operator whose derivative is not finite; None where none was seen, or nobody looked.
        is_probe: whether small random numbers stood for what the loss gives to the output.
        outside: paths of outputs to which something that is not finite came.
        is_from_outside: whether all of that came from outside of the model, and not in part through another output.
        output_is_finite: whether what the model returned is.
    """

    parameters: list[str]
    magnitudes: Mapping[str, float]
    operator: BadOperator | None = None
    is_probe: bool = False
    outside: Sequence[str] = ()
    is_from_outside: bool = False
    output_is_finite: bool = True

    @property
    def moved(self) -> frozenset[str]:
        """Names of those whose gradients are not zero throughout."""
        return frozenset(name for name, magnitude in self.magnitudes.items() if magnitude)

    @property
    def largest(self) -> float:
        """The largest finite magnitude."""
        return max(filter(math.isfinite, self.magnitudes.values()), default=0.0)


def replay_backward(
    forward: RecordedForward,
    current: CurrentPrecision,
    factor: float,
    scale: float,
    in_fp32: bool = False,
    by_operator: bool = False,
    first_only: bool = False,
) -> BackwardFindings | None:
    """Repeats `forward` and its backward from `factor` times the loss, and finds which gradients are not finite.

    It starts from the gradients that the step, with its loss times `scale`, gave to the outputs, where they were kept, otherwise
    from the loss that the model returns, or small random numbers at its single output, on which a loss must depend.
    None where nothing is known: there are several, or the repetition failed. Costs one step without its optimizer, and
    memory for the gradients; nothing of the run changes.
    `by_operator` looks for the operator as well, with one GPU-CPU sync each. `first_only` ends at the first parameter whose gradient
    is not finite, which alone is told, on a CPU; of a sharded model all ranks must go on together.
    """
    named = [(name, p) for name, p in forward.model.named_parameters() if p.requires_grad]
    trace = OperatorTrace(current, forward=False) if by_operator else None
    gathered = GatheredGradients() if holds_shards(forward.model) else None
    sharded.wait_for_turn(sharded.BACKWARD, forward, in_fp32)
    found = None  # where memory runs out, or whatever the model raises: then nothing is claimed
    with suppress(Exception), ExitStack() as stack:
        stack.enter_context(nothing_changes(forward.model, gradients=True))
        stack.enter_context(hooks_silent([p for _, p in named]))
        if in_fp32:
            stack.enter_context(ForwardContext.suspended())
        stack.enter_context(current.entry.context(PrecisionMode.FP32) if in_fp32 else nullcontext())
        stack.enter_context(gathered.watching(forward.model) if gathered else nullcontext())
        with trace.watching(forward.model) if trace else nullcontext():
            with nullcontext() if in_fp32 else current() as precision:
                output, _ = repeat_forward(forward, in_fp32)
            stack.enter_context(in_backward(precision))
            starts, *about = starts_of(output, forward, factor, scale)
            if trace is not None and starts:
                trace.repeats_backward = True
                trace.watch_backward([x for x, _ in starts])
            found = gathered.backward(starts, output) if gathered else gradient_ends(starts, named, first_only)
    if found is None:
        return None
    ends = to_host_list(end for _, pair in found for end in pair)
    pairs = zip(found, ends[::2], ends[1::2], strict=True)
    magnitudes = {name: max(-least, most) for (name, _), least, most in pairs}
    bad = [name for name, magnitude in magnitudes.items() if not math.isfinite(magnitude)]
    seen = (*cast(Any, about), not (bad and non_finite_tensors(output)))
    return BackwardFindings(bad, magnitudes, trace.in_backward if trace else None, *seen)


@contextmanager
def hooks_silent(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on `parameters` do not run inside: what a user's hook makes of a gradient is not the model's doing."""
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    former = [(p, kind, hooks) for p in parameters for kind in kinds if (hooks := getattr(p, kind))]
    for p, kind, _ in former:
        setattr(p, kind, None)
    try:
        yield
    finally:
        for p, kind, hooks in former:
            setattr(p, kind, hooks)


def starts_of(
    output: Any, forward: RecordedForward, factor: float, scale: float
) -> tuple[list[tuple[Tensor, Tensor]], bool, list[str], bool]:
    """(output, its gradient) of those that backward starts from, none where nothing is known; the rest as in `BackwardFindings`."""
    outputs = {path: x for path, x in float_tensors(output) if x.requires_grad}
    watched = {path: g for path, g in forward.output_gradients.items() if path in outputs}
    given = {path: g for path, g in watched.items() if g is not None and g.shape == outputs[path].shape}
    if given:
        # What came to an output that another one is made from came partly through that one.
        behind = {path: {node for node, _ in graph_of([outputs[path].grad_fn])} for path in given}
        ends = [path for path in given if sum(outputs[path].grad_fn in nodes for nodes in behind.values()) == 1]
        bad = [path for path in given if non_finite_tensors(given[path])]
        pairs = [(outputs[path], (upcast(given[path]) * (factor / scale)).to(outputs[path])) for path in ends]
        return pairs, False, [path for path in ends if path in bad] or bad, not set(bad).isdisjoint(ends)
    numbers = [(x, torch.full_like(x, factor)) for path, x in outputs.items() if x.dim() == 0 and path not in watched]
    if numbers or len(outputs) != 1:
        return numbers[:1], False, [], False
    return [(x, torch.randn_like(x) * TINY_SCALE) for x in outputs.values()], True, [], False


def gradient_ends(
    starts: Sequence[tuple[Tensor, Tensor]],
    named: Sequence[tuple[str, Tensor]],
    first_only: bool,
    retain_graph: bool = False,
) -> list[tuple[str, Tensor]] | None:
    """(name of a parameter, the least and the largest element of its gradient); None where nothing is known."""
    if not starts:
        return None
    (ends, seeds), parameters = zip(*starts, strict=True), [p for _, p in named]
    gradients: Sequence[Tensor | None]
    if not is_reentrant(ends):
        # On a GPU a wait for each gradient would take longer than what it may save.
        early = first_only and parameters[0].device.type == "cpu"
        find = _until_first if early else functools.partial(torch.autograd.grad, allow_unused=True)
        gradients = find(ends, parameters, seeds, retain_graph=retain_graph)
    elif is_distributed():
        return None  # what waits for the other ranks hangs on the gradients' accumulation
    else:  # reentrant checkpointing refuses `autograd.grad`
        former = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            torch.autograd.backward(ends, seeds, retain_graph=retain_graph)
            gradients = [p.grad for p in parameters]
        finally:
            for p, gradient in zip(parameters, former, strict=True):
                p.grad = gradient
    return [(name, extremes(g.detach())) for (name, _), g in zip(named, gradients, strict=True) if g is not None]


def _until_first(
    ends: Sequence[Tensor], parameters: Sequence[Tensor], seeds: Sequence[Tensor], retain_graph: bool
) -> Sequence[Tensor | None]:
    """The gradients of `parameters`; as soon as one of them is not finite, that alone. One GPU-CPU sync each."""
    first: list[Tensor | None] = [None] * len(parameters)

    def look(index: int, gradient: Tensor) -> None:
        if not all(map(math.isfinite, to_host_list(extremes(gradient)))):
            first[index] = gradient
            raise Found

    handles = [cast(Any, p).register_hook(functools.partial(look, index)) for index, p in enumerate(parameters)]
    try:
        return torch.autograd.grad(ends, parameters, seeds, retain_graph, allow_unused=True)
    except Found:
        return first
    finally:
        for handle in handles:
            handle.remove()


class Found(Exception):
    """Ends a backward that has shown what was looked for."""


class _Candidate(NamedTuple):
    """A module whose output is not finite in FP32 either: whether all of that is a single number, or -inf."""

    name: str
    only_loss: bool
    may_be_mask: bool


class _Replay:
    """Looks at the output of every module as it returns, innermost first.

    Where one has made NaN or inf in FP32 too, those around it show whether the half-precision values that it was given were to blame.
    Of them one that is most of the model is left out, unless `all_of_them` are wanted, for the whole model shows it as well.
    """

    def __init__(self, forward: RecordedForward, current: CurrentPrecision, all_of_them: bool = False) -> None:
        self._elements = sum(p.numel() for p in forward.model.parameters())
        self.current = current
        lockstep = Lockstep.now()
        self._lockstep = lockstep if lockstep is not None and holds_shards(forward.model) else None
        self._all_of_them = all_of_them or self._lockstep is not None
        self._alone = ModuleAlone(forward, current)
        self.findings = ReplayFindings(operators_in=self._alone.found)
        self._candidate: _Candidate | None = None

    def look_at(self, name: str) -> tuple[Callable[..., None], Callable[..., Any]]:
        """Forward hooks for the module of that name, one before and one after it has run in this thread."""
        thread = threading.get_ident()
        called_with: list[tuple[Given, RandomState]] = []

        def before(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if threading.get_ident() == thread and not self._alone.runs:
                called_with.append((Given(arguments, options), self._alone.random_state()))

        def after(module: nn.Module, _arguments: Any, _options: Any, output: Any) -> Any:
            if threading.get_ident() != thread or self._alone.runs:
                return None
            given, self._alone.drawn_from = called_with.pop()
            if self.findings.first_non_finite is not None:
                return None
            if name == "":
                self.findings.returns_loss = any(x.dim() == 0 for _, x in float_tensors(output))
            bad, asks = bool(non_finite_tensors(output)), self._lockstep
            together = asks is not None and (name == "" or sharded.needs_others(module)) and asks.anyone(bad)
            if not bad:
                self._clear(name, given)
                # Where another rank needs it, a part of what is spread over ranks has to be like the others.
                return self._in_fp32(name, module, given) if together else None
            known = self._candidate is not None and not self._candidate.may_be_mask and not self._all_of_them
            if known and name:
                is_most = 2 * sum(p.numel() for p in module.parameters()) > self._elements
                if is_most if self._candidate_is_in(name) else _holds_nan_or_inf(given.again()):
                    return None
            # Where it is clear, the candidate's NaN is in FP32 what it is here.
            is_clear = known and name == "" and self._alone.is_own_state
            cured = None if is_clear else self._cured(name, module, output, given)
            self.findings.is_inside = known and name == "" and cured is not None
            if name == "" and cured is None:
                self.blame_candidate()
            return cured

        return before, after

    def blame_candidate(self) -> None:
        """The pass is over, and its end was not finite, or not reached."""
        if (found := self._candidate) and (self.findings.error is None or not found.may_be_mask):
            self.findings.first_non_finite, self.findings.only_loss = found.name, found.only_loss

    def _cured(self, name: str, module: nn.Module, output: Any, given: Given) -> Any:
        """The output in FP32 where that is finite, but for a mask of -inf with values of `output` beside it; None otherwise."""
        exact = self._in_fp32(name, module, given)
        broken_in_fp32 = non_finite_tensors(exact)
        masked = broken_in_fp32 and not _holds_nan_or_inf(exact) and _finite_only_in(exact, output)
        if broken_in_fp32 and not masked:
            former, likelier = self._candidate, self._likelier_candidate(name, given.again(), broken_in_fp32)
            self._candidate, exact = likelier, None
            to_blame = likelier is not None and likelier is not former and not likelier.may_be_mask
        elif to_blame := name not in self.findings.overflowing:
            self.findings.overflowing.append(name)
        to_blame &= bool(name) and not self._lockstep and not torch.is_grad_enabled()
        if to_blame and not non_finite_tensors(given.again()):
            self._alone.look_inside(name, module, *given.again())
        return exact

    def _in_fp32(self, name: str, module: nn.Module, given: Given) -> Any:
        """With its hooks, which may change its output; but for those of FSDP, which has gathered its parameters already."""
        arguments, options = given.again()
        with self._alone.running(), ForwardContext.suspended(), self.current.entry.context(PrecisionMode.FP32):
            forward = (module.forward if is_unit(module) else module) if name else sharded.without_wrapper(module)
            return forward(*to_float32(arguments), **to_float32(options))

    def _likelier_candidate(self, name: str, inputs: Any, outputs: list[Tensor]) -> _Candidate | None:
        """Who is to blame if the model's output is not finite: the first whose own inputs were, unless it made a mask."""
        may_be_mask = not _holds_nan_or_inf(outputs)
        former = self._candidate
        if former is not None and (may_be_mask or not former.may_be_mask or non_finite_tensors(inputs)):
            return former
        if name and _holds_nan_or_inf(inputs):
            return former
        return _Candidate(name, all(x.dim() == 0 for x in outputs), may_be_mask)

    def _clear(self, name: str, given: Given) -> None:
        """Lets go of a candidate whose infinities the module of this name has made finite values of, as masks are meant to."""
        if self._candidate is not None and (self._candidate_is_in(name) or non_finite_tensors(given.again())):
            self._candidate = None

    def _candidate_is_in(self, name: str) -> bool:
        return self._candidate is not None and f"{self._candidate.name}.".startswith(f"{name}.")


def _finite_only_in(exact: Any, output: Any) -> bool:
    """Whether an element is finite in `exact` alone: both hold a mask, and `output` more than that. One GPU-CPU sync."""
    ours = dict(float_tensors(output))
    pairs = [(x, ours[path]) for path, x in float_tensors(exact) if path in ours and ours[path].shape == x.shape]
    pairs = [(local_part(x), local_part(y)) for x, y in pairs]
    return any(to_host_list((x.isfinite() & ~y.isfinite()).any() for x, y in pairs))


def _holds_nan_or_inf(inputs: Any) -> bool:
    """Whether they hold NaN or inf; -inf may be a mask. One GPU-CPU sync."""
    ends = to_host_list(extremes(local_part(x)) for _, x in float_tensors(inputs))
    return not all(most < math.inf for most in ends[1::2])


def float_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """(path, tensor) of the floating-point tensors inside of `value`."""
    return [(path, x) for path, x in tensors_in(value, depth=OBJECTS_DEEP) if x.is_floating_point()]


def non_finite_tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors inside of `value` that hold inf or NaN. One GPU-CPU sync."""
    found = [x for _, x in float_tensors(value)]
    ends = to_host_list(extremes(local_part(x)) for x in found)
    pairs = zip(found, ends[::2], ends[1::2], strict=True)
    return [x for x, *of_x in pairs if not all(map(math.isfinite, of_x))]


def repeat_forward(forward: RecordedForward, in_fp32: bool = False) -> tuple[Any, bool]:
    """What the model returns for the same batch and the same random numbers, and whether it draws any."""
    arguments, options = inputs_to_repeat(forward)
    if forward.random_state is not None:
        forward.random_state.restore()
    before = RandomState.now(devices_of(forward.model))
    model: Callable[..., Any] = forward.model
    if in_fp32:
        arguments, options = to_float32(arguments), to_float32(options)
        model = sharded.without_wrapper(forward.model)
    return call_without_writes(model, arguments, options), before.has_moved()


def inputs_to_repeat(forward: RecordedForward) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch itself, in copies of whatever else holds it: a cache of keys and values would grow again.

    Raises:
        RuntimeError: the batch is no longer what it was.
    """
    if not forward.is_intact:
        raise RuntimeError("the batch was written into since, by the model or by what loads it")
    given = [x for _, x in tensors_in((forward.arguments, forward.options), depth=OBJECTS_DEEP)]
    # Behind what the loop has computed before is a graph that its own backward has used up.
    kept = {id(x): x.detach().requires_grad_(x.requires_grad) if x.grad_fn is not None else x for x in given}
    arguments, options = copy.deepcopy((forward.arguments, forward.options), kept)
    if "use_cache" in inspect.signature(type(forward.model).forward).parameters:
        options["use_cache"] = False
    return arguments, options


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where the model would wait for other ranks (SyncBatchNorm, a gathered loss), which need not take the same look."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in getattr(func, "namespace", ""):
            raise RuntimeError(f"its {func} would wait for the other processes")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_changes(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Buffers, with their versions, plain attributes (counters, caches) and random state are afterwards what they are now;
    nothing is compiled, and nothing recorded for backward, but with `gradients`.

    Raises:
        RuntimeError: the model would wait for other ranks, or keep gathered parameters, whose gradients `zero_grad` misses.
    """
    is_whole = not holds_shards(model)
    lockstep = None if is_whole else Lockstep.now()
    if not is_whole and (lockstep is None or not recovers(model)):
        raise RuntimeError("its parameters are sharded, and gathering them would wait for the other processes")
    buffers = [(at, name, x, x.clone()) for at in model.modules() for name, x in at.named_buffers(recurse=False)]
    plain = [  # attribute → what it is and a copy of what it holds, for what is neither torch's own machinery nor a hook
        (its, {name: (x, _contents(x)) for name, x in its.items() if name not in _MACHINERY})
        for its in map(vars, model.modules())
    ]
    random_state = RandomState.now(devices_of(model))
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.callback(notes_kept())
        counted = tuple(x for _, _, x, _ in buffers if not x.is_inference())
        stack.enter_context(torch.autograd.grad_mode._unsafe_preserve_version_counter(counted))
        if "torch._dynamo" in sys.modules:  # which takes seconds to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            alone: Any = _NoCollectives() if is_distributed() else nullcontext()  # type: ignore[no-untyped-call]
            with alone if lockstep is None else lockstep.guarding(model):
                yield
        finally:
            with torch.no_grad():
                for module, name, buffer, copied in buffers:
                    buffer.copy_(copied)
                    setattr(module, name, buffer)  # forward may have put another tensor in its place
                for attributes, former in plain:
                    _restore(attributes, former)
            random_state.restore()
            torch.clear_autocast_cache()  # it may hold casts that were made while gradients were off


def _counters(model: nn.Module) -> list[list[Any]]:
    return [[x for x in vars(module).values() if isinstance(x, (int, float))] for module in model.modules()]


_MACHINERY = frozenset(vars(nn.Module()))


def _contents(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_meta:
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict, set, deque)) else None


def _restore(attributes: dict[str, Any], former: dict[str, tuple[Any, Any]]) -> None:
    """Gives attributes their former values, and containers and tensors among them their former contents."""
    for name in [name for name in attributes if name not in _MACHINERY and name not in former]:
        del attributes[name]
    for name, (value, contents) in former.items():
        attributes[name] = value
        if contents is None:
            continue
        if isinstance(value, Tensor):
            if not torch.equal(value, contents):
                value.detach().copy_(contents)
        else:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(contents)
