"""Models that FP16 cannot train are trained in FP16: the modules that leave its range are found and run in FP32."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_amp
from hf_amp import Cause, EventKind, MixedPrecisionConfig, PrecisionMode
from hf_amp.fallback.plan import PrecisionPlan
from tests.fallback.range_reference import fp16_flop_share, modules_out_of_range
from tests.fallback.rescaled import ZOO, RescaledModel
from tests.fallback.rescue_runs import BY_NAME, STEPS, final_loss_in_fp32, outermost, stock_skips, train
from tests.host_reads import count_host_reads
from tests.reference import TIMINGS, OverflowInBackward, assert_bitwise_equal, snapshot

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_a_model_beyond_the_range_of_fp16_trains_in_it(
    entry: RescaledModel, capsys: pytest.CaptureFixture[str], full_size: bool
) -> None:
    """Stock skips every step. hf_amp skips at most 5, names exactly the modules that an FP64 forward shows to leave the
    range, ends within 1% of FP32, and keeps at least 60% of the matrix products in FP16."""
    assert stock_skips(entry, 10) == 10
    steps = STEPS if full_size else 40
    run = train(entry, steps)
    figures = run.session.metrics()
    assert 1 <= figures["skipped_steps"] <= 5
    batch = next(entry.batches(0))
    blamed = set(run.session.plan.modules)
    assert outermost(blamed) == outermost(set(modules_out_of_range(run.model, batch)))
    assert set(run.session.plan.modules.values()) == {PrecisionMode.FP32}
    expected = final_loss_in_fp32(entry.name, steps)
    assert abs(run.final_loss / expected - 1) <= 0.01
    share = fp16_flop_share(run.model, batch, blamed)
    with capsys.disabled():
        print(
            f"\n{entry.name}: {share:.0%} of the products in FP16, {figures['skipped_steps']:g} skipped, "
            f"final loss {run.final_loss:.4f}, {expected:.4f} in FP32"
        )
    assert share >= 0.6
    skips = [event for event in run.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert skips[0].cause is Cause.ACTIVATION
    assert set(skips[0].modules) <= blamed


def test_it_does_so_on_real_half_kernels() -> None:
    """The CPU's own FP16 kernels: the same modules are blamed as under emulation, and the loss falls."""
    entry = BY_NAME["GPT-2"]
    run = train(entry, 12, emulate=False)
    assert set(run.session.plan.modules) == set(train(entry, 1).session.plan.modules)
    assert run.session.metrics()["skipped_steps"] <= 5
    assert run.losses[-1] < run.losses[0]


