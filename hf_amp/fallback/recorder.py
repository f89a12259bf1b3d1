"""Keeps hold of the batches of the newest step, so that a step that went wrong can be looked at again, and of what running
statistics were before it, so that they can be put back."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_amp.device import RandomState, is_capturing
from hf_amp.fallback.module_precision import PlanRunner
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.patch_log import compile_disabled
from hf_amp.statistics import to_host_list
from hf_amp.tree import copy_containers, tensors_in, tensors_of

_NAMES = ("running_mean", "running_var")


def norms_of(model: nn.Module) -> list[weakref.ref[nn.Module]]:
    """The modules of `model` that gather running statistics: batch norms, and whatever names its buffers as they do."""
    return [weakref.ref(module) for module in model.modules() if next(_gathered_by(module), None) is not None]


class BufferSnapshot:
    """What the norms of one model had gathered at one moment.

    A forward pass moves them before anybody knows whether its step will be applied. One NaN would stay in them for ever,
    and be in every evaluation and checkpoint from then on. Copies, on their own devices; no GPU-CPU sync.

    Args:
        norms: what `norms_of` gave for the model.
    """

    def __init__(self, norms: Sequence[weakref.ref[nn.Module]]) -> None:
        gathered = [(norm, name, x) for norm in norms if (module := norm()) for name, x in _gathered_by(module)]
        self._held = [(norm, name) for norm, name, _ in gathered]
        with torch.no_grad():
            self._copies = torch._foreach_mul([x for _, _, x in gathered], 1.0) if gathered else ()

    @torch.no_grad()
    def put_back(self) -> list[nn.Module]:
        """Restores what is not finite and was so before; returns the modules that had it. One GPU-CPU sync."""
        pairs = [
            (module, getattr(module, name), copy)
            for (norm, name), copy in zip(self._held, self._copies, strict=True)
            if (module := norm()) is not None
        ]
        if not pairs:
            return []
        lost = to_host_list([~now.isfinite().all() & copy.isfinite().all() for _, now, copy in pairs])
        broken = [pair for pair, is_lost in zip(pairs, lost, strict=True) if is_lost]
        for _, now, copy in broken:
            now.copy_(copy)
        return list(dict.fromkeys(module for module, _, _ in broken))


def _gathered_by(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers(recurse=False):
        if name in _NAMES and buffer.is_floating_point():
            yield name, buffer


KEPT_FORWARDS = 64
"""Forward passes of one step that are kept, the newest ones; references to the arguments only, never copies."""
KEPT_EVALUATIONS = 8
"""The same of models that only evaluate, such as a reference model; few, because a long evaluation also runs them."""
KEPT_STEPS = 2
"""Steps kept: the newest, and the one before, whose verdict PERFORMANCE_OPTIMIZED learns one step late."""


class RecordedForward(NamedTuple):
    """One forward pass of a whole model: which, and on what.

    Attributes:
        is_intact: whether the batch is still what it was: neither the model, nor a loader that reuses its memory, has
            written into it since.
        random_state: what dropout drew from on the CPU and on the batch's devices; None where that is not known.
        plan: what it ran under; None where that is not known.
        output_gradients: what the loss gave to each output, by its path, times the scale; where they were kept.
    """

    model: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    is_intact: bool = True
    random_state: RandomState | None = None
    plan: PrecisionPlan | None = None
    output_gradients: dict[str, Tensor] | None = None


class _Kept(NamedTuple):
    """The same, without keeping the model alive, and with the version of every tensor of the batch."""

    model: weakref.ref[nn.Module]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    versions: tuple[int, ...]
    random_state: RandomState | None
    plan: PrecisionPlan
    backwards: int
    thread: int
    output_gradients: dict[str, Tensor]


@dataclass
class _OfStep:
    """What belongs to one optimizer step.

    Attributes:
        calls: of models while gradients are on.
        has_let_go: whether there were more of them than are kept.
        evaluations: calls of models that only evaluate, without gradients.
        statistics: what batch norms had gathered before it, by model.
    """

    calls: deque[_Kept] = field(default_factory=lambda: deque(maxlen=KEPT_FORWARDS))
    has_let_go: bool = False
    evaluations: deque[_Kept] = field(default_factory=lambda: deque(maxlen=KEPT_EVALUATIONS))
    statistics: dict[weakref.ref[nn.Module], BufferSnapshot] = field(default_factory=dict)


class CountsSteps(Protocol):
    """Whoever counts the optimizer steps decided, and the backward passes begun."""

    decided_steps: int
    backwards: int


class ForwardRecorder:
    """Notes what models are called with while gradients are on: one forward hook on each outermost module.

    Of models that only evaluate, it notes calls without gradients. Before the first call of a training model in a step it
    copies the model's running statistics, if it has any.

    Args:
        steps: counts the optimizer steps decided; forward passes belong to the next.
        runner: the models; says which of them only evaluate, and which plan they run under.
    """

    def __init__(self, steps: CountsSteps, runner: PlanRunner) -> None:
        self._steps = steps
        self._runner = runner
        self._by_step: dict[int, _OfStep] = {}
        self._norms: dict[weakref.ref[nn.Module], list[weakref.ref[nn.Module]]] = {}
        self._entry_points: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.gradient_hooks: list[RemovableHandle] = []

    def watch(self, entry_point: nn.Module, model: nn.Module) -> Callable[[], None]:
        """Notes calls of `entry_point`, which is `model` or wraps it, from now on; returns what undoes it."""
        reference = weakref.ref(model)
        if norms := norms_of(model):
            self._norms[reference] = norms
        handle = entry_point.register_forward_pre_hook(_Note(self._note, reference), with_kwargs=True)
        self._entry_points.add(entry_point)

        def undo() -> None:
            handle.remove()
            self.keep_output_gradients(False)

        return undo

    def _note(self, reference: weakref.ref[nn.Module], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        model = reference()
        if model is None:
            return
        if model.training and reference in self._norms:
            self._gather(reference)
        if torch.is_grad_enabled():
            now = self._now()
            now.has_let_go |= len(now.calls) == KEPT_FORWARDS
            now.calls.append(self._kept(reference, arguments, options))
        elif self._runner.evaluates(model):
            self._now().evaluations.append(self._kept(reference, arguments, options))

    def _now(self) -> _OfStep:
        step = self._steps.decided_steps + 1
        if step not in self._by_step:
            kept = {old: its for old, its in self._by_step.items() if step - KEPT_STEPS < old < step}
            self._by_step = {**kept, step: _OfStep()}
        return self._by_step[step]

    def _gather(self, reference: weakref.ref[nn.Module]) -> None:
        statistics = self._now().statistics
        if reference not in statistics:
            statistics[reference] = BufferSnapshot(self._norms[reference])

    def _kept(self, reference: weakref.ref[nn.Module], arguments: tuple[Any, ...], options: dict[str, Any]) -> _Kept:
        # A model may add its outputs to its batch: they are no data, and would be kept alive.
        arguments, options = copy_containers((arguments, options))
        tensors = tensors_of((arguments, options))
        seen = (
            _versions(tensors),
            _random_state(tensors),
            self._runner.plan,
            self._steps.backwards,
            threading.get_ident(),
        )
        return _Kept(reference, arguments, options, *seen, output_gradients={})

    def keep_output_gradients(self, keep: bool) -> None:
        """Whether what the loss gives to outputs is kept from now on, so that backward can be repeated from there.

        For steps that go wrong again and again with a loss that is made outside of the model. Takes as much memory.
        """
        while not keep and self.gradient_hooks:
            self.gradient_hooks.pop().remove()
        if keep and not self.gradient_hooks:
            self.gradient_hooks = [entry.register_forward_hook(self._keep_gradients_of) for entry in self._entry_points]

    def _keep_gradients_of(self, entry_point: nn.Module, arguments: Any, output: Any) -> None:
        calls = self._now().calls
        for path, x in tensors_in(output) if calls else ():
            if x.requires_grad:
                cast(Any, x).register_hook(functools.partial(calls[-1].output_gradients.__setitem__, path))

    def forwards_of(self, step: int) -> list[RecordedForward]:
        """The forward passes behind optimizer step `step`, oldest first.

        Where a step had none of its own, as the second of two optimizers, those of the step before.
        """
        return _repeatable(next((its.calls for its in self._back_from(step) if its.calls), ()))

    def has_let_go(self, step: int) -> bool:
        """Whether there were more forward passes behind optimizer step `step` than are kept."""
        return next((its.has_let_go for its in self._back_from(step) if its.calls), False)

    def evaluations_of(self, step: int) -> list[RecordedForward]:
        """The same as `forwards_of`, of models that only evaluate, whose outputs the loss may be made from."""
        return _repeatable(next((its.evaluations for its in self._back_from(step) if its.evaluations), ()))

    def restore_buffers(self, step: int) -> list[nn.Module]:
        """Puts back running statistics that are not finite after optimizer step `step`, and were before it.

        Returns the modules that had them. One GPU-CPU sync for each model that has any.
        """
        gathered = next((its.statistics for its in self._back_from(step) if its.statistics), {})
        return [norm for statistics in gathered.values() for norm in statistics.put_back()]

    def _back_from(self, step: int) -> list[_OfStep]:
        """Of `step` and the kept steps before it, the newest first."""
        return [self._by_step[known] for known in sorted(self._by_step, reverse=True) if known <= step]

    def discard(self) -> bool:
        """Lets go of this step's forward passes before the newest backward; not, and False, where none came after it."""
        now = self._now()
        kept = [call for call in now.calls if call.backwards == self._steps.backwards]
        now.calls = deque(kept, KEPT_FORWARDS) if kept else now.calls
        return bool(kept)

    def forget(self) -> None:
        """Lets go of everything."""
        self._by_step.clear()


