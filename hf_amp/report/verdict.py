"""What a log says of its run, for people and for JSON: the verdict in one sentence, and the newest figures."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_amp.events import Cause, EventKind
from hf_amp.monitoring.metrics import CATALOGUE
from hf_amp.report.reader import Incident, LoggedEvent, RunHistory

SKIP_RATE_TO_WATCH = 0.01
"""The catalogue's limit for `skip_rate` after the first steps."""
FIRST_STEPS = 20
"""Skips up to here are the search for a scale: from 2^16 to 2^-4, smaller than a working model needs, takes as many."""
LAST_STEPS = 20
"""As many skips at the end of a log, without an applied step between them, are no search for a scale."""
LAST_LOSSES = 3
"""As many logged losses in a row that are not finite are more than a bad batch."""
HEADROOM_TO_WATCH_BITS = 1.0
"""The catalogue's limit for `headroom_bits`."""

CAUSE_IN_WORDS = {
    "SCALE": "the scale was too large",
    "ACTIVATION": "an activation left the range",
    "INPUT": "the batch held non-finite values",
    "WEIGHTS": "parameters were not finite",
    "LOSS": "the loss was not finite",
    "UNKNOWN": "no cause could be confirmed",
}
_UNITS = {metric.name: metric.unit for metric in CATALOGUE}


class Level(str, enum.Enum):
    """How a run is, from best to worst. Scripts read these names in the JSON of `hf-amp report`."""

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
    """The verdict on a run, finished or not: the worst that holds."""
    skipped = _skipped(run)
    total = max(skipped, sum(int(run.latest.get(name, 0)) for name in ("applied_steps", "skipped_steps")))
    if total <= 0:
        return Verdict(Level.EMPTY, "Nothing has been trained here yet: no optimizer step is in the log.")
    counted = _steps_in_words(run, skipped, total) + _causes_in_words(run)
    failure = _failure(run, skipped, total, counted)
    if failure is not None:
        return Verdict(Level.BROKEN, failure)
    remark = _remark(run, total)
    if remark is not None:
        return Verdict(Level.WATCH, f"Training, {remark}: {counted}.")
    headroom = run.latest.get("headroom_bits", math.inf)
    if headroom < HEADROOM_TO_WATCH_BITS and not _skips_after(run, FIRST_STEPS):
        left = f"{max(headroom, 0):.1f} bits of headroom are left"
        return Verdict(Level.SOUND, f"Training, with an overflow near: {counted}; {left}.")
    return Verdict(Level.SOUND, f"Training: {counted}.")


def _failure(run: RunHistory, skipped: int, total: int, counted: str) -> str | None:
    """Why this run does not train, where it does not: a sentence."""
    if Cause.WEIGHTS.value in run.skipped_by_cause:
        return (
            f"Not training since step {run.skips[Cause.WEIGHTS.value].steps[0]:,}: parameters hold non-finite values, which no "
            "step can fix; go back to the last good checkpoint."
        )
    stalled = _newest(run, EventKind.STALLED)
    if stalled is not None and skipped < total and _still_stalled(run, stalled.last_step):
        return f"Not training since step {stalled.last_step:,}: {stalled.message}"
    if skipped >= total or _skips_since(run, run.newest_step - LAST_STEPS):
        newest = "" if skipped >= total else f"the newest {LAST_STEPS} steps were all skipped; "
        return f"Not training: {newest}{counted}."
    if _newest(run, EventKind.SCALE_AT_FLOOR) is not None:
        return f"The gradients overflowed at the smallest scale, so FP16 is not enough for this model: {counted}."
    if 2 * skipped > total:
        return f"Hardly training: {counted}."
    lost = _newest_losses_lost(run)
    if lost and len(lost) in (LAST_LOSSES, len(run.figures["loss"])):
        return f"Not training: no finite loss has been logged since step {lost[-1]:,}; {counted}."
    return None


def _remark(run: RunHistory, total: int) -> str | None:
    """What to watch in a run that trains, where there is something."""
    if _newest_losses_lost(run):
        return "but the newest logged loss is not finite"
    if _skips_after(run, FIRST_STEPS) > max(1.0, SKIP_RATE_TO_WATCH * total):
        return "but with many skips"
    if run.changed_modules:
        return _precision_in_words(run.changed_modules)
    if set(run.skipped_by_cause) - {Cause.SCALE.value}:
        return "but not every skip came from the scale"
    return None


