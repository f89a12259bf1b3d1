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


def test_a_fallback_goes_on_where_the_graph_may_not_break() -> None:
    """With `fullgraph=True` the losses are those of the model that is not compiled, and the event says what runs."""
    losses = {}
    for fullgraph in (False, True):
        accelerator, session = emulated()
        model = torch.compile(small(), fullgraph=True, backend="eager") if fullgraph else small()
        losses[fullgraph] = train(accelerator, accelerator.prepare(model), steps=5)
        (change,) = [event for event in session.events if event.kind is EventKind.PRECISION_CHANGED]
        assert ("fullgraph" in change.message) == fullgraph
        assert causes(session) == [Cause.ACTIVATION]
        session.detach()
        assert not model._forward_hooks
    assert losses[True] == pytest.approx(losses[False], rel=1e-5, nan_ok=True)


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


def test_a_model_that_has_fullgraph_inside_is_an_error_that_says_what_to_do() -> None:
    """Compiled after `prepare`, the note of the batch is inside of the graph: the first step says so."""
    accelerator, _ = emulated()
    model = torch.compile(accelerator.prepare(small()), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"compile by torch.compile\(model\) before accelerator.prepare"):
        model(torch.ones(4, 4))


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
