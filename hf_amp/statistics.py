"""Statistics of gradients and parameters on their device, and the one place where hf_amp brings figures to the host."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_amp.device import copies_without_waiting, new_event, widest_float
from hf_amp.errors import ScalerError, in_one_line
from hf_amp.precision import FP16_FORMAT, FP32_FORMAT, NumberFormat


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`x` on `device`, and in `dtype` where one is given. Waited for on the way to the CPU alone.

    There PyTorch would give back memory that is still being written to, and arithmetic on it would use what is in it by
    then. Between other devices, and from the CPU, work is queued behind the copy. A single number leaves the CPU as the argument
    of a kernel: a copy would be from memory that is not pinned.
    """
    if x.device.type == "cpu" and device.type not in ("cpu", "meta") and x.dim() == 0:
        return torch.full((), x.item(), dtype=x.dtype if dtype is None else dtype, device=device)
    return x.to(device, x.dtype if dtype is None else dtype, non_blocking=device.type != "cpu")


def argument(number: Tensor, device: torch.device) -> Tensor | float:
    """`number`, shape [], on the CPU, as a kernel on `device` takes it without a copy. No GPU-CPU sync."""
    return number if device.type == "cpu" else number.item()


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, shape [], float32. Rounded once from FP64, where the device has it, as `torch.amp.GradScaler.unscale_` does."""
    return scale.to(widest_float(scale.device)).reciprocal().float()


def to_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Brings small tensors to the host in one transfer per device, which waits for the device.

    Args:
        values: name → tensor of shape [] or [n], any real dtype. FP64 carries them, so FP32 and integers up to 2^53 arrive
            exactly.

    Returns:
        name → value, in the same order; the elements of a tensor of shape [n] under `name[0]`, `name[1]` and so on.
        Booleans arrive as 0.0 and 1.0.
    """
    host: dict[str, float] = {}
    for device in {value.device for value in values.values()}:
        there = {name: value for name, value in values.items() if value.device == device}
        host.update(zip(_labels(there), _packed(there).tolist(), strict=True))
    return {label: host[label] for label in _labels(values)}


def elements_of(host: Mapping[str, float], name: str) -> list[float]:
    """The elements of what was read as a tensor of shape [n] under `name`; none where it was not."""
    found: list[float] = []
    while f"{name}[{len(found)}]" in host:
        found.append(host[f"{name}[{len(found)}]"])
    return found


def to_host_list(values: Iterable[Tensor]) -> list[float]:
    """The same without names: all elements, one after the other."""
    return list(to_host({str(index): value for index, value in enumerate(values)}).values())


class PendingTransfer:
    """Values on their way to the host: copied into pinned memory behind the work already queued, with an event.

    Devices that cannot do that are read in `result`, and waited for.

    Args:
        values: name → tensor of shape [] or [n].
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._host: list[tuple[list[str], Tensor]] = []
        self._events: list[torch.Event] = []
        for device in {value.device for value in values.values()}:
            there = {name: value for name, value in values.items() if value.device == device}
            packed = host = _packed(there).detach()
            if copies_without_waiting(device):
                host = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
                host.copy_(packed, non_blocking=True)
                self._events.append(new_event(device))
            self._host.append((_labels(there), host))

    def ready(self) -> bool:
        """Whether `result` would not wait, where the device can say so."""
        return all(event.query() for event in self._events)

    def result(self) -> dict[str, float]:
        """The values; waits for the device where `ready` is False."""
        for event in self._events:
            event.synchronize()
        return {name: value for names, host in self._host for name, value in zip(names, host.tolist(), strict=True)}


def _packed(values: Mapping[str, Tensor]) -> Tensor:
    tensors = list(values.values())
    if all(tensor.dtype == torch.float32 for tensor in tensors):
        scalars = not any(tensor.dim() for tensor in tensors)
        return torch.stack(tensors) if scalars else torch.cat([tensor.reshape(-1) for tensor in tensors])
    wide = widest_float(tensors[0].device)
    return torch.cat([tensor.to(wide).reshape(-1) for tensor in tensors])


def _labels(values: Mapping[str, Tensor]) -> list[str]:
    """What the elements of `_packed` are called."""
    labels: list[str] = []
    for name, value in values.items():
        labels += [name] if value.dim() == 0 else [f"{name}[{i}]" for i in range(value.numel())]
    return labels


def is_distributed() -> bool:
    """Whether there is more than one process to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main_process() -> bool:
    """Whether this process speaks for a run: the only one, or that of rank 0."""
    return not is_distributed() or dist.get_rank() == 0


