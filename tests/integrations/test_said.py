"""What looks fine and is not is said: optimizers that make NaN, gradients that underflow, losses that are lost, set-ups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_amp
from hf_amp import AmpSession, Cause, EventKind
from hf_amp.events import AmpEvent

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


class NormScaled(torch.optim.Optimizer):
    """A trust ratio without a floor: a gradient of 0 is divided by its norm."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(parameter.grad / parameter.grad.norm(), alpha=-1e-3)


class WithDeadBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.dead = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a(x) + torch.relu(self.dead(x) - 50)).square().mean()


def steps(model: nn.Module, optimizer: Any, losses: int, factor: float = 1.0, **options: Any) -> AmpSession:
    """A run of `losses` steps on the model's own output."""
    accelerator = Accelerator(mixed_precision=options.pop("precision", "fp16"), cpu=True)
    session = hf_amp.attach(accelerator, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(losses):
        accelerator.backward(model(torch.ones(2, 4)).mean() * factor)
        optimizer.step()
        optimizer.zero_grad()
    return session


def of_kind(session: AmpSession, kind: EventKind) -> list[AmpEvent]:
    return [event for event in session.events if event.kind is kind]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_an_optimizer_that_makes_nan_of_finite_gradients(precision: str) -> None:
    """The step that did it is named, and the optimizer."""
    model = WithDeadBranch()
    session = steps(model, NormScaled(model.parameters()), 2, precision=precision, init_scale=256.0)
    (skip,) = of_kind(session, EventKind.STEP_SKIPPED)
    assert skip.cause is Cause.WEIGHTS
    assert "Step 1 was applied with finite gradients: NormScaled has made them" in skip.message


def test_weights_that_were_bad_before_are_nobodys_doing() -> None:
    """A damaged checkpoint: no step was applied before."""
    model = WithDeadBranch()
    nn.init.constant_(model.a.bias, torch.nan)
    session = steps(model, NormScaled(model.parameters()), 1)
    assert "was applied" not in of_kind(session, EventKind.STEP_SKIPPED)[0].message


class Tiny(nn.Module):
    """Returns a loss so small that no FP16 gradient is left of it at the default scale."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.weight = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean() * self.weight


def test_gradients_that_all_underflow_are_the_scales_fault() -> None:
    """Not the labels': said at the first step, and where the run is called stalled."""
    model = Tiny(1e-13)
    session = steps(model, torch.optim.SGD(model.parameters(), 1.0), 4, patience=3)
    for kind in (EventKind.ZERO_GRADIENTS, EventKind.STALLED):
        (event,) = of_kind(session, kind)
        assert event.cause is Cause.SCALE
        assert "Raise init_scale" in event.message
        assert "label" not in event.message


def test_gradients_that_are_zero_in_fp32_too_are_not() -> None:
    """A loss that depends on no parameter in value."""
    model = Tiny(0.0)
    session = steps(model, torch.optim.SGD(model.parameters(), 1.0), 2)
    assert of_kind(session, EventKind.ZERO_GRADIENTS)[0].cause is Cause.LOSS


@pytest.mark.parametrize("strategy", ["ADAPTIVE", "PERFORMANCE_OPTIMIZED"])
def test_adaptive_grows_out_of_underflow(strategy: str) -> None:
    """Before it has seen any gradient; within a few steps all of them are there."""
    model = Tiny(1e-13)
    session = steps(model, torch.optim.SGD(model.parameters(), 1.0), 20, scaling_strategy=strategy)
    assert session.scaler.get_scale() > 2.0**30
    assert session.monitor.grad_norm > 0
    assert session.scaler.skipped_steps <= 1


def test_a_loss_that_is_lost_while_gradients_are_finite() -> None:
    """A term that reaches no parameter: said once for all in a row, and the step is applied."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=256.0)
    model = WithDeadBranch()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-3))
    for term in (0.0, torch.nan, torch.nan, 0.0, torch.nan):
        accelerator.backward(model(torch.ones(2, 4)) + term)
        optimizer.step()
        optimizer.zero_grad()
    assert [event.step for event in of_kind(session, EventKind.LOSS_LOST)] == [2, 5]
    assert session.scaler.skipped_steps == 0


def test_weights_whose_nan_backward_does_not_see() -> None:
    """A rectifier passes the gradient of NaN on: steps are applied, and the parameter is named."""
    model = nn.Linear(4, 1)
    nn.init.constant_(model.bias, torch.nan)
    session = steps(nn.Sequential(model, nn.ReLU(), nn.Flatten(0)), torch.optim.SGD([model.weight], 1e-3), 2)
    (event,) = of_kind(session, EventKind.LOSS_LOST)
    assert event.cause is Cause.WEIGHTS
    assert "0.bias among them" in event.message
