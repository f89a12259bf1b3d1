"""Half-precision parameters that lose no update, without FP32 copies of them between two steps.

While the optimizer runs it holds FP32 values of its parameters, gradients and half-precision state. Afterwards parameters
and state are rounded stochastically, up or down as often as the neighbour is near: an update far below the rounding step
moves few elements, and in the mean all is as in FP32. `kahan` rounds parameters to nearest and keeps the rounding error.
Source: Gupta et al., "Deep Learning with Limited Numerical Precision" (2015); Zamirai et al., "Revisiting BFloat16
Training" (2020), for both.

Bytes per parameter between two steps, AdamW: 2 for the parameter and 4 for its two averages, as without hf_amp; `kahan` 2 more.
During the step 20 more for the parameters that are FP32 at once: themselves, gradients, averages and random numbers; `kahan` 4 more. That is a
block of 2^24 elements (on a CPU 2^20), or one larger parameter, where the optimizer's class is known to treat each parameter
by itself (`optimizer_step.treats_each_by_itself`); otherwise it is all of them.

The state too is rounded stochastically: to nearest, BF16 holds an average with beta2 of 0.999 where it once was, because
0.001 of it is less than half a rounding step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_amp.precision import BF16_FORMAT, FP16_FORMAT, FP32_FORMAT, HALF_DTYPES, NumberFormat
from hf_amp.scaling.master_weights import MasterWeights, half_parameters, rename_state
from hf_amp.serialization import parse
from hf_amp.statistics import by_device_and_dtype, held_by, is_sharded, local_part

COMPENSATION = "hf_amp_compensation"
"""Name of a parameter's rounding error in `optimizer.state`: BF16, of its shape. Its value is the sum of the two."""

_TOGETHER = {"cpu": 2**20}
"""Elements of parameters that are FP32 at once, where the optimizer can be run on some of its parameters at a time: few enough for
a CPU's cache; elsewhere enough for a kernel to be worth its launch."""
_TOGETHER_ELSEWHERE = 2**24
_COLUMNS, _ROWS = 2**10, {"cpu": 2**7}


class RoundingNoise:
    """What makes rounding stochastic, from a generator of its own on every device. No GPU-CPU sync.

    Args:
        seed: chooses the numbers; ranks that pass the same seed round equal values alike.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def add_(self, values: Tensor, number_format: NumberFormat) -> None:
        """Moves `values`, shape [n] or [k, n], float32, so that they are rounded stochastically when they are made `number_format`.

        A value goes up as often as it is near to its upper neighbour, exact to 2^-16 of their distance (FP16: 2^-13), and
        one that the format holds stays. Where one is not finite, or not below the largest value, all are left to be rounded
        to nearest: rounding makes no inf, and hides none. The random numbers of a row are pairwise independent, not more: n
        of them are made from n / 1024 + 1024. Rows have the same.
        Source: Carter and Wegman, "Universal classes of hash functions" (1979), for the exclusive or.
        """
        device, count = values.device, values.shape[-1]
        if not values.numel():
            return
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        step = 2 ** round(math.log2(torch.finfo(number_format.dtype).eps / torch.finfo(torch.float32).eps))
        rows = -(-count // _COLUMNS)
        low, high = values.aminmax()
        fits = torch.maximum(-low, high) < number_format.largest
        size, generator = (rows + _COLUMNS,), self._generators[device]
        drawn = torch.randint(step, size, generator=generator, device=device, dtype=torch.int32) * fits
        kept_bits = ~(fits * (step - 1))
        together = _ROWS.get(device.type, rows)
        parts = torch.split(values, together * _COLUMNS, dim=-1)
        for of_rows, part in zip(torch.split(drawn[:rows], together), parts, strict=True):
            noise = (of_rows[:, None] ^ drawn[rows:]).view(-1)[: part.shape[-1]]
            bits = part.view(torch.int32)
            if number_format is FP16_FORMAT:  # whose subnormal values are further apart, all by as much
                subnormal = (part.abs() < number_format.smallest_normal) & fits
                raised = part + (noise - (step - 1) / 2) * (number_format.smallest_subnormal / step)
                part.copy_(torch.where(subnormal, raised, ((bits + noise) & kept_bits).view(torch.float32)))
            else:
                bits.add_(noise).bitwise_and_(kept_bits)


class RoundedWeights(MasterWeights):
    """In the place of masters: FP32 values that are there while the optimizer runs, and no longer.

    The FP32 state that an optimizer makes is kept in BF16, where it has its parameter's shape. FP16 gradients are FP32 from
    `unscale_` until the step; BF16 ones stay. Shards of FSDP2 work too, each rank rounds its own.

    Args:
        compensates: whether rounding errors of parameters are kept, `COMPENSATION`, and they are rounded to nearest.

    Attributes:
        steps: optimizer steps so far, which choose the random numbers of the next.
    """

    upcasts = (FP16_FORMAT.dtype,)
    state_dtype = None

    def __init__(self, compensates: bool) -> None:
        super().__init__()
        self._compensates = compensates
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        """What the next step's random numbers depend on."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict`. Raises `StateError` where it is none."""
        self.steps = parse(dict[str, int], state_dict, "rounding").get("steps", 0)

    def run(
        self,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], Any],
        *,
        found: list[Tensor] | None = None,
        in_parts: bool = False,
        whole: bool = False,
    ) -> Any:
        self.register_optimizer(optimizer)
        noise = RoundingNoise(self.steps)
        self.steps += 1
        moved = [p for p in half_parameters(optimizer) if whole or p.grad is not None]
        blocks = list(_blocks(moved))
        parts = [[block] for block in blocks] if in_parts and blocks else [blocks]
        others = {id(p) for p in held_by(optimizer)} - {id(p) for p in moved}  # go with the first part
        for part in parts:
            result = self._run_part(optimizer, step, part, others | {id(p) for block in part for p in block}, noise)
            others = set()
        return result

    def _run_part(
        self,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], Any],
        part: list[list[nn.Parameter]],
        others: set[int],
        noise: RoundingNoise,
    ) -> Any:
        blocks: list[_Block] = []
        groups = [(group, group["params"]) for group in optimizer.param_groups]
        try:
            for parameters in part:
                blocks.append(_Block(optimizer, parameters, self._compensates))
            wide = {p: stand_in for block in blocks for p, stand_in in block.wide.items()}
            for group, held in groups:
                group["params"] = [wide.get(p, p) for p in held if id(p) in others]
            return step()
        finally:
            for group, held in groups:
                group["params"] = held
            for block in blocks:
                block.narrow(noise)


