"""Losses that are made outside of the model: what they give to its outputs tells causes apart at the first skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import hf_amp
from hf_amp import AmpSession, Cause, EventKind
from tests.each import for_each
from tests.fallback.test_diagnosis import Loop

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
X = torch.linspace(-1, 1, 32).reshape(4, 8) + 0.01


def zero(h: Tensor) -> Tensor:
    """0, with a gradient."""
    return h - h.detach()


SINGULAR: dict[str, Callable[[Tensor], Tensor]] = {
    "Sqrt": lambda h: zero(h).abs().sqrt(),
    "Log1P": lambda h: torch.where(zero(h) > 0, torch.log1p(zero(h) - 1), h),
    "Rsqrt": lambda h: torch.where(zero(h) > 0, zero(h).rsqrt(), h),
    "Acos": lambda h: torch.acos(zero(h) + 1),
    "Pow": lambda h: zero(h).abs().pow(0.5),
    "Div": lambda h: torch.where(zero(h) > 0, h / zero(h), h),
    "LinalgEigh": lambda h: h * torch.linalg.eigh(torch.eye(8) + zero(h).mT @ zero(h))[1].sum(),
}
"""By the first letters of the backward: finite, with a derivative that is not."""


class Body(nn.Module):
    """Two layers with something in between; returns its hidden values as well where it is told to."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh, returns: str = "last") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between, self.returns = nn.Linear(8, 8), nn.Linear(8, 8), between, returns

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x)
        last = self.last(self.between(hidden))
        return {"last": last, "both": (hidden, last), "loss": {"loss": last.square().mean(), "out": last}}[self.returns]


@for_each("name", list(SINGULAR))
@for_each("precision", ["fp16", "bf16", "no"])
def test_a_derivative_is_found_at_the_first_skip(name: str, precision: str) -> None:
    """DERIVATIVE, outside; the same one inside of the model is placed in it. The scale stays."""
    for inside in (False, True):
        loop = Loop(Body(SINGULAR[name] if inside else torch.tanh), precision)
        scale = loop.session.scaler.get_scale()
        loop.step({"x": X}, loss_of=lambda y, inside=inside: (y if inside else y + SINGULAR[name](y)).square().mean())
        (skip,) = loop.skips
        assert (skip.cause, loop.session.scaler.get_scale()) == (Cause.DERIVATIVE, scale)
        assert ("outside of the model" in skip.message) == (not inside)
        assert f"{name}Backward" in skip.message or name in ("Pow", "Div")


@for_each("returns", ["last", "loss"])
@for_each("scaling_strategy", ["DYNAMIC", "ADAPTIVE"])
def test_a_factor_that_makes_all_gradients_underflow(returns: str, scaling_strategy: str) -> None:
    """SCALE, also where it is applied to a loss that the model returns; ADAPTIVE grows out of it."""
    loop = Loop(Body(returns=returns), "fp16", init_scale=1024.0, scaling_strategy=scaling_strategy)
    for _ in range(6):
        output = loop.model(X)
        loss = output["loss"] if returns == "loss" else output.square().mean()
        loop.accelerator.backward(loss * 1e-13)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    first = next(e for e in loop.session.events if e.cause)
    assert (first.kind, first.cause) == (EventKind.ZERO_GRADIENTS, Cause.SCALE)
    assert "init_scale" in first.message
    assert (loop.session.scaler.get_scale() > 1024) == (scaling_strategy == "ADAPTIVE")


def test_labels_that_are_ignored_are_no_underflow() -> None:
    """A loss of exactly 0 outside of the model gives gradients of 0 in FP32 too."""
    loop = Loop(Body(), "fp16")
    loop.step({"x": X}, loss_of=lambda y: y.square().mean() * 0.0)
    assert [e.cause for e in loop.session.events if e.kind is EventKind.ZERO_GRADIENTS] == [Cause.LOSS]


def test_an_output_that_another_is_made_from_is_not_blamed() -> None:
    """A root between two outputs: in the model, although both got NaN, whichever of them the loss is made from."""
    for weight in (0.0, 1.0):
        loop = Loop(Body(SINGULAR["Sqrt"], "both"), "fp16", init_scale=1024.0)
        loop.step({"x": X}, loss_of=lambda both, weight=weight: both[1].square().mean() + both[0].mean() * weight)
        assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.DERIVATIVE, ("first",))]
        assert "derivative of sqrt at test_outside.py" in loop.skips[0].message


