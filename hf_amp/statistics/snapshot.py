"""The one place where hf_amp reads a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def read(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Brings 0-d tensors to the host in one transfer per device, which waits for the device.

    Args:
        values: name → tensor of shape [], any real dtype. FP64 carries them, so FP32 and integers up to 2^53 arrive exactly.

    Returns:
        name → value, in the same order. Booleans arrive as 0.0 and 1.0.
    """
    by_device: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        by_device.setdefault(value.device, []).append(name)
    host: dict[str, float] = {}
    for device, names in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        packed = torch.stack([values[name].detach().to(wide) for name in names])
        host.update(zip(names, packed.tolist(), strict=True))
    return {name: host[name] for name in values}
