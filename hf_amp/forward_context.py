"""Enters a context around the forward pass of a model or of one of its modules: emulated FP16, or real autocast."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from hf_amp.nested import map_tensors


class ForwardContext:
    """Runs the forward passes of modules inside a context, until removed.

    The context is entered by forward hooks on every module, of which only the outermost acts: a module that is called
    on its own, as gradient checkpointing does when it recomputes, runs inside it as well.

    Args:
        make_context: gives a new context manager per forward pass; a picklable callable where the model is to be.
    """

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
        depth: int = getattr(self._of_thread, "depth", 0)
        if depth == 0:
            self._of_thread.context = self._make_context()
            self._of_thread.context.__enter__()
        self._of_thread.depth = depth + 1

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._of_thread.depth -= 1
        if self._of_thread.depth == 0:
            self._of_thread.context.__exit__(None, None, None)

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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter_with_float32(
        self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, ...]:
        outermost = getattr(self._of_thread, "depth", 0) == 0
        self._enter(module, arguments)
        return to_float32((arguments, options)) if outermost else (arguments, options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave_eagerly(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._leave(module, arguments, output)


def to_float32(value: Any) -> Any:
    """`value` with its FP16 and BF16 tensors in FP32; differentiable."""
    half = (torch.float16, torch.bfloat16)
    return map_tensors(lambda x: x.float() if x.dtype in half else x, value)


def _removal(handles: list[Any]) -> Callable[[], None]:
    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
