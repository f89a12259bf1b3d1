"""Losses on their way into backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_amp.errors import ScalerError
from hf_amp.statistics.transfer import moved


def map_losses(convert: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """`outputs`, a tensor or nested iterables of tensors, with every tensor converted. Lists and tuples stay such.

    Raises:
        ScalerError: there is something else in it.
    """
    if isinstance(outputs, Tensor):
        return convert(outputs)
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(map_losses(convert, item) for item in outputs)
    if hasattr(outputs, "__iter__") and not isinstance(outputs, (str, bytes)):
        return map(functools.partial(map_losses, convert), outputs)
    raise ScalerError(
        f"AdvancedGradScaler.scale got {type(outputs).__name__}: pass a tensor or an iterable of tensors."
    )


def refuse_capture(loss: Tensor) -> None:
    """Raises `ScalerError` where a CUDA graph is being captured: its replays would all scale by this step's scale."""
    if loss.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ScalerError(
            "scaler.scale(loss) while a CUDA graph is captured: every replay would scale by what the scale is now, and steps "
            "divide by what it has become. Capture the model alone (torch.cuda.make_graphed_callables), before hf_amp is "
            "attached to it, and scale its loss outside of the graph."
        )


@dataclass
class SeenLosses:
    """The losses behind the gradients of one step, or of those of several optimizers whose gradients they made together.

    Attributes:
        number: how many there were.
        told: how many of them a step was told of.
        non_finite: how many held a non-finite value; shape [], float32. None before the first.
        ended: whether the next backward begins anew.
    """

    number: int = 0
    told: int = 0
    non_finite: Tensor | None = None
    ended: bool = False

    def untold(self) -> int:
        """How many of them no step was told of yet; they are told from now on."""
        number, self.told = self.number - self.told, self.number
        return number

    def note(self, loss: Tensor, device: torch.device) -> None:
        """Counts `loss`, on `device`. No host read."""
        known = loss.detach()
        flags = torch.nan_to_num(known - known, nan=1.0)  # NaN where it is not finite, 0 elsewhere
        found = moved(flags.any() if flags.dim() else flags, device, torch.float32)
        self.number += 1
        self.non_finite = found if self.non_finite is None else self.non_finite + found
