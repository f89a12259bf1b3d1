"""After `torch.set_default_device` a run is what it was: what hf_amp makes for itself is where it needs it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_amp import AmpSession, Cause, EventKind
from tests.reference import assert_bitwise_equal


def trained(strategy: str, default_device: str) -> tuple[list[torch.Tensor], AmpSession]:
    """Ten steps of a model that lies on the CPU: a gradient that overflows, one layer beyond FP16, statistics at every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5000), nn.Tanh(), nn.Linear(5000, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"scaling_strategy": strategy, "monitoring_interval": 1, "init_scale": 1024.0, "monitor_modules": True}
    batches = [torch.randn(4, 8) for _ in range(10)]
    with (
        torch.device(default_device),
        AmpSession.for_model(model, optimizer, precision_mode="MIXED", **options) as session,
    ):
        for step, x in enumerate(batches):
            if step == 6:
                model[2].weight.data.mul_(1e7)
            loss = model(x).float().square().mean() * (1e9 if step == 3 else 1.0)
            session.scaler.scale(loss).backward()
            session.scaler.clip_grad_norm_(optimizer, 1.0)
            session.scaler.step(optimizer)
            session.scaler.update()
            optimizer.zero_grad()
        session.scaler.flush()
        parameters = copy.deepcopy([p.detach() for p in model.parameters()])
    return parameters, session


@pytest.mark.parametrize("strategy", ["DYNAMIC", "ADAPTIVE", "PERFORMANCE_OPTIMIZED"])
def test_a_default_device_changes_nothing(strategy: str) -> None:
    """Scales, skips, causes, places and parameters; `meta` holds no values, so nothing that is read can have been made there."""
    (expected, stock), (found, session) = trained(strategy, "cpu"), trained(strategy, "meta")
    told = [
        [(e.step, e.kind, e.cause, e.after, e.modules) for e in s.events if e.kind is EventKind.STEP_SKIPPED]
        for s in (stock, session)
    ]
    assert told[0] == told[1]
    assert {cause for _, _, cause, _, _ in told[0]} == {Cause.SCALE, Cause.ACTIVATION}
    assert_bitwise_equal(found, expected)
    timed = {name for name in stock.metrics() if "second" in name or "memory" in name}
    figures = [{k: v for k, v in s.metrics().items() if k not in timed} for s in (session, stock)]
    assert figures[0] == pytest.approx(figures[1], nan_ok=True)