def all_reduce_max(*values: Tensor, part_of_norm: Tensor | None = None) -> tuple[Tensor, ...]:
    """The element-wise maximum over all ranks of tensors of one shape, float32, in one all-reduce. No GPU-CPU sync.

    NaN, of which MAX loses track on some backends, travels as inf. With `part_of_norm`, shape [], last the 2-norm of all ranks'
    parts: in one all-gather.
    """
    parts = () if part_of_norm is None else (part_of_norm,)
    packed = torch.stack([value.float().nan_to_num(nan=torch.inf, posinf=torch.inf) for value in (*values, *parts)])
    of_ranks = [torch.empty_like(packed) for _ in range(dist.get_world_size())] if parts else []
    try:
        _ = dist.all_gather(of_ranks, packed) if parts else dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    except RuntimeError as error:
        raise ScalerError(f"{_WAITED_IN_VAIN} ({in_one_line(error)})") from error
    if part_of_norm is None:
        return tuple(packed.unbind())
    everyone = torch.stack(of_ranks)
    return (*everyone[:, :-1].amax(0).unbind(), torch.linalg.vector_norm(everyone[:, -1]))


_WAITED_IN_VAIN = (
    "this rank has waited in vain for what the others found at the end of the step. One has ended, has had fewer batches, or has gone "
    "another way through the loop: all ranks need the same number of steps, and of backward passes in each."
)


def copies_of(gradient: Tensor) -> float:
    """How many ranks hold each element of `gradient`: all where it is no DTensor, none where each holds a term of a sum."""
    parts, held = 1.0, cast(Any, gradient)
    for placement, size in zip(held.placements, held.device_mesh.shape, strict=True) if is_sharded(gradient) else ():
        parts *= math.inf if placement.is_partial() else 1 if placement.is_replicate() else size
    return (dist.get_world_size() if is_distributed() else 1) / parts


def all_reduce_max_to_host(values: Tensor) -> list[float]:
    """The element-wise maximum over all ranks of a tensor of shape [n], float32, finite, in one all-reduce and one GPU-CPU sync."""
    return to_host_list(all_reduce_max(values))


@torch.no_grad()
def collect(
    optimizer: torch.optim.Optimizer, without: Collection[int] = (), order: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The gradients that `optimizer` will apply, in its order; of a sparse one, its values; complex ones as real pairs.

    Of a DTensor it is this rank's shard, which shares its memory. Sparse gradients are coalesced in place first, so that
    duplicates which overflow only in sum are seen. No GPU-CPU sync on dense gradients.

    Args:
        without: `id` of the parameters whose gradients are left out.
        order: its parameters in another one, which a sum over them follows to the last bit.
    """
    gradients = []
    for parameter in order or held_by(optimizer):
        gradient = parameter.grad
        if gradient is None or (without and id(parameter) in without):
            continue
        if type(gradient) is not Tensor and hasattr(gradient, "to_local"):
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


def held_by(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The parameters that `optimizer` holds, in its order."""
    return itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)


def is_sharded(gradient: Tensor) -> bool:
    """Whether `gradient` is a DTensor, of which this process holds a part."""
    return type(gradient) is not Tensor and hasattr(gradient, "to_local")


