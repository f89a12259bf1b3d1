"""The pace of a run is told by the clock, and pauses are not steps."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from hf_amp.monitoring.throughput import ThroughputMonitor


def pace_at(*times: float, number_format: str = "FP16") -> ThroughputMonitor:
    """A pace whose steps were decided at these seconds."""
    clock: Iterator[float] = iter(times)
    throughput = ThroughputMonitor(device="cpu", clock=clock.__next__)
    for _ in times:
        throughput.step_decided(number_format)
    return throughput


def test_before_the_second_step_nothing_is_known() -> None:
    """One moment has no duration."""
    assert pace_at().metrics() == pace_at(5.0).metrics() == {}


def test_step_time_is_the_median_of_the_newest() -> None:
    """An evaluation between two steps does not move it, and what was long ago does not count."""
    times = [0.0, 100.0, 200.0]
    times += [200.0 + 0.5 * i for i in range(1, 11)]
    times[8:] = [time + 60.0 for time in times[8:]]
    assert pace_at(*times).metrics()["step_seconds"] == pytest.approx(0.5)


def test_throughput_is_samples_through_step_time() -> None:
    """Known where somebody has said how many samples a step has."""
    throughput = pace_at(0.0, 0.5, 1.0)
    assert "samples_per_second" not in throughput.metrics()
    throughput.samples_per_step = 32
    assert throughput.metrics()["samples_per_second"] == pytest.approx(64.0)


def test_time_is_counted_for_the_precision_of_the_step() -> None:
    """Each interval for the format that the step at its end ran in; a pause of ten steps and more for none."""
    clock = iter([0.0, 1.0, 2.0, 3.0, 50.0, 51.0])
    throughput = ThroughputMonitor(device="cpu", clock=clock.__next__)
    for number_format in ("FP16", "FP16", "FP16", "FP32", "FP32", "FP32"):
        throughput.step_decided(number_format)
    assert throughput.metrics()["fp16_seconds"] == 2.0
    assert throughput.metrics()["fp32_seconds"] == 2.0


def test_time_between_trainings_is_no_step() -> None:
    """After a pause the next step begins a new interval."""
    clock = iter([0.0, 1.0, 100.0, 101.0])
    throughput = ThroughputMonitor(device="cpu", clock=clock.__next__)
    for step in range(4):
        if step == 2:
            throughput.pause()
        throughput.step_decided("FP16")
    assert throughput.metrics()["fp16_seconds"] == 2.0


def test_a_resumed_run_adds_to_the_time_in_each_precision() -> None:
    """Through JSON, as a checkpoint goes; the step time starts anew, because the machine may be another."""
    resumed = ThroughputMonitor(device="cpu", clock=iter([0.0, 1.0]).__next__)
    resumed.load_state_dict(json.loads(json.dumps(pace_at(0.0, 1.0, 2.0).state_dict())))
    assert resumed.metrics() == {"fp16_seconds": 2.0}
    resumed.step_decided("FP16")
    resumed.step_decided("FP16")
    assert resumed.metrics() == {"fp16_seconds": 3.0, "step_seconds": 1.0}
    resumed.load_state_dict({})
    assert "fp16_seconds" not in resumed.metrics()
