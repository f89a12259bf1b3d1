"""The verdict on a run is one true sentence."""

from __future__ import annotations

from typing import Any

from hf_amp.report.verdict import Level, verdict_on
from tests.report.test_run_history import changed, history, line, skipped, started


def metrics(step: int, skips: int, **figures: Any) -> dict[str, Any]:
    return line("metrics", step, applied_steps=step - skips, skipped_steps=skips, **figures)


CASES: dict[str, tuple[list[dict[str, Any]], Level, str]] = {
    "nothing": ([], Level.EMPTY, "Nothing has been trained here yet"),
    "only begun": ([started()], Level.EMPTY, "no optimizer step"),
    "all applied": (
        [started(), metrics(100, 0), line("training_ended", 100)],
        Level.SOUND,
        "Training: all 100 steps were applied.",
    ),
    "still running": ([started(), metrics(100, 0)], Level.SOUND, "Training: all 100 steps were applied so far."),
    "a scale was looked for": (
        [started(), skipped(1), skipped(2), metrics(1000, 2), line("training_ended", 1000)],
        Level.SOUND,
        "Training: 2 of 1,000 steps (0.2%) were skipped (the scale was too large).",
    ),
    "one skip": (
        [started(), skipped(50), metrics(1000, 1), line("training_ended", 1000)],
        Level.SOUND,
        "Training: 1 of 1,000 steps (0.1%) was skipped",
    ),
    "many late skips": (
        [started(), *map(skipped, range(50, 70)), metrics(100, 20)],
        Level.WATCH,
        "Training, but with many skips: 20 of 100 steps (20%) were skipped so far",
    ),
    "gone back, with skips that were left out": (
        [
            started(),
            *map(skipped, range(151, 154)),
            line("rewound", 154, before=154, after=120),
            line("metrics", 200, applied_steps=166, skipped_steps=0),
        ],
        Level.WATCH,
        "Training, after going back once to a good checkpoint, last at step 154 to step 120: 3 of 200 steps (1.5%) were skipped so far",
    ),
    "ranks that wait for each other": (
        [started(), metrics(10, 0), line("ranks_parted", 10, message="ranks have gone different ways: rank 0 waits.")],
        Level.BROKEN,
        "Ended after step 10: ranks have gone different ways: rank 0 waits.",
    ),
    "ranks that waited before the run was resumed": (
        [started(), metrics(10, 0), line("ranks_parted", 10, message="-"), started(10), metrics(20, 0)],
        Level.SOUND,
        "Training: all 20 steps were applied so far.",
    ),
    "data": (
        [started(), skipped(3, "INPUT"), metrics(1000, 1)],
        Level.WATCH,
        "Training, but not every skip came from the scale: 1 of 1,000 steps (0.1%) was skipped so far (fix the data or the loss: the batch held non-finite values).",
    ),
    "several causes, by what to do": (
        [
            started(),
            skipped(1),
            *(skipped(s, "INPUT") for s in (30, 40, 50)),
            skipped(60, "LOSS"),
            skipped(70, "OF_A_LATER_VERSION"),
            metrics(1000, 6),
        ],
        Level.WATCH,
        "(fix the data or the loss: the batch held non-finite values 3 times, the loss was not finite 1 time; "
        "the scale was too large 1 time; look at the events: a cause that this version does not know 1 time).",
    ),
    "frozen": (
        [
            started(),
            line("frozen", 8, message="2 of 9 stand still", modules=["norm.weight", "h.weight"]),
            metrics(100, 0),
        ],
        Level.WATCH,
        "Training, but rounding loses the updates of 2 parameters (norm.weight, h.weight) since step 8: all 100 steps were applied so far.",
    ),
    "fallback": (
        [started(), skipped(3, "ACTIVATION"), changed(3, "MIXED", "FP32", "h.1"), metrics(1000, 1)],
        Level.WATCH,
        "Training, 1 module in FP32 since step 3 (h.1): 1 of 1,000 steps",
    ),
    "fallback, and what cures the model": (
        [started(), skipped(3, "ACTIVATION"), changed(3, "MIXED", "FP32", "h.1"), metrics(1000, 1)],
        Level.WATCH,
        ". `hf-amp rescale MODEL -o OUT` looks for a checkpoint of the same function that needs no module in FP32.",
    ),
    "the whole model fell back": (
        [started(), changed(3, "MIXED", "BF16"), metrics(1000, 0)],
        Level.WATCH,
        "Training, the whole model in BF16 instead of MIXED since step 3: all 1,000 steps were applied",
    ),
    "came back": (
        [started(), changed(3, "MIXED", "FP32", "a"), changed(9, "FP32", "MIXED", "a"), metrics(1000, 0)],
        Level.SOUND,
        "Training: all 1,000 steps were applied",
    ),
    "little headroom": (
        [started(), metrics(100, 0, headroom_bits=0.4)],
        Level.SOUND,
        "Training, with an overflow near: all 100 steps were applied so far; 0.4 bits of headroom are left.",
    ),
    "weights": (
        [started(), skipped(7, "WEIGHTS"), metrics(1000, 900)],
        Level.BROKEN,
        "Not training since step 7: parameters hold non-finite values",
    ),
    "nothing applied": (
        [started(), *map(skipped, range(1, 11)), metrics(10, 10)],
        Level.BROKEN,
        "Not training: all 10 steps were skipped so far",
    ),
    "stalled": (
        [
            started(),
            metrics(40, 0),
            line("stalled", 50, message="this run learns nothing: because."),
            *map(skipped, range(51, 61)),
            metrics(60, 20),
        ],
        Level.BROKEN,
        "Not training since step 50: this run learns nothing: because.",
    ),
    "stalled, and then not": (
        [
            started(),
            line("stalled", 50, message="this run learns nothing."),
            *map(skipped, range(51, 55)),
            metrics(1000, 5),
        ],
        Level.SOUND,
        "Training: 5 of 1,000 steps",
    ),
    "stalled with gradients of zero": (
        [started(), line("stalled", 50, message="all gradients are zero."), metrics(90, 0, grad_norm=0.0)],
        Level.BROKEN,
        "Not training since step 50: all gradients are zero.",
    ),
    "the end skipped": (
        [started(), metrics(900, 0), *map(skipped, range(981, 1001)), metrics(1000, 20)],
        Level.BROKEN,
        "Not training: the newest 20 steps were all skipped; 20 of 1,000 steps (2%) were skipped so far",
    ),
    "most skipped": (
        [started(), *map(skipped, range(1, 90)), metrics(100, 89)],
        Level.BROKEN,
        "Hardly training: 89 of 100 steps (89%) were skipped so far (the scale was too large).",
    ),
    "nearly all skipped": ([started(), metrics(1000, 999)], Level.BROKEN, "999 of 1,000 steps (99.9%)"),
    "a loss of NaN": (
        [started(), metrics(1, 0, loss=2.0), *(metrics(s, 0, loss="nan") for s in (2, 3, 4))],
        Level.BROKEN,
        "Not training: no finite loss has been logged since step 2; all 4 steps were applied so far.",
    ),
    "never a finite loss": (
        [started(), metrics(9, 0, loss="inf")],
        Level.BROKEN,
        "no finite loss has been logged since step 9",
    ),
    "one loss of NaN": (
        [started(), metrics(1, 0, loss=2.0), metrics(2, 0, loss="nan")],
        Level.WATCH,
        "In doubt: the newest logged loss is not finite; all 2 steps were applied so far.",
    ),
    "NaN seen in a loop that logs no loss": (
        [started(), *(metrics(s, 0, non_finite_loss_fraction=1.0) for s in (10, 20, 30))],
        Level.BROKEN,
        "Not training: no finite loss has been logged since step 10;",
    ),
    "a streak at the end": (
        [started(), metrics(94, 0), *(skipped(s, "LOSS") for s in range(95, 100)), metrics(99, 5)],
        Level.WATCH,
        "In doubt: the newest 5 steps were all skipped; 5 of 99 steps",
    ),
    "most of the newest skipped": (
        [started(), metrics(900, 0), *(skipped(s, "LOSS") for s in range(901, 1001) if s % 5), metrics(1000, 80)],
        Level.BROKEN,
        "Hardly training: 80 of the newest 100 steps were skipped; 80 of 1,000 steps (8%)",
    ),
    "a loss of NaN long ago": (
        [started(), metrics(1, 0, loss="nan"), metrics(2, 0, loss=2.0)],
        Level.SOUND,
        "Training: all 2 steps",
    ),
    "a cause of a later version": (
        [started(), skipped(3, "OF_A_LATER_VERSION"), metrics(1000, 1)],
        Level.WATCH,
        "(look at the events: a cause that this version does not know).",
    ),
    "floor": (
        [started(), skipped(1), line("scale_at_floor", 1), metrics(100, 1)],
        Level.BROKEN,
        "overflowed at the smallest scale",
    ),
}


def test_the_verdict_says_what_became_of_the_run() -> None:
    """The worst that holds is said, with its numbers, in one sentence."""
    for name, (lines, level, words) in CASES.items():
        verdict = verdict_on(history(*lines))
        assert words in verdict.sentence, f"{name}: {verdict}"
        assert verdict.level is level, f"{name}: {verdict}"
        assert verdict.sentence.endswith("."), name


def test_no_run_that_fails_is_said_to_train() -> None:
    """What does not train, or not for sure, is never called training, whatever else is in its log."""
    failing = [(lines, words) for lines, level, words in CASES.values() if level is Level.BROKEN or "In doubt" in words]
    sentences = [verdict_on(history(*lines)).sentence for lines, _ in failing]
    assert [sentence for sentence in sentences if sentence.startswith("Training")] == []
