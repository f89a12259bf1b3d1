"""Streams in constant space: what they say of a stream is what the whole list would say."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from hf_amp.monitoring.monitor import History, LossMean, RunningStatistics
from tests.each import for_each
from tests.host_reads import count_host_reads


@for_each("count", [0, 1, 2, 1000])
def test_running_statistics_are_those_of_the_list(count):
    """Count, mean, standard deviation and range of random numbers, one by one."""
    numbers = [random.Random(count).gauss(3.0, 2.0) for _ in range(count)]
    running = RunningStatistics()
    for number in numbers:
        running.add(number)
    assert running.count == count
    assert running.mean == pytest.approx(statistics.mean(numbers) if numbers else 0.0)
    assert running.deviation == pytest.approx(statistics.pstdev(numbers) if numbers else 0.0)
    assert running.smallest == min(numbers, default=None)
    assert running.largest == max(numbers, default=None)


@for_each("changes", [0, 5, 256, 257, 10_000])
def test_a_history_is_bounded_and_even(changes):
    """At most 256 points, the first among them, at equal distances; all changes are counted."""
    history = History()
    for step in range(changes):
        history.add(step, 2.0**step if step < 100 else 1.0)
    steps = [step for step, _ in history.points]
    assert history.changes == changes
    assert len(steps) <= 256
    assert steps == list(range(0, changes, history.every))


def test_the_mean_of_losses_reads_nothing_until_asked():
    """200 losses with two that are not finite: no host read while they come, then the mean of the finite ones."""
    values = torch.linspace(1.0, 3.0, 200)
    values[7], values[150] = torch.nan, torch.inf
    mean = LossMean()
    with count_host_reads() as reads:
        for value in values:
            mean.add(value)
    assert reads.count == 0
    with count_host_reads() as reads:
        reported, non_finite = mean.read()
    assert reads.count == 1
    assert reported == pytest.approx(float(values[values.isfinite()].mean()))
    assert non_finite == 2
    assert mean.read() == (reported, 2)


def test_losses_of_several_devices_wait_for_no_one():
    """Numbers come as tensors on the CPU: mixed with losses on an accelerator they are summed there, without a read."""
    mean = LossMean()
    with count_host_reads() as reads:
        for index in range(200):
            mean.add(torch.ones((), device="meta" if index % 90 == 10 else "cpu"))
    assert reads.sources == []


def test_a_loss_counts_as_it_was_when_it_was_given():
    """A caller, or a CUDA graph, may write the next one into the same memory."""
    mean, loss = LossMean(), torch.zeros(())
    for value in (1.0, 2.0, 6.0):
        mean.add(loss.fill_(value))
    assert mean.read() == (3.0, 0)


def test_no_losses_have_no_mean():
    """NaN rather than an invented 0."""
    reported, non_finite = LossMean().read()
    assert math.isnan(reported)
    assert non_finite == 0
