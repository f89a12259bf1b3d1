"""Two hundred random faults in random models: what they were against what was told. Shown with `pytest -s`."""

from __future__ import annotations

from collections import Counter
from itertools import count, islice

from hf_amp import Cause
from tests.fallback.random_faults import FAULTS, run

TRIALS = 200


def table(told: Counter[tuple[str, str]]) -> str:
    """Faults down, verdicts across."""
    columns = [*(cause.value for cause in Cause), "elsewhere"]
    width = max(len(fault.__name__) for fault in FAULTS)
    lines = ["".ljust(width) + "".join(column.rjust(12) for column in columns)]
    for fault, truth in FAULTS.items():
        cells = [told[fault.__name__, column] for column in columns]
        shown = [f"[{n}]" if c == truth.value else str(n or "·") for n, c in zip(cells, columns, strict=True)]
        lines.append(fault.__name__.ljust(width) + "".join(cell.rjust(12) for cell in shown))
    return "\n".join(lines)


def test_confusion_table() -> None:
    """At least 95% are told right, and of the others most are UNKNOWN rather than wrong."""
    told: Counter[tuple[str, str]] = Counter()
    right = unknown = 0
    trials = islice(filter(None, map(run, count())), TRIALS)
    for name, truth, verdict in trials:
        told[name, verdict] += 1
        right += verdict == truth.value
        unknown += verdict == Cause.UNKNOWN.value != truth.value
    wrong = TRIALS - right - unknown
    print(f"\n{table(told)}\n{right} of {TRIALS} right, {unknown} UNKNOWN instead, {wrong} wrong")
    assert right >= 0.95 * TRIALS
    assert wrong <= unknown