def local_part(x: Tensor) -> Tensor:
    """Of a DTensor this rank's part, which shares its memory; any other tensor itself. No communication."""
    return cast(Tensor, cast(Any, x).to_local()) if is_sharded(x) else x


def by_device_and_dtype(gradients: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """The same gradients grouped as the foreach kernels want them."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return groups


@torch.no_grad()
def extremes(x: Tensor) -> Tensor:
    """The least and the largest element of `x`, floating or complex; shape [2]. NaN where it holds NaN, 0 where it is empty.

    On a CPU 50 times as fast as `isfinite().all()`. No GPU-CPU sync.
    """
    x = torch.view_as_real(x) if x.is_complex() else x
    return torch.stack(x.aminmax()) if x.numel() else x.new_zeros(2)


def all_finite(x: Tensor) -> Tensor:
    """Whether every element of `x`, floating or complex, is finite; shape [], bool, on its device. No GPU-CPU sync."""
    return extremes(x).isfinite().all()


def exact_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """2-norm to the last digits of FP32, at most its largest value: finite wherever all gradients are. No GPU-CPU sync.

    Slow, and copies every gradient, one at a time; for when `norm_and_amax` has an infinite norm although the gradients are.
    """
    norms = [_norm_within_range(to_device(g, g.device, torch.float32)) for g in gradients if g.numel()]
    return _combined(norms, device, _norm_within_range)


def _norm_within_range(x: Tensor) -> Tensor:
    """What is squared is divided by the amax first, so that no square leaves the range, without FP64, which MPS lacks."""
    peak = torch.linalg.vector_norm(x, math.inf).clamp(FP32_FORMAT.smallest_normal, FP32_FORMAT.largest)
    # `sum` adds in pairs. A 2-norm does not: on a CPU it is off by 0.5% at 2^26 elements.
    return cast(Tensor, peak * (x / peak).square_().sum().sqrt_()).clamp_(max=FP32_FORMAT.largest)


def total_amax(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Largest magnitude over all elements, shape [], float32, on `device`. Not finite where a gradient is not.

    Always the true one: a sampled amax misses it by a factor of 2 to 6. No GPU-CPU sync.
    """
    return cast(Tensor, norm_and_amax(gradients, device, norm=False)[1])


@torch.no_grad()
def norm_and_amax(
    gradients: Sequence[Tensor], device: torch.device, *, norm: bool = True, amax: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """2-norm over all elements and `total_amax`, for less than the two cost apart; None for the one that is not wanted.

    Both have shape [], float32, on `device`, and are not finite where a gradient is not. No GPU-CPU sync. Squares are
    summed in the gradients' own precision: above |g| of about 1e19 an FP32 sum is inf although every gradient is
    finite. `exact_norm` has no such limit.
    """
    norms: list[Tensor] = []
    peaks: list[Tensor] = []
    for group in filled_groups(gradients):
        read = _read_on_cpu if amax and group[0].device.type == "cpu" else _read_by_foreach
        group_norm, group_peak = read(group, norm, amax)
        norms += group_norm
        peaks += group_peak
    return (
        _combined(norms, device, torch.linalg.vector_norm) if norm else None,
        _combined(peaks, device, torch.amax) if amax else None,
    )


def _read_by_foreach(group: list[Tensor], norm: bool, amax: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The norm and the largest magnitude of tensors of one device and dtype, each if it is wanted."""
    if not (orders := [2.0] * norm + [math.inf] * amax):
        return [], []
    of_each = torch.stack([x for order in orders for x in torch._foreach_norm(group, order)]).view(len(orders), -1)
    norms = [torch.linalg.vector_norm(of_each[0])] if norm else []
    return norms, [of_each[-1].amax()] if amax else []


_IN_CACHE, _JOINED = 2**17, 2**10
"""Elements of FP32 that stay in a core's cache until they are read again, 512 KiB; of tensors that are copied together to be
read on a CPU, because a call costs more."""


def _read_on_cpu(group: list[Tensor], norm: bool, amax: bool) -> tuple[list[Tensor], list[Tensor]]:
    """There `aminmax` reads eight times faster than an inf-norm; `amax` and `amin`, what BLAS has brought into the cache."""
    small = [x for x in group if x.numel() <= _JOINED]
    flatten = cast(Any, torch._utils)._flatten_dense_tensors  # private; tests/contract fails by name if it goes
    joined = [x for x in group if x.numel() > _JOINED] + ([flatten(small)] if small else [])
    if not norm:
        return [], [torch.stack([end for x in joined for end in x.aminmax()]).abs_().amax()]
    squares: list[Tensor] = []
    ends: list[Tensor] = []
    for x in joined:
        for part in torch.split(x.reshape(-1), _IN_CACHE) if x.numel() > _IN_CACHE else (x.reshape(-1),):
            wide = part.float() if part.element_size() < 4 else part
            squares.append(wide.dot(wide))
            ends += (wide.amax(), wide.amin())
    return [torch.stack(squares).sum().sqrt_()], [torch.stack(ends).abs_().amax()]


def filled_groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those of `tensors` that have elements, grouped by device and dtype."""
    return list(by_device_and_dtype([tensor for tensor in tensors if tensor.numel()]).values())


def _combined(figures: list[Tensor], device: torch.device, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """One figure out of those of several groups; 0 out of none."""
    here = [to_device(figure, device, torch.float32) for figure in figures]
    return here[0] if len(here) == 1 else combine(torch.stack(here)) if here else torch.zeros((), device=device)


ELEMENTS_COUNTED_AT_ONCE = 2**26
"""Elements that `count_non_finite` puts together in a copy, 256 MiB of FP32, so that large and many tensors take few kernels."""


@torch.no_grad()
def count_non_finite(gradients: Sequence[Tensor]) -> tuple[int, int]:
    """How many elements are infinite, and how many NaN. One GPU-CPU sync: for overflowing steps only."""
    counts: list[Tensor] = []
    for group in filled_groups(gradients):
        for part in _joined(group, ELEMENTS_COUNTED_AT_ONCE):
            nan = part.ne(part).sum()
            counts += (nan, part.sub_(part).count_nonzero() - nan)  # finite ones are 0 now, the others NaN
    found = to_host_list(counts)
    return int(sum(found[1::2])), int(sum(found[::2]))


def _joined(tensors: list[Tensor], elements: int) -> Iterator[Tensor]:
    """Copies of all elements of `tensors`, as tensors of shape [n] with n up to `elements`."""
    held: list[Tensor] = []
    room = elements
    for tensor in tensors:
        rest = tensor.reshape(-1)
        while rest.numel() > room:
            yield torch.cat([*held, rest[:room]])
            rest, held, room = rest[room:], [], elements
        held.append(rest)
        room -= rest.numel()
    if held:
        yield torch.cat(held)


def plain_parts(x: Tensor) -> Iterator[Tensor]:
    """The tensors that `x` is made of, such as the integers and scales of torchao's quantized weights; else `x` itself."""
    if type(x) is Tensor or not hasattr(x, "__tensor_flatten__"):
        yield x
        return
    for name in cast(Any, x).__tensor_flatten__()[0]:
        yield from plain_parts(getattr(x, name))


@torch.no_grad()
def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Of each tensor whether all its elements are. One GPU-CPU sync, and few kernels.

    Integers are, FP8 counts as such, and a tensor on `meta` has no elements. Quantized ones are where their scales are.
    """
    finite, groups = [True] * len(tensors), dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]]()
    for index, whole in enumerate(tensors):
        for x in plain_parts(whole):
            if x.numel() and not x.is_meta and x.element_size() > 1 and (x.is_floating_point() or x.is_complex()):
                groups.setdefault((x.device, x.dtype), []).append((index, x))
    peaks: dict[str, Tensor] = {}
    for number, ((device, _), parts) in enumerate(groups.items()):
        group = [x for _, x in parts]
        if device.type == "cpu":  # where an inf-norm is slow
            peaks[str(number)] = torch.stack([x.isfinite().all() for x in group]).float().reciprocal()
        else:
            peaks[str(number)] = torch.stack(torch._foreach_norm(group, math.inf))
    host = to_host(peaks)
    for number, parts in enumerate(groups.values()):
        for (index, _), peak in zip(parts, elements_of(host, str(number)), strict=True):
            finite[index] &= math.isfinite(peak)
    return finite


SAMPLES_PER_TENSOR = 1024
"""Elements of each low-precision parameter whose updates are looked at."""
SAMPLES = 2**16
"""Elements of all gradients that are looked at for the underflow fraction, which they give to 0.002."""
_ELEMENTS_PER_SAMPLE, _FEWEST = 128, 2**13
"""Elements of all gradients to each that is looked at at once, which is 1% of the memory that they take; but no fewer at once."""
TOLERATED_UNDERFLOW = float(torch.finfo(FP16_FORMAT.dtype).eps)
"""Share of elements whose underflow is left alone: 2^-10, the spacing of FP16 at one, which all the others are rounded to anyway."""
_BITS = 64
"""Largest distance, in bits, of an element from the smallest normal value that still differs from zero and from infinity."""


class Underflow(NamedTuple):
    """What a sample of scaled gradients shows of their smallest elements, float32."""

    counts: Tensor
    """Of shape [5]: elements that are zero, the smallest subnormal number, two octaves above it, subnormal, and normal. What
    `underflow_fraction` takes."""
    cure: Tensor
    """The power of two that the gradients would have to be multiplied by, so that a share of no more than
    `TOLERATED_UNDERFLOW` of all elements is subnormal; below 1 where they could be smaller. Zeros, which it might not cure,
    do not count; 0 where nothing else is seen."""


@torch.no_grad()
def sample_underflow(gradients: Sequence[Tensor], number_format: NumberFormat, seed: int) -> Underflow:
    """Looks for elements that are zero or subnormal in `number_format`, in a random sample. No GPU-CPU sync.

    Args:
        gradients: the *scaled* gradients, as backward left them. At least one.
        seed: chooses the sample; ranks that hold the same gradients and pass the same seed get the same result. The global
            random state is not touched.

    Returns:
        Both figures on the device of the first gradient.
    """
    total = sum(gradient.numel() for gradient in gradients)
    at_once = SAMPLES if total <= SAMPLES else min(max(total // _ELEMENTS_PER_SAMPLE, _FEWEST), SAMPLES)
    # of elements, by the exponent of FP32, 0 for zero
    counts = torch.zeros(256, dtype=torch.int32, device=gradients[0].device)
    one, looked_at = counts.new_ones(()), 0
    for part in range(1 if total <= at_once else SAMPLES // at_once):
        values = random_elements(gradients, seed * SAMPLES + part, at_once)
        exponents = values.view(torch.int32).bitwise_right_shift_(23).bitwise_and_(255)
        counts.index_add_(0, exponents, one.expand(exponents.shape))
        looked_at += exponents.numel()
        del values, exponents  # before the next are there
    edge = 127 + round(math.log2(number_format.smallest_normal))
    near = counts[max(edge - _BITS + 1, 1) : edge + _BITS]
    at_most = near.cumsum(0, dtype=torch.int32)  # of floats it is an error in CUDA's deterministic mode
    enough = (at_most > looked_at * TOLERATED_UNDERFLOW).sum() - _BITS
    last = max(127 + round(math.log2(number_format.smallest_subnormal)), 1)
    small, normal = (part.sum(dtype=torch.int32) for part in (counts[1:edge], counts[edge:]))
    kinds = torch.stack([counts[0], counts[last], counts[last + 2], small, normal])
    return Underflow(kinds.float(), enough.float().exp2() * (enough > -_BITS))


_WIDTHS = 1.44
"""Octaves that round to the smallest subnormal number (log2(1.5 / 0.5) = 1.58), to those that round to its four- to sevenfold
(log2(7.5 / 3.5) = 1.10)."""
_BEYOND, _FEW, _DEVIATIONS, _DOUBT = 1.5, 32, 4.0, 0.1
"""See `underflow_fraction`; elements that show no trend; deviations of a difference of counts beyond which it is not chance; the share of
elements that may be in doubt, which is the metric's limit."""


def underflow_fraction(counts: Sequence[float]) -> float:
    """Share of gradient elements that the format has made subnormal or zero, of the `counts` of `Underflow`; NaN where unknown.

    The other zeros are zero in FP32 too, as rows of an embedding that no token asks for. A gradient has magnitudes over many octaves,
    and what is flushed to zero is the end of them. Where they become fewer towards that end, no more is taken to be beyond it than 1.5
    times what the last octave holds: between the half that is where they are spread evenly near zero, and the double where they fill
    ten octaves and more. Where they become more, or a few are left and none of them normal, it may be all zeros or some of them, and
    nothing tells which: NaN, if they are more than a tenth of all elements. So it is where only zeros are seen. Measured against FP32
    in the tests.
    """
    zeros, last, third, small, normal = counts
    total = zeros + small + normal
    flushed = min(zeros, _BEYOND * last)
    if last - _WIDTHS * third > _DEVIATIONS * (last + third) ** 0.5 or (normal == 0 and small < _FEW):
        if zeros - flushed > _DOUBT * total:
            return math.nan
        flushed = zeros
    return (small + flushed) / total if small + normal else math.nan


class LostUpdates:
    """What one optimizer step leaves of low-precision parameters as it was, from at most 1024 elements of each. No GPU-CPU sync.

    An update counts as due where element and gradient are not 0, and as lost where it was due and the element is the same
    afterwards. (An element of 0 has room for any update.)

    Args:
        parameters: those that the optimizer holds, before its step; of a shard, this process's part. None is due of one without
            a dense gradient.
        seed: chooses the sample. The global random state is not touched.
    """

    @torch.no_grad()
    def __init__(self, parameters: Sequence[Tensor], seed: int) -> None:
        self._held = [local_part(p.detach()) for p in parameters]
        generator = torch.Generator().manual_seed(seed)
        self._drawn = torch.randint(2**62, (SAMPLES_PER_TENSOR,), generator=generator, device="cpu")
        self._before, self._device = self._sample(self._held), self._held[0].device
        dense = [None if p.grad is None or p.grad.is_sparse else local_part(p.grad) for p in parameters]
        gradients = [
            x.new_zeros(()).expand(x.shape) if g is None else g for g, x in zip(dense, self._held, strict=True)
        ]
        self._due = (self._sample(gradients) != 0) & (self._before != 0)

    def _sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """Elements of one after the other, shape [n], float32: all of a small one, the same of a large one at every call."""
        positions: dict[tuple[torch.device, int], Tensor] = {}
        parts = []
        for x in tensors:
            flat, key = x.reshape(-1), (x.device, x.numel())
            if x.numel() > SAMPLES_PER_TENSOR:
                if key not in positions:
                    positions[key] = to_device(self._drawn, x.device) % x.numel()
                flat = flat[positions[key]]
            parts.append(to_device(flat, tensors[0].device, torch.float32))
        return torch.cat(parts)

    @torch.no_grad()
    def after(self, moves: Sequence[bool], judged: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Compares with what the parameters are now.

        Args:
            moves: of each parameter, whether its learning rate is above 0; where not, none was due.
            judged: of each, whether a share of its own is wanted.

        Returns:
            Lost share of all updates that were due, every element counting alike, shape []; and that of each parameter,
            shape [n], NaN where none was due. Both float32.
        """
        lost = self._due & (self._sample(self._held) == self._before)
        taken = [min(x.numel(), SAMPLES_PER_TENSOR) for x in self._held]
        ends = torch.tensor([0, *itertools.accumulate(taken)], device="cpu")
        # Of floats it is an error in CUDA's deterministic mode.
        sums = torch.stack([lost, self._due]).int().cumsum(1, dtype=torch.int32)
        sums = torch.nn.functional.pad(sums, (1, 0))[:, to_device(ends, self._device)].diff().float()
        weights = torch.tensor(
            [
                [float(m) * x.numel() / max(n, 1) for m, x, n in zip(moves, self._held, taken, strict=True)],
                [1.0 if m and j else math.nan for m, j in zip(moves, judged, strict=True)],
            ],
            device="cpu",
        )
        whole, own = to_device(weights, self._device)
        all_lost, all_due = (sums * whole).sum(1)
        return all_lost / all_due, sums[0] / sums[1] * own


@torch.no_grad()
def random_elements(tensors: Sequence[Tensor], seed: int, most: int) -> Tensor:
    """About `most` elements of all of `tensors`, at least one, the same for the same sizes and seed. No GPU-CPU sync.

    Every n-th element, as if the tensors lay one behind the other, from a random one on; n shares no factor with any row's length,
    so that no column is met more often than others. All of them where there are no more.

    Returns:
        New, shape [n], float32, on the device of the first tensor. Each stands for as many elements as any other.
    """
    total = sum(tensor.numel() for tensor in tensors)
    stride, rows = max(math.ceil(total / most), 1), {tensor.shape[-1] for tensor in tensors if tensor.dim()}
    for longer in range(stride, stride + 100) if stride > 1 else ():
        if all(math.gcd(longer, row) == 1 for row in rows if row):
            stride = longer
            break
    taken: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    skipped = random.Random(seed).randrange(stride)
    for tensor in tensors:
        if skipped < tensor.numel():
            taken.setdefault((tensor.device, tensor.dtype), []).append(tensor.reshape(-1)[skipped::stride])
        skipped = (skipped - tensor.numel()) % stride
    first = tensors[0].device
    parts = [to_device(torch.cat(group), first, torch.float32) for group in taken.values()]
    return parts[0] if len(parts) == 1 else torch.cat([torch.zeros(0, device=first), *parts])


@torch.no_grad()
def amax_of_each(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Largest magnitude of each tensor: shape [n], float32, on `device`; 0 for an empty one. No GPU-CPU sync."""
    return torch.cat([torch.zeros(0, device=device), *(total_amax([x], device).reshape(1) for x in tensors)])


@torch.no_grad()
def underflow_of_each(tensors: Sequence[Tensor], number_format: NumberFormat, factor: Tensor, seed: int) -> Tensor:
    """Of each tensor times `factor`, what `underflow_fraction` takes. No GPU-CPU sync.

    Args:
        tensors: gradients; of large ones about 1,024 elements are looked at.
        factor: shape [], what makes them the *scaled* gradients.
        seed: chooses the sample. The global random state is not touched.

    Returns:
        Shape [n, 5], float32, on `factor`'s device.
    """
    tiny, edge = number_format.smallest_subnormal, number_format.smallest_normal
    kinds = [torch.zeros(0, 5, device=factor.device)]
    for tensor in tensors:
        sample = (to_device(random_elements([tensor], seed, most=1024), factor.device) * factor).abs_()
        zeros, bounds = (sample <= 0).sum(), (0.5 * tiny, 1.5 * tiny, 3.5 * tiny, 7.5 * tiny, edge)
        below = [(sample < bound).sum() for bound in bounds]
        counts = (zeros, below[1] - below[0], below[3] - below[2], below[4] - zeros, sample.numel() - below[4])
        kinds.append(torch.stack(counts).float().reshape(1, 5))
    return torch.cat(kinds)
