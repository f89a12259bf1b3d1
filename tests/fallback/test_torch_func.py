"""Models that torch.func calls: nothing raises, and what cannot be repeated is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from hf_amp import Cause
from tests.each import for_each
from tests.fallback.test_diagnosis import Loop

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
X = torch.linspace(-1, 1, 24).reshape(3, 8)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "vmap": lambda model: vmap(model)(X),
    "jvp": lambda model: jvp(model, (X,), (torch.ones_like(X),))[1],
    "jacrev": lambda model: jacrev(model)(X),
    "functional_call": lambda model: functional_call(model, dict(model.named_parameters()), (X,)),
}


@for_each("precision", ["fp16", "bf16", "no"])
@for_each("name", list(CALLS))
def test_calls_by_torch_func_give_what_they_give_alone(precision: str, name: str) -> None:
    alone = CALLS[name](mlp())
    attached = CALLS[name](Loop(mlp(), precision).model)
    assert torch.allclose(attached.float(), alone, rtol=0.05, atol=0.02)


@for_each("precision", ["fp16", "bf16", "no"])
def test_gradients_of_each_sample_that_are_not_finite(precision: str) -> None:
    """The step is skipped, nothing else is blamed, and a sentence says what cannot be repeated and how it can be found out."""
    loop = Loop(mlp(), precision)
    loop.step({"input": X}, loss_of=lambda y: y.square().mean())
    parameters = {name: p.detach() for name, p in loop.model.named_parameters()}

    def loss(parameters: Any, row: Tensor) -> Tensor:
        return functional_call(loop.model, parameters, (row[None],)).square().mean()

    loop.accelerator.backward(loop.model(X).sum() * 0.0)
    loop.optimizer.zero_grad()
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, X.masked_fill(X > 0.9, torch.inf))
    for name, p in loop.model.named_parameters():
        p.grad = found[name].mean(0)
    loop.optimizer.step()
    (skip,) = loop.skips
    assert skip.cause in (Cause.SCALE, Cause.UNKNOWN)
    assert "torch.func has called the model" in skip.message


def test_an_inner_loop_of_a_meta_learner_trains_on() -> None:
    """The outer loss is made with other parameters than the model's: a bad batch costs one step."""
    loop = Loop(mlp(), "fp16", init_scale=256.0)
    for step in range(4):
        own = dict(loop.model.named_parameters())
        inner = functional_call(loop.model, own, (X * torch.nan if step == 1 else X,)).square().mean()
        slopes = torch.autograd.grad(inner, list(own.values()), create_graph=True)
        moved = {name: p - 0.1 * slope for (name, p), slope in zip(own.items(), slopes, strict=True)}
        loop.accelerator.backward(functional_call(loop.model, moved, (X,)).square().mean())
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    assert [skip.cause for skip in loop.skips] == [Cause.INPUT]
    assert loop.session.metrics()["applied_steps"] == 3
