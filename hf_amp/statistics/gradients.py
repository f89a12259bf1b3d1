"""The gradients of one optimizer at a step boundary, and what can be said of them without a host read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_amp.config import NumberFormat
from hf_amp.statistics import snapshot

SAMPLES_PER_TENSOR = 1024
"""Random elements per tensor for the underflow fraction, which they give to 0.003 to 0.005."""


def collect(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients that `optimizer` will apply, parameter order; of a sparse one, its values.

    Sparse gradients are coalesced in place first, so that duplicates which overflow only in sum are seen.
    No host read on dense gradients.
    """
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                if not gradient.is_coalesced():
                    parameter.grad = gradient = gradient.coalesce()
                gradient = gradient._values()
            gradients.append(gradient)
    return gradients


def by_device_and_dtype(
    gradients: Iterable[Tensor],
) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """The same gradients grouped as the foreach kernels want them."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return groups


class GradientStatistics(NamedTuple):
    """Norm and largest magnitude of a set of gradients, both of shape [], float32, on the device asked for.

    Either is non-finite where a gradient is.
    """

    norm: Tensor
    amax: Tensor


@torch.no_grad()
def measure(gradients: Sequence[Tensor], device: torch.device) -> GradientStatistics:
    """2-norm and largest magnitude over all elements of `gradients`. No host read.

    The squared sum is taken in the gradients' own precision and is inf above |g| of about 1e19 in FP32.
    """
    norms, peaks = [], []
    for group in by_device_and_dtype(gradients).values():
        filled = [gradient for gradient in group if gradient.numel()]
        if not filled:
            continue
        norms.append(torch.nn.utils.get_total_norm(filled, 2.0).float().to(device))
        peaks.append(_amax(filled).float().to(device))
    if not norms:
        zero = torch.zeros((), device=device)
        return GradientStatistics(zero, zero)
    if len(norms) == 1:
        return GradientStatistics(norms[0], peaks[0])
    return GradientStatistics(torch.linalg.vector_norm(torch.stack(norms)), torch.stack(peaks).amax())


def _amax(gradients: Sequence[Tensor]) -> Tensor:
    """Largest magnitude, shape []. On a CPU `aminmax` reads each tensor once, eight times faster than an inf-norm."""
    if gradients[0].device.type == "cpu":
        extremes = [extreme for gradient in gradients for extreme in gradient.aminmax()]
        return torch.stack(extremes).abs_().amax()
    return torch.nn.utils.get_total_norm(gradients, float("inf"))


@torch.no_grad()
def underflow_fraction(gradients: Sequence[Tensor], number_format: NumberFormat) -> Tensor:
    """Share of elements that are zero or subnormal in `number_format`, from a random sample. No host read.

    Args:
        gradients: the *scaled* gradients, as backward left them.

    Returns:
        Tensor of shape [], float32, on the device of the first gradient, weighted by tensor size. What FP16 has
        flushed arrives as zero, so zeros count as well; exact zeros of the FP32 gradient cannot be told from them.
    """
    device = gradients[0].device
    total = sum(gradient.numel() for gradient in gradients)
    fraction = torch.zeros((), device=device)
    for gradient in gradients:
        flat = gradient.reshape(-1)
        if flat.numel() > SAMPLES_PER_TENSOR:
            picked = torch.randint(flat.numel(), (SAMPLES_PER_TENSOR,), device=flat.device)
            sample = flat[picked]
        else:
            sample = flat
        if sample.numel():
            small = (sample.abs() < number_format.smallest_normal).float().mean()
            fraction += small.to(device) * (gradient.numel() / total)
    return fraction


@torch.no_grad()
def count_non_finite(gradients: Sequence[Tensor]) -> tuple[int, int]:
    """How many elements are infinite, and how many NaN. One host read: for overflowing steps only."""
    if not gradients:
        return 0, 0
    counts: dict[str, Tensor] = {}
    for index, gradient in enumerate(gradients):
        counts[f"inf {index}"] = gradient.isinf().sum()
        counts[f"nan {index}"] = gradient.isnan().sum()
    host = snapshot.read(counts)
    infinite = sum(value for name, value in host.items() if name.startswith("inf"))
    return int(infinite), int(sum(host.values()) - infinite)
