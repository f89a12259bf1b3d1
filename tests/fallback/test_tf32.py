"""Modules that leave FP16's range may run in TF32, which has FP32's range: where a device has it and does not use it, that is said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from hf_amp import AdvancedGradScaler, AmpSession, Cause, EventKind, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import Hardware, products_use_tf32
from hf_amp.fallback.controller import FallbackController
from hf_amp.fallback.diagnosis import Diagnosis

HINT = 'torch.set_float32_matmul_precision("high")'


@pytest.fixture(autouse=True)
def former_setting() -> Iterator[None]:
    former = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = former


def changes_of_a_run(tf32: str) -> list[str]:
    """What is said of two layers that leave the range, one after the other."""
    config = MixedPrecisionConfig(init_scale=1.0)
    scaler = AdvancedGradScaler(config, "cpu")
    session = AmpSession(
        config, scaler, PrecisionMode.MIXED, Hardware("cpu", "with such units", "slow", "slow", "none", tf32)
    )
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    session.register_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for layer in (0, 0, 2, 2):
        nn.init.constant_(model[layer].weight, 1e6)
        with session.autocast():
            loss = torch.tanh(model(torch.ones(2, 4))).float().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [event.message for event in session.events if event.kind is EventKind.PRECISION_CHANGED]


def test_it_is_said_once_where_it_helps() -> None:
    """With the first module, and not on a device without it, nor where products run in TF32 already."""
    torch.set_float32_matmul_precision("highest")
    assert [HINT in message for message in changes_of_a_run("native")] == [True, False]
    assert [HINT in message for message in changes_of_a_run("none")] == [False, False]
    torch.set_float32_matmul_precision("high")
    assert [HINT in message for message in changes_of_a_run("native")] == [False, False]


def test_it_is_not_said_where_nothing_goes_to_fp32() -> None:
    """A gradient of the model's own overflows: the model goes to BF16, whose products are fast."""
    torch.set_float32_matmul_precision("highest")
    hardware = Hardware("cpu", "with such units", "native", "native", "none", "native")
    controller = FallbackController(
        MixedPrecisionConfig(emulate=False),
        PrecisionMode.MIXED,
        hardware,
        AdvancedGradScaler(MixedPrecisionConfig(), "cpu"),
    )
    change = controller.after_skipped(Diagnosis(Cause.ACTIVATION, "made up", ("",)), 1.0, 8.0)
    assert change is not None
    assert change.after.default is PrecisionMode.BF16
    assert HINT not in change.message


def test_both_settings_are_read() -> None:
    """PyTorch's former setting and its newer one, after which reading the former raises."""
    torch.set_float32_matmul_precision("high")
    assert products_use_tf32()
    torch.set_float32_matmul_precision("highest")
    assert not products_use_tf32()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert products_use_tf32()
