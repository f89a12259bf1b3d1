"""Small tensors from one device to another."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`x` on `device`, and in `dtype` where one is given. Waited for on the way to the CPU alone.

    There PyTorch would give back memory that is still being written to, and arithmetic on it would use what is in it by
    then. Between other devices, and from the CPU, work is queued behind the copy.
    """
    return x.to(device, x.dtype if dtype is None else dtype, non_blocking=device.type != "cpu")
