"""Causes that what is around a model would hide: objects, caches, checkpointing, a loss made elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from hf_amp import Cause
from hf_amp.fallback.module_precision import ForwardContext
from tests.each import for_each
from tests.fallback.test_diagnosis import Loop

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
X = torch.linspace(-1, 1, 32).reshape(4, 8)


def root_of_zero(x: Tensor) -> Tensor:
    return x + (x - x.detach()).abs().sqrt()


class Middle(nn.Module):
    """A layer, and what is done to its values."""

    def __init__(self, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.fault = nn.Linear(8, 8), fault

    def forward(self, x: Tensor) -> Tensor:
        return self.fault(self.layer(x))


class Model(nn.Module):
    """Three layers, of which the middle one has the fault; the parts pass objects on, or are checkpointed."""

    def __init__(
        self, fault: Callable[[Tensor], Tensor], use_reentrant: bool | None = None, loss_inside: bool = True
    ) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), Middle(fault), nn.Linear(8, 8)
        self.use_reentrant, self.loss_inside = use_reentrant, loss_inside

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = (
            self.middle(x)
            if self.use_reentrant is None
            else checkpoint(self.middle, x, use_reentrant=self.use_reentrant)
        )
        x = self.last(x)
        return x.square().mean() if self.loss_inside else x


class Wrapper(nn.Module):
    """A model that returns an object which hf_amp does not know."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = Objects(body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).values.square().mean()


class Objects(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.model = body

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(values=self.model(x))


def test_a_module_that_returns_an_object_hides_nothing() -> None:
    """MODEL in the layer, not in the model, where a NaN goes through an object."""
    loop = Loop(Wrapper(Model(lambda x: x / 0.0 * 0.0, loss_inside=False)), "fp16")
    loop.step({"x": X})
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.MODEL, ("body.model.middle",))]


@for_each("use_reentrant", [None, False, True])
@for_each("precision", ["fp16", "bf16", "no"])
def test_a_derivative_under_checkpointing_is_found(precision: str, use_reentrant: bool | None) -> None:
    """DERIVATIVE with layer and operator; gradients that were there are there still."""
    loop = Loop(Model(root_of_zero, use_reentrant), precision)
    scale = loop.session.scaler.get_scale()
    loop.step({"x": X})
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.DERIVATIVE, ("middle",))]
    assert "SqrtBackward0, the derivative of sqrt at test_hidden_causes.py" in loop.skips[0].message
    assert loop.session.scaler.get_scale() == scale


@for_each("precision", ["fp16", "bf16", "no"])
def test_a_derivative_of_a_model_without_a_loss_is_found_at_the_first_skip(precision: str) -> None:
    """DERIVATIVE with the layer, and an unmoved scale, although the loss is made in the loop."""
    loop = Loop(Model(root_of_zero, loss_inside=False), precision)
    scale = loop.session.scaler.get_scale()
    loop.step({"x": X}, loss_of=lambda y: y.square().mean())
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.DERIVATIVE, ("middle",))]
    assert loop.session.scaler.get_scale() == scale


