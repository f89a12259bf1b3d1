"""Dividing gradients by the scale, and finding non-finite ones, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_amp.statistics.gradients import by_device_and_dtype, total_amax
from hf_amp.statistics.transfer import moved

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, shape [], float32. Rounded once from FP64, as `torch.amp.GradScaler.unscale_` does; MPS has none."""
    if scale.device.type == "mps":
        return scale.reciprocal()
    return scale.double().reciprocal().float()


@torch.no_grad()
def unscale_and_check_(gradients: Sequence[Tensor], inverse_scale: Tensor) -> Tensor:
    """Multiplies `gradients` in place by `inverse_scale`; says whether any element was not finite before.

    Returns:
        Tensor of shape [], float32, on the device of `inverse_scale`: 0 where all were finite. No host read.

    The kernel is the stock scaler's own, which has no public name; `tests/contract` fails by name if it goes. It
    does not know BF16 on every device, for which two public operators do the same.
    """
    found = torch.zeros((), dtype=torch.float32, device=inverse_scale.device)
    for (device, dtype), group in by_device_and_dtype(gradients).items():
        factor = moved(inverse_scale, device)
        if dtype in _KERNEL_DTYPES:
            found_here = torch.zeros((), dtype=torch.float32, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(group, found_here, factor)
        else:
            torch._foreach_mul_(group, factor)
            found_here = (~total_amax(group, device).isfinite()).float()
        found = torch.maximum(found, moved(found_here, found.device))
    return found


@torch.no_grad()
def multiply_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies `gradients` in place by `factor`, shape []. No host read."""
    for (device, _), group in by_device_and_dtype(gradients).items():
        torch._foreach_mul_(group, moved(factor, device))
