"""What a step of BF16 parameters costs by what `half_parameters` does: CPU time, operators, bytes.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_half_step_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp.precision import BF16_FORMAT
from hf_amp.scaling import stochastic_rounding
from hf_amp.scaling.master_weights import MasterWeights
from hf_amp.scaling.stochastic_rounding import RoundedWeights
from tests.benchmarks.measuring import Row, compared, interleaved, parser, write
from tests.benchmarks.models import SIZES
from tests.benchmarks.test_scaler_cost import parameters

ROUNDS = {"1M": 40, "25M": 10}
REMEDIES: dict[str, Callable[[], MasterWeights]] = {
    "master_weights": MasterWeights,
    "stochastic_rounding": lambda: RoundedWeights(compensates=False),
    "kahan": lambda: RoundedWeights(compensates=True),
}


def step_of(held: list[nn.Parameter], make: Callable[[], MasterWeights] | None) -> tuple[Callable[[], None], Any]:
    """Upcasting of the gradients and the step, of parameters that `held` are copied to; and the optimizer."""
    ours = [nn.Parameter(p.detach().bfloat16()) for p in held]
    gradients = [p.grad.bfloat16() for p in held if p.grad is not None]
    optimizer = torch.optim.AdamW(ours, lr=1e-5, fused=True)
    masters = make() if make else None

    def step() -> None:
        for p, gradient in zip(ours, gradients, strict=True):
            p.grad = gradient
        if masters is None:
            optimizer.step()
        else:
            masters.upcast_gradients(optimizer)
            masters.run(optimizer, optimizer.step, in_parts=True)

    return step, optimizer


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    """What is kept between two steps: parameters, state and master weights, without counters."""
    saved = optimizer.state_dict()
    state = [value for entry in saved["state"].values() for value in entry.values() if value.dim()]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    masters = saved.get("hf_amp_master_weights", {}).values()
    return sum(x.numel() * x.element_size() for x in [*held, *state, *masters])


class Operators(TorchDispatchMode):
    """Counts operators that are no views: a kernel or a few each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name.startswith(("empty", "detach", "lift_fresh")))
        return func(*args, **(kwargs or {}))


def operators_as_on_a_gpu(held: list[nn.Parameter], make: Callable[[], MasterWeights] | None) -> int:
    """Operators of the third step, in blocks of the size that a GPU gets; what a block is made of is the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stochastic_rounding, "_TOGETHER", {})
        patch.setattr(stochastic_rounding, "_ROWS", {})
        step, _ = step_of(held, make)
        step()
        step()
        with Operators() as operators:
            step()
    return operators.count


def measure(size: str, rounds: int) -> list[Row]:
    """A row for plain BF16 and each remedy: the ratio of CPU time, operators, bytes kept a parameter."""
    shape = SIZES[size]
    held = parameters(shape.width, shape.layers, shape.vocabulary, "cpu")
    made = {"plain BF16": step_of(held, None), **{name: step_of(held, make) for name, make in REMEDIES.items()}}
    seconds = interleaved({name: step for name, (step, _) in made.items()}, rounds, "thread")
    elements = sum(p.numel() for p in held)
    stock = operators_as_on_a_gpu(held, None)
    return [
        {
            **row,
            "operators_on_a_GPU": operators_as_on_a_gpu(held, REMEDIES[row["what"]]),
            "operators_of_plain_BF16": stock,
            "size_of_a_parameter": round(bytes_of(made[row["what"]][1]) / elements, 2),
        }
        for row in compared(seconds, "plain BF16", parameters=size)
    ]


PIECE = 2**19


def in_pieces(kinds: list[list[Tensor]]) -> list[list[list[Tensor]]]:
    """Lists of tensors of the same sizes, cut into pieces that are together no more than 2^19 elements a list."""
    cut = [[piece for x in kind for piece in x.view(-1).split(PIECE)] for kind in kinds]
    blocks: list[list[list[Tensor]]] = []
    for pieces in zip(*cut, strict=True):
        if not blocks or sum(x.numel() for x in blocks[-1][0]) + pieces[0].numel() > PIECE:
            blocks.append([[] for _ in kinds])
        for kind, piece in zip(blocks[-1], pieces, strict=True):
            kind.append(piece)
    return blocks


def fp32_step_alone(held: list[nn.Parameter], rounded: bool) -> tuple[Callable[[], None], list[Tensor]]:
    """The least that an FP32 step asks of PyTorch's operators: BF16 to FP32, fused AdamW, and back; `rounded`: stochastically.

    Nothing but this. Memory, views, stand-ins and state are made before, and all random numbers of a step by one call. In pieces of 2^19
    elements, which only an optimizer that moves each element by itself can be run on. Also returns the BF16 parameters.
    """
    stored = (
        [p.detach().bfloat16() for p in held],
        *([torch.zeros_like(p, dtype=torch.bfloat16) for p in held] for _ in "mv"),
    )
    blocks = in_pieces([*stored, [cast(Tensor, p.grad).bfloat16() for p in held]])
    memory, noise = torch.empty(4, PIECE), torch.empty(PIECE // 1024, 1024, dtype=torch.int32)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(()))], lr=1e-5, fused=True)
    prepared = []
    for block in blocks:
        wide = [memory[kind].split([*map(len, x), PIECE - sum(map(len, x))])[:-1] for kind, x in enumerate(block)]
        stand_ins = [nn.Parameter(x) for x in wide[0]]
        for stand_in, average, square, gradient in zip(stand_ins, *wide[1:], strict=True):
            stand_in.grad = gradient
            optimizer.state[stand_in] = {"step": torch.zeros(()), "exp_avg": average, "exp_avg_sq": square}
        prepared.append((list(chain(*wide)), list(chain(*block)), stand_ins, sum(map(len, block[0]))))
    rows = [-(-count // 1024) for *_, count in prepared]

    def step() -> None:
        *drawn, of_columns = torch.randint(2**16, (sum(rows) + 1024,), dtype=torch.int32).split([*rows, 1024])
        for (wide, narrow, stand_ins, count), of_rows in zip(prepared, drawn, strict=True):
            torch._foreach_copy_(wide, narrow)
            optimizer.param_groups[0]["params"] = stand_ins
            optimizer.step()
            if rounded:
                values = memory[:3, :count]
                extremes = [x.aminmax() for x in values]
                largest = torch.stack([torch.maximum(-low, high) for low, high in extremes]).amax()
                fits = (largest < BF16_FORMAT.largest).int()
                torch.bitwise_xor((of_rows * fits)[:, None], of_columns * fits, out=noise[: len(of_rows)])
                values.view(torch.int32).add_(noise.view(-1)[:count]).bitwise_and_(-1 - fits * (2**16 - 1))
            torch._foreach_copy_(narrow[: 3 * len(stand_ins)], wide[: 3 * len(stand_ins)])

    return step, stored[0]


def step_of_torchao(held: list[nn.Parameter], compiled: bool) -> Callable[[], None]:
    """torchao's AdamW with stochastic rounding of the parameters, and of nothing else."""
    optim = pytest.importorskip("torchao.optim", reason="needs torchao, which the extra hf_amp[peers] brings")
    ours = [nn.Parameter(p.detach().bfloat16()) for p in held]
    for p, given in zip(ours, held, strict=True):
        p.grad = cast(Tensor, given.grad).bfloat16()
    step: Callable[[], None] = optim._AdamW(ours, lr=1e-5, bf16_stochastic_round=True).step
    return step if compiled else torch.compiler.set_stance("force_eager")(step)


