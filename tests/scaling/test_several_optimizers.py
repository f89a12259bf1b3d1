"""Several optimizers under one scaler: whatever the order of their calls, each gets the step of its own gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from tests.reference import assert_bitwise_equal, tiny_mlp


class Member:
    """A model and its optimizer under the scaler, beside the same ones without it, and which calls are in order now."""

    def __init__(self, number: int, fused: bool, scaler: AdvancedGradScaler) -> None:
        self.scaler, self.model = scaler, tiny_mlp(number)
        self.alone = copy.deepcopy(self.model)
        self.optimizers = [
            torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5, fused=fused)
            for model in (self.model, self.alone)
        ]
        self.waiting = self.non_finite = self.unscaled = self.stepped = self.used_up = self.can_drop = False

    def backward(self, x: Tensor) -> None:
        if self.used_up:
            self.zero_grad(set_to_none=bool(x[0, 0] > 0))
        self.scaler.scale(self.model(x).square().mean()).backward()
        self.alone(x).square().mean().backward()
        self.waiting = True

    def zero_grad(self, set_to_none: bool) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)
        self.used_up = False

    def source(self) -> None:
        next(self.model.parameters()).grad[0, 0] = torch.inf
        self.non_finite = True

    def unscale(self) -> None:
        self.scaler.unscale_(self.optimizers[0])
        self.unscaled = True

    def clip(self) -> None:
        for model in (self.model, self.alone):
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    def step(self, keep: bool) -> None:
        self.scaler.step(self.optimizers[0])
        if not self.non_finite:
            self.optimizers[1].step()
        assert_bitwise_equal(list(self.model.parameters()), list(self.alone.parameters()))
        assert self.scaler.last_outcome.applied is not self.non_finite
        self.stepped, self.used_up = True, True
        self.waiting = self.non_finite = self.unscaled = self.can_drop = False
        if not keep:
            self.zero_grad(set_to_none=True)

    def drop(self, set_to_none: bool) -> None:
        self.zero_grad(set_to_none)
        self.waiting = self.non_finite = self.unscaled = self.can_drop = False

    def updated(self) -> None:
        self.stepped, self.can_drop = False, self.unscaled

    def in_order(self, is_newest: bool) -> list[Callable[[], None]]:
        """The calls that are in order for this member now; some more often than others."""
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(self.scaler.decided_steps))
        calls: list[Callable[[], None]] = []
        if not self.unscaled and not self.stepped:
            calls += [functools.partial(self.backward, x)] * 2
        if self.waiting and not self.unscaled:
            calls += [self.source, self.unscale]
        if self.unscaled and not self.non_finite and is_newest:
            calls += [self.clip]
        if self.waiting and not self.stepped:
            calls += [functools.partial(self.step, keep) for keep in (False, True)]
        if self.can_drop:
            calls += [functools.partial(self.drop, set_to_none) for set_to_none in (False, True)]
        return calls


@given(choices=st.lists(st.integers(0, 2**16), min_size=30, max_size=60), fused=st.booleans())
def test_any_order_of_calls_gives_each_optimizer_its_own_steps(choices: list[int], fused: bool) -> None:
    """Interleaved windows, with the scale changing at every update: to the bit the steps without a scaler."""
    config = MixedPrecisionConfig(init_scale=64.0, growth_interval=1, min_scale=2.0**-4, max_scale=2.0**12)
    scaler = AdvancedGradScaler(config, "cpu")
    members = [Member(number, fused, scaler) for number in range(2)]
    for member in members:
        scaler.watch(member.optimizers[0])  # as `attach` does for what is prepared
    newest = None
    for choice in choices:
        calls = [(member, call) for member in members for call in member.in_order(member is newest)]
        if any(member.stepped for member in members):
            calls += [(None, functools.partial(scaler.update, new)) for new in (None, 2.0 ** (choice % 9))]
        member, call = calls[choice % len(calls)]
        call()
        if member is None:
            for each in members:
                each.updated()
        elif getattr(call, "func", None) == member.backward:
            newest = member


def test_one_that_is_unscaled_may_wait_for_the_backward_of_another() -> None:
    """Unscaled and clipped one after the other, then stepped together: the steps that the stock scaler takes."""
    found = []
    for scaler in (torch.amp.GradScaler("cpu"), AdvancedGradScaler(MixedPrecisionConfig(), "cpu")):
        models = [tiny_mlp(0), tiny_mlp(1)]
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
        for step in range(5):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                scaler.scale(model(torch.ones(2, 4) * step).square().mean()).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        found.append([p for model in models for p in model.parameters()])
    assert_bitwise_equal(*found)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_had_their_step_are_left_alone(fused: bool) -> None:
    """Whoever logs the gradients of one optimizer after its step finds them unchanged by what another one does."""
    scaler = AdvancedGradScaler(MixedPrecisionConfig(init_scale=64.0, growth_interval=1), "cpu")
    models = [tiny_mlp(0), tiny_mlp(1)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused) for model in models]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
            others = [p.grad for m in models if m is not model for p in m.parameters()]
            before = [None if g is None else g.clone() for g in others]
            scaler.step(optimizer)
            scaler.update()
            scaler.scale(torch.ones(()))
            if step > 0:
                assert_bitwise_equal(others, before)
