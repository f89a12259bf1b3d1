"""Losses on their way into backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_amp.errors import ScalerError


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


def count_non_finite(loss: Tensor, earlier: Tensor | None, device: torch.device) -> Tensor:
    """How many losses, `earlier` ones included, hold a non-finite value; shape [], float32. No host read."""
    found = (~loss.detach().isfinite().all()).float().to(device, non_blocking=True)
    return found if earlier is None else earlier + found
