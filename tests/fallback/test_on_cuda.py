"""Fallback in real FP16 on a GPU: models beyond its range train, and looking for a cause leaves no trace."""

from __future__ import annotations

import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_amp
from hf_amp import Cause, EventKind, MixedPrecisionConfig, PrecisionMode
from hf_amp.fallback.controller import TIMED_STEPS, WARMUP_STEPS
from hf_amp.fallback.plan import PrecisionPlan
from tests.fallback.rescaled import ZOO, RescaledModel

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_accelerator_state")]

STEPS = 60


def train(entry: RescaledModel) -> tuple[list[float], hf_amp.AmpSession]:
    """A raw Accelerate loop in FP16 that tries a skipped batch again. Losses of the applied steps, and the session."""
    accelerator = Accelerator(mixed_precision="fp16")
    session = hf_amp.attach(accelerator)
    plain, batches, make_optimizer = entry.build(0)
    model, optimizer = accelerator.prepare(plain, make_optimizer(plain))
    losses, batch = [], next(batches)
    while len(losses) < STEPS and session.scaler.skipped_steps < STEPS:
        loss = model(**{name: x.cuda() for name, x in batch.items()}).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            losses.append(loss.item())
            batch = next(batches)
    return losses, session


def losses_in_fp32(entry: RescaledModel) -> list[float]:
    """Of the same run without hf_amp."""
    model, batches, make_optimizer = entry.build(0)
    model.cuda()
    optimizer, losses = make_optimizer(model), []
    for _ in range(STEPS):
        loss = model(**{name: x.cuda() for name, x in next(batches).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_a_model_beyond_the_range_of_fp16_trains_in_it(entry: RescaledModel) -> None:
    """The modules that overflow run in FP32, the others in FP16, and the loss falls as it does in FP32."""
    losses, session = train(entry)
    skips = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert 1 <= len(skips) <= 10
    assert Cause.ACTIVATION in {event.cause for event in skips}
    assert session.plan.default is PrecisionMode.MIXED
    assert set(session.plan.modules.values()) == {PrecisionMode.FP32}
    assert sum(losses[-20:]) == pytest.approx(sum(losses_in_fp32(entry)[-20:]), rel=0.03)


class Noisy(nn.Module):
    """Dropout and a running mean before a layer whose weight makes FP16 overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.layer = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8)
        nn.init.constant_(self.layer.weight, 1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.dropout(self.norm(x))).log_softmax(-1).mean()


def test_the_look_for_a_cause_draws_nothing() -> None:
    """The generator of the device, and running statistics, are after the skipped step what its forward pass left."""
    accelerator = Accelerator(mixed_precision="fp16")
    session = hf_amp.attach(accelerator)
    torch.manual_seed(0)
    plain = Noisy()
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    accelerator.backward(model(torch.randn(16, 8, device="cuda")))
    drawn, mean = torch.cuda.get_rng_state(), plain.norm.running_mean.clone()
    optimizer.step()
    assert [e.cause for e in session.events if e.kind is EventKind.STEP_SKIPPED] == [Cause.ACTIVATION]
    assert session.plan.modules == {"layer": PrecisionMode.FP32}
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
    assert torch.equal(plain.norm.running_mean, mean)


def test_every_plan_runs_what_it_says() -> None:
    """Results of the products under a default of FP16, of FP16 with one module in FP32, of BF16 and of FP32; back again,
    and after detach, what accelerate made of them."""
    accelerator = Accelerator(mixed_precision="fp16")
    session = hf_amp.attach(accelerator)
    model = accelerator.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    dtypes: list[torch.dtype] = []
    for layer in model:
        layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))

    def run(plan: PrecisionPlan) -> list[torch.dtype]:
        session._fallback.runner.apply(plan)
        dtypes.clear()
        assert model(torch.ones(4, 8, device="cuda")).dtype == torch.float32
        return list(dtypes)

    start = PrecisionPlan(PrecisionMode.MIXED)
    half, full = torch.float16, torch.float32
    assert run(start) == [half, half]
    assert run(start.with_modules(["1"], PrecisionMode.FP32)) == [half, full]
    assert run(PrecisionPlan(PrecisionMode.BF16)) == [torch.bfloat16] * 2
    assert run(PrecisionPlan(PrecisionMode.FP32)) == [full, full]
    assert run(start) == [half, half]
    session._fallback.runner.apply(PrecisionPlan(PrecisionMode.FP32))
    session.detach()
    dtypes.clear()
    model(torch.ones(4, 8, device="cuda"))
    assert dtypes == [half, half]


def test_the_fastest_precision_is_found() -> None:
    """FP16, BF16 where the device has units for it, and FP32 are timed in the run's own steps; the shortest time wins."""
    accelerator = Accelerator(mixed_precision="fp16")
    config = MixedPrecisionConfig(precision_mode="DYNAMIC", init_scale=1024.0)
    session = hf_amp.attach(accelerator, config)
    plain = nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(4)])
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=1e-4))
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(3 * (WARMUP_STEPS + TIMED_STEPS) + 3):
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    said = [event for event in session.events if event.kind is EventKind.PRECISION_CHANGED][-1].message
    seconds = {mode: float(ms) for ms, mode in re.findall(r"([\d.]+) ms in (\w+)", said)}
    with_units = {"BF16"} if session.hardware.bf16 == "native" else set()
    assert set(seconds) == {"MIXED", "FP32"} | with_units
    chosen = session.plan.default.value
    assert seconds[chosen] == min(seconds.values())
    assert chosen != "FP32"