def _blocks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one device and dtype each, together no more than fit, or one."""
    for (device, _), alike in by_device_and_dtype(parameters).items():
        most, begun, size = _TOGETHER.get(device.type, _TOGETHER_ELSEWHERE), list[nn.Parameter](), 0
        for parameter in cast("list[nn.Parameter]", alike):
            if begun and size + parameter.numel() > most:
                yield begun
                begun, size = [], 0
            begun.append(parameter)
            size += parameter.numel()
        yield begun


@dataclass
class _Place:
    """A half-precision tensor of `optimizer.state`, or (name "") a parameter, and its FP32 values while the optimizer runs."""

    parameter: nn.Parameter
    name: str
    stored: Tensor
    values: Tensor


class _Block:
    """Parameters of one device and dtype, which FP32 values stand in for, with their gradients and state, until `narrow`.

    The values of parameters, then of state, name by name, lie in one tensor, so that few kernels round them. What lies as many
    elements apart as there are of parameters shares random numbers: a parameter and its averages, never two of a kind.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], compensates: bool) -> None:
        self._optimizer, self._parameters, self._compensates = optimizer, parameters, compensates
        self.wide: dict[nn.Parameter, nn.Parameter] = {}
        """What stands in for each parameter."""
        state = optimizer.state
        entries = [state.get(p, {}) for p in parameters]
        errors = [entry.pop(COMPENSATION, None) for entry in entries]
        stored = [(p, "", p.detach()) for p in parameters]
        for name in dict.fromkeys(itertools.chain.from_iterable(entries)):
            of_name = [(p, name, entry.get(name)) for p, entry in zip(parameters, entries, strict=True)]
            stored += [each for each in of_name if _is_like(each[0], each[2], HALF_DTYPES)]
        self._flat, values = _widened([x for _, _, x in stored])
        self._places = [_Place(*each, x) for each, x in zip(stored, values, strict=True)]
        self._errors = [
            torch.zeros_like(p, dtype=BF16_FORMAT.dtype) if error is None else error
            for p, error in zip(parameters if self._compensates else (), errors, strict=False)
        ]
        if self._errors:
            wide_errors, _ = _widened(self._errors)
            self._flat[: wide_errors.numel()].add_(wide_errors)
        for place in self._places:
            wide = _with_values(place.stored, place.values)
            if place.name:
                state[place.parameter][place.name] = wide
            else:
                self.wide[place.parameter] = nn.Parameter(wide)
        dense = [p for p in parameters if p.grad is not None and not p.grad.is_sparse]
        for p, gradient in zip(dense, _widened([cast(Tensor, p.grad) for p in dense])[1], strict=True):
            self.wide[p].grad = _with_values(p, gradient)
        for p, stand_in in self.wide.items():
            if p.grad is not None and p.grad.is_sparse:
                stand_in.grad = p.grad.float().coalesce()
        rename_state(self._optimizer, self.wide)

    @torch.no_grad()
    def narrow(self, noise: RoundingNoise) -> None:
        """Rounds what the optimizer has made of them into parameters and state, which are the optimizer's again."""
        state = self._optimizer.state
        rename_state(self._optimizer, {stand_in: p for p, stand_in in self.wide.items()})
        entries = {id(p): state.get(p, {}) for p in self._parameters}
        for place in self._places:
            owner = entries[id(place.parameter)]
            now = local_part(owner.get(place.name, place.stored) if place.name else self.wide[place.parameter].detach())
            if now.data_ptr() != place.values.data_ptr():  # the optimizer has put another in its place
                place.values.copy_(now)
            if place.name in owner:
                owner[place.name] = place.stored
        count = sum(x.values.numel() for x in self._places if not x.name)
        of_parameters, of_state = self._flat[:count], self._flat[count:]
        stored, values = [local_part(x.stored) for x in self._places], [x.values for x in self._places]
        if self._compensates:
            held, stored = (
                stored[: len(self._errors)],
                [local_part(x) for x in self._errors] + stored[len(self._errors) :],
            )
            torch._foreach_copy_(held, values[: len(held)])
            of_parameters.sub_(_widened(held)[0])
            for p, error in zip(self._parameters, self._errors, strict=True):
                state[p][COMPENSATION] = error
        if self._compensates or self._parameters[0].dtype == BF16_FORMAT.dtype:
            noise.add_(_in_rows(self._flat, count), BF16_FORMAT)
        else:
            noise.add_(of_parameters, FP16_FORMAT)
            noise.add_(_in_rows(of_state, count), BF16_FORMAT)
        torch._foreach_copy_(stored, values)
        for p in self._parameters:
            for name, value in entries[id(p)].items():
                if _is_like(p, value, (FP32_FORMAT.dtype,)):  # new in this step
                    made = local_part(value).reshape(-1).clone()
                    noise.add_(made, BF16_FORMAT)
                    entries[id(p)][name] = _with_values(value, made.to(BF16_FORMAT.dtype).view(local_part(value).shape))
            if p.grad is not None and p.grad.dtype != p.dtype:
                p.grad = None  # it was FP32 for the step alone


