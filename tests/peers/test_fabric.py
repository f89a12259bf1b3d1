"""A Lightning Fabric loop with hf_amp in it: ten lines, and an overflow that no scale cures costs one step."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_amp import AmpSession, Cause
from tests.test_any_loop import Wide, batches

fabric_module = pytest.importorskip("lightning_fabric", reason="the extra `peers` is not installed")


def test_a_fabric_loop_keeps_going() -> None:
    """Fabric owns devices and processes, hf_amp the precision: one skipped step, one module in FP32, and the loss falls."""
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision="32-true")
    model = Wide(factor=1e6)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    session = AmpSession.for_model(model.module, optimizer.optimizer, init_scale=256.0)
    losses = []
    for x, y in batches(60):
        loss = cross_entropy(model(x), y)
        fabric.backward(session.scaler.scale(loss))
        session.scaler.step(optimizer.optimizer)
        session.scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert session.metrics()["skipped_steps"] == 1
    assert next(event.cause for event in session.events if event.modules) is Cause.ACTIVATION
    assert list(session.plan.modules) == ["middle"]
    assert sum(losses[-5:]) < sum(losses[1:6])
