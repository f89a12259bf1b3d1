"""TorchScript's modules: hf_amp says what it cannot do there, scales and checks, and ends no run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_amp
from hf_amp import Cause, EventKind, PrecisionMode

pytestmark = [pytest.mark.usefixtures("fresh_accelerator_state"), pytest.mark.filterwarnings("ignore:`torch.jit")]


class Partly(nn.Module):
    """Scripted in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.c = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "script": lambda: torch.jit.script(plain()),
    "trace": lambda: torch.jit.trace(plain(), torch.ones(2, 4)),
    "partly": Partly,
}


@pytest.mark.parametrize("options", [{}, {"monitor_modules": True, "monitoring_interval": 1}], ids=["", "monitored"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_scaled_and_checked(kind: str, precision: str, options: dict[str, bool]) -> None:
    """One event says so; a batch with NaN is skipped, before and after that the model learns, and detach gives it back."""
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    session = hf_amp.attach(accelerator, init_scale=256.0, **options)
    model = MODELS[kind]()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-3))
    options_told, told = precision == "no", [e for e in session.events if e.kind is EventKind.SETUP][-1]
    assert sum(e.kind is EventKind.SETUP for e in session.events) == 1 + options_told
    assert told.message.startswith(f"TorchScript runs {'b, b.0' if kind == 'partly' else 'the model'}")
    for factor in (1.0, float("nan"), 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        accelerator.backward(model(torch.ones(4, 4) * factor).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        moved = not all(map(torch.equal, before, model.parameters()))
        assert moved is (factor == 1.0)
    assert session.scaler.skipped_steps == 1
    session.detach()


def test_a_model_that_is_scripted_in_part_falls_back() -> None:
    """The modules around it are named and go to FP32; it overflows by itself, so the model goes too, and the run goes on."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=1.0)
    model = Partly()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    for _ in range(3):
        accelerator.backward(model(torch.ones(4, 4) * 1e6).mean())
        optimizer.step()
        optimizer.zero_grad()
    skips = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert [skip.cause for skip in skips] == [Cause.ACTIVATION] * 2
    assert "a" in session.plan.modules
    assert session.plan.default is PrecisionMode.FP32  # what is scripted overflows too
    assert session.scaler.applied_steps == 1
