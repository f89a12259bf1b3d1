"""One module of a repeated pass, run once more by itself: which of its operators is to blame, for the time that it takes alone.

Without that the whole pass is made once more, operator by operator, which says the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from hf_amp.device import RandomState, devices_of
from hf_amp.fallback.module_precision import CurrentPrecision
from hf_amp.fallback.operators import BadOperator, OperatorTrace
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.statistics import are_finite


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
