"""Keeps hold of the batches of the newest step, so that a step that went wrong can be looked at again, and of what
buffers were before it, so that they can be put back."""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from hf_amp.device import RandomState, devices_of, is_capturing
from hf_amp.fallback.module_precision import PlanRunner
from hf_amp.fallback.operators import graph_of
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.patch_log import UnpickledHook, compile_disabled, is_one_graph, removal, takes_hooks
from hf_amp.statistics import is_sharded, to_host_list
from hf_amp.tree import copy_containers, tensors_in, tensors_of

ELEMENTS_COPIED_UNSEEN = 2**23
"""Elements of one model's buffers that are copied before each step without a sign that anything writes into them."""


class _Buffer(NamedTuple):
    """Where a model keeps a buffer, or a tensor as a plain attribute, which a forward pass may replace by another tensor."""

    path: str
    module: weakref.ref[nn.Module]
    name: str

    def place(self) -> dict[str, Any]:
        """What holds it by its name."""
        module = self.module()
        return {} if module is None else module._buffers if self.name in module._buffers else vars(module)

    def tensor(self) -> Tensor | None:
        """The tensor there now; None where there is none, or none that `isfinite` is for, such as FP8, or a DTensor."""
        x = self.place().get(self.name)
        if not isinstance(x, Tensor) or x.requires_grad or x.is_meta or x.is_sparse or is_sharded(x):
            return None
        return x if x.is_floating_point() and x.element_size() > 1 else None


_Copies = list[tuple[_Buffer, weakref.ref[Tensor], Tensor]]


class ModelBuffers:
    """The floating-point buffers of one model that forward writes into: running statistics, codebooks, amaxes.

    Forward moves them before anybody knows whether its step will be applied. One NaN would stay in them for ever.

    Version counters show too little: the first write only when it is too late, and none through `.data` or by PyTorch's own
    batch norm. So the smallest buffers, `ELEMENTS_COPIED_UNSEEN` in all, are copied before every step. A larger one, mostly a
    constant, is from when its counter has moved, or its tensor has been replaced, since the first step.
    """

    def __init__(self, model: nn.Module) -> None:
        plain = [
            (*at, *item) for at in model.named_modules() for item in vars(at[1]).items() if isinstance(item[1], Tensor)
        ]
        held = [*plain, *((*at, *item) for at in model.named_modules() for item in at[1]._buffers.items())]
        floats = [(path, module, name) for path, module, name, x in held if x is None or x.is_floating_point()]
        self._all = [_Buffer(f"{path}.{name}".lstrip("."), weakref.ref(module), name) for path, module, name in floats]
        self._at_start: dict[str, tuple[weakref.ref[Tensor], tuple[int, ...], Tensor]] = {}
        self._large: set[str] = set()

    def _now(self) -> list[tuple[_Buffer, Tensor]]:
        return [(buffer, x) for buffer in self._all if (x := buffer.tensor()) is not None]

    def _is_written(self, path: str, x: Tensor) -> bool:
        tensor, versions, _ = self._at_start[path]
        return tensor() is not x or versions != _versions([x])

    @torch.no_grad()
    def snapshot(self) -> _Copies:
        """Copies on their own devices, before a step; no GPU-CPU sync."""
        now = self._now()
        if now and not self._at_start:
            self._at_start = {at.path: (weakref.ref(x), _versions([x]), x.isfinite().all()) for at, x in now}
            by_size = sorted(now, key=lambda held: held[1].numel())
            totals = accumulate(x.numel() for _, x in by_size)
            self._large = {at.path for (at, _), n in zip(by_size, totals, strict=True) if n > ELEMENTS_COPIED_UNSEEN}
        held = [(at, x) for at, x in now if at.path not in self._large or self._is_written(at.path, x)]
        copies = torch._foreach_mul([x for _, x in held], 1.0) if held else ()
        return [(at, weakref.ref(x), copy) for (at, x), copy in zip(held, copies, strict=True)]

    @torch.no_grad()
    def put_back(self, copies: _Copies) -> list[nn.Module]:
        """If forward made one non-finite, gives all what they held before; returns the modules of such. One GPU-CPU sync.

        More syncs in that case. What held NaN before stays, and what nothing wrote: a backward to come may check its version.
        """
        pairs = [(*former, now) for former in copies if (now := former[0].tensor()) is not None]
        # 2 where there is NaN, otherwise 1 where there is inf, otherwise 0.
        found = to_host_list(x.isnan().any().int() + (~x.isfinite()).any() for _, _, *both in pairs for x in both)
        rows = list(zip(pairs, found[::2], found[1::2], strict=True))
        lost = [module for (at, *_), was, bad in rows if was < 2 and bad > was and (module := at.module()) is not None]
        for (at, tensor, old, now), was, _ in rows if lost else ():
            if was < 2 and not torch.equal(now, old.to(now)):
                at.place()[at.name] = now.copy_(old) if tensor() is now and now.shape == old.shape else old.clone()
        return list(dict.fromkeys(lost))

    def non_finite(self, suspects: bool = False) -> list[str]:
        """Paths of those with NaN or inf that were finite at the first step or have been written since. One GPU-CPU sync.

        Not of constants that hold it by design; -inf may be a mask. With `suspects` those too that may be bad all the same:
        NaN or inf that was there from the start, and -inf that was not.
        """
        now = [(at.path, x, self._at_start[at.path][2]) for at, x in self._now() if at.path in self._at_start]
        found = to_host_list(
            f for _, x, was in now for f in ((x.isnan() | x.isposinf()).any(), (~x.isfinite()).any(), was)
        )
        rows = zip(now, found[::3], found[1::3], found[2::3], strict=True)
        return [
            path
            for (path, x, _), bad, masked, was in rows
            if (bad and (suspects or was or self._is_written(path, x))) or (suspects and masked and was)
        ]


