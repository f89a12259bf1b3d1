"""An optimizer that holds another: it steps through the scaler, or is refused while gradients are scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_amp
from hf_amp import AmpSession, ScalerError

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


class Holding(torch.optim.Optimizer):
    """SAM-like: `second_step` steps the optimizer that it holds, and so does `step`."""

    def __init__(self, parameters: Any, deep: bool = False, **options: Any) -> None:
        super().__init__(parameters, options)
        base = torch.optim.SGD(self.param_groups, **options)
        self.base = {"all": [Holding(self.param_groups, **options)]} if deep else base
        self._newest = self.base["all"][0] if deep else base
        self.param_groups = base.param_groups

    def second_step(self) -> None:
        self._newest.step()

    def step(self, closure: Any = None) -> None:
        self._newest.step()


X = torch.ones(2, 4)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_held_optimizer_that_steps_on_scaled_gradients(by_hand: bool, deep: bool) -> None:
    """`second_step` past the scaler is a clear error before anything moves; `step` through it is right, also after detach."""
    model = nn.Linear(4, 1, bias=False)
    optimizer = Holding(model.parameters(), deep, lr=0.1)
    before = model.weight.detach().clone()
    if by_hand:
        session = AmpSession.for_model(model, optimizer, init_scale=256.0)
        backward, step = lambda loss: session.scaler.scale(loss).backward(), lambda: session.scaler.step(optimizer)
    else:
        accelerator = Accelerator(mixed_precision="fp16", cpu=True)
        session = hf_amp.attach(accelerator, init_scale=256.0)
        model, prepared = accelerator.prepare(model, optimizer)
        backward, step = accelerator.backward, prepared.step
    backward(model(X).sum())
    with pytest.raises(ScalerError, match=r"by Holding.*SAM's first_step"):
        optimizer.second_step()
    assert torch.equal(model.weight, before)
    step()
    assert torch.allclose(model.weight, before - 0.1 * X.sum(0))
    session.detach()
    model.zero_grad()
    model(X).sum().backward()
    optimizer.second_step()
    assert torch.allclose(model.weight, before - 0.2 * X.sum(0))


def test_where_nothing_is_scaled_it_steps_as_it_likes() -> None:
    """In BF16 and FP32."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    session = hf_amp.attach(accelerator)
    model = nn.Linear(4, 1, bias=False)
    optimizer = Holding(model.parameters(), lr=0.1)
    model, _ = accelerator.prepare(model, optimizer)
    accelerator.backward(model(X).sum())
    optimizer.second_step()
    session.detach()
