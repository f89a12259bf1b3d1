"""What a log says of its run, for people and for JSON: the verdict in one sentence, and the newest figures."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_amp.events import Cause, EventKind, join_names
from hf_amp.monitoring.metrics import CATALOGUE
from hf_amp.precision import PrecisionMode
from hf_amp.report.reader import Incident, LoggedEvent, RunHistory, Series

SKIP_RATE_TO_WATCH = 0.01
"""The catalogue's limit for `skip_rate` after the first steps."""
FIRST_STEPS = 20
"""Skips up to here are the search for a scale: from 2^16 to 2^-4, smaller than a working model needs, takes as many."""
LAST_STEPS = 20
"""As many skips at the end of a log, without an applied step between them, are no search for a scale."""
STREAK = 5
"""As many leave in doubt whether the run trains."""
RECENT_STEPS = 100
"""Of these most were applied in a run that trains, however many were before."""
LAST_LOSSES = 3
"""As many logged losses in a row that are not finite are more than a bad batch."""
HEADROOM_TO_WATCH_BITS = 1.0
"""The catalogue's limit for `headroom_bits`."""

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
    skipped = max(int(run.latest.get("skipped_steps", 0)), run.skipped_by_cause.total())
    total = max(skipped, sum(int(run.latest.get(name, 0)) for name in ("applied_steps", "skipped_steps")))
    if parted := _newest(run, EventKind.RANKS_PARTED):
        return Verdict(Level.BROKEN, f"Ended after step {parted.last_step:,}: {parted.message}")
    if rewound := _newest(run, EventKind.REWOUND):
        total = max(total, run.newest_step)  # counters went back with the run
    if total <= 0:
        return Verdict(Level.EMPTY, "Nothing has been trained here yet: no optimizer step is in the log.")
    counted = _steps_in_words(run, skipped, total) + _causes_in_words(run)
    failure = _failure(run, skipped, total, counted)
    if failure is not None:
        return Verdict(Level.BROKEN, failure)
    if _newest_losses_lost(run):
        return Verdict(Level.WATCH, f"In doubt: the newest logged loss is not finite; {counted}.")
    if _skips_since(run, run.newest_step - STREAK):
        return Verdict(Level.WATCH, f"In doubt: the newest {STREAK} steps were all skipped; {counted}.")
    if rewound:
        times = "once" if rewound.count == 1 else f"{rewound.count:,} times"
        at = f"at step {rewound.last_step:,} to step {formatted(rewound.after)}"
        return Verdict(Level.WATCH, f"Training, after going back {times} to a good checkpoint, last {at}: {counted}.")
    late_skips = _skips_after(run, FIRST_STEPS)
    if late_skips > max(1.0, SKIP_RATE_TO_WATCH * total):
        return Verdict(Level.WATCH, f"Training, but with many skips: {counted}.")
    if frozen := _newest(run, EventKind.FROZEN):
        which = f"{_count(len(frozen.modules), 'parameter')} ({join_names(frozen.modules)})"
        return Verdict(
            Level.WATCH,
            f"Training, but rounding loses the updates of {which} since step {frozen.last_step:,}: {counted}.",
        )
    if fp8 := _newest(run, EventKind.FP8_DAMAGE):
        return Verdict(Level.WATCH, f"Training, but FP8 does damage in {join_names(fp8.modules)}: {counted}.")
    if changed := {
        name: it for name, it in run.changed_modules.items() if it.cause or (it.step and not it.by_choice)
    }:  # else by choice
        return Verdict(Level.WATCH, f"Training, {_precision_in_words(changed)}: {counted}.{_cure_of_the_model(run)}")
    if set(run.skipped_by_cause) - {Cause.SCALE.value}:
        return Verdict(Level.WATCH, f"Training, but not every skip came from the scale: {counted}.")
    headroom = run.latest.get("headroom_bits", math.inf)
    if headroom < HEADROOM_TO_WATCH_BITS and not late_skips:
        left = f"{max(headroom, 0):.1f} bits of headroom are left"
        return Verdict(Level.SOUND, f"Training, with an overflow near: {counted}; {left}.")
    return Verdict(Level.SOUND, f"Training: {counted}.")


def _failure(run: RunHistory, skipped: int, total: int, counted: str) -> str | None:
    """Why this run does not train, where it does not: a sentence."""
    rewound = _newest(run, EventKind.REWOUND)
    gone_back = rewound.last_step if rewound else -1
    if lost := [step for step in run.skips.get(Cause.WEIGHTS.value, Series()).steps if step > gone_back]:
        return (
            f"Not training since step {lost[0]:,}: parameters hold non-finite values, which no "
            "step can fix; go back to the last good checkpoint."
        )
    stalled = _newest(run, EventKind.STALLED)
    moves_nothing = run.latest.get("grad_norm") == 0
    if (
        stalled
        and stalled.last_step > gone_back
        and skipped < total
        and (moves_nothing or _skips_since(run, stalled.last_step))
    ):
        return f"Not training since step {stalled.last_step:,}: {stalled.message}"
    if skipped >= total or _skips_since(run, run.newest_step - LAST_STEPS):
        newest = "" if skipped >= total else f"the newest {LAST_STEPS} steps were all skipped; "
        return f"Not training: {newest}{counted}."
    if _newest(run, EventKind.SCALE_AT_FLOOR) is not None:
        return f"The gradients overflowed at the smallest scale, so FP16 is not enough for this model: {counted}."
    if 2 * skipped > total:
        return f"Hardly training: {counted}."
    recent = _skips_after(run, run.newest_step - RECENT_STEPS)
    if 2 * recent > RECENT_STEPS:
        return f"Hardly training: {recent} of the newest {RECENT_STEPS} steps were skipped; {counted}."
    not_finite = _newest_losses_lost(run)
    if not_finite and len(not_finite) in (LAST_LOSSES, len(_losses(run))):
        return f"Not training: no finite loss has been logged since step {not_finite[-1]:,}; {counted}."
    return None