KEPT_FORWARDS = 64
"""Forward passes of one step that are kept, the newest ones; references to the arguments only, never copies."""
KEPT_EVALUATIONS = 8
"""The same of models that only evaluate, such as a reference model; few, because a long evaluation also runs them."""
OBJECTS_DEEP = 3
"""How many objects inside of each other are looked into for tensors of the batch, such as a graph's `data.x`; after a skip only."""
KEPT_GRADIENTS, LARGE_GRADIENTS = 2**24, 2**26
"""Bytes of what the loss gives to outputs that are kept until the next step; the same after one that could not be explained."""
PASSES_TRIED = 3
"""The first forward passes of a model, which show whether it draws from NumPy or Python: their states take 60 µs to keep."""
KEPT_BYTES = 2**30
"""What the batches of one step that are kept may take on their devices; the newest one is kept in any case."""


class RecordedForward(NamedTuple):
    """One forward pass of a whole model: which, and on what.

    Attributes:
        random_state: what dropout drew from on the CPU and on the batch's devices; None where that is not known.
        plan: what it ran under; None where that is not known.
        output_gradients: what the loss gave to each output, by its path, times the scale; None where it gave nothing. Outputs
            that are not in it were not watched.
        is_intact: whether the batch is still what it was: neither the model, nor a loader that reuses its memory, has
            written into it since.
    """

    model: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    random_state: RandomState | None = None
    plan: PrecisionPlan | None = None
    output_gradients: Mapping[str, Tensor | None] = MappingProxyType({})
    is_intact: bool = True


class _Kept(NamedTuple):
    """The same, without keeping the model alive, and with the version of every tensor of the batch."""

    model: weakref.ref[nn.Module]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    random_state: RandomState | None
    plan: PrecisionPlan
    output_gradients: dict[str, list[Tensor | None]]
    versions: tuple[int, ...]
    backwards: int
    thread: int
    sequence_number: int
    nbytes: int
    """Of the batch's tensors."""