class Language(nn.Module):
    """A wrapped language model, which fills its cache of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        self.model.model.layers[1].mlp = nn.Sequential(nn.Linear(16, 16), Middle16())

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss


class Middle16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x[..., :0].mean(-1, keepdim=True)


def test_a_cache_is_not_filled_twice() -> None:
    """MODEL where a wrapped model writes into a cache of keys and values in each of its layers, which run again."""
    loop = Loop(Language(), "fp16")
    loop.step({"ids": torch.arange(3, 15).reshape(2, 6)})
    assert [skip.cause for skip in loop.skips] == [Cause.MODEL]
    assert loop.skips[0].modules == ("model.model.layers.1.mlp.1",)


def test_a_gradient_that_vanishes_at_a_small_scale_is_no_large_loss() -> None:
    """ACTIVATION: no scale keeps both ends of backward in FP16."""
    loop = Loop(Model(lambda x: x + (x - x.detach()) * 1e16), "fp16", init_scale=1.0)
    loop.step({"x": X * 1e-3})
    assert [skip.cause for skip in loop.skips] == [Cause.ACTIVATION]
    assert "middle.layer" in loop.skips[0].modules


def test_labels_of_a_loss_in_the_loop_do_not_move_the_scale() -> None:
    """A NaN label now and then leaves the scale alone; one step after the other, which the scale may do, lowers it."""
    loop = Loop(Model(lambda x: x, loss_inside=False), "fp16")
    scale = loop.session.scaler.get_scale()
    for label in (torch.nan, 0.0, torch.nan, 0.0):
        loop.step({"x": X}, loss_of=lambda y, label=label: (y - label).square().mean())
    assert ([skip.cause for skip in loop.skips], loop.session.scaler.get_scale()) == ([Cause.LOSS] * 2, scale)
    for _ in range(2):
        loop.step({"x": X}, loss_of=lambda y: (y - torch.nan).square().mean())
    assert loop.session.scaler.get_scale() == scale / 2


def test_suspended_contexts_nest() -> None:
    """An operator that is looked at in FP32 does not end a replay that is in FP32 itself."""
    with ForwardContext.suspended():
        with ForwardContext.suspended():
            pass
        assert ForwardContext.suspensions() == 1
    assert not ForwardContext.suspensions()


@for_each("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_buffer_is_told_whatever_it_holds(value: float) -> None:
    """BUFFER, also where it holds -inf, which may be a mask where it was there from the start."""
    model = Model(lambda x: x)
    model.middle.register_buffer("shift", torch.zeros(8))
    model.middle.fault = lambda x: x + model.middle.shift
    loop = Loop(model, "fp16")
    loop.step({"x": X})
    model.middle.shift[0] = value
    loop.step({"x": X})
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.BUFFER, ("middle",))]


@for_each("precision", ["fp16", "bf16", "no"])
def test_a_hook_that_makes_nan_is_no_matter_of_precision(precision: str) -> None:
    """MODEL in the layer whose output somebody's forward hook divides zero by zero in; no layer leaves its precision."""
    model = Model(lambda x: x)
    model.middle.register_forward_hook(
        lambda _module, _arguments, output: output + (output - output) / (output - output)
    )
    loop = Loop(model, precision)
    loop.step({"x": X})
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.MODEL, ("middle",))]
    assert not loop.session.plan.modules


def test_what_a_hook_makes_of_inputs_is_not_made_twice_in_a_trial() -> None:
    """A scale below 1 serves, also where somebody's hook multiplies what the layer is given: twice, and it would overflow."""

    def steep(y: Tensor) -> Tensor:
        squares = y * y
        return y.float() / y.detach().float().abs().amax() + ((squares - squares.detach()) * 1e4).float()

    model = Model(steep)
    model.middle.register_forward_pre_hook(lambda _module, arguments: arguments[0] * 100)
    loop = Loop(model, "fp16", init_scale=1.0)
    loop.step({"x": X}, loss_of=lambda loss: loss * 100)
    assert [skip.cause for skip in loop.skips] == [Cause.SCALE]
    assert "They fit at a scale of" in loop.skips[0].message


def test_a_module_whose_hook_makes_its_inputs_is_tried_with_what_the_hook_was_given() -> None:
    """ACTIVATION in a layer that takes another shape than it is called with."""
    model = Model(lambda x: nn.functional.linear(x * 1e4, torch.full((8, 8), 1e4)) * 1e-9)
    model.middle.register_forward_pre_hook(
        lambda _module, arguments: torch.einsum("bi,j->bij", *arguments, torch.ones(8))
    )
    model.middle.register_forward_hook(lambda _module, _arguments, output: output.mean(1))
    loop = Loop(model, "fp16")
    loop.step({"x": X})
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.ACTIVATION, ("middle",))]
