"""Enters a context around the forward pass of a model or of one of its modules: emulated FP16, or real autocast."""

from __future__ import annotations

import copy
import fnmatch
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_amp.device import runs_backward
from hf_amp.emulation import EmulatedPrecision
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.patch_log import compile_disabled, is_one_graph, not_compiled_alone, removal, takes_hooks, unpickled
from hf_amp.precision import FP32_FORMAT, HALF_DTYPES, PrecisionMode, upcast
from hf_amp.statistics import is_sharded
from hf_amp.tree import map_tensors, replace_tensors


class ForwardContext:
    """Runs the forward passes of modules inside a context, until removed.

    The context is entered by forward hooks on every module, of which only the outermost acts: a module that is called
    on its own, as gradient checkpointing does when it recomputes, runs inside it as well.

    Args:
        make_context: gives a new context manager per forward pass; a picklable callable where the model is to be.
    """

    _all_of_thread: ClassVar[threading.local] = threading.local()
    _suspended: ClassVar[int] = 0

    def __init__(self, make_context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make_context = make_context
        self._of_thread = threading.local()  # DataParallel calls replicas from several threads
        self._is_copy = False
        self._made_in = self.suspensions()

    def install(self, model: nn.Module, everywhere: bool = True) -> Callable[[], None]:
        """Puts `model` inside the context from now on; returns what undoes it.

        Args:
            everywhere: its submodules too, for whoever calls them on their own. torch's gradient checkpointing does, but
                enters autocast again by itself.
        """
        modules = model.modules() if everywhere else [model]
        return removal([handle for module in modules if takes_hooks(module) for handle in self._hook(module)])

    def _hook(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    @unpickled
    def _enter(self, module: nn.Module, arguments: Any) -> None:
        if self.suspensions() > self._made_in:
            return
        running = self._running()
        if not running:
            if self._is_copy and self._entered():
                return
            self._of_thread.context = self._make_context()
            self._of_thread.context.__enter__()
            self._entered().append(self)
        running.append(module)

    @unpickled
    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        running = self._running()
        if not running or running[-1] is not module:
            return  # suspended, or somebody else's hook raised before `_enter`: torch calls this one all the same
        running.pop()
        if not running:
            self._exit()

    def _exit(self) -> None:
        self._entered().remove(self)
        context, self._of_thread.context = self._of_thread.context, None  # compiled code cannot hand it on
        context.__exit__(None, None, None)

    @classmethod
    def leave_interrupted(cls) -> None:
        """Leaves what this thread is still inside of; called where no forward pass can be running.

        A forward pass that ends by KeyboardInterrupt, as in a notebook, calls no hooks: torch does so for
        `Exception` only.
        """
        for context in reversed(list(cls._entered())):
            context._running().clear()
            context._exit()

    @classmethod
    @contextmanager
    def suspended(cls) -> Iterator[None]:
        """Inside of it, forward passes of this thread enter no context but those made inside of it."""
        cls._all_of_thread.suspensions = cls.suspensions() + 1
        cls._suspended += 1
        try:
            yield
        finally:
            cls._suspended -= 1
            cls._all_of_thread.suspensions -= 1

    @classmethod
    def suspensions(cls) -> int:
        """How many times `suspended` this thread is inside of; where it runs a backward, the thread that has asked for that."""
        own = int(cls._all_of_thread.__dict__.get("suspensions", 0))
        return own if own or not cls._suspended or not runs_backward() else cls._suspended

    @classmethod
    def _entered(cls) -> list[ForwardContext]:
        """The contexts that this thread is inside of, outermost first."""
        entered: list[ForwardContext] = cls._all_of_thread.__dict__.setdefault("entered", [])
        return entered

    def _running(self) -> list[nn.Module]:
        """The modules that this thread is inside of, outermost first."""
        running: list[nn.Module] = self._of_thread.__dict__.setdefault("running", [])
        return running

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardContext:
        """A copied model runs inside a context of its own, unless it is in a session by itself, which enters its own before."""
        twin = type(self)(copy.deepcopy(self._make_context, memo))
        twin._is_copy, twin._made_in = type(self) is ForwardContext, self._made_in
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled model runs inside of none."""
        return nullcontext, ()


@contextmanager
def without_its_precision(model: nn.Module) -> Iterator[None]:
    """Inside of it `model` runs in what is around it, also where a session, or `Accelerator.prepare`, has given it a precision."""
    own = vars(getattr(model, "_orig_mod", model))  # compiled, it hands names on
    # Private; tests/contract fails by name if it goes.
    wrapped = own.get("forward") if "_original_forward" in own else None
    if wrapped is not None:
        own["forward"] = own["_original_forward"]
    try:
        with ForwardContext.suspended():
            yield
    finally:
        if wrapped is not None:
            own["forward"] = wrapped


not_compiled_alone(ForwardContext._enter)
not_compiled_alone(ForwardContext._leave)


class InnerForwardContext(ForwardContext):
    """The same for one module of a model that runs inside another context: this one is entered last and left first.

    Half-precision arguments are cast to FP32 on the way in, as FP32 kernels want them; those of submodules too, as
    gradient checkpointing calls these on their own. Compiled code breaks its graph at these hooks, where it may: a context that
    is entered in one traced function and left in another would be lost.
    """

    def _hook(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter_with_float32, with_kwargs=True),
            module.register_forward_hook(self._leave_inner, prepend=True, always_call=True),
        ]

    @unpickled
    def _enter_with_float32(self, module: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        in_graph = torch.compiler.is_compiling() and is_one_graph()
        entered: tuple[Any, ...] = (self._enter_inner if in_graph else self._enter_eagerly)(module, arguments, options)
        return entered

    def _enter_inner(self, module: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        self._enter(module, arguments)
        # Lists and mappings stay the same objects: the module may add to them for its caller.
        return upcast_in_place(arguments), upcast_in_place(options)

    _enter_eagerly = compile_disabled(_enter_inner)

    @unpickled
    def _leave_inner(self, module: nn.Module, arguments: Any, output: Any) -> None:
        in_graph = torch.compiler.is_compiling() and is_one_graph()
        (self._leave if in_graph else self._leave_eagerly)(module, arguments, output)

    @compile_disabled
    def _leave_eagerly(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._leave(module, arguments, output)


class ContextOutside(ForwardContext):
    """The same where the whole forward pass runs inside such a context already: entered by what is called outside of that one.

    That is what gradient checkpointing recomputes, and a model inside of adapters that generates.
    """

    _make_context: CurrentPrecision

    @unpickled
    def _enter(self, module: nn.Module, arguments: Any) -> None:
        if self._running() or not self._make_context.is_entered():
            super()._enter(module, arguments)


def to_float32(value: Any) -> Any:
    """`value` with its FP16 and BF16 tensors in FP32; differentiable."""
    return map_tensors(upcast, value)


def upcast_in_place(value: Any) -> Any:
    """The same, in the very lists, mappings and dataclasses of `value`; tuples are new ones where something changes."""
    return replace_tensors(upcast, value)


@dataclass(frozen=True)
class PrecisionEntry:
    """How a precision is entered on one device.

    Attributes:
        device_type: such as "cuda".
        emulate: round FP32 arithmetic to the format instead of running its kernels.
    """

    device_type: str
    emulate: bool

    def context(self, precision: PrecisionMode) -> AbstractContextManager[Any]:
        """A new context manager in which what autocast would cast runs in `precision`, whatever is around it."""
        number_format = precision.number_format
        if self.emulate and precision is not PrecisionMode.BF16:  # for which a CPU has kernels
            return EmulatedPrecision(number_format)
        if number_format.dtype == torch.float32:
            return _float32_kernels(self.device_type)
        return torch.autocast(self.device_type, number_format.dtype)


@contextmanager
def _float32_kernels(device_type: str) -> Iterator[None]:
    """FP32, also of half-precision parameters, such as a frozen body under adapters, which no kernel mixes with FP32."""
    with torch.autocast(device_type, enabled=False), EmulatedPrecision(FP32_FORMAT):
        yield


class CurrentPrecision:
    """Gives the context of the plan's default, whatever that is by then; none when the run is over. Copies of a model share it."""

    def __init__(self, entry: PrecisionEntry, mode: PrecisionMode) -> None:
        self.entry = entry
        self.mode = mode
        self.is_over = False

    def __call__(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.is_over else self.entry.context(self.mode)

    def is_entered(self) -> bool:
        """Whether this thread is inside of such a context."""
        if EmulatedPrecision.is_entered():
            return True
        return (
            not self.entry.emulate
            and self.mode is not PrecisionMode.FP32
            and torch.is_autocast_enabled(self.entry.device_type)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CurrentPrecision:
        return self


class PlanRunner:
    """The models of a run, and the plan that their forward passes follow.

    A module that the plan names runs inside a context of its own: FP32 kernels on FP32 copies of its half-precision
    arguments. Where the whole model changes, `current` gives another context from then on, and `on_default_change`
    is called for models that do not enter `current` by themselves.

    Attributes:
        current: the context of the default, for whoever runs a forward pass.
        on_default_change: called with the new default.
        sharded: whether a trained model's parameters are shards.
        limits: a phrase on what is not done because of that; "" where all is.
        fp32_parameters: `id` of the parameters that only modules which the plan names hold.
        plan: what the next forward passes follow.
    """

    def __init__(self, entry: PrecisionEntry, default: PrecisionMode) -> None:
        self.entry = entry
        self.current = CurrentPrecision(entry, default)
        self.on_default_change: list[Callable[[PrecisionMode], None]] = []
        self._models: list[weakref.ref[nn.Module]] = []
        self._evaluated: list[weakref.ref[nn.Module]] = []
        self._inner: dict[str, Callable[[], None]] = {}
        self._of_plan: list[Callable[[], None]] = []
        self.sharded = False
        self.limits = ""
        self._shards: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = weakref.WeakKeyDictionary()
        self.fp32_parameters: frozenset[int] = frozenset()
        self._asked_for = default
        self.plan = PrecisionPlan(default)

    def register_model(self, model: nn.Module, is_trained: bool = True) -> None:
        """Lets `model` follow the plan, without keeping it alive. Harmless when called again.

        Args:
            is_trained: False for one that only evaluates, such as a reference model, until it is registered as trained.
        """
        if model in self.models() or (not is_trained and self.evaluates(model)):
            return
        if self.evaluates(model):
            self._evaluated = [reference for reference in self._evaluated if reference() is not model]
            self._forget_contexts()  # those under the names that it leaves, and that others take
        _forget_compiled_code()  # of steps before
        if is_trained and holds_shards(model):
            self.sharded = True
            if not recovers(model):
                lacks = " (that needs FSDPModule.reset_iter_state, which this PyTorch lacks and 2.13 has)"
                why = lacks if any(map(is_unit, model.modules())) else ""
                self.limits = f"; of these shards no forward pass is repeated, modules do not fall back{why}"
        models = self._models if is_trained else self._evaluated
        free = next((index for index, reference in enumerate(models) if reference() is None), len(models))
        if free < len(models):
            self._forget_contexts()  # those under its names were of the model that is gone
        models[free : free + 1] = [weakref.ref(model)]
        self.apply(self.plan)

    def evaluates(self, model: nn.Module) -> bool:
        """Whether `model` was registered as one that only evaluates."""
        return any(reference() is model for reference in self._evaluated)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        anywhere = torch.device(self.entry.device_type)
        return next((p.device for model in self.models() for p in model.parameters()), anywhere)

    def devices(self) -> set[torch.device]:
        """Where the trained models are; one that is offloaded for now trains where the run is."""
        kind = self.entry.device_type
        found = {p.device for model in self.models() for p in model.parameters() if p.device.type == kind}
        return found or {torch.device(kind)}

    def models(self) -> list[nn.Module]:
        """The trained models that are alive, in order of registration."""
        return [model for _, model in self._trained()]

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(qualified name, module) of every module of every model.

        Names are those of `named_modules`; from the second model on "model_2." stands before them, and "eval_model_1."
        before those of the first that only evaluates. The name of a whole first model is "".
        """
        for prefix, model in self._prefixed():
            yield from model.named_modules(prefix=prefix)

    def names_like(self, pattern: str) -> list[str]:
        """Names of the modules that `pattern` is the name, a glob, or a class of."""
        return names_like(pattern, self.named_modules())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(qualified name, parameter) of every parameter of every trained model, under the same names; of one that is gathered, the shard."""
        for prefix, model in self._trained():
            shards = self._shards.setdefault(model, {})
            for name, p in model.named_parameters():
                if is_sharded(p):
                    shards[name] = p
                yield f"{prefix}.{name}" if prefix else name, shards.get(name, p)

    def names_of(self, modules: Collection[nn.Module]) -> tuple[str, ...]:
        """Qualified names of `modules`, in order of the models."""
        held = set(modules)
        return tuple(name for name, module in self.named_modules() if module in held) if held else ()

    def name_of(self, model: nn.Module) -> str:
        """What stands before the names of `model`'s modules."""
        return next(prefix for prefix, known in self._prefixed() if known is model)

    def _prefixed(self) -> list[tuple[str, nn.Module]]:
        evaluated = enumerate(reference() for reference in self._evaluated)
        return self._trained() + [(f"eval_model_{index + 1}", model) for index, model in evaluated if model is not None]

    def _trained(self) -> list[tuple[str, nn.Module]]:
        models = enumerate(reference() for reference in self._models)
        return [(f"model_{index + 1}" if index else "", model) for index, model in models if model is not None]

    def apply(self, plan: PrecisionPlan) -> None:
        """Makes the next forward passes follow `plan`. Modules that it names but nobody has are left out."""
        modules = dict(self.named_modules())
        changed = plan.default is not self.plan.default
        for name in [name for name in self._inner if plan.modules.get(name) != self.plan.modules.get(name)]:
            self._inner.pop(name)()
            changed = True
        for name, precision in plan.modules.items():
            if name in modules and name not in self._inner:
                context = InnerForwardContext(functools.partial(self.entry.context, precision))
                self._inner[name] = context.install(modules[name])
                changed = True
        self.plan = plan
        if plan.default is not self.current.mode:
            self.current.mode = plan.default
            for notify in self.on_default_change:
                notify(plan.default)
        self._install_contexts_of_plan()
        self.fp32_parameters = self._wide_parameters(plan)
        if changed:
            _forget_compiled_code()

    def _install_contexts_of_plan(self) -> None:
        """Half-precision parameters meet FP32 values also in what is called outside of the model's own forward pass."""
        for remove in self._of_plan:
            remove()
        is_fp32 = self.current.mode is PrecisionMode.FP32 is not self._asked_for
        half = self.plan.modules and any(p.dtype in HALF_DTYPES for model in self.models() for p in model.parameters())
        children = [child for model in self.models() for child in model.children()] if is_fp32 or half else []
        outside = ContextOutside(self.current)
        self._of_plan = [outside.install(child) for child in children]

    def _wide_parameters(self, plan: PrecisionPlan) -> frozenset[int]:
        """`id` of the parameters that only modules in FP32 hold."""
        held: dict[bool, set[int]] = {True: set(), False: set()}
        for name, module in self.named_modules() if plan.modules else ():
            held[plan.holds(name)].update(id(p) for p in module.parameters(recurse=False))
        return frozenset(held[True] - held[False])

    def _forget_contexts(self) -> None:
        for name in list(self._inner):
            self._inner.pop(name)()

    def remove(self) -> None:
        """Takes every context back, and the default that the run asked for."""
        self.apply(PrecisionPlan(self._asked_for))
        _forget_compiled_code()


_OF_PEFT = ("base_model.model.", "base_model.")
"""What stands before the names of the base's modules: of LoRA and its kin, and of prompts."""


def names_like(pattern: str, named_modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Names of the modules that `pattern` is the name, a glob, or a class of; in a model of PEFT's else as its base calls them."""
    modules, found = list(named_modules), list[str]()
    for prefix in ("", *_OF_PEFT):
        found = found or [
            name
            for name, module in modules
            if fnmatch.fnmatchcase(name, prefix + pattern)
            or any(pattern == c.__name__ for c in type(module).__mro__[:-1])
        ]
    return found


def holds_shards(model: nn.Module) -> bool:
    """Whether this process holds a part of `model`'s parameters only: DTensors of FSDP2 or tensor parallelism, or FSDP1."""
    by_fsdp = any(is_unit(m) or "_fsdp_wrapped_module" in m._modules for m in model.modules())
    return by_fsdp or any(map(is_sharded, model.parameters()))


def recovers(model: nn.Module) -> bool:
    """Whether a pass of a sharded `model` that fails leaves it whole: not in FSDP1, nor where PyTorch has no `reset_iter_state`."""
    units = (m for m in model.modules() if is_unit(m) or hasattr(m, "_fsdp_wrapped_module"))
    return all(hasattr(unit, "reset_iter_state") for unit in units)


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 gathers parameters around `module`'s forward pass."""
    return hasattr(type(module), "set_requires_gradient_sync")  # of the class that fully_shard gives it


def has_compiled() -> bool:
    """Whether torch.compile has been given a backend since the last reset, or has looked at any code in this process.

    By private names; tests/contract fails by name if one goes. What is not to be compiled has None for a backend.
    """
    dynamo, utils = (sys.modules.get(f"torch._dynamo.{name}") for name in ("eval_frame", "utils"))
    if dynamo is None or utils is None:
        return False
    return bool(utils.counters["frames"]) or any(backend is not None for backend in dynamo.cached_backends.values())


def _forget_compiled_code() -> None:
    """Compiled code does not watch the hooks of modules: whatever is compiled is compiled anew, at its next call."""
    if has_compiled():
        torch.compiler.reset()
