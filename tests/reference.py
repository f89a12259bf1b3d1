"""Small models, data and runs that several tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.monitoring.metrics import CATALOGUE

StepPlan = Callable[[int], bool]


def tiny_mlp(seed: int = 0) -> nn.Module:
    """Two layers, 4 → 8 → 3; equal for equal seeds."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


TIMINGS = frozenset(metric.name for metric in CATALOGUE if metric.unit in ("s", "samples/s", "B"))
"""Metrics that the machine has a part in: not the same in two equal runs."""


class OverflowInBackward(torch.autograd.Function):
    """Identity whose gradient is inf: what a scale that is too large does to a finite loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


def losses(model: nn.Module, steps: int, overflows: StepPlan, seed: int = 0) -> Iterator[Tensor]:
    """One finite loss a step; where `overflows(step)`, its gradient is inf."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        loss = model(torch.randn(5, 4, generator=generator)).square().mean()
        yield OverflowInBackward.apply(loss) if overflows(step) else loss


def adamw(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    """AdamW, fused or not."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and of all optimizer state tensors, in a fixed order."""
    tensors = [p.detach().clone() for p in model.parameters()]
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        tensors += [state[key].clone() for key in sorted(state) if isinstance(state[key], Tensor)]
    return tensors


def assert_bitwise_equal(left: list[Tensor], right: list[Tensor]) -> None:
    """Same number of tensors, each equal to the last bit."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)
