"""Statistics of every tensor by itself, as one tensor for all, so that they come to the host in the step's one read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_amp.precision import NumberFormat
from hf_amp.statistics.samples import SAMPLES_PER_TENSOR, drawn_on_cpu
from hf_amp.statistics.transfer import moved


@torch.no_grad()
def amax(x: Tensor) -> Tensor:
    """Largest magnitude of a tensor that is not empty: shape [], its dtype and device. No host read, and no copy of it."""
    if x.device.type == "cpu":
        return torch.stack(x.aminmax()).abs_().amax()
    peak: Tensor = torch.linalg.vector_norm(x, torch.inf)
    return peak


@torch.no_grad()
def amax_of_each(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Largest magnitude of each tensor: shape [n], float32, on `device`; 0 for an empty one. No host read."""
    if not tensors:
        return torch.zeros(0, device=device)
    peaks = [amax(x) if x.numel() else x.new_zeros(()) for x in tensors]
    return torch.stack([moved(peak, device, torch.float32) for peak in peaks])


@torch.no_grad()
def underflow_of_each(
    tensors: Sequence[Tensor], number_format: NumberFormat, factor: Tensor, seed: int
) -> Tensor:
    """Share of elements of each tensor times `factor` that are zero or subnormal in `number_format`. No host read.

    Args:
        tensors: gradients; of large ones 1,024 elements are looked at.
        factor: shape [], what makes them the *scaled* gradients.
        seed: chooses the sample. The global random state is not touched.

    Returns:
        Shape [n], float32, on `factor`'s device.
    """
    if not tensors:
        return torch.zeros(0, device=factor.device)
    drawn = drawn_on_cpu(seed)
    drawn_there = {device: moved(drawn, device) for device in {tensor.device for tensor in tensors}}
    shares = []
    for tensor in tensors:
        sample = tensor.reshape(-1)
        if sample.numel() > SAMPLES_PER_TENSOR:
            sample = sample[drawn_there[sample.device] % sample.numel()]
        sample = moved(sample, factor.device, torch.float32) * factor
        small = sample.abs_() < number_format.smallest_normal
        shares.append(small.float().mean() if sample.numel() else factor.new_zeros((), dtype=torch.float32))
    return torch.stack(shares)
