"""`PerformanceTracker` adds up what it is told, on the host's clock or between events of a device."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch

from hf_amp import MixedPrecisionConfig, PerformanceTracker
from tests.host_reads import count_host_reads


@pytest.fixture
def clock(monkeypatch):
    """A host clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def step(tracker, clock, seconds, samples=8, precision=None):
    with tracker.step(samples, precision):
        clock[0] += seconds


def test_times_and_throughput_are_those_of_the_steps(clock):
    """Random step times: mean, range, percentiles and samples a second as of the list; time between steps is nobody's."""
    tracker = PerformanceTracker(MixedPrecisionConfig(), device="cpu")
    dice = random.Random(0)
    seconds = [dice.uniform(0.01, 0.2) for _ in range(500)]
    for duration in seconds:
        step(tracker, clock, duration)
        clock[0] += 5.0
    stats = tracker.get_stats()
    assert stats["steps"] == 500
    assert stats["avg_step_time"] == pytest.approx(sum(seconds) / 500)
    assert stats["avg_throughput"] == pytest.approx(8 * 500 / sum(seconds))
    assert stats["step_time_p90"] == pytest.approx(sorted(seconds)[449], rel=0.01)
    assert (stats["step_time_min"], stats["step_time_max"]) == pytest.approx((min(seconds), max(seconds)))
    assert tracker.newest_step_seconds == pytest.approx(seconds[-1])
    assert stats["clock"] == "host"


def test_time_is_shared_out_by_precision(clock):
    """A second in FP16 and three in FP32: a quarter and three quarters; without a name the config's counts."""
    tracker = PerformanceTracker(MixedPrecisionConfig(), device="cpu")
    step(tracker, clock, 1.0)
    step(tracker, clock, 3.0, precision="FP32")
    assert tracker.get_stats()["time_share"] == pytest.approx({"FP16": 0.25, "FP32": 0.75})


def test_before_the_first_step_nothing_is_invented():
    """Averages are NaN, which the document's format strings take."""
    stats = PerformanceTracker(device="cpu").get_stats()
    assert math.isnan(stats["avg_step_time"])
    assert f"{stats['avg_throughput']:.0f}" == "nan"


def test_a_step_that_raised_does_not_count(clock):
    """Neither does one that was dropped or never begun."""
    tracker = PerformanceTracker(device="cpu")
    with pytest.raises(RuntimeError, match="user code"), tracker.step(8):
        raise RuntimeError("user code")
    tracker.start_step()
    tracker.drop_step()
    tracker.end_step(8)
    assert tracker.get_stats()["steps"] == 0
    step(tracker, clock, 1.0)
    tracker.end_step(8)  # it was ended
    assert tracker.get_stats()["steps"] == 1


def test_tracking_reads_nothing():
    """No tensor is read, on whatever device."""
    tracker = PerformanceTracker(device="cpu")
    with count_host_reads() as reads, tracker.step(8):
        torch.ones(3).sum()
    assert reads.count == 0


@pytest.mark.gpu
def test_device_time_is_not_queueing_time():
    """On CUDA a step that is queued at once counts with the time that the device takes for it, without a wait."""
    tracker = PerformanceTracker(device="cuda")
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    with tracker.step(1):
        for _ in range(50):
            x = x @ x * 1e-2
    queued = time.perf_counter() - started
    stats = tracker.get_stats()
    assert stats["clock"] == "device"
    assert stats["avg_step_time"] > queued