@dataclass
class _OfStep:
    """What belongs to one optimizer step.

    Attributes:
        calls: of models while gradients are on.
        bytes_kept: what their batches take.
        has_let_go: whether there were more of them than are kept.
        evaluations: calls of models that only evaluate, without gradients.
        buffers: what they were before it, by model.
        may_leave_out: whether a call followed another without a backward in between: a loss may be made from both, or not.
        graphs: from then on, number of a backward and where its graph begins; let go of when the next step begins.
    """

    calls: deque[_Kept] = field(default_factory=lambda: deque(maxlen=KEPT_FORWARDS))
    bytes_kept: int = 0
    has_let_go: bool = False
    evaluations: deque[_Kept] = field(default_factory=lambda: deque(maxlen=KEPT_EVALUATIONS))
    buffers: dict[weakref.ref[nn.Module], _Copies] = field(default_factory=dict)
    may_leave_out: bool = False
    graphs: deque[tuple[int, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_FORWARDS))

    def used(self, backwards: int) -> list[_Kept]:
        """`calls` but those that no loss of the `backwards` begun so far was made from: the loop has left theirs out.

        Of such a call and what follows it until the next, no operation is in a graph. All calls of a model, where that is so
        of each: what it made may have been given to another, detached.
        """
        calls = list(self.calls)
        numbers = {number: [each._sequence_nr() for each, _ in graph_of([node])] for number, node in self.graphs}
        ends = [*(call.sequence_number for call in calls), math.inf][1:]

        def is_used(call: _Kept, end: float) -> bool:
            since = range(call.backwards + 1, backwards + 1)
            known = call.thread == threading.get_ident() and all(number in numbers for number in since)
            return not known or any(call.sequence_number <= n < end for number in since for n in numbers[number])

        used = [is_used(call, end) for call, end in zip(calls, ends, strict=True)]
        models = {call.model for call, its in zip(calls, used, strict=True) if its}
        return [call for call, its in zip(calls, used, strict=True) if its or call.model not in models]


class CountsSteps(Protocol):
    """Whoever counts the optimizer steps decided, those whose outcome is known, and the backward passes begun."""

    decided_steps: int
    known_steps: int
    backwards: int
    graph: Any
    note_loss: Callable[[Tensor], None] | None


