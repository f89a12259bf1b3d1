"""`PrecisionMonitor` in a loop of one's own: what `get_precision_stats` says, and that it never grows."""

from __future__ import annotations

import math
import pickle
import tracemalloc

import pytest
import torch

from hf_amp import (
    AdvancedGradScaler,
    BatchError,
    Cause,
    ConfigError,
    MixedPrecisionConfig,
    PerformanceTracker,
    PrecisionMonitor,
)
from hf_amp.monitoring.monitor import ERRORS_KEPT, KINDS_KEPT
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.monitoring.outcomes import record_applied, record_skipped
from tests.reference import losses, tiny_mlp


def run(monitor, scaler, steps, overflows):
    """A hand-written loop over `steps` steps, `monitor` told after each."""
    model = tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step, loss in enumerate(losses(model, steps, overflows), start=1):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.update_metrics(scaler, loss, step)


@pytest.mark.parametrize("scaler_class", [AdvancedGradScaler, torch.amp.GradScaler])
def test_the_document_s_loop_is_counted(scaler_class):
    """20 steps with overflows in the 3rd and the 8th: two skips, both errors, the scale's course, the losses' mean."""
    config = MixedPrecisionConfig(init_scale=1024.0)
    ours = scaler_class is AdvancedGradScaler
    scaler = scaler_class(config, "cpu") if ours else scaler_class("cpu", init_scale=1024.0)
    monitor = PrecisionMonitor(config)
    run(monitor, scaler, 20, lambda step: step in (2, 7))
    stats = monitor.get_precision_stats()
    assert (stats["applied_steps"], stats["skipped_steps"], stats["skip_rate"]) == (18, 2, 0.1)
    assert len(stats["numerical_errors"]) == 2
    assert [step for _, step in stats["numerical_errors"]] == [3, 8]
    assert stats["numerical_error_counts"] == {"gradient_overflow" if ours else "unknown": 2}
    assert stats["fp16_usage_rate"] == 1.0
    assert stats["fallback_count"] == 0
    assert stats["gradient_scale"]["current"] == scaler.get_scale() == 256.0
    assert stats["gradient_scale"]["volatility_bits"] > 0
    assert 0 < stats["avg_loss"] < 10
    assert math.isnan(stats["avg_memory_savings"])  # nobody has measured it


def test_a_stock_scale_that_has_decayed_to_zero_is_survived():
    """200 overflows in a row leave the stock scaler with a scale of 0: a monitor beside it goes on, and can be saved."""
    scaler, monitor = torch.amp.GradScaler("cpu", init_scale=1.0), PrecisionMonitor()
    run(monitor, scaler, 200, lambda step: True)
    assert scaler.get_scale() == 0.0
    assert monitor.applied_steps + monitor.skipped_steps == 200
    assert monitor.get_precision_stats()["gradient_scale"]["min"] == 2.0**-149
    PrecisionMonitor().load_state_dict(monitor.state_dict())


def test_a_step_that_is_told_twice_counts_once():
    """Calling `update_metrics` again before the next step adds no step."""
    config = MixedPrecisionConfig()
    scaler, monitor = AdvancedGradScaler(config, "cpu"), PrecisionMonitor(config)
    run(monitor, scaler, 3, lambda step: False)
    monitor.update_metrics(scaler, 1.0, 3)
    assert monitor.applied_steps == 3


def test_update_metrics_reads_nothing():
    """With an `AdvancedGradScaler` a step is taken into account without a host read."""
    config = MixedPrecisionConfig()
    scaler, monitor = AdvancedGradScaler(config, "cpu"), PrecisionMonitor(config)
    run(monitor, scaler, 2, lambda step: False)
    loss = torch.tensor(1.0)
    with count_host_reads() as reads:
        for step in range(200):
            monitor.update_metrics(scaler, loss, step)
    assert reads.count == 0


