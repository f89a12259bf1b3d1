"""Changes to instances that can be undone, and hooks on modules that compiled code leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
_ABSENT = object()
_REASON = "hf_amp notes batches here"


class PatchLog:
    """A log of changes to instances, undone in reverse order. Classes and modules are never touched.

    Copies and pickles of a changed instance are made from what it was before.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._changes: list[tuple[Any, str, Any, Any]] = []

    def set_attribute(self, instance: Any, name: str, value: Any) -> None:
        """Sets `instance.name`; undoing gives back the former value, or removes the attribute.

        Where somebody else has replaced the attribute in the meantime, theirs is left alone.
        """
        attributes = vars(instance)
        if "__getstate__" not in attributes and name != "__getstate__":
            self.set_attribute(instance, "__getstate__", functools.partial(self._unchanged_state, instance))
        former = attributes.get(name, _ABSENT)
        setattr(instance, name, value)
        self._changes.append((instance, name, former, value))

        def undo() -> None:
            if attributes.get(name, _ABSENT) is not value:
                return
            if former is _ABSENT:
                delattr(instance, name)
            else:
                setattr(instance, name, former)

        self._undo.append(undo)

    def _unchanged_state(self, instance: Any) -> dict[str, Any]:
        """What `copy` and `pickle` ask `instance` for: its attributes as they were before the changes."""
        state = dict(getattr(type(instance), "__getstate__", vars)(instance))
        for changed, name, former, value in reversed(self._changes):
            if changed is instance and state.get(name) is value:
                state[name] = former
        return {name: value for name, value in state.items() if value is not _ABSENT}

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Registers what takes back a change that the caller has made, such as a hook handle's `remove`."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Takes everything back, newest first. Harmless when called again."""
        while self._undo:
            self._undo.pop()()
        self._changes.clear()


class UnpickledHook:
    """A hook on a module that is none in a pickle, as a function of the standard library: no hf_amp is needed to load it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def unpickled(hook: R) -> R:
    """The same for a method whose object is pickled as a `nullcontext`: pickles ask that for a method of the same name."""
    cast(Any, hook).__name__ = "__exit__"
    return hook


def removal(handles: Iterable[Any]) -> Callable[[], None]:
    """What takes back the hooks that torch has given `handles` for."""

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def takes_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks can be put on `module`: not on TorchScript's, which refuses them, and runs its code past Python."""
    return not isinstance(module, torch.jit.ScriptModule)


def compile_disabled(hook: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`, put off to the first call: it loads torch's compiler, which takes a second."""
    kept: Any = hook

    @functools.wraps(hook)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # An attribute, not a cell: compiled code that meets it guards on it, and breaks its graph at the call.
        disabled = getattr(kept, "disabled", None)
        if disabled is None:
            disabled = kept.disabled = torch.compiler.disable(hook, reason=_REASON)  # type: ignore[no-untyped-call]
        return cast(R, disabled(*args, **kwargs))

    return call


def not_compiled_alone(hook: Callable[..., Any]) -> None:
    """Lets a hook that enters a context, and leaves it to another, be compiled with what calls it only (`module.compile()`)."""
    frames: Any = torch._C._dynamo.eval_frame
    skipped = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    frames.set_code_exec_strategy(hook.__code__, skipped)


def is_one_graph() -> bool:
    """Whether the code that is being compiled may not break its graph (`fullgraph=True`); for hooks, while they are compiled."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # it is loaded by then

    return bool(InstructionTranslator.current_tx().one_graph)


# As `torch.compiler.assume_constant_result`, which loads the compiler: called while hooks are compiled, and not in compiled code.
cast(Any, is_one_graph)._dynamo_marked_constant = True
