"""The gradients of one optimizer at a step boundary, and what can be said of them without a host read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_amp.precision import FP16_FORMAT, NumberFormat
from hf_amp.statistics import snapshot
from hf_amp.statistics.transfer import moved

SAMPLES_PER_TENSOR = 1024
"""Random elements per tensor for the underflow fraction, which they give to 0.003 to 0.005."""
TOLERATED_UNDERFLOW = float(torch.finfo(FP16_FORMAT.dtype).eps)
"""Share of elements whose underflow is left alone: 2^-10, the spacing of FP16 at one, which all the others are rounded to anyway."""
_BITS = 64
"""Largest distance, in bits, of an element from the smallest normal value that is told apart from zero and from infinity."""
_ELEMENTS_PER_SAMPLE = 1200
"""Elements of all gradients to each that is looked at at once, which takes up to 46 bytes: 1% of what FP32 gradients take."""


def collect(optimizer: torch.optim.Optimizer, without: Collection[int] = ()) -> list[Tensor]:
    """The gradients that `optimizer` will apply, parameter order; of a sparse one, its values.

    Of a DTensor it is this rank's shard, which shares its memory. Sparse gradients are coalesced in place first, so that
    duplicates which overflow only in sum are seen. No host read on dense gradients.

    Args:
        without: `id` of the parameters whose gradients are left out.
    """
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or id(parameter) in without:
                continue
            if is_sharded(gradient):
                gradient = gradient.to_local()
            if gradient.is_sparse:
                if not gradient.is_coalesced():
                    parameter.grad = gradient = gradient.coalesce()
                gradient = gradient._values()
            gradients.append(gradient)
    return gradients


def is_sharded(gradient: Tensor) -> bool:
    """Whether `gradient` is a DTensor, of which this process holds a part."""
    return type(gradient) is not Tensor and hasattr(gradient, "to_local")


def by_device_and_dtype(
    gradients: Iterable[Tensor],
) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """The same gradients grouped as the foreach kernels want them."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return groups


@torch.no_grad()
def total_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """2-norm over all elements, shape [], float32, on `device`. Not finite where a gradient is not. No host read.

    Squares are summed in the gradients' own precision: above |g| of about 1e19 an FP32 sum is inf although every
    gradient is finite. `exact_norm` has no such limit.
    """
    norms = [moved(_norm(group), device, torch.float32) for group in _filled_groups(gradients)]
    return _combined(norms) if norms else torch.zeros((), device=device)


@torch.no_grad()
def exact_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """2-norm with squares summed in FP64, at most FP32's largest value: finite wherever all gradients are.

    Slow; for when `total_norm` is not finite although the gradients are.
    """
    wide = [torch.linalg.vector_norm(g, dtype=torch.float64).to(device) for g in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack(wide))
    return total.clamp(max=torch.finfo(torch.float32).max).float()