class ForwardRecorder:
    """Notes what models are called with while gradients are on: one forward hook on each outermost module.

    Of models that only evaluate, it notes calls without gradients. Before the first call of a training model in a step it
    copies the model's buffers; see `ModelBuffers`.

    Args:
        steps: counts the optimizer steps decided; forward passes belong to the next.
        runner: the models; says which of them only evaluate, and which plan they run under.

    Attributes:
        is_paused: whether nothing is noted, because forward passes are repeated.
        gradient_bytes: of what the loss gives to outputs, so many are kept of a step at most.
        compiled: whether what is called in a model's place was made by torch.compile.
        functional_step: the newest step in which torch.func has called a model, which cannot be repeated.
        without_backward: the newest step in which a forward pass followed another without a backward in between; 0 for none.
        one_graph: whether compiled code that may not break its graph calls a model.
        on_error: called with what a training model's forward pass has raised.
    """

    def __init__(self, steps: CountsSteps, runner: PlanRunner) -> None:
        self._steps = steps
        self._runner = runner
        self._by_step: dict[int, _OfStep] = {}
        self._buffers: dict[weakref.ref[nn.Module], ModelBuffers] = {}
        self.gradient_bytes: float = KEPT_GRADIENTS
        self._room: float = KEPT_GRADIENTS
        self._end_of_forward = self.functional_step = self.without_backward = 0
        self.one_graph = self.compiled = False
        self._hooks: list[_Note] = []
        self._passes_tried: Counter[weakref.ref[nn.Module]] = Counter()
        self._devices: dict[weakref.ref[nn.Module], set[torch.device]] = {}
        self._draws_outside: set[weakref.ref[nn.Module]] = set()
        self.is_paused = False
        self._generates = False
        self._without_gradients: tuple[weakref.ref[nn.Module], tuple[Any, ...], dict[str, Any]] | None = None
        self.on_error: Callable[[Exception], Any] = lambda error: None

    def watch(self, entry_point: nn.Module, model: nn.Module) -> Callable[[], None]:
        """Notes calls of `entry_point`, which is `model` or wraps it, from now on; returns what undoes it."""
        self.compiled |= "_orig_mod" in entry_point._modules
        reference = weakref.ref(model)
        self._buffers[reference] = ModelBuffers(model)
        if not takes_hooks(entry_point):
            return lambda: None
        self._hooks.append(note := _Note(self, reference))
        before = entry_point.register_forward_pre_hook(note, with_kwargs=True)
        return removal([before, entry_point.register_forward_hook(_NoteEnd(self, reference), always_call=True)])

    def note(self, reference: weakref.ref[nn.Module], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Before a call of a model."""
        model = reference()
        if model is None or self.is_paused:
            return
        if model.training and reference not in (now := self._now()).buffers:
            now.buffers[reference] = self._buffers[reference].snapshot()
        if _is_functional(model):
            self.functional_step = self._steps.decided_steps + 1
        elif torch.is_grad_enabled():
            now = self._now()
            self._let_go_of_known_steps()
            now.has_let_go |= len(now.calls) == KEPT_FORWARDS
            if now.calls and now.calls[-1].backwards == self._steps.backwards:
                now.may_leave_out, self.without_backward = True, self._steps.decided_steps + 1
            if now.may_leave_out and self._steps.note_loss is None:
                self._steps.note_loss = self.note_loss
            now.calls.append(kept := self._kept(reference, arguments, options))
            now.bytes_kept += kept.nbytes
            while now.bytes_kept > KEPT_BYTES and len(now.calls) > 1:
                now.bytes_kept -= now.calls.popleft().nbytes
                now.has_let_go = True
        elif self._runner.evaluates(model):
            self._now().evaluations.append(self._kept(reference, arguments, options))
        elif self._generates:  # with a cache, which must not be kept alive
            weak = {name: _weakly(x) for name, x in options.items()}
            self._without_gradients = reference, tuple(map(_weakly, arguments)), weak

    def note_end(self, reference: weakref.ref[nn.Module], output: Any) -> bool:
        """After a call: one that has raised has no output, and torch calls this while it handles the exception.

        Returns:
            Whether it was a training model's pass.
        """
        if (model := reference()) is None or self.is_paused or not torch.is_grad_enabled() or _is_functional(model):
            return False
        at = (reference, threading.get_ident())
        call = next((call for call in reversed(self._now().calls) if (call.model, call.thread) == at), None)
        if call is None:
            return False
        if self._passes_tried[reference] < PASSES_TRIED:
            if (before := call.random_state) and before.has_moved_outside_of_torch():
                self._draws_outside.add(reference)
            self._passes_tried[reference] += 1
        self._end_of_forward = cast(Any, torch.autograd)._get_sequence_nr()
        if output is None and isinstance(error := sys.exc_info()[1], Exception):
            self.on_error(error)
        self._watch_gradients(call.output_gradients, output)
        return True

    def _watch_gradients(self, kept: dict[str, list[Tensor | None]], output: Any) -> None:
        """Keeps what the loss will give to `output`, so that backward can be repeated from there. No kernel, no GPU-CPU sync.

        Where there is no room for all of it, of what is one number, as a loss that the model returns.
        """
        items = output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, tuple) else ()
        found = [(str(path), x) for path, x in items if isinstance(x, Tensor) and x.grad_fn is not None]
        if not found or self.gradient_bytes > KEPT_GRADIENTS:
            found = [(path, x) for path, x in tensors_in(output) if x.grad_fn is not None]
        if (size := sum(x.nbytes for _, x in found)) > self._room:
            found, size = [(path, x) for path, x in found if x.dim() == 0], 0
        if found:
            self._room -= size
            for path, x in found:
                kept[path] = []
                cast(Any, x).register_hook(kept[path].append)

    def _let_go_of_known_steps(self) -> None:
        """A forward pass begins: nobody asks for the batches of steps whose outcome is known, and has been acted on.

        But for those of models that only evaluate, whose outputs may be used for several steps.
        """
        for number, its in self._by_step.items():
            if number <= self._steps.known_steps:
                its.calls.clear()
                its.buffers.clear()

    def newest(self) -> list[RecordedForward]:
        """The newest forward pass of the step to come, if there is one; one without gradients where that came after it."""
        if (last := self._without_gradients) is not None:
            reference, weak, by_name = last
            arguments, options = tuple(map(_revived, weak)), {name: _revived(x) for name, x in by_name.items()}
            return _repeatable([self._kept(reference, arguments, options)._replace(random_state=None)])
        return _repeatable(list(self._now().calls)[-1:])

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside of it a model makes text or the like: its newest forward pass is kept, although it has no gradients."""
        self._generates = True
        try:
            yield
        finally:
            self._generates, self._without_gradients = False, None

    def _now(self) -> _OfStep:
        step = self._steps.decided_steps + 1
        if step not in self._by_step:
            kept = {old: its for old, its in self._by_step.items() if step - 2 < old < step}
            self._room, self._steps.graph = self.gradient_bytes, None
            for old, its in kept.items():
                its.graphs.clear()
                for call in its.calls if old <= self._steps.known_steps else ():
                    call.output_gradients.clear()
            self._by_step = {**kept, step: _OfStep()}
        return self._by_step[step]

    def _kept(self, reference: weakref.ref[nn.Module], arguments: tuple[Any, ...], options: dict[str, Any]) -> _Kept:
        # A model may add its outputs to its batch: they are no data, and would be kept alive.
        arguments, options = copy_containers((arguments, options))
        tensors = tensors_of((arguments, options))
        only_torch = self._passes_tried[reference] >= PASSES_TRIED and reference not in self._draws_outside
        versions, devices = _versions(tensors), {x.device for x in tensors}
        if (model := reference()) is not None:  # one that is spread over several draws on all of them
            if self._passes_tried[reference] < PASSES_TRIED:
                self._devices[reference] = devices_of(model)
            devices |= self._devices[reference]
        # While a CUDA graph is captured, no generator may be asked.
        random_state = None if any(map(is_capturing, devices)) else RandomState.now(devices, only_torch)
        seen = (random_state, self._runner.plan, dict[str, list[Tensor | None]](), versions)
        where = (self._steps.backwards, threading.get_ident(), cast(Any, torch.autograd)._get_sequence_nr())
        return _Kept(reference, arguments, options, *seen, *where, sum([x.nbytes for x in tensors]))

    def note_loss(self, loss: Tensor) -> None:
        """`loss` goes into backward: where it does not say by itself which calls it was made from, its graph will."""
        for hook in self._hooks:
            if hook.newest is not None:
                kept, hook.newest = self._kept(hook.model, *hook.newest), None
                self._now().calls.append(kept._replace(random_state=None, backwards=self._steps.backwards - 1))
                self.one_graph, self._steps.note_loss = True, self.note_loss
        now = self._by_step.get(self._steps.decided_steps + 1)
        if now is not None and now.may_leave_out:
            now.graphs.append((self._steps.backwards, loss.grad_fn))

    def operations_outside(self) -> list[Any]:
        """The nodes of the newest loss's graph that were made after the model had returned."""
        return [node for node, _ in graph_of([self._steps.graph]) if node._sequence_nr() >= self._end_of_forward]

    def keep_more_gradients(self) -> None:
        """A step could not be explained; where it is not the first such, whatever outputs are given is kept until one is applied."""
        self.gradient_bytes = LARGE_GRADIENTS if self.gradient_bytes == KEPT_GRADIENTS else math.inf

    def begin_step(self) -> None:
        """Copies buffers already now where calls are noted only after they were made, as those of one graph."""
        for hook in self._hooks:
            if self.one_graph and hook.model() is not None:
                self._now().buffers[hook.model] = self._buffers[hook.model].snapshot()

    def forwards_of(self, step: int, left_out: bool = True) -> list[RecordedForward]:
        """The forward passes behind optimizer step `step`, oldest first. `left_out`: those too that no loss was made from.

        Where a step had none of its own, as the second of two optimizers, those of the step before.
        """
        its = next((its for its in self._back_from(step) if its.calls), _OfStep())
        return _repeatable(its.calls if left_out else its.used(self._steps.backwards))

    def has_let_go(self, step: int) -> bool:
        """Whether there were more forward passes behind optimizer step `step` than are kept."""
        return next((its.has_let_go for its in self._back_from(step) if its.calls), False)

    def evaluations_of(self, step: int) -> list[RecordedForward]:
        """The same as `forwards_of`, of models that only evaluate, whose outputs the loss may be made from."""
        return _repeatable(next((its.evaluations for its in self._back_from(step) if its.evaluations), ()))

    def restore_buffers(self, step: int) -> list[nn.Module]:
        """Puts back buffers that are not finite after optimizer step `step`, and were before it; see `ModelBuffers.put_back`.

        Returns the modules that had them. One GPU-CPU sync for each model that has any.
        """
        held = next((its.buffers for its in self._back_from(step) if its.buffers), {})
        return [module for model, copies in held.items() for module in self._buffers[model].put_back(copies)]

    def non_finite_buffers(self, model: nn.Module, suspects: bool = False) -> list[str]:
        """Names in `model` of the buffers that forward writes and that hold NaN or inf by now; see `ModelBuffers.non_finite`."""
        known = self._buffers.get(weakref.ref(model))
        return [] if known is None else known.non_finite(suspects)

    def _back_from(self, step: int) -> list[_OfStep]:
        """Of `step` and the kept steps before it, the newest first."""
        return [self._by_step[known] for known in sorted(self._by_step, reverse=True) if known <= step]

    def discard(self) -> bool:
        """Lets go of this step's forward passes before the newest backward; not, and False, where none came after it."""
        now = self._now()
        kept = [call for call in now.calls if call.backwards == self._steps.backwards]
        now.calls = deque(kept, KEPT_FORWARDS) if kept else now.calls
        now.graphs.clear()
        return bool(kept)

    def forget(self) -> None:
        """Lets go of everything."""
        self._by_step.clear()


def _repeatable(calls: Collection[_Kept]) -> list[RecordedForward]:
    """Those of the thread that steps, where it has made any: another may serve the model meanwhile."""
    own = [kept for kept in calls if kept.thread == threading.get_ident()]
    repeatable = []
    for kept in own or calls:
        if (model := kept.model()) is not None:
            given = {path: _sum_of(each) for path, each in kept.output_gradients.items()}
            is_intact = kept.versions == _versions(tensors_of(kept[1:3]))
            repeatable.append(RecordedForward(model, *kept[1:5], given, is_intact))
    return repeatable


def _weakly(value: Any) -> Any:
    """A tensor itself; a cache, which may be large, so that it is not kept alive, and None where it is empty and will be filled."""
    if isinstance(value, Tensor) or not hasattr(value, "__dict__"):
        return value
    try:
        return weakref.ref(value) if any(True for _ in tensors_in(value, depth=OBJECTS_DEEP)) else None
    except TypeError:  # a tuple with names, such as PackedSequence
        return value


def _revived(value: Any) -> Any:
    return value() if isinstance(value, weakref.ref) else value


def _is_functional(model: nn.Module) -> bool:
    """Whether torch.func calls `model`: inside of a transform (`grad`, `vmap`), or on other parameters (`functional_call`)."""
    held = next(model.parameters(), None)
    return torch._C._are_functorch_transforms_active() or not (held is None or isinstance(held, nn.Parameter))


def _sum_of(gradients: list[Tensor | None]) -> Tensor | None:
    """What all passes backward gave to an output; autograd calls hooks with None where a pass gives nothing."""
    found = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(found).sum(0) if found else None


def _versions(tensors: list[Tensor]) -> tuple[int, ...]:
    """How often each tensor has been written into. Source: `torch.Tensor._version`, which autograd checks as well."""
    return tuple(0 if x.is_inference() else x._version for x in tensors)


class _Note(UnpickledHook):
    """The hook that notes the calls of one model, not those of its copies, such as an EMA.

    Compiled code breaks its graph here. Where it may not, it leaves in `newest` what it was called with, which is noted later.
    """

    def __init__(self, recorder: ForwardRecorder, model: weakref.ref[nn.Module]) -> None:
        self._recorder = recorder
        self.model = model
        self.newest: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._recorder.note(self.model, arguments, options)
        elif not is_one_graph():
            self._note(arguments, options)
        elif torch.is_grad_enabled():
            self.newest = (arguments, options)

    @compile_disabled
    def _note(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._recorder.note(self.model, arguments, options)


class _NoteEnd(_Note):
    """The same after each call; compiled code sees that it does nothing but in the first passes and where forward raises."""

    passes_tried = 0

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._recorder.note_end(self.model, output)
        elif (output is None or self.passes_tried < PASSES_TRIED) and not is_one_graph():
            self._note_end(output)

    @compile_disabled
    def _note_end(self, output: Any) -> None:
        self.passes_tried += self._recorder.note_end(self.model, output)
