"""A run that learns nothing is told once, with its cause, and not before."""

from __future__ import annotations

import json

import pytest

from hf_amp import Cause, EventKind
from hf_amp.events import StepOutcome
from hf_amp.monitoring.stall import StallDetector


def applied(zero_gradients: bool, loss_finite: bool | None, scale: float, has_gradients: bool = True) -> StepOutcome:
    """An applied step."""
    return StepOutcome(
        1, True, scale, loss_finite=loss_finite, zero_gradients=zero_gradients, has_gradients=has_gradients
    )


def kinds_told(watch: StallDetector, steps: str) -> list[str]:
    """What is told at each step: `-` nothing, `z` zero gradients, `h` hopeless. Steps: `a`pplied, `z`ero, `n`one, `s`kipped."""
    marks = {None: "-", EventKind.ZERO_GRADIENTS: "z", EventKind.STALLED: "h"}
    reported = []
    for step in steps:
        if step == "s":
            finding = watch.after_skipped(Cause.SCALE, 1)
        else:
            finding = watch.after_applied(applied(step == "z", True, 8.0, step != "n"), 1)
        reported.append(marks[finding.kind if finding else None])
    return reported


@pytest.mark.parametrize(
    ("steps", "reported"),
    [
        ("aaaaa", "-----"),
        ("ssass", "-----"),
        ("sssss", "--h--"),
        ("sssasss", "--h---h"),
        ("zazza", "z-z--"),
        ("zzzz", "z-h-"),
        ("szsa", "-zh-"),
        ("nannn", "----h"),
        ("nzsn", "-zh-"),
    ],
)
def test_what_is_told_when(steps: str, reported: str) -> None:
    """After three steps without anything learned, once; a row of zero gradients at its first step too."""
    assert "".join(kinds_told(StallDetector(patience=3), steps)) == reported


def test_poisoned_weights_are_hopeless_at_once() -> None:
    """No patience with weights that are not finite."""
    finding = StallDetector(patience=50).after_skipped(Cause.WEIGHTS, 1)
    assert (finding.kind, finding.cause) == (EventKind.STALLED, Cause.WEIGHTS)
    assert "last good checkpoint" in finding.message


def test_the_cause_is_that_of_most_skips() -> None:
    """One odd skip among many does not name the row."""
    watch = StallDetector(patience=4)
    findings = [watch.after_skipped(c, 1) for c in (Cause.UNKNOWN, Cause.INPUT, Cause.INPUT, Cause.INPUT)]
    assert findings[-1].cause is Cause.INPUT
    assert "most for INPUT" in findings[-1].message


@pytest.mark.parametrize(
    ("loss_finite", "scale", "cause", "words"),
    [
        (False, 8.0, Cause.LOSS, "not a number, so most likely every label of the batch is ignored (-100)"),
        (False, 0.5, Cause.LOSS, "not a number"),
        (True, 8.0, Cause.LOSS, "0.0 too"),
        (None, 1.0, Cause.LOSS, "0.0 too"),
        (True, 8.0, Cause.LOSS, "where rewards are learned from, all of a group may be equal"),
        (True, 2.0**-24, Cause.SCALE, "the scale of 5.96046e-08 leaves nothing"),
    ],
)
def test_zero_gradients_blame_labels_as_far_as_shown(
    loss_finite: bool | None, scale: float, cause: Cause, words: str
) -> None:
    """A loss that is not a number shows it; a scale below 1 explains it; otherwise the message says what it can be."""
    finding = StallDetector(patience=9).after_applied(applied(True, loss_finite, scale), 1)
    assert words in finding.message
    assert finding.cause is cause


@pytest.mark.parametrize("before", [0, 1])
def test_a_scale_that_has_decayed_to_nothing_is_to_be_raised(before: int) -> None:
    """Zeros that a tiny scale has made, also after skips: the advice is not to lower the scale still more."""
    watch = StallDetector(patience=3)
    findings = [watch.after_skipped(Cause.SCALE, 1) for _ in range(before)]
    findings += [watch.after_applied(applied(True, True, 2.0**-20), 1) for _ in range(3 - before)]
    stalled = findings[-1]
    assert (stalled.kind, stalled.cause) == (EventKind.STALLED, Cause.SCALE)
    assert f"for {3 - before} steps every gradient was exactly zero" in stalled.message
    assert "the scale of 9.53674e-07 leaves nothing of them in FP16. Raise init_scale and min_scale" in stalled.message
    assert "lower" not in stalled.message.replace("lowered", "")


def test_a_scale_that_is_too_large_is_to_be_lowered() -> None:
    """The other direction: gradients that overflow, step after step."""
    watch = StallDetector(patience=3)
    assert "lower init_scale" in [watch.after_skipped(Cause.SCALE, 1) for _ in range(3)][-1].message


@pytest.mark.parametrize("steps", ["", "s", "zz", "sss", "ssssa"])
def test_it_goes_on_from_a_checkpoint(steps: str) -> None:
    """State goes through JSON, and a resumed watch tells what the old one would have; patience is the new config's."""
    watch, resumed = StallDetector(patience=3), StallDetector(patience=3)
    kinds_told(watch, steps)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed == watch
    assert kinds_told(resumed, "sszz") == kinds_told(watch, "sszz")
    assert "patience" not in watch.state_dict()
