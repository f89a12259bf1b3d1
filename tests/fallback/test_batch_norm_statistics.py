"""Running statistics of batch norms outlive a skipped step: one NaN in them would be in every evaluation that follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hf_amp
from hf_amp import AmpEvent, EventKind, MixedPrecisionConfig
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.reference import OverflowInBackward, assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
EVERY_PRECISION = for_each("precision", ["fp16", "bf16", "no"])


class Normalised(nn.Module):
    """A layer, a batch norm, and a layer; `by` makes the first one's output as much larger, which the norm takes back."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        with torch.no_grad():
            self.first.weight.mul_(by)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


class Loop:
    """A raw Accelerate loop, attached unless told otherwise."""

    def __init__(
        self, model: nn.Module, precision: str, attached: bool = True, fused: bool = False, **options: Any
    ) -> None:
        self.accelerator = Accelerator(mixed_precision=precision, cpu=True)
        config = MixedPrecisionConfig(**options)
        self.session = hf_amp.attach(self.accelerator, config) if attached else None
        self.plain = model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def step(self, *batches: Tensor, end: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
        for x in batches:
            self.accelerator.backward(end(self.model(x).square().mean()))
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def put_back(self) -> list[AmpEvent]:
        assert self.session is not None
        return [event for event in self.session.events if event.kind is EventKind.BUFFERS_RESTORED]

    @property
    def statistics(self) -> list[Tensor]:
        return [self.plain.norm.running_mean.clone(), self.plain.norm.running_var.clone()]


def batch(seed: int) -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))


@EVERY_PRECISION
def test_a_bad_batch_leaves_the_statistics_as_they_were(precision: str) -> None:
    """To the last bit, which an event tells; the model can be evaluated, and goes on to gather."""
    loop = Loop(Normalised(), precision)
    loop.step(batch(0))
    before = loop.statistics
    loop.step(batch(1), batch(2) * math.nan)
    assert_bitwise_equal(loop.statistics, before)
    (event,) = loop.put_back
    assert (event.step, event.modules) == (2, ("norm",))
    assert "buffers of norm were not finite after the skipped step" in event.message
    assert loop.plain.eval()(batch(3)).isfinite().all()
    loop.plain.train()
    loop.step(batch(3))
    assert not torch.equal(loop.statistics[0], before[0])


def test_an_overflow_before_a_norm_is_cured_in_its_statistics_too() -> None:
    """In the very first step, which has no applied one before it: they begin as they were made."""
    loop = Loop(Normalised(by=1e6), "fp16", init_scale=1.0)
    before = loop.statistics
    loop.step(batch(0))
    assert [event.modules for event in loop.put_back] == [("norm",)]
    assert_bitwise_equal(loop.statistics, before)
    loop.step(batch(0))
    assert all(x.isfinite().all() for x in loop.statistics)
    assert loop.session.metrics()["applied_steps"] == 1


def test_statistics_of_a_pass_without_gradients_are_put_back_too() -> None:
    """A gradient cache embeds its batch without gradients before it does so with them."""
    loop = Loop(Normalised(), "fp16")
    before = loop.statistics
    bad = batch(0) * math.nan
    with torch.no_grad():
        loop.model(bad)
    loop.step(bad)
    assert_bitwise_equal(loop.statistics, before)


def test_a_verdict_that_is_one_step_late_puts_back_what_was_before_its_own_step() -> None:
    """PERFORMANCE_OPTIMIZED with a fused optimizer: the next forward pass has run by then."""
    loop = Loop(Normalised(), "fp16", fused=True, scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=64.0)
    loop.step(batch(0))
    before = loop.statistics
    loop.step(batch(1) * math.nan)
    loop.step(batch(2))
    loop.session.scaler.flush()
    assert [event.step for event in loop.put_back] == [2]
    assert_bitwise_equal(loop.statistics, before)


def test_statistics_that_are_finite_are_left_as_the_stock_loop_leaves_them() -> None:
    """A skipped step whose forward pass was sound has been seen by them, as an applied one has."""
    gathered = []
    for attached in (True, False):
        loop = Loop(Normalised(), "no", attached)
        loop.plain.first.requires_grad_(False)  # what reaches the norm hangs on no step
        loop.step(batch(0))
        loop.step(batch(1), end=OverflowInBackward.apply)
        loop.step(batch(2))
        gathered.append(loop.statistics)
        assert not attached or (loop.session.metrics()["skipped_steps"] == 1 and not loop.put_back)
    assert_bitwise_equal(*gathered)


def test_a_sound_step_reads_the_host_no_more_often_for_a_norm() -> None:
    """As often as one without a norm."""
    counts = []
    for norm in (nn.BatchNorm1d(8), nn.Identity()):
        model = Normalised()
        model.norm = norm
        loop = Loop(model, "fp16", init_scale=1.0)
        loop.step(batch(0))
        with count_host_reads() as reads:
            loop.step(batch(1))
        counts.append(reads.count)
    assert counts[0] == counts[1]
