"""Which losses are spikes, which checkpoints are good, and when a run goes back: by themselves, without a training."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_amp import EventKind, MixedPrecisionConfig, StateError
from hf_amp.events import StepOutcome
from hf_amp.monitoring.rewind import GOOD_FILE, LOSS, LossSpikes, Rewinder
from tests.each import for_each


def outcome(applied: bool = True, loss: float | None = None, **facts: Any) -> StepOutcome:
    extras = {} if loss is None else {LOSS: loss}
    return StepOutcome(1, applied, 1.0, extras=extras, **facts)


def rewinder(**options: Any) -> Rewinder:
    return Rewinder(MixedPrecisionConfig(**{"on_stalled": "rewind", "good_after": 3, **options}))


# ---- spikes --------------------------------------------------------------------------------------------------


def slow_spikes(losses: list[float]) -> list[bool]:
    """The rule by weights written out: every loss weighs what the ones after it have left of its weight."""

    def above(values: list[float], value: float) -> float:
        weights: list[float] = []
        for count in range(1, len(values) + 1):
            new = max(1 / count, 2 / 101)
            weights = [w * (1 - new) for w in weights] + [new]
        mean = sum(w * v for w, v in zip(weights, values, strict=True))
        spread = math.sqrt(sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)))
        return (value - mean) / spread

    return [
        i >= 100 and above(losses[:i], loss) >= 7 and above([math.log(x) for x in losses[:i]], math.log(loss)) >= 4
        for i, loss in enumerate(losses)
    ]


def test_spikes_are_those_of_a_slow_reference() -> None:
    """Losses with a normal spread and spikes among them; and small ones with heavy tails, which the logarithm lets pass."""
    draw = random.Random(0)
    normal = [2 + draw.gauss(0, 0.1) for _ in range(260)]
    for at in (50, 120, 180, 240):
        normal[at] = 4 + at / 40
    heavy = [math.exp(draw.gauss(-2, 1)) for _ in range(260)]
    heavy[200:] = [5.0, *heavy[201:250], 200.0, *heavy[251:]]
    for losses, spikes in ((normal, [120, 180, 240]), (heavy, [250])):
        rule = LossSpikes()
        found = [rule.add(loss) > 0 for loss in losses]
        assert found == slow_spikes(losses)
        assert [i for i, spike in enumerate(found) if spike] == spikes


def test_equal_losses_and_losses_below_zero_are_no_error() -> None:
    """Nothing varies, or there is no logarithm: the first is never a spike, the second is judged as it is."""
    spikes = LossSpikes()
    assert [spikes.add(1.0) for _ in range(200)] == [0.0] * 200
    negative = LossSpikes()
    assert not any(negative.add(-2 + 0.01 * (i % 5)) for i in range(200))
    assert negative.add(-1.0) > 7


def test_losses_of_a_step_are_added_up() -> None:
    """Micro-batches make one figure; what was abandoned before the first of a step does not count."""
    watch = rewinder(loss_spikes=True)
    record = type("Record", (), {"device": torch.device("cpu"), "agrees": False})
    watch.note(torch.tensor(9.0), first=True)  # cleared without a step
    for first, loss in ((True, 1.0), (False, 2.5)):
        watch.note(torch.tensor(loss, dtype=torch.bfloat16), first)
    assert watch.collect(record, None)[LOSS].item() == 3.5
    assert watch.collect(record, None) == {}


# ---- good checkpoints ----------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int) -> Path:
    place = folder / f"checkpoint-{step}"
    place.mkdir()
    return place


def test_a_checkpoint_is_good_after_clean_steps(tmp_path: Path) -> None:
    """Skipped steps, zero gradients and losses that are not finite do not count, and take nothing back; the folder keeps its time."""
    follower, place = rewinder(), checkpoint(tmp_path, 5)
    os.utime(place, (1000, 1000))
    follower.written(place, 5)
    seen = [
        outcome(), outcome(applied=False), outcome(zero_gradients=True), outcome(has_gradients=False),
        outcome(loss_finite=False), outcome(),
    ]  # fmt: skip
    assert [follower.after_step(each, 6, stalled=False) for each in seen] == [[]] * 6
    (event,) = follower.after_step(outcome(), 12, stalled=False)
    assert (event.kind, event.step) == (EventKind.CHECKPOINT_GOOD, 12)
    assert json.loads((place / GOOD_FILE).read_text()) == {"step": 5, "clean_steps": 3}
    assert place.stat().st_mtime == 1000


@for_each("fault", ["stall", "spike"])
def test_what_comes_before_a_fault_becomes_good_no_more(tmp_path_factory: pytest.TempPathFactory, fault: str) -> None:
    """The steps after them were not clean; the one that was good before stays."""
    folder = tmp_path_factory.mktemp("run")
    follower = rewinder(loss_spikes=True)
    follower.spikes = LossSpikes(200, follower.spikes.plain, follower.spikes.log)
    follower.spikes.plain.mean, follower.spikes.plain.variance = 1.0, 0.01
    follower.spikes.log.mean, follower.spikes.log.variance = 0.0, 0.01
    follower.written(checkpoint(folder, 1), 1)
    for step in (2, 3, 4):
        follower.after_step(outcome(loss=1.0), step, stalled=False)
    follower.written(checkpoint(folder, 4), 4)
    follower.after_step(outcome(loss=9.0 if fault == "spike" else 1.0), 5, stalled=fault == "stall")
    assert follower.fault
    assert follower.candidates == []
    assert follower.good.step == 1


def test_a_stall_is_one_fault() -> None:
    """It asks once, not at every step until it ends."""
    follower = rewinder()
    for step in (1, 2, 3):
        follower.after_step(outcome(applied=False), step, stalled=True)
        assert bool(follower.fault) == (step == 1)
        follower.fault = ""
    follower.after_step(outcome(), 4, stalled=False)
    follower.after_step(outcome(applied=False), 5, stalled=True)
    assert follower.fault


def test_one_that_is_written_again_is_not_good_yet(tmp_path: Path) -> None:
    """The mark is of what was there before."""
    follower, place = rewinder(), checkpoint(tmp_path, 5)
    follower.written(place, 5)
    for step in (6, 7, 8):
        follower.after_step(outcome(), step, stalled=False)
    follower.written(place, 8)
    assert not (place / GOOD_FILE).exists()
    assert follower.good is None


def test_good_ones_are_found_again(tmp_path: Path) -> None:
    """The newest that is not later than the run; damaged marks are none; the one that the run goes on from may become good."""
    for step, mark in (
        (2, '{"step": 2}'),
        (4, '{"step": 4}'),
        (6, "{"),
        (8, '{"step": "8"}'),
        (20, '{"step": 20}'),
        (10, None),
    ):
        place = checkpoint(tmp_path, step)
        if mark is not None:
            (place / GOOD_FILE).write_text(mark)
    follower = rewinder()
    follower.find(tmp_path, 10)
    assert follower.good.step == 4
    assert [each.step for each in follower.candidates] == [10]


@for_each(
    "damaged",
    [{"rewinds": -1}, {"rewinds": 1.5}, {"spikes": {"count": "many"}}, {"spikes": {"plain": {"variance": -1.0}}}, 3],
)
def test_damaged_state_is_refused(damaged: Any) -> None:
    """And nothing has changed then."""
    follower = rewinder()
    with pytest.raises(StateError, match="rewind"):
        follower.load_state_dict(damaged)
    assert follower.state_dict() == rewinder().state_dict()


def test_state_goes_through_json() -> None:
    """To the last bit."""
    follower, other = rewinder(loss_spikes=True), rewinder(loss_spikes=True)
    for step in range(120):
        follower.after_step(outcome(loss=1 / (step + 1)), step, stalled=False)
    other.load_state_dict(json.loads(json.dumps(follower.state_dict())))
    assert other.state_dict() == follower.state_dict()