def pair(first: nn.Module, second: nn.Module, init_scale: float) -> tuple[AmpSession, Any, Any, Any]:
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=init_scale)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=1e-3)
    prepared = accelerator.prepare(first, second, optimizer)

    def step(loss: Tensor) -> list[Any]:
        accelerator.backward(loss)
        prepared[2].step()
        prepared[2].zero_grad()
        return [(e.cause, e.modules) for e in session.events if e.kind is EventKind.STEP_SKIPPED]

    return session, *prepared[:2], step


@for_each("at", [0, 1])
def test_a_root_in_one_of_two_models_in_a_row(at: int) -> None:
    """The model that has it is named, and not what is outside of the other."""
    models = [Body(SINGULAR["Sqrt"]) if index == at else Body() for index in range(2)]
    _, first, second, step = pair(*models, init_scale=1024.0)
    assert step(second(first(X)).square().mean()) == [(Cause.DERIVATIVE, (("model_2.first", "first")[1 - at],))]


def test_too_large_a_scale_for_two_models_in_a_row() -> None:
    """What the second gives to the first's output is infinite by the scale: nothing outside of the models is blamed for it."""
    session, first, second, step = pair(Body(), Body(), init_scale=2.0**40)
    assert step(second(first(X)).square().mean()) == [(Cause.SCALE, ())]
    assert session.scaler.get_scale() == 2.0**39


def test_a_model_called_twice() -> None:
    """A distance of zero between what it makes of one batch, twice: outside."""
    _, model, _, step = pair(Body(), nn.Linear(8, 8), init_scale=1024.0)
    assert step((model(X) - model(X)).square().sum(-1).sqrt().mean() + model(X).mean()) == [(Cause.DERIVATIVE, ())]


def test_a_loss_in_half_precision_may_be_the_scales_doing() -> None:
    """An overflow outside of the model, in FP16, comes right with a smaller scale."""
    loop = Loop(Body(), "fp16", init_scale=2.0**20)
    for _ in range(8):
        loop.step({"x": X}, loss_of=lambda y: y.half().square().float().sum())
    assert {skip.cause for skip in loop.skips} == {Cause.SCALE}
    assert loop.session.metrics()["applied_steps"] > 0


def test_a_loss_that_needs_a_scale_below_one() -> None:
    """What it gives to an FP16 output overflows without a scale too: no DERIVATIVE, at which the run would stay for ever."""
    model = Body()
    optimizer = torch.optim.SGD(model.parameters(), 1e-12)
    session = AmpSession.for_model(model, optimizer, init_scale=1.0)
    for _ in range(4):
        session.scaler.scale(model(X).float().square().sum() * 1e8).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
    assert session.metrics()["applied_steps"] == 2
    session.detach()


def test_values_that_were_made_before_a_change_of_precision() -> None:
    """The generator's output, from before it fell back, is used again for its own step: no new cause, and an unmoved scale."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=1024.0)
    plain = [Body(), Body()]
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in plain]
    made, judge, *optimizers = accelerator.prepare(*plain, *optimizers)
    for step in range(3):
        fake = made(X * (1e6 if step == 1 else 1))
        for at, loss in ((1, lambda fake=fake: F.softplus(judge(fake.detach()))), (0, lambda fake=fake: -judge(fake))):
            accelerator.backward(loss().mean())
            optimizers[at].step()
            for each in optimizers:
                each.zero_grad()
    causes = [e.cause for e in session.events if e.kind is EventKind.STEP_SKIPPED]
    assert causes == [Cause.ACTIVATION] * 2
    assert session.scaler.get_scale() == 1024.0


class Running(nn.Module):
    """Divides by a running maximum that it keeps in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.amax = nn.Linear(8, 8), torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.amax = torch.maximum(self.amax * 0.9, h.detach().abs().amax())
        return h / self.amax


def test_a_state_in_a_plain_attribute_is_restored() -> None:
    """As a buffer is: one bad batch costs one step; one that is NaN from the outside is named."""
    loop = Loop(Running(), "fp16", init_scale=1024.0)
    for step in range(4):
        if step == 3:
            loop.plain.amax.fill_(torch.nan)
        loop.step({"x": X * (torch.nan if step == 1 else 1)}, loss_of=lambda y: y.square().mean())
    assert [skip.cause for skip in loop.skips] == [Cause.INPUT, Cause.BUFFER]
    assert "amax" in loop.skips[1].message
