"""One module of a repeated pass, run once more by itself: which of its operators is to blame, for the time that it takes alone.

Without that the whole pass is made once more, operator by operator, which says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.device import RandomState, devices_of
from hf_amp.fallback.module_precision import CurrentPrecision
from hf_amp.fallback.operators import BadOperator, OperatorTrace
from hf_amp.fallback.recorder import OBJECTS_DEEP, RecordedForward
from hf_amp.statistics import are_finite, to_host_list
from hf_amp.tree import copy_containers, map_tensors, tensors_in


class BatchWritten(RuntimeError):
    """A model writes into what it is called with: nobody knows what it was called with before a first time."""


class Given:
    """What a module is called with, with copies of the tensors: it may write into them, also through `.data`, which no version counts.

    Of parameters, shards and FP8 there are no copies.
    """

    def __init__(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._inputs = copy_containers((arguments, options), OBJECTS_DEEP)
        found = (x for _, x in tensors_in(self._inputs, depth=OBJECTS_DEEP) if _can_be_compared(x))
        self._copies = {id(x): (x, x.detach().clone()) for x in found}

    def changes(self) -> list[Tensor]:
        """Of each tensor whether the module has written into it; shape [], bool, on its device. No GPU-CPU sync."""
        pairs = ((x.detach(), former) for x, former in self._copies.values())
        return [~((x == former) | (x.isnan() & former.isnan())).all() for x, former in pairs]

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(arguments, options) as the module was called with them: the tensors themselves, but copies of those that are not what they were.

        One GPU-CPU sync.
        """
        written = dict(zip(self._copies, to_host_list(self.changes()), strict=True))
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = map_tensors(
            lambda x: self._copies[id(x)][1].clone() if written.get(id(x)) else x, self._inputs, OBJECTS_DEEP
        )
        return inputs

    def put_back(self) -> bool:
        """Gives the tensors that are not what they were their former values; whether there are such. One GPU-CPU sync."""
        written = to_host_list(self.changes())
        for (x, former), is_written in zip(self._copies.values(), written, strict=True):
            if is_written:
                x.data.copy_(former)
        return any(written)


def call_without_writes(model: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What `model` returns; the tensors that it is called with are afterwards what they were. One GPU-CPU sync.

    Raises:
        BatchWritten: it has written into them.
    """
    given = Given(arguments, options)
    try:
        output = model(*arguments, **options)
    finally:
        is_written = given.put_back()
    if is_written:
        raise BatchWritten("the batch was written into since, by the model or by what loads it")
    return output


def _can_be_compared(x: Tensor) -> bool:
    is_plain = type(x) is Tensor and x.layout is torch.strided and not (x.is_meta or x.is_nested or x.is_quantized)
    return is_plain and (x.element_size() > 1 or not x.is_floating_point())


class ModuleAlone:
    """Runs modules of a pass that is being repeated once more each.

    Attributes:
        runs: whether one runs now, which nobody is to look at.
        drawn_from: what random numbers the module to run was made from.
        is_own_state: whether the newest one that was looked into was finite but for parameters or buffers of its own.
        found: module → by module inside of it, the first operator to blame; none where its own state is.
    """

    def __init__(self, forward: RecordedForward, current: CurrentPrecision) -> None:
        self._current = current
        self._devices = devices_of(forward.model)
        self._only_torch = forward.random_state is None or forward.random_state.python is None
        buffers = list(forward.model.buffers())
        self._bad_buffers = {id(x) for x, fine in zip(buffers, are_finite(buffers), strict=True) if not fine}
        self.runs = self.is_own_state = False
        self.drawn_from: RandomState | None = None
        self.found: dict[str, Mapping[str, BadOperator]] = {}

    def random_state(self) -> RandomState:
        """The present one; of Python and NumPy too where the model draws from them."""
        return RandomState.now(self._devices, self._only_torch)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside of it a module draws what it drew, and what follows draws as if it had not."""
        after = self.random_state()
        self.runs = True
        try:
            if self.drawn_from is not None:
                self.drawn_from.restore()
            yield
        finally:
            self.runs = False
            after.restore()

    def look_inside(self, name: str, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Operator by operator, on what it was given, which is finite: so none before it is to blame."""
        trace = OperatorTrace(self._current)
        with suppress(Exception), self.running(), trace.watching(module, name):
            module(*arguments, **options)
        holds_bad = not all(are_finite(list(module.parameters()))) or any(
            id(x) in self._bad_buffers for x in module.buffers()
        )
        self.is_own_state = not trace.found and holds_bad
        if trace.found or holds_bad:
            self.found[name] = trace.found
