"""`eager`: keeps compiled code out of a hook, without loading torch's compiler before there is a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def compile_disabled(hook: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`, put off to the first call: it loads torch's compiler, which takes a second."""
    kept: Any = hook

    @functools.wraps(hook)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # An attribute, not a cell: compiled code that meets it guards on it, and breaks its graph at the call.
        disabled = getattr(kept, "disabled", None)
        if disabled is None:
            disabled = kept.disabled = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        return cast(R, disabled(*args, **kwargs))

    return call
