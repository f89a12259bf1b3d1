"""The verdict on a run is one true sentence."""

from __future__ import annotations

from typing import Any

import pytest

from hf_amp.report.verdict import Level, verdict_on
from tests.report.test_run_history import changed, history, line, skipped, started


def metrics(step: int, skips: int, **figures: float) -> dict[str, Any]:
    return line("metrics", step, applied_steps=step - skips, skipped_steps=skips, **figures)


CASES: dict[str, tuple[list[dict[str, Any]], Level, str]] = {
    "nothing": ([], Level.EMPTY, "Nothing has been trained here yet"),
    "only begun": ([started()], Level.EMPTY, "no optimizer step"),
    "all applied": (
        [started(), metrics(100, 0), line("training_ended", 100)],
        Level.SOUND,
        "Sound: all 100 steps were applied.",
    ),
    "still running": ([started(), metrics(100, 0)], Level.SOUND, "Sound: all 100 steps were applied so far."),
    "a scale was looked for": (
        [started(), skipped(1), skipped(2), metrics(1000, 2), line("training_ended", 1000)],
        Level.SOUND,
        "Sound: 2 of 1,000 steps (0.2%) were skipped (the scale was too large).",
    ),
    "one skip": (
        [started(), skipped(50), metrics(1000, 1), line("training_ended", 1000)],
        Level.SOUND,
        "Sound: 1 of 1,000 steps (0.1%) was skipped",
    ),
    "many late skips": (
        [started(), *map(skipped, range(50, 70)), metrics(100, 20)],
        Level.WATCH,
        "Learning, but with many skips: 20 of 100 steps (20%) were skipped so far",
    ),
    "data": (
        [started(), skipped(3, "INPUT"), metrics(1000, 1)],
        Level.WATCH,
        "some skips were not the scale's doing: 1 of 1,000 steps (0.1%) was skipped so far (the batch held non-finite values).",
    ),
    "fallback": (
        [started(), skipped(3, "ACTIVATION"), changed(3, "MIXED", "FP32", "h.1"), metrics(1000, 1)],
        Level.WATCH,
        "Learning, with help: 1 module, h.1, has run in FP32 since step 3",
    ),
    "the whole model fell back": (
        [started(), changed(3, "MIXED", "BF16"), metrics(1000, 0)],
        Level.WATCH,
        "the whole model has run in BF16 instead of MIXED since step 3",
    ),
    "came back": (
        [started(), changed(3, "MIXED", "FP32", "a"), changed(9, "FP32", "MIXED", "a"), metrics(1000, 0)],
        Level.SOUND,
        "Sound",
    ),
    "little headroom": (
        [started(), metrics(100, 0, headroom_bits=0.4)],
        Level.SOUND,
        "Sound, with an overflow near: all 100 steps were applied so far; 0.4 bits of headroom are left.",
    ),
    "poisoned": (
        [started(), skipped(7, "WEIGHTS"), metrics(1000, 900)],
        Level.BROKEN,
        "Broken since step 7: parameters hold non-finite values",
    ),
    "nothing applied": (
        [started(), *map(skipped, range(1, 11)), metrics(10, 10)],
        Level.BROKEN,
        "Nothing was learned so far: all 10 steps were skipped",
    ),
    "hopeless": (
        [
            started(),
            metrics(40, 0),
            line("stalled", 50, message="this run learns nothing: because."),
            *map(skipped, range(51, 61)),
            metrics(60, 20),
        ],
        Level.BROKEN,
        "Hopeless since step 50: this run learns nothing: because.",
    ),
    "hopeless, and then not": (
        [
            started(),
            line("stalled", 50, message="this run learns nothing."),
            *map(skipped, range(51, 55)),
            metrics(1000, 5),
        ],
        Level.SOUND,
        "Sound: 5 of 1,000 steps",
    ),
    "floor": (
        [started(), skipped(1), line("scale_at_floor", 1), metrics(100, 1)],
        Level.BROKEN,
        "overflowed at the smallest scale",
    ),
}


@pytest.mark.parametrize(("lines", "level", "words"), CASES.values(), ids=CASES)
def test_the_verdict_says_what_became_of_the_run(
    lines: list[dict[str, Any]], level: Level, words: str
) -> None:
    """The worst that holds is said, with its numbers, in one sentence."""
    verdict = verdict_on(history(*lines))
    assert verdict.level is level
    assert words in verdict.sentence
    assert verdict.sentence.endswith(".")
