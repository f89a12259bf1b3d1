"""`AmpSession.for_model`: a loop without accelerate gets skips, causes, module fallback, metrics and state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_amp import AmpSession, Cause, EventKind, MixedPrecisionConfig, PrecisionMode, ScalerError
from hf_amp.report.reader import read_run
from tests.reference import adamw, assert_bitwise_equal, snapshot


class Wide(nn.Module):
    """A classifier whose middle layer leaves FP16's range where `factor` is large; its function does not depend on it."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.middle, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.factor = factor
        with torch.no_grad():
            self.middle.weight *= factor
            self.middle.bias *= factor

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self.inner(x).relu()).float() / self.factor
        return self.out(hidden.relu())


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(16, 8, generator=generator) for _ in range(steps)]
    return [(x, (x.sum(-1) > 0).long() + 2 * (x[:, 0] > 0).long()) for x in rows]


def train(
    session: AmpSession, model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]
) -> None:
    for x, y in data:
        session.scaler.scale(cross_entropy(model(x), y)).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()


def test_a_module_falls_back_and_the_run_goes_on(tmp_path: Path) -> None:
    """One step is skipped, its cause and module are named, the module runs in FP32, and what happened is in a log."""
    model = Wide(factor=1e6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    session = AmpSession.for_model(model, optimizer, init_scale=256.0)
    session.log_to(tmp_path)
    train(session, model, optimizer, batches(4))
    session.log_metrics(loss=1.0)
    (skip,) = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert (skip.step, skip.cause, skip.modules) == (1, Cause.ACTIVATION, ("middle",))
    assert session.plan.modules == {"middle": PrecisionMode.FP32}
    assert (session.metrics()["applied_steps"], session.metrics()["skipped_steps"]) == (3, 1)
    session.detach()
    assert read_run(tmp_path).skipped_by_cause == {"ACTIVATION": 1}


def test_a_compiled_model() -> None:
    """Passed as `torch.compile` gives it: its module is found under the name that the model has for it, and falls back."""
    model = Wide(factor=1e6)
    compiled, optimizer = torch.compile(model, backend="eager"), torch.optim.SGD(model.parameters(), lr=0.0)
    session = AmpSession.for_model(compiled, optimizer, init_scale=256.0)
    train(session, compiled, optimizer, batches(2))
    assert session.plan.modules == {"middle": PrecisionMode.FP32}
    session.detach()


def test_metrics_are_there_before_the_first_step() -> None:
    """Scale and both counters, so that a dashboard needs no special case."""
    model = Wide()
    session = AmpSession.for_model(model, torch.optim.SGD(model.parameters(), lr=0.1), {"init_scale": 64.0})
    figures = session.metrics()
    assert (figures["scale"], figures["applied_steps"], figures["skipped_steps"]) == (64.0, 0, 0)


@pytest.mark.parametrize("mode", ["MIXED", "BF16", "FP32"])
def test_a_nan_batch_moves_nothing(mode: str) -> None:
    """In every precision: the step of the bad batch is left out, and the scale stays where it was."""
    model = Wide()
    optimizer = adamw(model, fused=False)
    session = AmpSession.for_model(model, optimizer, precision_mode=mode)
    train(session, model, optimizer, batches(1))
    before, scale = snapshot(model, optimizer), session.scaler.get_scale()
    train(session, model, optimizer, [(torch.full((16, 8), torch.nan), torch.zeros(16, dtype=torch.long))])
    assert_bitwise_equal(before, snapshot(model, optimizer))
    assert session.scaler.get_scale() == scale
    assert session.events[-1].cause is Cause.INPUT


def test_a_resumed_run_is_the_run() -> None:
    """Six steps, or three, a checkpoint and three: parameters, scale, counters and plan are equal; in BF16 it goes on too."""
    data = batches(6)

    def begin() -> tuple[AmpSession, Wide, torch.optim.Optimizer]:
        model = Wide(factor=1e6)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        return AmpSession.for_model(model, optimizer, MixedPrecisionConfig(init_scale=256.0)), model, optimizer

    whole, model, _ = run = begin()
    train(*run, data)
    half = begin()
    train(*half, data[:3])
    state, weights = half[0].state_dict(), half[1].state_dict()
    resumed, again, optimizer = begin()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(resumed, again, optimizer, data[3:])
    assert_bitwise_equal(list(model.parameters()), list(again.parameters()))
    assert resumed.plan == whole.plan
    assert resumed.scaler.state_dict()["scale"] == whole.scaler.state_dict()["scale"]
    assert resumed.metrics()["skipped_steps"] == whole.metrics()["skipped_steps"] == 1
    in_bf16 = AmpSession.for_model(again, optimizer, precision_mode="BF16")
    in_bf16.load_state_dict(state)
    assert in_bf16.metrics()["applied_steps"] == 2
    assert not in_bf16.plan.modules


def test_stepping_past_the_scaler_is_an_error_and_detach_gives_everything_back() -> None:
    """Scaled gradients never reach the weights; afterwards model and optimizer have no hook of ours."""
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = AmpSession.for_model(model, optimizer)
    x, y = batches(1)[0]
    session.scaler.scale(cross_entropy(model(x), y)).backward()
    with pytest.raises(ScalerError, match=r"session\.scaler\.step\(optimizer\)"):
        optimizer.step()
    session.detach()
    optimizer.step()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
