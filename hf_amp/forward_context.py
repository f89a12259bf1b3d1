"""Enters a context around the forward pass of a model: emulated FP16, or real autocast."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn


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
        handles: list[Any] = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

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
        return ForwardContext, (self._make_context,)
