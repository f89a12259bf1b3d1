"""Which optimizers have a step open, and what becomes of their gradients when another's backward or update comes first."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from hf_amp.errors import ScalerError
from hf_amp.scaling.boundary import Boundary
from hf_amp.scaling.unscale import multiply_, reciprocal
from hf_amp.statistics.gradients import collect


@dataclass
class _Known:
    optimizer: Callable[[], torch.optim.Optimizer | None]
    boundary: Boundary | None = None
    applied: list[tuple[TensorWeakRef, int]] = field(default_factory=list)
    """The gradients of its last step, and their versions then; none where a loop has one optimizer."""
    closed_after: int | None = None
    """Backward passes begun until its last step; None before the first."""


class OpenSteps:
    """The boundaries of one scaler's optimizers, each from its examination until the update after its step.

    Gradients do not say which backward they are from. So that each is divided by the scale of its own all the same, those
    that wait for their optimizer's step while the scale changes are brought to the new one before the next backward: all
    that are scaled have one scale. A loop with one optimizer pays nothing for it. Keeps neither optimizers nor applied
    gradients alive. No host read.

    Attributes:
        backwards: backward passes begun.
    """

    def __init__(self) -> None:
        self.backwards = 0
        self._known: dict[int, _Known] = {}

    def __bool__(self) -> bool:
        return any(known.boundary is not None for known in self._known.values())

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts `optimizer` among those whose gradients can wait."""
        self._of(optimizer)

    def open(self, optimizer: torch.optim.Optimizer, boundary: Boundary) -> None:
        """`optimizer`'s gradients have been examined."""
        self._of(optimizer).boundary = boundary

    def begin_backward(self, former: Tensor | None, scale: Tensor | None) -> None:
        """Keeps what waits for its step apart from what the next backward makes.

        Args:
            former: the scale of the last backward, shape [], float32; None before the first.
            scale: that of the next; None before the first.
        """
        for known, optimizer in self._alive():
            boundary = known.boundary
            if boundary is None:
                continue
            if boundary.observed and not boundary.stepped and not boundary.is_untouched(optimizer):
                known.boundary = None
            else:
                boundary.mark(optimizer)
        self.backwards += 1
        several = len(self._known) > 1
        if several and former is not None and scale is not None and scale is not former:
            self._rescale(scale * reciprocal(former))

    def current(self, optimizer: torch.optim.Optimizer) -> Boundary | None:
        """What was examined of these very gradients; None where they are new since.

        Raises:
            ScalerError: something was added to gradients that had been unscaled or clipped.
        """
        known = self._of(optimizer)
        boundary = known.boundary
        if boundary is None or boundary.backward == self.backwards or boundary.stepped:
            return boundary
        if boundary.is_untouched(optimizer):  # the backward passes since were another optimizer's
            return boundary
        if boundary.observed:  # left over from before an update: the next backward made new gradients
            known.boundary = None
            return None
        raise ScalerError(
            "more gradients were accumulated onto ones that unscale_() or a clip had treated already: unscale or clip "
            "only after the last backward of the accumulation window, and before that of another optimizer. A step that is "
            "left out needs its update() all the same."
        )

    def close(self, optimizer: torch.optim.Optimizer, boundary: Boundary) -> None:
        """`boundary`'s step is over, applied or not: until something is added to its gradients, they do not wait."""
        several = len(self._known) > 1
        known = self._of(optimizer)
        known.applied = [(TensorWeakRef(g), g._version) for g in boundary.gradients] if several else []
        known.closed_after = self.backwards
        boundary.gradients = []

    def is_scaled_by_hand(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether no backward has begun here since `optimizer`'s last step: its caller multiplies by `get_scale()`."""
        return self._of(optimizer).closed_after == self.backwards

    def is_waiting(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a backward has begun since `optimizer`'s last step, and none of its steps is running."""
        known = self._of(optimizer)
        is_stepping = known.boundary is not None and known.boundary.stepped
        return not is_stepping and self.backwards > (known.closed_after or 0)

    def unobserved(self) -> dict[int, Boundary]:
        """The boundaries that no update has seen, by the optimizer's `id`."""
        boundaries = {key: known.boundary for key, known in self._known.items()}
        return {key: found for key, found in boundaries.items() if found is not None and not found.observed}

    def end_update(self) -> None:
        """All boundaries have been seen, and those whose step is over are forgotten."""
        for known in self._known.values():
            if known.boundary is not None:
                known.boundary.observed = True
                if known.boundary.stepped:
                    known.boundary = None

    def forget(self, key: int) -> None:
        """Lets the optimizer with this `id` be examined anew."""
        if key in self._known:
            self._known[key].boundary = None

    def abandon(self) -> None:
        """Forgets every boundary: its gradients will not be applied."""
        for known in self._known.values():
            known.boundary = None

    def _of(self, optimizer: torch.optim.Optimizer) -> _Known:
        """By identity: what stands in for an optimizer may be neither hashable nor weakly referable."""
        key, everyone = id(optimizer), self._known
        if key not in everyone:
            try:
                everyone[key] = _Known(weakref.ref(optimizer, lambda _: everyone.pop(key, None)))
            except TypeError:
                everyone[key] = _Known(lambda: optimizer)
        return everyone[key]

    def _alive(self) -> Iterator[tuple[_Known, torch.optim.Optimizer]]:
        for known in list(self._known.values()):
            if (optimizer := known.optimizer()) is not None:
                yield known, optimizer

    def _rescale(self, factor: Tensor) -> None:
        """Multiplies all gradients that wait and are scaled: exactly, between powers of two."""
        for known, optimizer in self._alive():
            if known.boundary is None:
                multiply_(_added_to(collect(optimizer), known.applied), factor)


def _added_to(gradients: Iterable[Tensor], applied: Iterable[tuple[TensorWeakRef, int]]) -> list[Tensor]:
    """Those of `gradients` that are not among `applied`, or have been written to since."""
    versions = {id(g): version for ref, version in applied if (g := ref()) is not None}
    return [g for g in gradients if versions.get(id(g)) != g._version]
