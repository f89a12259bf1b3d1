"""A run in figures: what the page shows in tables, and `--json` prints."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from hf_amp.monitoring.incidents import Incident, PrecisionChange
from hf_amp.monitoring.metrics import CATALOGUE
from hf_amp.monitoring.run_history import RunHistory
from hf_amp.monitoring.verdict import verdict_on

_UNITS = {metric.name: metric.unit for metric in CATALOGUE}


def figures_of(run: RunHistory) -> dict[str, Any]:
    """Plain data, fit for JSON: the verdict, the newest figures, skips by cause, incidents and changes of precision."""
    verdict = verdict_on(run)
    return {
        "name": run.name,
        "log": str(run.path),
        "run_id": run.run_id,
        "verdict": {"level": verdict.level.value, "sentence": verdict.sentence},
        "state": state_of(run),
        "started": run.started,
        "newest": run.newest,
        "newest_step": run.newest_step,
        "what_ran": run.what_ran,
        "resumed_at": run.resumed_at,
        "former_runs": run.former_runs,
        "lines": run.lines,
        "torn_lines": run.torn_lines,
        "figures": {
            name: {"value": value if math.isfinite(value) else str(value), "unit": _UNITS.get(name, "")}
            for name, value in run.latest.items()
        },
        "skipped_by_cause": dict(run.skipped_by_cause),
        "incidents": [_fields_of(incident) for incident in run.incidents],
        "transitions": [_fields_of(change) for change in run.transitions],
    }


def _fields_of(told: Incident | PrecisionChange) -> dict[str, Any]:
    return {**asdict(told), "cause": told.cause or None}


def state_of(run: RunHistory) -> str:
    """`empty`, `finished`, or `unfinished`: still running or killed, which a log alone cannot tell."""
    if run.lines == 0:
        return "empty"
    return "finished" if run.ended else "unfinished"


def shown(value: float) -> str:
    """A figure for people: whole numbers with separators, others with four digits."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 2**53:
        return f"{int(value):,}"
    return f"{value:.4g}"
