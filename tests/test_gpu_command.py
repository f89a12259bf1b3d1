"""`python -m tests.gpu` runs, small, on a CPU: what it finds is written as it goes, and not found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import gpu
from tests.benchmarks.gpu import contenders, measuring

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


def options(out: Path, *more: str) -> object:
    return gpu.parser().parse_args(["--out", str(out), "--tiny", *more])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the command itself is run")
def test_every_stage_runs_and_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the smallest size; a second call does nothing again."""
    for module, name in ((measuring, "WARM_UP_STEPS"), (measuring, "COUNTED_STEPS"), (gpu, "BOUNDARIES_A_WAIT")):
        monkeypatch.setattr(module, name, 1)
    some = ("FP32", "FP32 with TF32", "BF16", "FP16 stock", "FP16 DYNAMIC", "FP16 PERFORMANCE_OPTIMIZED")
    every = contenders.contenders
    monkeypatch.setattr(
        "tests.benchmarks.test_gpu_training.contenders",
        lambda *args: {n: w for n, w in every(*args).items() if n in some},
    )
    monkeypatch.setattr("tests.gpu.expectations", lambda cases: sorted(cases))
    gpu.run(options(tmp_path))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert list(written["stages"]) == [stage.name for stage in gpu.STAGES]
    assert {name: stage.get("error") for name, stage in written["stages"].items()} == dict.fromkeys(written["stages"])
    found = {name: stage["found"] for name, stage in written["stages"].items()}
    assert found["correctness"]["exit"] == 0
    assert found["correctness"]["counts"]["skipped"] > 0
    assert set(found["scaler cost"]["over stock"]) == set(gpu.STRATEGIES)
    assert set(found["training GPT-2 124M"]["ways"]) == set(some)
    (said,) = found["predictions"].values()  # both are emulated here
    assert said["came true"] == {"modules": True, "causes": True, "scale within 2 bits": True}
    assert said["device"]["modules"]
    assert found["compiled and graphed"]["graphed model"]["captured"] is False
    assert found["compiled and graphed"]["compiled GPT-2"]["runs"]
    monkeypatch.setattr(gpu, "STAGES", tuple(gpu.Stage(s.name, s.seconds, unwanted) for s in gpu.STAGES))
    assert gpu.run(options(tmp_path))["stages"] == written["stages"]


def test_all_of_it_fits_into_9_minutes() -> None:
    """Every stage is begun within the 8.5 minutes after which none is, if each takes what it may."""
    assert sum(stage.seconds for stage in gpu.STAGES) <= 60 * gpu.parser().get_default("minutes")


def unwanted(device: torch.device, tiny: bool) -> dict[str, object]:
    raise AssertionError("it is known already")


def test_what_fails_or_has_no_time_is_said_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other stages run all the same, and the next call goes on with what is missing."""
    broken = [True]

    def breaks(device: torch.device, tiny: bool) -> dict[str, object]:
        if broken[0]:
            raise RuntimeError("no kernel image")
        return {"works": True}

    stages = (gpu.Stage("a", 0, breaks), gpu.Stage("b", 0, lambda *_: {"works": True}), gpu.Stage("c", 100, unwanted))
    monkeypatch.setattr(gpu, "STAGES", stages)
    first = gpu.run(options(tmp_path, "--minutes", "1"))["stages"]
    assert first["a"]["error"] == "RuntimeError: no kernel image"
    assert first["b"]["found"] == {"works": True}
    assert "were left" in first["c"]["not begun"]
    broken[0] = False
    assert gpu.run(options(tmp_path, "--minutes", "1"))["stages"]["a"]["found"] == {"works": True}
