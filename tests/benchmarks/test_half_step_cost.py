"""What a step of BF16 parameters costs by what `half_parameters` does: CPU time, operators, bytes.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_half_step_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def main() -> None:
    options = parser(list(ROUNDS)).parse_args()
    rows = [row for size in options.sizes for row in measure(size, options.rounds or ROUNDS[size])]
    write("half_step_cost", {"rows": rows}, options.out)


def test_every_remedy_is_measured() -> None:
    """The benchmark is sound: stochastic rounding keeps 6 bytes a parameter as plain BF16 does, kahan 8, masters 14."""
    rows = {row["what"]: row for row in measure("tiny", 2)}
    kept = {name: row["size_of_a_parameter"] for name, row in rows.items()}
    assert kept == {"stochastic_rounding": 6, "kahan": 8, "master_weights": 14}
    assert all(row["operators_on_a_GPU"] > row["operators_of_plain_BF16"] for row in rows.values())


if __name__ == "__main__":
    main()
