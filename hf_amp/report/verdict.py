"""A run's verdict: one sentence, said from what its log tells."""

from __future__ import annotations

import enum
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from hf_amp.events import Cause, EventKind
from hf_amp.report.reader import Incident, PrecisionChange, RunHistory

SKIP_RATE_TO_WATCH = 0.01
"""The catalogue's limit for `skip_rate` after the first steps."""
FIRST_STEPS = 20
"""Skips up to here are the search for a scale. From 2^16 to 2^-4, far below what a sound model needs, takes as many."""
HEADROOM_TO_WATCH_BITS = 1.0
"""The catalogue's limit for `headroom_bits`."""

CAUSE_IN_WORDS = defaultdict(
    lambda: "a cause that this version does not know",
    {
        "SCALE": "the scale was too large",
        "ACTIVATION": "an activation left the range",
        "INPUT": "the batch held non-finite values",
        "WEIGHTS": "parameters were not finite",
        "LOSS": "the loss was not finite",
        "UNKNOWN": "no cause could be shown",
    },
)


class Level(str, enum.Enum):
    """How a run is, from best to worst."""

    SOUND = "sound"
    WATCH = "watch"
    BROKEN = "broken"
    EMPTY = "empty"


@dataclass(frozen=True)
class Verdict:
    """How a run is, and a sentence for people that says so."""

    level: Level
    sentence: str


def verdict_on(run: RunHistory) -> Verdict:
    """The verdict on a run, finished or not. The first of these that holds: nothing was trained, parameters are not
    finite, hopeless, no step was applied, skips that no scale cures, many skips, precision that fell back, little headroom, sound.
    """
    skipped, total = _skipped(run), _steps(run)
    if total == 0:
        return Verdict(Level.EMPTY, "Nothing has been trained here yet: the log tells of no optimizer step.")
    so_far = "" if run.ended else " so far"
    if run.skips[Cause.WEIGHTS.value].points:
        first = run.skips[Cause.WEIGHTS.value].steps[0]
        return Verdict(
            Level.BROKEN,
            f"Broken since step {first:,}: parameters hold non-finite values, so no step can mend it; go back to the last "
            "good checkpoint.",
        )
    stalled = _hopeless(run)
    if stalled is not None and skipped < total:
        return Verdict(Level.BROKEN, f"Hopeless since step {stalled.last_step:,}: {stalled.message}")
    if skipped >= total:
        return Verdict(
            Level.BROKEN,
            f"Nothing was learned{so_far}: all {_count(total, 'step')} were skipped{_causes(run)}.",
        )
    if any(incident.event == EventKind.SCALE_AT_FLOOR.value for incident in run.incidents):
        return Verdict(
            Level.BROKEN,
            f"The gradients overflowed at the smallest scale, so FP16 is not enough for this model: {skipped:,} of "
            f"{_count(total, 'step')} were skipped{_causes(run)}.",
        )
    return _verdict_on_a_learning_run(run, skipped, total, so_far)


def _verdict_on_a_learning_run(run: RunHistory, skipped: int, total: int, so_far: str) -> Verdict:
    late = skips_after(run, FIRST_STEPS)
    reported = _told(skipped, total, so_far) + _causes(run)
    if late > max(1.0, SKIP_RATE_TO_WATCH * total):
        return Verdict(Level.WATCH, f"Learning, but with many skips: {reported}.")
    unresolved = sum(run.skips[cause.value].points for cause in Cause if cause is not Cause.SCALE)
    changed_modules = run.changed_modules
    if changed_modules:
        return Verdict(
            Level.WATCH, f"Learning, with help: {_in_which_precision(changed_modules)}; {reported}."
        )
    if unresolved:
        return Verdict(Level.WATCH, f"Learning, but some skips were not the scale's doing: {reported}.")
    headroom = run.figures["headroom_bits"].newest if "headroom_bits" in run.figures else None
    if headroom is not None and headroom < HEADROOM_TO_WATCH_BITS and not late:
        return Verdict(
            Level.SOUND,
            f"Sound, with an overflow near: {reported}; {max(headroom, 0):.1f} bits of headroom are left.",
        )
    return Verdict(Level.SOUND, f"Sound: {reported}.")


def _in_which_precision(changed_modules: Mapping[str, PrecisionChange]) -> str:
    if "" in changed_modules:
        change = changed_modules[""]
        return (
            f"the whole model has run in {change.after} instead of {change.before} since step {change.step:,}"
        )
    since = min(change.step for change in changed_modules.values())
    precisions = " and ".join(sorted({change.after for change in changed_modules.values()}))
    one = len(changed_modules) == 1
    return (
        f"{_count(len(changed_modules), 'module')}, {next(iter(changed_modules))}{'' if one else ' among them'}, "
        f"{'has' if one else 'have'} run in {precisions} since step {since:,}"
    )


def _hopeless(run: RunHistory) -> Incident | None:
    """That nothing can be learned any more, where that was told and no step has been applied since."""
    reported = [incident for incident in run.incidents if incident.event == EventKind.STALLED.value]
    if not reported:
        return None
    newest = max(reported, key=lambda incident: incident.last_step)
    return newest if skips_after(run, newest.last_step) >= run.newest_step - newest.last_step else None


def skips_after(run: RunHistory, step: int) -> int:
    """Skipped steps later than `step`; of a long series, at least."""
    early = sum(sum(1 for at in series.steps if at <= step) for series in run.skips.values())
    return max(0, sum(series.points for series in run.skips.values()) - early)


def _steps(run: RunHistory) -> int:
    figures = run.latest
    counted = figures.get("applied_steps", 0) + figures.get("skipped_steps", 0)
    return int(max(counted, _skipped(run)))


def _skipped(run: RunHistory) -> int:
    return int(max(run.latest.get("skipped_steps", 0), sum(run.skipped_by_cause.values())))


def _told(skipped: int, total: int, so_far: str) -> str:
    if not skipped:
        return f"{'the one step was' if total == 1 else f'all {total:,} steps were'} applied{so_far}"
    share = f"{100 * skipped / total:.2g}%"
    return f"{skipped:,} of {_count(total, 'step')} ({share}) {'was' if skipped == 1 else 'were'} skipped{so_far}"


def _causes(run: RunHistory) -> str:
    causes = run.skipped_by_cause
    if not causes:
        return ""
    if len(causes) == 1:
        return f" ({CAUSE_IN_WORDS[next(iter(causes))]})"
    return " (" + ", ".join(f"{CAUSE_IN_WORDS[cause]}: {n:,}" for cause, n in causes.most_common()) + ")"


def _count(number: float, noun: str) -> str:
    if not math.isfinite(number):
        return f"{number} {noun}s"
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"
