"""Why a step was skipped, found only after it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_amp.events import Cause
from hf_amp.statistics import snapshot


class Diagnosis(NamedTuple):
    """A cause, and a sentence that says what to do."""

    cause: Cause
    message: str


def diagnose(loss_finite: bool | None, parameters: Iterable[tuple[str, Tensor]]) -> Diagnosis:
    """The cause of a step whose gradients were not finite.

    A finite loss shows that forward was sound, so the scale was too large for backward. A non-finite loss is never
    the scale's fault: the parameters are looked at, which costs one read of them and one of the host.

    Args:
        loss_finite: whether every loss behind the gradients was finite before scaling; None where nothing was
            scaled (BF16, FP32), and so no loss was seen.
        parameters: (qualified name, parameter) of what the optimizer holds.
    """
    if loss_finite:
        return Diagnosis(
            Cause.SCALE,
            "the gradients left the range of FP16 although the loss was finite; a smaller scale cures that. Normal "
            "in the first steps of a run; nothing to do.",
        )
    poisoned = _non_finite_names(parameters)
    if poisoned:
        return Diagnosis(
            Cause.WEIGHTS,
            f"{len(poisoned)} parameters already hold non-finite values, {poisoned[0]} among them; no step can mend "
            "that. Go back to the last good checkpoint.",
        )
    if loss_finite is None:
        return Diagnosis(
            Cause.UNKNOWN,
            "the gradients were not finite, and there is no loss scale to blame. Look at this step's batch (NaN, "
            "empty inputs, every label ignored) and at the loss function.",
        )
    return Diagnosis(
        Cause.UNKNOWN,
        "the loss was not finite before it was scaled, so no scale can cure it. Look at this step's batch (NaN, empty "
        "inputs, every label ignored), at the loss function, and for activations beyond 65504.",
    )


def _non_finite_names(parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    with torch.no_grad():
        flags = {name: ~(p._values() if p.is_sparse else p).isfinite().all() for name, p in parameters}
    return [name for name, flag in snapshot.read(flags).items() if flag] if flags else []
