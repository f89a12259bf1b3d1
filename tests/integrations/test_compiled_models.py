"""Models that `torch.compile` has compiled, in loops of accelerate."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_amp
from hf_amp import AmpSession, Cause, EventKind


@pytest.fixture(autouse=True)
def nothing_compiled_before(fresh_accelerator_state: None) -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def train(accelerator: Accelerator, model: nn.Module, steps: int = 3, rate: float = 0.1) -> list[float]:
    """The losses of `steps` steps, of which the second's activations leave the range of FP16."""
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), rate))
    losses = []
    for step in range(steps):
        loss = model(torch.ones(4, 4) * (1e5 if step == 1 else 1)).square().mean()
        losses.append(loss.item())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def emulated() -> tuple[Accelerator, AmpSession]:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    return accelerator, hf_amp.attach(accelerator)


def causes(session: AmpSession) -> list[Cause | None]:
    return [event.cause for event in session.events if event.kind is EventKind.STEP_SKIPPED]


COMPILED = {
    "before prepare": lambda accelerator, model: accelerator.prepare(
        torch.compile(model, fullgraph=True, backend="eager")
    ),
    "after prepare": lambda accelerator, model: torch.compile(
        accelerator.prepare(model), fullgraph=True, backend="eager"
    ),
    "in itself": lambda accelerator, model: (
        accelerator.prepare(model).compile(fullgraph=True, backend="eager") or model
    ),
}


@pytest.mark.parametrize("when", COMPILED)
def test_a_fallback_goes_on_where_the_graph_may_not_break(when: str) -> None:
    """With `fullgraph=True` the losses and the cause are those of the model that is not compiled."""
    losses = {}
    for compiled in (lambda accelerator, model: accelerator.prepare(model), COMPILED[when]):
        accelerator, session = emulated()
        model = compiled(accelerator, small())
        losses[compiled] = train(accelerator, model, steps=5)
        assert causes(session) == [Cause.ACTIVATION]
        assert set(session.plan.modules) == {"0", "2"}
        session.detach()
        assert not model._forward_hooks
    expected, actual = losses.values()
    assert actual == pytest.approx(expected, rel=1e-2, nan_ok=True)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_loss_that_is_compiled_with_its_model(precision: str) -> None:
    """In one graph: the bad batch is named, and what it made of a batch norm's statistics is taken back."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    session = hf_amp.attach(accelerator, init_scale=256.0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 0.01))
    loss_of = torch.compile(lambda x: model(x).square().mean(), fullgraph=True, backend="eager")
    for step in range(4):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        accelerator.backward(loss_of(x * torch.nan if step == 2 else x))
        optimizer.step()
        optimizer.zero_grad()
    assert [(e.step, e.cause) for e in session.events if e.kind is EventKind.STEP_SKIPPED] == [(3, Cause.INPUT)]
    assert plain[1].running_var.isfinite().all()
    assert session.metrics()["applied_steps"] == 3


@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_whole_model_can_leave_its_precision(fullgraph: bool) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    session = hf_amp.attach(accelerator, fallback_threshold=0.01)
    plain = small()
    model = accelerator.prepare(torch.compile(plain, fullgraph=fullgraph, backend="eager"))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), 0.1))
    for step in range(5):
        accelerator.backward(model(torch.ones(4, 4)).square().mean())
        if step in (1, 2):
            plain[0].weight.grad.fill_(torch.inf)  # of which nothing can be found out
        optimizer.step()
        optimizer.zero_grad()
    assert session.plan.default is hf_amp.PrecisionMode.FP32
    assert session.metrics()["applied_steps"] == 3
    in_fp32 = small()
    in_fp32.load_state_dict(plain.state_dict())
    assert torch.allclose(model(torch.ones(4, 4)), in_fp32(torch.ones(4, 4)), rtol=1e-6)


def test_what_was_compiled_before_attach_is_emulated_after_it() -> None:
    """And is FP32 again after `detach`."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    model = accelerator.prepare(torch.compile(small(), backend="eager"))
    in_fp32 = train(accelerator, model, rate=0.0)
    session = hf_amp.attach(accelerator)
    in_fp16 = train(accelerator, model, rate=0.0)
    assert causes(session) == [Cause.ACTIVATION]
    assert in_fp16[0] != in_fp32[0]
    session.detach()
    assert train(accelerator, model, rate=0.0) == in_fp32
