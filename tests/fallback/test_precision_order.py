"""Which precisions a whole run can go to: BF16 where the device has units for it, FP32 everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_amp import AdvancedGradScaler, AmpSession, Cause, EventKind, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import Hardware
from hf_amp.fallback.plan import precision_order

MIXED, FP16, BF16, FP32 = (PrecisionMode[name] for name in ("MIXED", "FP16", "BF16", "FP32"))
WITH_UNITS = Hardware("cpu", "a CPU with units", "native", "native")
WITHOUT_UNITS = Hardware("cpu", "a CPU without units", "slow", "slow")


@pytest.mark.parametrize(
    ("mode", "hardware", "emulate", "order"),
    [
        (MIXED, WITH_UNITS, False, (MIXED, BF16, FP32)),
        (MIXED, WITH_UNITS, True, (MIXED, FP32)),
        (MIXED, WITHOUT_UNITS, False, (MIXED, FP32)),
        (FP16, WITH_UNITS, False, (FP16, BF16, FP32)),
        (BF16, WITHOUT_UNITS, False, (BF16, FP32)),
        (FP32, WITH_UNITS, False, (FP32,)),
    ],
)
def test_bf16_is_a_rung_where_there_are_units_for_it_and_fp16_is_real(
    mode: PrecisionMode, hardware: Hardware, emulate: bool, order: tuple[PrecisionMode, ...]
) -> None:
    """Emulated runs do not depend on the machine: there BF16 is neither a remedy nor a candidate of DYNAMIC."""
    assert precision_order(mode, hardware, emulate) == order


class OwnProducts(nn.Module):
    """Its own forward, and no module that could be put in FP32, multiplies to beyond 65504."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x) * 1e3
        return nn.functional.layer_norm(hidden @ hidden.T, (4,)).square().mean()


@pytest.mark.parametrize(
    ("hardware", "emulate", "level", "dtypes"),
    [
        (WITH_UNITS, False, BF16, [torch.float16, torch.bfloat16]),
        (WITHOUT_UNITS, False, FP32, [torch.float16, torch.float32]),
        (WITH_UNITS, True, FP32, [torch.float16, torch.float32]),
    ],
)
def test_a_model_that_overflows_by_itself_takes_the_next_rung(
    hardware: Hardware, emulate: bool, level: PrecisionMode, dtypes: list[torch.dtype]
) -> None:
    """One step is skipped, the event says where the model went, and the next step runs and is applied there."""
    config = MixedPrecisionConfig(emulate=emulate, init_scale=1.0)
    scaler = AdvancedGradScaler(config, "cpu")
    session = AmpSession(config, scaler, MIXED, hardware)
    model = OwnProducts()
    session.register_model(model)
    seen: list[torch.dtype] = []
    model.first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        with session.autocast():
            loss = model(torch.randn(4, 8))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    (change,) = [event for event in session.events if event.kind is EventKind.PRECISION_CHANGED]
    assert (change.before, change.after, change.step) == ("MIXED", level.value, 1)
    (skip,) = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert skip.cause is Cause.ACTIVATION
    assert session.metrics()["applied_steps"] == 2
    assert seen[0] is dtypes[0]
    assert seen[-1] is dtypes[-1]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