def _repeatable(calls: Collection[_Kept]) -> list[RecordedForward]:
    """Those of the thread that steps, where it has made any: another may serve the model meanwhile."""
    own = [kept for kept in calls if kept.thread == threading.get_ident()]
    return [
        RecordedForward(
            model,
            kept.arguments,
            kept.options,
            is_intact=kept.versions == _versions(tensors_of((kept.arguments, kept.options))),
            random_state=kept.random_state,
            plan=kept.plan,
            output_gradients=kept.output_gradients,
        )
        for kept in own or calls
        if (model := kept.model()) is not None
    ]


def _versions(tensors: list[Tensor]) -> tuple[int, ...]:
    """How often each tensor has been written into. Source: `torch.Tensor._version`, which autograd checks as well."""
    return tuple(0 if x.is_inference() else x._version for x in tensors)


def _random_state(batch: list[Tensor]) -> RandomState | None:
    """What dropout will draw from; None while a CUDA graph is captured, when a generator may not be asked."""
    devices = {x.device for x in batch}
    if any(map(is_capturing, devices)):
        return None
    return RandomState.now(devices)


class _Note:
    """The hook that notes the calls of one model. Copies of the model, such as an EMA, carry one that notes nothing."""

    def __init__(self, note: Callable[..., None], model: weakref.ref[nn.Module]) -> None:
        self._note = note
        self._model = model

    @compile_disabled
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._note(self._model, arguments, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _note_nothing, ()


def _note_nothing() -> Callable[..., None]:
    return _silent


def _silent(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What a copied model calls in place of the recorder."""
