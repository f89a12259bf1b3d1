"""Random faults in random models: what they were against what was told. Shown with `pytest -s`."""

from __future__ import annotations

from collections import Counter

from hf_amp import Cause
from tests.fallback.random_faults import FAULTS, TRIALS, told_of


def table(reported: Counter[tuple[str, str]]) -> str:
    """Faults down, verdicts across."""
    columns = [*(cause.value for cause in Cause), "elsewhere"]
    width = max(len(fault.__name__) for fault in FAULTS)
    lines = ["".ljust(width) + "".join(column.rjust(12) for column in columns)]
    for fault, truth in FAULTS.items():
        cells = [reported[fault.__name__, column] for column in columns]
        shown = [f"[{n}]" if c == truth.value else str(n or "·") for n, c in zip(cells, columns, strict=True)]
        lines.append(fault.__name__.ljust(width) + "".join(cell.rjust(12) for cell in shown))
    return "\n".join(lines)


def test_confusion_table(full_size: bool) -> None:
    """Of 60 at random, or of 200, at least 95% are told right, and of the others most are UNKNOWN rather than wrong."""
    trials = TRIALS if full_size else 60
    reported = told_of(trials)
    print(
        f"\n{table(reported.pairs)}\n{reported.right} of {trials} right, {reported.unknown} UNKNOWN instead, {reported.wrong} wrong"
    )
    assert reported.right >= 0.95 * trials
    assert reported.wrong <= reported.unknown