def _precision_in_words(changed: Mapping[str, LoggedEvent]) -> str:
    if "" in changed:
        change = changed[""]
        return f"the whole model in {change.after} instead of {change.before} since step {change.step:,}"
    precisions = " and ".join(sorted({str(change.after) for change in changed.values()}))
    since = min(change.step for change in changed.values())
    named = next(iter(changed)) + (" among them" if len(changed) > 1 else "")
    return f"{_count(len(changed), 'module')} in {precisions} since step {since:,} ({named})"


def _newest(run: RunHistory, kind: EventKind) -> Incident | None:
    found = [incident for incident in run.incidents if incident.event == kind]
    return max(found, key=lambda incident: incident.last_step, default=None)


def _skips_after(run: RunHistory, step: int) -> int:
    return sum(series.count_after(step) for series in run.skips.values())


def _skips_since(run: RunHistory, step: int) -> bool:
    """Whether every step after this one was skipped."""
    return _skips_after(run, step) >= run.newest_step - step


def _still_stalled(run: RunHistory, step: int) -> bool:
    return _skips_since(run, step) or run.latest.get("grad_norm") == 0


def _skipped(run: RunHistory) -> int:
    return max(int(run.latest.get("skipped_steps", 0)), run.skipped_by_cause.total())


def _newest_losses_lost(run: RunHistory) -> list[int]:
    """Steps of the newest logged losses, the newest first, up to the first finite one; three at the most."""
    if "loss" not in run.figures:
        return []
    losses = run.figures["loss"]
    newest = list(zip(losses.steps[-LAST_LOSSES:], losses.values[-LAST_LOSSES:], strict=True))[::-1]
    return [step for step, _ in itertools.takewhile(lambda point: not math.isfinite(point[1]), newest)]


def _steps_in_words(run: RunHistory, skipped: int, total: int) -> str:
    so_far = "" if run.ended else " so far"
    if skipped in (0, total):
        everything = "the one step was" if total == 1 else f"all {total:,} steps were"
        return f"{everything} {'skipped' if skipped else 'applied'}{so_far}"
    share = f"{100 * skipped / total:.3g}%"
    return f"{skipped:,} of {_count(total, 'step')} ({share}) {'was' if skipped == 1 else 'were'} skipped{so_far}"


def _causes_in_words(run: RunHistory) -> str:
    causes = [
        (CAUSE_IN_WORDS.get(cause, "a cause that this version does not know"), count)
        for cause, count in run.skipped_by_cause.most_common()
    ]
    if len(causes) == 1:
        return f" ({causes[0][0]})"
    return f" ({', '.join(f'{words}: {count:,}' for words, count in causes)})" if causes else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def formatted(value: float) -> str:
    """A figure for people: whole numbers with separators, others with four digits."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 2**53:
        return f"{int(value):,}"
    return f"{value:.4g}"


def figures_of(run: RunHistory) -> dict[str, Any]:
    """Plain data, fit for JSON: the verdict, the newest figures, skips by cause, incidents and changes of precision."""
    verdict = verdict_on(run)
    facts = (
        "run_id",
        "state",
        "started",
        "newest",
        "newest_step",
        "what_ran",
        "resumed_at",
        "former_runs",
        "lines",
        "torn_lines",
    )
    return {
        "name": run.name,
        "log": str(run.path),
        "verdict": {"level": verdict.level.value, "sentence": verdict.sentence},
        **{name: getattr(run, name) for name in facts},
        "figures": {
            name: {"value": value if math.isfinite(value) else str(value), "unit": _UNITS.get(name, "")}
            for name, value in run.latest.items()
        },
        "skipped_by_cause": dict(run.skipped_by_cause),
        "incidents": [_plain_incident(incident) for incident in run.incidents],
        "precision_changes": [{**asdict(change), "cause": change.cause or None} for change in run.precision_changes],
    }  # fmt: skip


def _plain_incident(incident: Incident) -> dict[str, Any]:
    names = ("event", "modules", "first_step", "last_step", "count", "message", "before", "after")
    return {**{name: getattr(incident, name) for name in names}, "cause": incident.cause or None}
