"""The trainers that choose a precision: by what is stable, and by what is fast."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from hf_amp import (
    Cause,
    ConfigError,
    DynamicMixedPrecisionTrainer,
    EventKind,
    MixedPrecisionConfig,
    PerformanceOptimizedMixedPrecisionTrainer,
    PrecisionMode,
    ScalingStrategy,
)
from hf_amp.device import probe
from hf_amp.fallback.controller import TIMED_STEPS, WARMUP_STEPS
from tests.each import for_each
from tests.training.choosing_worker import choices
from tests.training.loops import vectors

TRIAL = WARMUP_STEPS + TIMED_STEPS + 1


class Overflowing(nn.Module):
    """Two layers; while `loud`, what lies between them leaves FP16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.loud = False

    def forward(self, x):
        hidden = self.first(x)
        if self.loud:
            return self.second(hidden.float() * 1e6) * 1e-6
        return self.second(hidden)


class Timed:
    """A trainer on a clock of its own, by which steps take as long as `seconds` says."""

    def __init__(self, trainer, seconds: dict[PrecisionMode, float]) -> None:
        self.trainer, self.seconds, self.now = trainer, seconds, 0.0

    def step(self, model, optimizer, index=0):
        self.now += self.seconds[self.trainer.session.plan.default]
        result = self.trainer.train_step(vectors(1 + index)[index], model, optimizer)
        throughput = self.trainer.session.throughput
        if throughput._clock != self.read:  # the first step, which is never timed, has made the session
            throughput._clock, throughput._last = self.read, self.now
        return result

    def read(self) -> float:
        return self.now


def test_it_switches_and_recovers_under_faults():
    """Where FP16 is fastest it is chosen; activations that leave its range put a module in FP32; 20 clean steps later
    it is back."""
    model = Overflowing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = MixedPrecisionConfig(recovery_steps=20, init_scale=64.0)
    trainer = DynamicMixedPrecisionTrainer(config, loss_fn=mse_loss)
    timed = Timed(trainer, {PrecisionMode.MIXED: 1.0, PrecisionMode.BF16: 2.0, PrecisionMode.FP32: 2.0})
    seen = [timed.step(model, optimizer, i)["precision_mode"] for i in range(2 * TRIAL)]
    assert {PrecisionMode.MIXED, PrecisionMode.FP32} == set(seen)  # both were tried
    assert trainer.session.plan.default is PrecisionMode.MIXED
    assert not trainer.session.plan.modules
    model.loud = True
    results = [timed.step(model, optimizer, i) for i in range(4)]
    assert results[0]["cause"] is Cause.ACTIVATION
    assert results[-1]["skipped"] is False
    assert set(trainer.session.plan.modules) == {"second"}
    model.loud = False
    for i in range(25):
        timed.step(model, optimizer, i)
    assert not trainer.session.plan.modules
    stats = trainer.precision_monitor.get_precision_stats()
    assert stats["fallback_count"] == 1
    assert 0 < stats["fp16_usage_rate"] < 1
    kinds = [event.kind for event in trainer.session.events]
    assert kinds.count(EventKind.PRECISION_CHANGED) >= 4


@for_each("kind", [DynamicMixedPrecisionTrainer, PerformanceOptimizedMixedPrecisionTrainer])
@for_each("mode", ["FP32", "BF16", "FP16"])
def test_a_fixed_precision_leaves_no_choice(kind, mode):
    """FP32, BF16 and FP16 are refused, with the trainer that takes them."""
    with pytest.raises(ConfigError, match=rf"precision_mode={mode}.*StandardMixedPrecisionTrainer"):
        kind(MixedPrecisionConfig(precision_mode=mode))


@pytest.mark.parametrize("fastest", [PrecisionMode.MIXED, PrecisionMode.FP32], ids=lambda mode: mode.value)
def test_the_fastest_stable_precision_goes_on_and_is_said_to(fastest):
    """FP16 and FP32 are run in turn; the one with the shorter steps goes on, and an event has both times."""
    model = Overflowing()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    config = MixedPrecisionConfig(precision_mode="MIXED", init_scale=64.0)
    trainer = PerformanceOptimizedMixedPrecisionTrainer(config, loss_fn=mse_loss, clip_norm=1.0)
    assert trainer.config.scaling_strategy is ScalingStrategy.PERFORMANCE_OPTIMIZED
    timed = Timed(trainer, {mode: 1.0 if mode is fastest else 2.0 for mode in PrecisionMode})
    seen = [timed.step(model, optimizer, i)["precision_mode"] for i in range(3 * (TRIAL + 2))]
    assert {PrecisionMode.MIXED, PrecisionMode.FP32} <= set(seen)
    assert seen[-1] is trainer.session.plan.default is fastest
    changes = [event for event in trainer.session.events if event.kind is EventKind.PRECISION_CHANGED]
    assert f"{fastest.value} is the fastest stable precision here" in changes[-1].message


TRAINERS = ["DynamicMixedPrecisionTrainer", "PerformanceOptimizedMixedPrecisionTrainer"]


def times_in(reported):
    """Precision → milliseconds a step, as the verdict among these messages gives them."""
    (verdict,) = [message for message in reported if "is the fastest stable precision here" in message]
    return {name: float(ms) for ms, name in re.findall(r"([\d.]+) ms in (\w+)", verdict)}


def test_on_this_machine_the_shortest_time_wins():
    """GPT-2 on real text, real kernels, BF16's where this CPU has units: what goes on is what the event gives the least for."""
    chosen = choices()
    assert list(chosen) == TRAINERS
    units = {"BF16"} if probe("cpu").bf16 == "native" else set()
    for name in TRAINERS:
        assert "real FP16" in chosen[name]["told"][0]
        times = times_in(chosen[name]["told"])
        assert times.keys() == {"MIXED", "FP32"} | units
        assert times[chosen[name]["precision"]] == min(times.values())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the limits are those of x86-64")
def test_on_a_cpu_without_units_it_is_fp32_and_says_so():
    """The same, limited to AVX2, which has no units for half precision: the first event says that, and the verdict, with
    the times, is FP32. BF16 is not tried."""
    environment = {
        **os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.training.choosing_worker"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["hardware"]["fp16"], result["hardware"]["bf16"]) == ("slow", "slow")
    for name in TRAINERS:
        reported = result["choices"][name]["told"]
        assert "has no units for them" in reported[0]
        assert result["choices"][name]["precision"] == "FP32"
        assert reported[-1].startswith("FP32 is the fastest stable precision here")
        assert times_in(reported).keys() == {"MIXED", "FP32"}