def _in_rows(values: Tensor, count: int) -> Tensor:
    """`values`, shape [n], in rows of `count`, if it is rows of that: where all parameters have the same state."""
    return values.view(-1, count) if count and not values.numel() % count else values


def _is_like(parameter: Tensor, value: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether `value` is a plain tensor, or a shard, of the parameter's shape and one of these dtypes; no counter."""
    plain = type(value) is Tensor or (
        isinstance(value, Tensor) and is_sharded(value) and type(local_part(value)) is Tensor
    )
    return plain and value.dtype in dtypes and value.dim() > 0 and value.shape == parameter.shape


def _widened(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The local values of `tensors` in FP32, one after the other in one tensor of shape [n], and its parts in their shapes."""
    local = [local_part(x) for x in tensors]
    device = local[0].device if local else None
    flat = torch.empty(sum(x.numel() for x in local), dtype=FP32_FORMAT.dtype, device=device)
    parts = [part.view(x.shape) for part, x in zip(torch.split(flat, [x.numel() for x in local]), local, strict=True)]
    if parts:
        torch._foreach_copy_(parts, local)
    return flat, parts


def _with_values(like: Tensor, values: Tensor) -> Tensor:
    """`values`; where `like` is a shard, as the same shard of the same whole. No communication."""
    if not is_sharded(like):
        return values
    whole = cast(Any, like)
    layout = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
    return cast(Tensor, type(whole.detach()).from_local(values, whole.device_mesh, whole.placements, **layout))