def _precision_in_words(changed: Mapping[str, LoggedEvent]) -> str:
    if "" in changed:
        change = changed[""]
        return f"the whole model in {change.after} instead of {change.before} since step {change.step:,}"
    precisions = " and ".join(sorted({str(change.after) for change in changed.values()}))
    since = min(change.step for change in changed.values())
    return f"{_count(len(changed), 'module')} in {precisions} since step {since:,} ({join_names(list(changed))})"


def _cure_of_the_model(run: RunHistory) -> str:
    """What makes the model itself fit FP16, where activations left the range: a sentence, or nothing."""
    in_fp32 = any(module and change.after == PrecisionMode.FP32 for module, change in run.changed_modules.items())
    if not in_fp32 or Cause.ACTIVATION.value not in run.skipped_by_cause:
        return ""
    return " `hf-amp rescale MODEL -o OUT` looks for a checkpoint of the same function that needs no module in FP32."


def _newest(run: RunHistory, kind: EventKind) -> Incident | None:
    found = [incident for incident in run.incidents if incident.event == kind]
    return max(found, key=lambda incident: incident.last_step, default=None)


def _skips_after(run: RunHistory, step: int) -> int:
    return sum(series.count_after(step) for series in run.skips.values())


def _skips_since(run: RunHistory, step: int) -> bool:
    """Whether every step after this one was skipped."""
    return _skips_after(run, step) >= run.newest_step - step


def _newest_losses_lost(run: RunHistory) -> list[int]:
    """Steps of the newest logged losses, the newest first, up to the first finite one; three at the most."""
    newest = _losses(run)[-LAST_LOSSES:][::-1]
    return [step for step, _ in itertools.takewhile(lambda point: not math.isfinite(point[1]), newest)]


def _losses(run: RunHistory) -> list[tuple[int, float]]:
    """(step, loss) as logged; NaN for what a loop that logs no loss has seen to be none but non-finite ones."""
    if "loss" in run.figures:
        return list(run.figures["loss"])
    return [(s, math.nan if share == 1 else 0.0) for s, share in run.figures.get("non_finite_loss_fraction", ())]


def _steps_in_words(run: RunHistory, skipped: int, total: int) -> str:
    so_far = "" if run.ended else " so far"
    if skipped in (0, total):
        everything = "the one step was" if total == 1 else f"all {total:,} steps were"
        return f"{everything} {'skipped' if skipped else 'applied'}{so_far}"
    share = f"{100 * skipped / total:.3g}%"
    return f"{skipped:,} of {_count(total, 'step')} ({share}) {'was' if skipped == 1 else 'were'} skipped{so_far}"


def _causes_in_words(run: RunHistory) -> str:
    """The causes, grouped by what to do about them."""
    causes = run.skipped_by_cause
    groups: dict[str, list[str]] = {}
    for cause, count in causes.most_common():
        known = Cause.__members__.get(cause)
        words = "a cause that this version does not know" if known is None else known.facts.in_words
        group = groups.setdefault("look at the events" if known is None else known.facts.to_do, [])
        group.append(words if len(causes) == 1 else f"{words} {_count(count, 'time')}")
    grouped = "; ".join(f"{to_do}: {', '.join(group)}".removeprefix(": ") for to_do, group in groups.items())
    return f" ({grouped})" if grouped else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def formatted(value: object) -> str:
    """A figure for people: whole numbers with separators, others with four digits; what is no number as it is."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return str(value)
    return f"{int(value):,}" if value == int(value) and abs(value) < 2**53 else f"{value:.4g}"


def figures_of(run: RunHistory) -> dict[str, Any]:
    """Plain data, fit for JSON: the verdict, the newest figures, skips by cause, incidents and changes of precision."""
    verdict = verdict_on(run)
    facts = ["run_id", "state", "started", "newest", "newest_step", "what_ran"]
    facts += ["resumed_at", "former_runs", "lines", "torn_lines"]
    shown = ("event", "modules", "first_step", "last_step", "count", "message", "before", "after")
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
        "incidents": [{**{name: getattr(it, name) for name in shown}, "cause": it.cause or None} for it in run.incidents],
        "precision_changes": [{**asdict(change), "cause": change.cause or None} for change in run.precision_changes],
    }  # fmt: skip
