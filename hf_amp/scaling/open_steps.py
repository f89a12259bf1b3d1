"""Which optimizers have a step open, and what becomes of their gradients when another's backward or update comes first."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from hf_amp.errors import ScalerError
from hf_amp.scaling.boundary import Boundary
from hf_amp.scaling.unscale import multiply_, reciprocal
from hf_amp.statistics.gradients import collect


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
        self._boundaries: weakref.WeakKeyDictionary[torch.optim.Optimizer, Boundary] = (
            weakref.WeakKeyDictionary()
        )
        self._applied: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[tuple[TensorWeakRef, int]]] = (
            weakref.WeakKeyDictionary()
        )

    def __bool__(self) -> bool:
        return bool(self._boundaries)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts `optimizer` among those whose gradients can wait."""
        self._applied.setdefault(optimizer, [])

    def open(self, optimizer: torch.optim.Optimizer, boundary: Boundary) -> None:
        """`optimizer`'s gradients have been examined."""
        self._boundaries[optimizer] = boundary

    def begin_backward(self, former: Tensor | None, scale: Tensor | None) -> None:
        """Keeps what waits for its step apart from what the next backward makes.

        Args:
            former: the scale of the last backward, shape [], float32; None before the first.
            scale: that of the next; None before the first.
        """
        for optimizer, boundary in list(self._boundaries.items()):
            if boundary.observed and not boundary.stepped and not boundary.is_untouched(optimizer):
                del self._boundaries[optimizer]
            else:
                boundary.mark()
        self.backwards += 1
        several = len(self._applied) > 1
        if several and former is not None and scale is not None and scale is not former:
            self._rescale(scale * reciprocal(former))

    def current(self, optimizer: torch.optim.Optimizer) -> Boundary | None:
        """What was examined of these very gradients; None where they are new since.

        Raises:
            ScalerError: something was added to gradients that had been unscaled or clipped.
        """
        boundary = self._boundaries.get(optimizer)
        if boundary is None or boundary.backward == self.backwards or boundary.stepped:
            return boundary
        if boundary.is_untouched(optimizer):  # the backward passes since were another optimizer's
            return boundary
        if boundary.observed:  # left over from before an update: the next backward made new gradients
            del self._boundaries[optimizer]
            return None
        raise ScalerError(
            "more gradients were accumulated onto ones that unscale_() or a clip had treated already: unscale or clip "
            "only after the last backward of the accumulation window, and before that of another optimizer."
        )

    def close(self, optimizer: torch.optim.Optimizer, boundary: Boundary) -> None:
        """`boundary`'s step is over, applied or not: until something is added to its gradients, they do not wait."""
        several = len(self._applied) > 1
        self._applied[optimizer] = (
            [(TensorWeakRef(g), g._version) for g in boundary.gradients] if several else []
        )
        boundary.gradients = []

    def unobserved(self) -> list[Boundary]:
        """The boundaries that no update has seen."""
        return [boundary for boundary in self._boundaries.values() if not boundary.observed]

    def end_update(self) -> None:
        """All boundaries have been seen, and those whose step is over are forgotten."""
        for optimizer, boundary in list(self._boundaries.items()):
            boundary.observed = True
            if boundary.stepped:
                del self._boundaries[optimizer]

    def abandon(self) -> None:
        """Forgets every boundary: its gradients will not be applied."""
        self._boundaries.clear()

    def _rescale(self, factor: Tensor) -> None:
        """Multiplies all gradients that wait and are scaled: exactly, between powers of two."""
        for optimizer, applied in list(self._applied.items()):
            if optimizer not in self._boundaries:
                multiply_(_added_to(collect(optimizer), applied), factor)


def _added_to(gradients: Iterable[Tensor], applied: Iterable[tuple[TensorWeakRef, int]]) -> list[Tensor]:
    """Those of `gradients` that are not among `applied`, or have been written to since."""
    versions = {id(g): version for ref, version in applied if (g := ref()) is not None}
    return [g for g in gradients if versions.get(id(g)) != g._version]
