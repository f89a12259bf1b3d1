"""What finding a cause costs, counted in calls of blocks: no more of the model is repeated than the cause needs."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_amp import Cause
from tests.each import for_each
from tests.fallback.test_diagnosis import Loop

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
LAYERS = 5
CALLS: list[int] = []
"""Of blocks, by number. Outside of the model, whose attributes a replay puts back."""


class Block(nn.Module):
    """A layer, with a fault or without; it draws a number, and keeps a running mean that a fault spoils."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.layer = number, nn.Linear(8, 8)
        self.fault: Callable[[Block, Tensor], Tensor] | None = None
        self.register_buffer("factor", torch.ones(1))
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(self.number)
        self.drawn = np.random.rand()
        x = self.layer(x)
        x = x if self.fault is None else self.fault(self, x)
        self.mean.lerp_(x.detach().float().mean(), 0.1)
        return x


class Stack(nn.Module):
    """Blocks in a list, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(map(Block, range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


def rounding(block: Block, x: Tensor) -> Tensor:
    return x + 0 * (x * 0 + 1.0002 - 1.0001).log()


def division(block: Block, x: Tensor) -> Tensor:
    return x + (x - x) / (x - x)


def root(block: Block, x: Tensor) -> Tensor:
    return x + (x - x.detach()).abs().sqrt()


def overflow_by_chance(block: Block, x: Tensor) -> Tensor:
    return x + torch.addmm(x * 0, x * 0 + 1e4, x.new_ones(8, 8) * 1e4) * 1e-9 if block.drawn < 0.5 else x


def slope(block: Block, x: Tensor) -> Tensor:
    return x + (x - x.detach()) * 1e16


def bad_factor(block: Block, x: Tensor) -> Tensor:
    return x * block.factor


@for_each(
    ("fault", "cause", "operator", "calls_in_front", "calls_behind"),
    [  # the training pass and one in FP16; of MODEL one in FP32, of BUFFER one without it; of DERIVATIVE none but in front
        (rounding, Cause.ROUNDING, "log at test_diagnosis_cost.py", 4, 2),
        (overflow_by_chance, Cause.ACTIVATION, "addmm at test_diagnosis_cost.py", 4, 2),
        (division, Cause.MODEL, "div at test_diagnosis_cost.py", 5, 3),
        (bad_factor, Cause.BUFFER, "", 5, 3),
        (root, Cause.DERIVATIVE, "SqrtBackward0", 3, 2),
        (slope, Cause.ACTIVATION, "derivative of mul at test_diagnosis_cost.py", 4, 2),
    ],
)
def test_no_more_is_repeated_than_the_cause_needs(
    fault: Callable[[Block, Tensor], Tensor], cause: Cause, operator: str, calls_in_front: int, calls_behind: int
) -> None:
    """The block to blame is run alone, in FP16 by operator and in FP32; those behind it are not run on its NaN in FP32."""
    loop = Loop(model := Stack(), "fp16", init_scale=1.0, automatic_fallback=False)
    batch = {"x": torch.linspace(-1, 1, 32).reshape(4, 8)}
    np.random.seed(0)  # of its numbers the first six are above 0.42, the 11th is above 0.7
    loop.step(batch)
    assert loop.skips == []
    model.blocks[0].fault = fault
    if cause is Cause.BUFFER:
        model.blocks[0].factor.fill_(torch.nan)
    np.random.seed(5)  # of whose numbers the first is 0.22, and the next four are above 0.2
    CALLS.clear()
    loop.step(batch)
    (skip,) = loop.skips
    assert (skip.cause, skip.modules[:1]) == (cause, ("blocks.0",))
    assert operator in skip.message
    assert CALLS.count(0) <= calls_in_front
    assert [CALLS.count(number) for number in range(1, LAYERS)] == [calls_behind] * (LAYERS - 1)


def test_a_scale_that_was_too_large_costs_one_step() -> None:
    """Backward is repeated once, without a scale, which loses no gradient."""
    loop = Loop(Stack(), "fp16", init_scale=2.0**24)
    CALLS.clear()
    loop.step({"x": torch.linspace(-1, 1, 32).reshape(4, 8)})
    assert [skip.cause for skip in loop.skips] == [Cause.SCALE]
    assert [CALLS.count(number) for number in range(LAYERS)] == [2] * LAYERS


def test_the_scale_that_a_large_loss_needs_is_searched_once() -> None:
    """The first of several skips tries scales in FP16 and a pass in FP32, the others one pass at the scale that was found."""
    loop, calls = Loop(Stack(), "fp16", init_scale=4.0), list[int]()
    batch = {"x": torch.linspace(-1, 1, 32).reshape(4, 8)}
    for _ in range(4):
        CALLS.clear()
        loop.step(batch, loss_of=lambda loss: loss * 1e9)
        calls.append(CALLS.count(0))
    assert {(skip.cause, "They fit at a scale of" in skip.message) for skip in loop.skips} == {(Cause.SCALE, True)}
    assert len(loop.skips) == 4
    assert calls[0] <= 7
    assert set(calls[1:]) == {3}


@for_each("factors", [(1e9, 1e7), (1e7, 1e9), (1e9, 1e9)])
def test_a_large_loss_of_another_size_is_told_with_its_own_scale(factors: tuple[float, float]) -> None:
    """The largest at which its gradients fit, as a run tells that meets it first, in the same step of training."""
    batch = {"x": torch.linspace(-1, 1, 32).reshape(4, 8)}
    loops = [Loop(Stack(), "fp16", init_scale=4.0), Loop(Stack(), "fp16", init_scale=2.0)]
    for factor in factors:
        loops[0].step(batch, loss_of=lambda loss, factor=factor: loss * factor)
    loops[1].step(batch, loss_of=lambda loss: loss * factors[1])
    first, second = (re.findall(r"fit at a scale of ([\d.e-]*\d)", loop.skips[-1].message) for loop in loops)
    assert first == second != []