@for_each(("mode", "name"), [("FP32", "FP32"), ("BF16", "BF16"), (None, "FP16")])
def test_usage_is_that_of_the_configured_precision(mode, name):
    """All steps count for the number format that the config says."""
    monitor = PrecisionMonitor(MixedPrecisionConfig(precision_mode=mode))
    record_applied(monitor, 1.0, None, None, None)
    stats = monitor.get_precision_stats()
    assert stats["usage_by_format"] == {name: 1.0}
    assert stats["fp16_usage_rate"] == (1.0 if name == "FP16" else 0.0)


def test_usage_is_weighed_by_steps_and_parameters():
    """One step in FP16 and three with a quarter of the parameters in FP32: 13/16 FP16."""
    monitor = PrecisionMonitor()
    record_applied(monitor, 1.0, None, None, None)
    monitor.record_formats({"FP16": 0.75, "FP32": 0.25})
    for _ in range(3):
        record_applied(monitor, 1.0, None, None, None)
    assert monitor.get_precision_stats()["usage_by_format"] == {"FP16": 13 / 16, "FP32": 3 / 16}


def test_memory_savings_are_a_mean_over_steps_and_may_be_negative():
    """Two steps at -0.1 and one at 0.2 mean 0; before a step the newest figure stands."""
    monitor = PrecisionMonitor()
    monitor.record_memory(-0.1)
    assert monitor.get_precision_stats()["avg_memory_savings"] == -0.1
    record_applied(monitor, 1.0, None, None, None)
    record_applied(monitor, 1.0, None, None, None)
    monitor.record_memory(0.2)
    record_skipped(monitor, Cause.SCALE, 1.0, None, None)
    assert monitor.get_precision_stats()["avg_memory_savings"] == pytest.approx(0.0)


def test_errors_are_bounded_but_all_counted():
    """The newest 1,000 are kept; kinds beyond 100 count as "other"."""
    monitor = PrecisionMonitor()
    for step in range(3000):
        monitor.record_numerical_error(f"kind {step % 150}", step)
    stats = monitor.get_precision_stats()
    assert len(stats["numerical_errors"]) == ERRORS_KEPT
    assert stats["numerical_errors"][-1] == ("other", 2999)
    assert sum(stats["numerical_error_counts"].values()) == 3000
    assert len(stats["numerical_error_counts"]) == KINDS_KEPT + 1


def test_a_loss_of_more_than_one_element_is_refused():
    """The message says what it got and what to do, and nothing is counted."""
    monitor = PrecisionMonitor()
    scaler = AdvancedGradScaler(MixedPrecisionConfig(), "cpu")
    with pytest.raises(BatchError, match=r"shape \(3,\).*loss\.mean\(\)"):
        monitor.update_metrics(scaler, torch.ones(3), 1)
    assert monitor.get_precision_stats()["applied_steps"] == 0


@pytest.mark.parametrize("kind", [PrecisionMonitor, PerformanceTracker])
def test_something_else_than_a_config_is_refused(kind):
    """A dictionary is named, and what to pass instead."""
    with pytest.raises(ConfigError, match=rf"{kind.__name__}\(config=.*pass a MixedPrecisionConfig"):
        kind({"init_scale": 2.0})


def feed(monitor, tracker, steps, first):
    """Synthetic steps with a skip in every tenth and a scale that never rests."""
    loss = torch.tensor(1.0)
    for step in range(first, first + steps):
        tracker.start_step()
        if step % 10:
            record_applied(monitor, 2.0 ** (step % 30), 1.0, 1.0, None)
        else:
            record_skipped(monitor, Cause.SCALE, 2.0 ** (step % 30), 1, 1)
        monitor._loss_mean.add(loss)
        tracker.end_step(samples=8)


def test_memory_is_flat_over_100_000_steps():
    """From 20,000 steps on, where 1,000 errors are kept, nothing grows: under 20 kB as a pickle, under 100 kB in memory."""
    monitor, tracker = PrecisionMonitor(), PerformanceTracker(device="cpu")
    feed(monitor, tracker, 20_000, first=1)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    feed(monitor, tracker, 80_000, first=20_001)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert monitor.record.steps == tracker.get_stats()["steps"] == 100_000
    assert len(pickle.dumps([monitor.state_dict(), vars(tracker)])) < 20_000
    assert grown < 100_000  # a number a step would be 640 kB
