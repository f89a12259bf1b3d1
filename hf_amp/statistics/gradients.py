"""The gradients of one optimizer at a step boundary, and what can be said of them without a host read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from hf_amp.precision import FP32_FORMAT
from hf_amp.statistics import snapshot
from hf_amp.statistics.transfer import moved

_ELEMENTS_PER_COPIED = 200
"""Elements of all gradients to each that is copied at once, to be read together with others: half of 1%."""
_MOST_COPIED = 16384
"""Elements that are copied at once, at most; copying more costs what it saves."""
_IN_CACHE = 2**17
"""Elements of FP32 that stay in the cache of one core until they are read again: 512 KiB."""


def collect(optimizer: torch.optim.Optimizer, without: Collection[int] = ()) -> list[Tensor]:
    """The gradients that `optimizer` will apply, parameter order; of a sparse one, its values; complex ones as real pairs.

    Of a DTensor it is this rank's shard, which shares its memory. Sparse gradients are coalesced in place first, so that
    duplicates which overflow only in sum are seen. No host read on dense gradients.

    Args:
        without: `id` of the parameters whose gradients are left out.
    """
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or (without and id(parameter) in without):
                continue
            if type(gradient) is not Tensor and is_sharded(gradient):
                gradient = gradient.to_local()
            if gradient.is_sparse:
                if not gradient.is_coalesced():
                    parameter.grad = gradient = gradient.coalesce()
                gradient = gradient._values()
            if gradient.is_complex():
                if gradient.is_conj():
                    parameter.grad = gradient = gradient.resolve_conj()
                gradient = torch.view_as_real(gradient)
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


def total_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """2-norm over all elements, shape [], float32, on `device`. Not finite where a gradient is not. No host read.

    Squares are summed in the gradients' own precision: above |g| of about 1e19 an FP32 sum is inf although every
    gradient is finite. `exact_norm` has no such limit.
    """
    return cast(Tensor, norm_and_amax(gradients, device, amax=False)[0])


@torch.no_grad()
def exact_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """2-norm to the last digits of FP32, at most its largest value: finite wherever all gradients are. No host read.

    Slow, and copies every gradient, one at a time; for when `total_norm` is not finite although the gradients are.
    """
    norms = [_norm_within_range(moved(g, g.device, torch.float32)) for g in gradients if g.numel()]
    return _combined(norms, device, _norm_within_range)


def _norm_within_range(x: Tensor) -> Tensor:
    """What is squared is divided by the amax first, so that no square leaves the range, without FP64, which MPS lacks."""
    peak = torch.linalg.vector_norm(x, math.inf).clamp(FP32_FORMAT.smallest_normal, FP32_FORMAT.largest)
    # `sum` adds in pairs. A 2-norm does not: on a CPU it is off by 0.5% at 2^26 elements.
    return cast(Tensor, peak * (x / peak).square_().sum().sqrt_()).clamp_(max=FP32_FORMAT.largest)


def total_amax(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Largest magnitude over all elements, shape [], float32, on `device`. Not finite where a gradient is not.

    Always the true one: a sampled amax misses it by a factor of 2 to 6. No host read.
    """
    return cast(Tensor, norm_and_amax(gradients, device, norm=False)[1])


@torch.no_grad()
def norm_and_amax(
    gradients: Sequence[Tensor], device: torch.device, *, norm: bool = True, amax: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """`total_norm` and `total_amax`, for less than the two cost apart; None for the one that is not wanted."""
    norms: list[Tensor] = []
    peaks: list[Tensor] = []
    for group in filled_groups(gradients):
        read = _read_on_cpu if group[0].device.type == "cpu" else _read_by_foreach
        group_norm, group_peak = read(group, norm, amax)
        norms += group_norm
        peaks += group_peak
    return (
        _combined(norms, device, torch.linalg.vector_norm) if norm else None,
        _combined(peaks, device, torch.amax) if amax else None,
    )


def _read_by_foreach(group: list[Tensor], norm: bool, amax: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Its norm and its largest magnitude, each if it is wanted."""
    return (
        [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(group, 2.0)))] if norm else [],
        [torch.stack(torch._foreach_norm(group, math.inf)).amax()] if amax else [],
    )


def _read_on_cpu(group: list[Tensor], norm: bool, amax: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The same. BLAS reads large FP32 with every core; `aminmax` reads anything eight times faster than an inf-norm, and what
    BLAS has just brought into the cache `amax` and `amin` read twice as fast again. Measured by `tests/benchmarks`."""
    if not amax:
        return _norms_on_cpu(group), []
    by_blas = norm and group[0].dtype == torch.float32
    squares: list[Tensor] = []
    extremes: list[Tensor] = []
    for piece in _pieces(group):
        if not by_blas:
            extremes += piece.aminmax()
            continue
        flat = _flat(piece)
        for part in torch.split(flat, _IN_CACHE) if flat.numel() > _IN_CACHE else (flat,):
            squares.append(part.dot(part))
            extremes += (part.amax(), part.amin())
    norms = [torch.stack(squares).sum().sqrt_()] if by_blas else _read_by_foreach(group, norm, False)[0]
    return norms, [torch.stack(extremes).abs_().amax()]


def _norms_on_cpu(group: list[Tensor]) -> list[Tensor]:
    """The norm alone: what is large by BLAS, the rest in one call."""
    large = [g for g in group if g.numel() > _IN_CACHE] if group[0].dtype == torch.float32 else []
    if not large:
        return _read_by_foreach(group, True, False)[0]
    squares = [flat.dot(flat) for flat in map(_flat, large)]
    rest = [gradient for gradient in group if gradient.numel() <= _IN_CACHE]
    norms = _read_by_foreach(rest, True, False)[0] if rest else []
    return [*norms, torch.stack(squares).sum().sqrt_()]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)


def _pieces(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """`tensors`, of one device and dtype, small ones copied together: calls cost more than reading them."""
    sizes = [tensor.numel() for tensor in tensors]
    most = min(sum(sizes) // _ELEMENTS_PER_COPIED, _MOST_COPIED)
    run: list[Tensor] = []
    held = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if 2 * size > most:
            yield tensor
            continue
        if held + size > most:
            yield torch.cat(run)
            run, held = [], 0
        run.append(tensor if tensor.dim() == 1 else tensor.reshape(-1))
        held += size
    if run:
        yield torch.cat(run)


def filled_groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those of `tensors` that have elements, grouped by device and dtype."""
    return list(by_device_and_dtype([tensor for tensor in tensors if tensor.numel()]).values())


def _combined(figures: list[Tensor], device: torch.device, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """One figure out of those of several groups; 0 out of none."""
    here = [moved(figure, device, torch.float32) for figure in figures]
    if len(here) == 1:
        return here[0]
    return combine(torch.stack(here)) if here else torch.zeros((), device=device)


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
