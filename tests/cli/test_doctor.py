"""`hf-amp doctor` says what is true of this machine and about others."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_amp.cli import app
from hf_amp.cli.doctor import Device, find_devices, recommend
from hf_amp.device import Hardware, probe


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def reported() -> dict[str, Any]:
    result = doctor("--json")
    assert result.exit_code == 0, result.output
    plain: dict[str, Any] = json.loads(result.stdout)
    return plain


def test_json_has_everything(reported: dict[str, Any]) -> None:
    """Devices, system, versions, and the recommendation with its reason."""
    assert reported["versions"]["torch"] == importlib.metadata.version("torch")
    hardware, probed = reported["devices"][-1]["hardware"], probe("cpu")
    assert (hardware["device"], hardware["fp16"], hardware["bf16"]) == ("cpu", probed.fp16, probed.bf16)
    assert set(reported["devices"][-1]["product_seconds"]) <= {"FP32", "FP16", "BF16"}  # what was steady
    assert reported["recommendation"]["why"].endswith(".")
    assert reported["system"]["python"]
    assert reported["half_parameters"] == {
        "None": 8, "stochastic_rounding": 8, "kahan": 10, "upcast": 16, "master_weights": 18,
    }  # fmt: skip


def test_people_read_the_same(reported: dict[str, Any]) -> None:
    """The precision stands first; every device and package is in the tables."""
    result = doctor("--no-measure")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.replace("│", " ").split())
    assert text.startswith("Train in ")
    assert f"torch {importlib.metadata.version('torch')}" in text
    for word in ("FP8", "fused AdamW", "matrix product", "None 8, stochastic_rounding 8, kahan 10"):
        assert word in text


def test_nothing_is_measured_where_it_is_not_wanted() -> None:
    """Without measuring, speeds are unknown and no precision is called fast because of them."""
    cpu = find_devices(measure=False)[-1]
    assert cpu.product_seconds == {}
    assert cpu.speed("BF16") is None
    assert recommend(cpu).precision == "FP32"


def device(hardware: Hardware, **seconds: float) -> Device:
    return Device(hardware, None, seconds, fused_adamw=True)


H100 = Hardware("cuda", "H100", "native", "native", "native", "native", (9, 0))
T4 = Hardware("cuda", "T4", "native", "slow", capability=(7, 5))
GTX = Hardware("cuda", "GTX 1080", "slow", "slow", capability=(6, 1))
CPU = Hardware("cpu", "x86", "slow", "slow")
XEON = Hardware("cpu", "Xeon", "native", "native")


def test_the_recommendation_follows_from_the_device() -> None:
    """BF16 where it is native, FP16 where only that is, FP32 elsewhere; and the reason is the device's own."""
    for given, precision, words in (
        (device(H100), "BF16", "range of FP32"),
        (device(T4), "FP16", "none for BF16"),
        (device(GTX), "FP32", "no time"),
        (device(CPU), "FP32", "emulates FP16"),
        (device(XEON), "FP32", "not been measured"),
        (device(XEON, FP32=1.0, BF16=2.0), "FP32", "2.0 times as long"),
        (device(CPU, FP32=1.0, BF16=2.0), "FP32", "2.0 times as long"),
        (device(CPU, FP32=1.0, BF16=0.25), "BF16", "4.0 times as fast"),
        (device(CPU, FP32=1.0, BF16=0.95), "FP32", "gains nothing"),
        (device(Hardware("mps", "mps", "native", "native")), "FP32", "not been measured"),
    ):
        recommendation = recommend(given)
        assert recommendation.precision == precision
        assert words in recommendation.why
        assert ("fp16=True" in recommendation.trainer) == (precision == "FP16")
        assert ("bf16=True" in recommendation.trainer) == (precision == "BF16")


def test_the_floor_that_is_missing_upstream_is_missing() -> None:
    """What the table says of torch is so: overflows without end bring its scale to 0. Whoever sees it fixed fixes the table."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(170):
        scaler.scale(parameter.sum())
        parameter.grad = torch.tensor([torch.inf])
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 0.0


@pytest.mark.gpu
def test_a_gpu_is_shown_with_its_capability() -> None:
    """The first device is the GPU, with its memory and measured products."""
    first = find_devices()[0]
    assert first.hardware.device == "cuda"
    assert first.hardware.capability == torch.cuda.get_device_capability(0)
    assert first.memory_bytes is not None
    assert set(first.product_seconds) >= {"FP32", "FP16"}
