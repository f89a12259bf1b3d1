"""Enters a context around the forward pass of a model or of one of its modules: emulated FP16, or real autocast."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from torch import nn

from hf_amp.eager import eager
from hf_amp.nested import map_tensors, replace_tensors
from hf_amp.precision import widened


class ForwardContext:
    """Runs the forward passes of modules inside a context, until removed.

    The context is entered by forward hooks on every module, of which only the outermost acts: a module that is called
    on its own, as gradient checkpointing does when it recomputes, runs inside it as well.

    Args:
        make_context: gives a new context manager per forward pass; a picklable callable where the model is to be.
    """

    _all_of_thread: ClassVar[threading.local] = threading.local()

    def __init__(self, make_context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make_context = make_context
        self._of_thread = threading.local()  # DataParallel calls replicas from several threads

    def install(self, model: nn.Module) -> Callable[[], None]:
        """Puts `model` and its submodules inside the context from now on; returns what undoes it."""
        return _removal([handle for module in model.modules() for handle in self._hook(module)])

    def _hook(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        if self._all_of_thread.__dict__.get("is_suspended"):
            return
        running = self._running()
        if not running:
            self._of_thread.context = self._make_context()
            self._of_thread.context.__enter__()
            self._entered().append(self)
        running.append(module)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        running = self._running()
        if not running or running[-1] is not module:
            return  # suspended, or somebody else's hook raised before `_enter`: torch calls this one all the same
        running.pop()
        if not running:
            self._exit()

    def _exit(self) -> None:
        self._entered().remove(self)
        self._of_thread.context.__exit__(None, None, None)

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
        """Inside of it, forward passes of this thread enter no context: they run in what is around them."""
        of_thread = cls._all_of_thread.__dict__
        of_thread["is_suspended"] = True
        try:
            yield
        finally:
            of_thread["is_suspended"] = False

    @classmethod
    def _entered(cls) -> list[ForwardContext]:
        """The contexts that this thread is inside of, outermost first."""
        entered: list[ForwardContext] = cls._all_of_thread.__dict__.setdefault("entered", [])
        return entered

    def _running(self) -> list[nn.Module]:
        """The modules that this thread is inside of, outermost first."""
        running: list[nn.Module] = self._of_thread.__dict__.setdefault("running", [])
        return running

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model runs inside a context of its own."""
        return type(self), (self._make_context,)


class InnerForwardContext(ForwardContext):
    """The same for one module of a model that runs inside another context: this one is entered last and left first.

    Half-precision arguments of the outermost call are cast to FP32 on the way in, as FP32 kernels want them. Compiled
    code breaks its graph at these hooks: a context that is entered in one traced function and left in another would
    be lost.
    """

    def _hook(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter_with_float32, with_kwargs=True),
            module.register_forward_hook(self._leave_eagerly, prepend=True, always_call=True),
        ]

    @eager
    def _enter_with_float32(
        self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, ...]:
        outermost = not self._running()
        self._enter(module, arguments)
        if not outermost:
            return arguments, options
        # Lists and mappings stay the same objects: the module may add to them for its caller.
        return widened_in_place(arguments), widened_in_place(options)

    @eager
    def _leave_eagerly(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._leave(module, arguments, output)


def to_float32(value: Any) -> Any:
    """`value` with its FP16 and BF16 tensors in FP32; differentiable."""
    return map_tensors(widened, value)


def widened_in_place(value: Any) -> Any:
    """The same, in the very lists, mappings and dataclasses of `value`; tuples are new ones where something changes."""
    return replace_tensors(widened, value)


def _removal(handles: list[Any]) -> Callable[[], None]:
    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