class Writer(nn.Module):
    """A layer whose output leaves FP16's range as long as its weight is large; a norm takes the size away again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write, self.read = nn.Linear(8, 8), nn.Linear(8, 1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.norm(self.write(x)))

    def grow(self, factor: float) -> None:
        with torch.no_grad():
            self.write.weight.mul_(factor)
            self.write.bias.mul_(factor)


class Loop:
    """A raw Accelerate loop on `Writer`."""

    def __init__(self, **options: Any) -> None:
        self.accelerator = Accelerator(mixed_precision="fp16", cpu=True)
        self.session = hf_amp.attach(
            self.accelerator, MixedPrecisionConfig(**{"recovery_steps": 4, "init_scale": 256.0, **options})
        )
        self.writer = Writer()
        self.model, self.optimizer = self.accelerator.prepare(
            self.writer, torch.optim.AdamW(self.writer.parameters(), lr=1e-3, fused=True)
        )
        self.generator = torch.Generator().manual_seed(1)

    def step(self) -> None:
        loss = self.model(torch.randn(4, 8, generator=self.generator)).square().mean()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def changes(self) -> list[tuple[int, str, str, tuple[str, ...]]]:
        changed = EventKind.PRECISION_CHANGED
        return [(e.step, e.before, e.after, e.modules) for e in self.session.events if e.kind is changed]


def test_when_the_overflow_goes_away_the_module_comes_back() -> None:
    """Out at step 1 and, too early, at 6; the weights shrink, and after 8 clean steps the run is plain FP16 for good."""
    loop = Loop()
    loop.writer.grow(1e7)
    loop.steps(8)
    loop.writer.grow(1e-7)
    loop.steps(40)
    out, back = ("MIXED", "FP32", ("write",)), ("FP32", "MIXED", ("write",))
    assert loop.changes() == [(1, *out), (5, *back), (6, *out), (14, *back)]
    assert loop.session.plan == PrecisionPlan(PrecisionMode.MIXED)
    assert loop.session.metrics()["skipped_steps_activation"] == 2
    assert loop.session.scaler.get_scale() == 256.0


@pytest.mark.parametrize("automatic", [True, False])
def test_a_skip_tells_the_scale_of_the_next_step(automatic: bool) -> None:
    """No scale cures an activation: it stays, whether or not the module leaves FP16; event, metric and scaler say the same."""
    loop = Loop(automatic_fallback=automatic)
    loop.writer.grow(1e7)
    loop.step()
    (skip,) = [event for event in loop.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert (skip.before, skip.after) == (256.0, 256.0)
    assert loop.session.metrics()["scale"] == loop.session.scaler.get_scale() == 256.0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_optimizers_of_one_backward_share_its_cause(precision: str) -> None:
    """As Muon beside AdamW: both skips are told alike, what is done about them is done once, and the scale stays.

    In FP16 a module overflows, in BF16 only backward, outside of the model.
    """
    accelerator, writer = Accelerator(mixed_precision=precision, cpu=True), Writer()
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=256.0))
    writer.grow(1e7)
    parts = (writer.write.parameters(), writer.read.parameters())
    model, *optimizers = accelerator.prepare(writer, *(torch.optim.AdamW(part, lr=1e-3) for part in parts))
    for step in range(2):
        loss = model(torch.ones(4, 8)).square().mean()
        accelerator.backward(OverflowInBackward.apply(loss) if step == 0 and precision == "bf16" else loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    causes = [event.cause for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert causes == [Cause.ACTIVATION if precision == "fp16" else Cause.DERIVATIVE] * 2
    assert session.plan.default is session.requested_mode
    assert list(session.plan.modules) == (["write"] if precision == "fp16" else [])
    assert session.metrics()["precision_changes"] == len(session.plan.modules)
    assert session.metrics()["applied_steps"] == 2
    assert session.scaler.get_scale() == (256.0 if precision == "fp16" else 1.0)


@pytest.mark.parametrize("second", [Cause.ACTIVATION, Cause.INPUT])
def test_a_step_that_ran_before_its_remedy_has_the_same_cause(second: Cause) -> None:
    """A late verdict changes the plan when the next step has overflowed already, unless that has a cause of its own."""
    loop = Loop(scaling_strategy="PERFORMANCE_OPTIMIZED", recovery_steps=100)
    loop.writer.grow(1e7)
    loop.step()
    if second is Cause.INPUT:
        loop.accelerator.backward(loop.model(torch.full((4, 8), torch.nan)).square().mean())
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    loop.steps(4)
    loop.session.scaler.flush()
    causes = [event.cause for event in loop.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert causes == [Cause.ACTIVATION, second]
    assert len(loop.changes()) == 1


def test_what_was_scaled_by_hand_is_judged_anew() -> None:
    """No backward is seen to begin there: the cause of one skip is not taken for that of the next."""
    loop = Loop()
    loop.step()
    for batch in (torch.full((4, 8), torch.nan), torch.ones(4, 8)):
        (loop.model(batch).square().mean() * loop.session.scaler.get_scale()).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.writer.grow(1e7)
    causes = [event.cause for event in loop.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert causes == [Cause.INPUT, Cause.ACTIVATION]


def test_a_module_that_never_fits_is_tried_ever_less_often() -> None:
    """Over 300 steps it overflows whenever it comes back, and does so 7 times: after 4, 8, 16, … clean steps."""
    loop = Loop()
    loop.writer.grow(1e7)
    loop.steps(300)
    steps = [step for step, before, _, _ in loop.changes() if before == "MIXED"]
    assert [later - sooner - 1 for sooner, later in pairwise(steps)] == [4, 8, 16, 32, 64, 128]
    assert loop.session.metrics()["skipped_steps"] == len(steps) == 7


def test_resume_is_exact_plan_and_patience_included() -> None:
    """9 steps, a checkpoint in the middle of the way back, 12 more: parameters, events and figures of 21 steps."""

    def prepared() -> Loop:
        loop = Loop()
        loop.writer.grow(1e7)
        return loop

    whole, first, second = prepared(), prepared(), prepared()
    whole.steps(21)
    first.steps(9)
    second.writer.load_state_dict(first.writer.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.session.scaler.load_state_dict(first.session.scaler.state_dict())
    second.session.begin_at(9)
    second.generator.set_state(first.generator.get_state())
    assert second.session.plan == first.session.plan
    second.steps(12)
    assert_bitwise_equal(
        snapshot(whole.writer, whole.optimizer.optimizer), snapshot(second.writer, second.optimizer.optimizer)
    )
    assert second.session.plan == whole.session.plan
    figures = [
        {name: value for name, value in run.session.metrics().items() if name not in TIMINGS} for run in (second, whole)
    ]
    assert figures[0] == figures[1]
    assert whole.changes() == [*first.changes(), *second.changes()] != []


def test_a_healthy_step_reads_the_host_once_and_a_plan_in_force_adds_nothing() -> None:
    """Without an overflow, and with a module in FP32: one read a step, as without the fallback."""
    for growth in (1.0, 1e7):
        loop = Loop(recovery_steps=1000, monitoring_interval=1000)
        loop.writer.grow(growth)
        loop.steps(3)
        with count_host_reads() as reads:
            loop.steps(5)
        assert reads.count == 5, growth


def test_gradients_of_modules_in_fp32_are_no_underflow() -> None:
    """FP16 would lose most of what the module in FP32 learns; the underflow fraction is that of the others."""
    loop = Loop(recovery_steps=1000, monitoring_interval=1)
    loop.writer.grow(1e7)
    lost = []

    def share_lost(gradient: torch.Tensor) -> None:
        lost.append((gradient.abs() < torch.finfo(torch.float16).smallest_normal).float().mean().item())

    loop.writer.write.weight.register_hook(share_lost)
    loop.steps(4)
    assert dict(loop.session.plan.modules) == {"write": PrecisionMode.FP32}
    assert min(lost[1:]) > 0.9
    assert loop.session.metrics()["underflow_fraction"] < 0.1


@pytest.mark.parametrize("strategy", ["ADAPTIVE", "PERFORMANCE_OPTIMIZED"])
def test_gradients_of_modules_in_fp32_do_not_choose_the_scale(strategy: str) -> None:
    """A module that runs in FP32 has gradients far beyond FP16, of which no scale would leave anything of the others."""
    loop = Loop(recovery_steps=1000, scaling_strategy=strategy)
    loop.writer.grow(1e7)
    loop.steps(3)
    assert dict(loop.session.plan.modules) == {"write": PrecisionMode.FP32}
    before = loop.session.scaler.get_scale()
    loop.writer.write.weight.register_hook(lambda gradient: gradient * 1e12)
    loop.steps(6)
    loop.session.scaler.flush()
    assert loop.session.metrics()["grad_amax"] > 1e4
    assert loop.session.scaler.get_scale() >= before / 2


def test_without_automatic_fallback_the_cause_is_told_and_nothing_changes() -> None:
    """Every step is skipped, each with its cause and module."""
    loop = Loop(automatic_fallback=False)
    loop.writer.grow(1e7)
    loop.steps(3)
    skips = [(e.cause, e.modules) for e in loop.session.events if e.kind is EventKind.STEP_SKIPPED]
    assert skips == [(Cause.ACTIVATION, ("write",))] * 3
    assert loop.changes() == []


class RootAtZero(nn.Module):
    """Its loss is finite, the derivative of its square root at zero is not, with or without a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.last(self.first(x)) * 0.0).abs().sqrt().mean()


def test_a_scale_that_cures_nothing_is_found_out_at_the_first_skip() -> None:
    """Backward is tried without a scale and in FP32, the module it starts in is named, and the scale stays."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator)
    model = RootAtZero()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(4):
        accelerator.backward(model(torch.ones(2, 4)))
        optimizer.step()
        optimizer.zero_grad()
    skips = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert [event.cause for event in skips] == [Cause.DERIVATIVE] * 4
    assert skips[-1].modules == ("last",)
    assert [event.after for event in skips] == [65536.0] * 4