@torch.no_grad()
def total_amax(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Largest magnitude over all elements, shape [], float32, on `device`. Not finite where a gradient is not.

    Always the true one: a sampled amax misses it by a factor of 2 to 6. No host read.
    """
    peaks = [moved(_amax(group), device, torch.float32) for group in _filled_groups(gradients)]
    if not peaks:
        return torch.zeros((), device=device)
    return peaks[0] if len(peaks) == 1 else torch.stack(peaks).amax()


def _filled_groups(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    return list(by_device_and_dtype(g for g in gradients if g.numel()).values())


def _combined(norms: Sequence[Tensor]) -> Tensor:
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(tuple(norms)))


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """2-norm, shape []. On a CPU BLAS reads FP32 twice as fast as the norm kernel does; measured by `tests/benchmarks`."""
    first = gradients[0]
    if first.device.type == "cpu" and first.dtype == torch.float32:
        flat = [g.view(-1) if g.is_contiguous() else g.reshape(-1) for g in gradients]
        return torch.stack([g.dot(g) for g in flat]).sum().sqrt_()
    return _combined(torch._foreach_norm(list(gradients), 2.0))


def _amax(gradients: Sequence[Tensor]) -> Tensor:
    """Largest magnitude, shape []. On a CPU `aminmax` reads each tensor once, eight times faster than an inf-norm."""
    if gradients[0].device.type == "cpu":
        extremes = [extreme for gradient in gradients for extreme in gradient.aminmax()]
        return torch.stack(extremes).abs_().amax()
    return torch.stack(torch._foreach_norm(list(gradients), float("inf"))).amax()


class Underflow(NamedTuple):
    """What a sample of scaled gradients shows of their smallest elements. Both of shape [], float32."""

    fraction: Tensor
    """Share of elements that are zero or subnormal. What the format has flushed arrives as zero, so zeros count as well;
    exact zeros of the FP32 gradient cannot be told from them."""
    cure: Tensor
    """The power of two that the gradients would have to be multiplied by, so that a share of no more than
    `TOLERATED_UNDERFLOW` of all elements is subnormal; below 1 where they could be smaller. Zeros, which it might not cure,
    do not count; 0 where nothing else is seen."""


@torch.no_grad()
def underflow(gradients: Sequence[Tensor], number_format: NumberFormat, seed: int) -> Underflow:
    """Looks for elements that are zero or subnormal in `number_format`, in a random sample. No host read.

    Args:
        gradients: the *scaled* gradients, as backward left them. At least one.
        seed: chooses the sample; ranks that hold the same gradients and pass the same seed get the same result. The global
            random state is not touched.

    Returns:
        Both figures on the device of the first gradient, weighted by tensor size.
    """
    total = sum(gradient.numel() for gradient in gradients)
    shares = torch.zeros(
        2 * _BITS + 1, device=gradients[0].device
    )  # of elements that miss -_BITS to _BITS bits
    for part, size in _parts(gradients, most=total // _ELEMENTS_PER_SAMPLE):
        values, weights = random_elements(part, seed)
        missing_bits = math.log2(number_format.smallest_normal) - values.abs_().log2_().floor_()
        missing_bits = missing_bits.nan_to_num_(nan=-_BITS).clamp_(-_BITS, _BITS).long().add_(_BITS)
        shares.scatter_add_(0, missing_bits.to(shares.device), weights.mul_(size / total).to(shares.device))
    at_least = shares[:-1].flip(0).cumsum(0)  # the last are zeros; share that misses this many bits or more
    enough = (at_least > TOLERATED_UNDERFLOW).sum() - 1 - _BITS
    cure = torch.where(enough > -_BITS, enough.float().exp2(), 0.0)
    return Underflow(fraction=shares[_BITS + 1 :].sum(), cure=cure)


def _parts(tensors: Sequence[Tensor], most: int) -> Iterator[tuple[list[Tensor], int]]:
    """Runs of `tensors` of whose elements `random_elements` takes `most`, or of one tensor; with their sizes."""
    part: list[Tensor] = []
    samples = size = 0
    for tensor in tensors:
        taken = min(tensor.numel(), SAMPLES_PER_TENSOR)
        if part and samples + taken > most:
            yield part, size
            part, samples, size = [], 0, 0
        part.append(tensor)
        samples, size = samples + taken, size + tensor.numel()
    if size:
        yield part, size


@torch.no_grad()
def random_elements(tensors: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """At most 1024 random elements of each of `tensors`, the same for the same sizes and seed. No host read.

    Returns:
        (values, weights), of one shape [n], float32, on the device of the first tensor. A weight is the share of all
        elements that a value stands for; together they are 1, or nothing where there are no elements.
    """
    device = tensors[0].device
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros(0, device=device), torch.zeros(0, device=device)
    total = sum(tensor.numel() for tensor in filled)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2**62, (SAMPLES_PER_TENSOR,), generator=generator)
    positions: dict[tuple[torch.device, int], Tensor] = {}
    samples, weights = [], []
    for tensor in filled:
        sample, size = tensor.reshape(-1), tensor.numel()
        if size > SAMPLES_PER_TENSOR:
            key = (tensor.device, size)
            if key not in positions:
                positions[key] = (drawn % size).to(tensor.device, non_blocking=True)
            sample = sample.take(positions[key])
        samples.append(moved(sample, device, torch.float32))
        weights.append(torch.full((sample.numel(),), size / total / sample.numel()))
    return torch.cat(samples), torch.cat(weights).to(device, non_blocking=True)


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
