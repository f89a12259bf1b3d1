"""Random samples of gradients and parameters: their smallest elements, and what a step has changed. No host read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_amp.precision import FP16_FORMAT, NumberFormat
from hf_amp.statistics.gradients import filled_groups
from hf_amp.statistics.transfer import moved

SAMPLES_PER_TENSOR = 1024
"""Random elements per tensor for the underflow fraction, which they give to 0.003 to 0.005."""
TOLERATED_UNDERFLOW = float(torch.finfo(FP16_FORMAT.dtype).eps)
"""Share of elements whose underflow is left alone: 2^-10, the spacing of FP16 at one, which all the others are rounded to anyway."""
_BITS = 64
"""Largest distance, in bits, of an element from the smallest normal value that is told apart from zero and from infinity."""
_WHOLE = 2**30
"""All elements, where their shares are integers."""
_ELEMENTS_PER_SAMPLE = 400
"""Elements of all gradients to each that is looked at at once, which takes 8 bytes: half of 1% of what FP32 gradients take."""


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
    shares = torch.zeros(256, device=gradients[0].device)  # of elements, by the exponent of FP32, 0 for zero
    for values, weight in _samples(gradients, seed, most=total // _ELEMENTS_PER_SAMPLE):
        exponents = values.view(torch.int32).bitwise_right_shift_(23).bitwise_and_(255)
        shares.index_add_(0, exponents, shares.new_full((), weight).expand(exponents.shape))
        del values, exponents  # before the next are there
    edge = 127 + round(math.log2(number_format.smallest_normal))
    near = (shares[max(edge - _BITS + 1, 1) : edge + _BITS] * _WHOLE).int()
    at_most = near.cumsum(0, dtype=torch.int32)  # of floats it is an error in CUDA's deterministic mode
    enough = (at_most > _WHOLE * TOLERATED_UNDERFLOW).sum() - _BITS
    cure = torch.where(enough > -_BITS, enough.float().exp2(), 0.0)
    return Underflow(fraction=shares[:edge].sum(), cure=cure)


def drawn_on_cpu(seed: int) -> Tensor:
    """What, modulo the size of a tensor, chooses its random elements: shape [1024], int64, whatever the default device is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**62, (SAMPLES_PER_TENSOR,), generator=generator, device="cpu")


def _samples(tensors: Sequence[Tensor], seed: int, most: int) -> Iterator[tuple[Tensor, float]]:
    """At most 1024 random elements of each of `tensors`, the same for the same sizes and seed. No host read.

    Yields:
        (values, weight): new, shape [n], float32, on the device of the first tensor, from tensors of one size, and no more
        than `most` or of one tensor; and the share of all elements that each of them stands for.
    """
    total = sum(tensor.numel() for tensor in tensors)
    for group in filled_groups(tensors):
        drawn_here = moved(drawn_on_cpu(seed), group[0].device)  # 8 KB, which CUDA does not wait for
        for size, alike in itertools.groupby(sorted(group, key=Tensor.numel), Tensor.numel):
            taken = min(size, SAMPLES_PER_TENSOR)
            positions = drawn_here % size if size > taken else None
            while part := list(itertools.islice(alike, max(most // taken, 1))):
                # Not by name, which would keep it while the next one is made.
                yield (
                    moved(
                        torch.cat(
                            [t.reshape(-1) if positions is None else t.reshape(-1)[positions] for t in part]
                        ),
                        tensors[0].device,
                        torch.float32,
                    ),
                    size / total / taken,
                )


@torch.no_grad()
def random_elements(tensors: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """At most 1024 random elements of each of `tensors`, the same for the same sizes and seed. No host read.

    Returns:
        (values, weights), of one shape [n], float32, on the device of the first tensor. A weight is the share of all
        elements that a value stands for; together they are 1, or nothing where there are no elements.
    """
    device = tensors[0].device
    samples = list(_samples(tensors, seed, most=sum(tensor.numel() for tensor in tensors)))
    if not samples:
        return torch.zeros(0, device=device), torch.zeros(0, device=device)
    weights = [torch.full(values.shape, weight, device=device) for values, weight in samples]
    return torch.cat([values for values, _ in samples]), torch.cat(weights)