BOUNDS: dict[str, Callable[[list[nn.Parameter]], Callable[[], None]]] = {
    "plain BF16": lambda held: step_of(held, None)[0],
    "to FP32 and back, prepared": lambda held: fp32_step_alone(held, rounded=False)[0],
    "the same, rounded stochastically": lambda held: fp32_step_alone(held, rounded=True)[0],
}
PEERS: dict[str, Callable[[list[nn.Parameter]], Callable[[], None]]] = {
    "torchao, bf16_stochastic_round": functools.partial(step_of_torchao, compiled=False),
    "torchao, compiled": functools.partial(step_of_torchao, compiled=True),
}


def measure_bounds(size: str, rounds: int, contenders: dict[str, Any]) -> list[Row]:
    """The ratio of what an FP32 step cannot be below in PyTorch's operators, and of torchao's optimizer."""
    shape = SIZES[size]
    held = parameters(shape.width, shape.layers, shape.vocabulary, "cpu")
    steps = {name: make(held) for name, make in contenders.items()}
    return compared(interleaved(steps, rounds, "thread"), "plain BF16", parameters=size)


def main() -> None:
    options = parser(list(ROUNDS)).parse_args()
    rows = [row for size in options.sizes for row in measure(size, options.rounds or ROUNDS[size])]
    bounds = [measure_bounds(size, options.rounds or ROUNDS[size], BOUNDS | PEERS) for size in options.sizes]
    write("half_step_cost", {"rows": rows, "details": list(chain(*bounds))}, options.out)


def test_every_remedy_is_measured() -> None:
    """The benchmark is sound: stochastic rounding keeps 6 bytes a parameter as plain BF16 does, kahan 8, masters 14."""
    rows = {row["what"]: row for row in measure("tiny", 2)}
    kept = {name: row["size_of_a_parameter"] for name, row in rows.items()}
    assert kept == {"stochastic_rounding": 6, "kahan": 8, "master_weights": 14}
    assert all(row["operators_on_a_GPU"] > row["operators_of_plain_BF16"] for row in rows.values())
    assert [row["what"] for row in measure_bounds("tiny", 2, BOUNDS)] == [*BOUNDS][1:]


def test_the_bound_does_what_it_is_a_bound_of() -> None:
    """Beside fused AdamW on FP32 copies of the same parameters, what is prepared is rounded to nearest, or up or down at random."""
    held = parameters(64, 1, 9000, "cpu")  # of which one is cut into two pieces
    for rounded in (False, True):
        step, ours = fp32_step_alone(held, rounded)
        step()
        exact = [nn.Parameter(p.detach().bfloat16().float()) for p in held]
        for p, given in zip(exact, held, strict=True):
            p.grad = cast(Tensor, given.grad).bfloat16().float()
        torch.optim.AdamW(exact, lr=1e-5, fused=True).step()
        off = torch.cat([(a.float() - b).view(-1) for a, b in zip(ours, exact, strict=True)])
        nearest = torch.cat([(b.bfloat16().float() - b).view(-1) for b in exact])
        assert torch.equal(off, nearest) is not rounded
        assert (off.abs() <= 2 * nearest.abs().clamp(min=2**-12)).all()


if __name__ == "__main__":
    main()
