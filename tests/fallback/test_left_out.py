"""A batch whose loss the loop leaves out before backward is not blamed for a later skip, and all that count still are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_amp
from hf_amp import Cause

NAN = torch.full((4, 4), float("nan"))


class Model(nn.Module):
    """Two layers; `infinite` makes the second one overflow in FP16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Run:
    """One attached model and its optimizer."""

    def __init__(self, **options: Any) -> None:
        self.accelerator = Accelerator(mixed_precision="fp16", cpu=True)
        self.session = hf_amp.attach(self.accelerator, **{"init_scale": 256.0, **options})
        model = Model()
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-3))

    def loss(self, factor: float = 1.0, x: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(torch.randn(4, 4) if x is None else x).pow(2).mean() * factor

    def step(self) -> Cause | None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        newest = self.session.events[-1]
        return newest.cause if self.session.scaler.last_outcome.applied is False else None


TOO_LARGE = 1e6
OVERFLOWS = 1e6 * torch.ones(4, 4)


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.mark.parametrize("times", [1, 3])
def test_before_backward(run: Run, times: int) -> None:
    """`if not loss.isfinite(): continue`: the next step, which overflows by the scale alone, is SCALE's."""
    for _ in range(times):
        run.loss(x=NAN)
    run.accelerator.backward(run.loss(TOO_LARGE))
    assert run.step() is Cause.SCALE


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_micro_batch_of_three(run: Run, at: int) -> None:
    """Left out first, in the middle or last in an accumulation window."""
    for micro in range(3):
        loss = run.loss(TOO_LARGE, NAN if micro == at else None)
        if loss.isfinite():
            run.accelerator.backward(loss)
    assert run.step() is Cause.SCALE


def test_a_step_of_its_own_fault(run: Run) -> None:
    """What follows has a cause of its own, which is named: an activation, and not the batch that was left out."""
    run.loss(x=NAN)
    run.accelerator.backward(run.loss(x=OVERFLOWS))
    assert run.step() is Cause.ACTIVATION
    assert "holds NaN" not in run.session.events[-1].message


@pytest.mark.parametrize("first_is_bad", [True, False])
def test_a_loss_made_from_two_forward_passes(run: Run, first_is_bad: bool) -> None:
    """Both count: the batch that holds NaN is named, whichever it is."""
    batches = [NAN, None] if first_is_bad else [None, NAN]
    run.accelerator.backward(sum(run.loss(x=x) for x in batches))
    assert run.step() is Cause.INPUT


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_losses_in_any_order(run: Run, order: tuple[int, int]) -> None:
    """Forward, forward, backward, backward: the bad batch is named."""
    losses = [run.loss(x=NAN), run.loss()]
    for index in order:
        run.accelerator.backward(losses[index])
    assert run.step() is Cause.INPUT


def test_a_batch_that_made_a_target(run: Run) -> None:
    """Self-distillation: what the model makes of one batch is the target of another. Its NaN is found in that batch."""
    target = run.model(NAN).detach()
    run.accelerator.backward((run.model(torch.randn(4, 4)) - target).pow(2).mean())
    assert run.step() is Cause.INPUT


def test_graphs_are_let_go_of(run: Run) -> None:
    """Kept only where a loss may be made from several forward passes, and no longer than until the next step begins; nor are
    the newest loss's and what it gave to outputs."""
    recorder = run.session._fallback.recorder
    run.accelerator.backward(run.loss())
    assert not recorder._now().graphs
    run.step()
    run.accelerator.backward(run.loss() + run.loss())
    assert len(recorder._now().graphs) == 1
    assert recorder.operations_outside()
    assert all(len(call.output_gradients[""]) == 1 for call in recorder._now().calls)
    run.step()
    run.loss()
    assert not any(its.graphs for its in recorder._by_step.values())
    assert not recorder.operations_outside()
    assert not any(call.output_gradients.get("") for its in recorder._by_step.values() for call in its.calls)
