"""Random faults in random models: what they were against what was told, and what was done to the runs. Shown with `pytest -s`."""

from __future__ import annotations

from collections import Counter

import pytest

from hf_amp import Cause
from tests.fallback.random_faults import FAULTS, TRIALS, Outcome, outcomes, told_of
from tests.forking import told_by_ranks


def table(reported: Counter[tuple[str, str]]) -> str:
    """Faults down, verdicts across."""
    columns = [*(cause.value for cause in Cause), "elsewhere"]
    width = max(map(len, FAULTS))
    lines = ["".ljust(width) + "".join(column.rjust(12) for column in columns)]
    for name, fault in FAULTS.items():
        cells = [reported[name, column] for column in columns]
        shown = [f"[{n}]" if c == fault.cause.value else str(n or "·") for n, c in zip(cells, columns, strict=True)]
        lines.append(name.ljust(width) + "".join(cell.rjust(12) for cell in shown))
    return "\n".join(lines)


def harmed(ran: list[Outcome]) -> str:
    """A line for each run to which something was done that should not have been."""
    return "\n".join(f"{it.fault} told as {it.told}: {', '.join(it.harm)} ({it.setting})" for it in ran if it.harm)


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest) -> list[Outcome]:
    """One of each kind at random, or as many as published."""
    return outcomes(TRIALS if request.config.getoption("--full-size") else len(FAULTS))


def test_confusion_table(ran: list[Outcome]) -> None:
    """No cause, place or operator is told wrong, and at most one in twenty not at all."""
    reported = told_of(ran)
    print(
        f"\n{table(reported.pairs)}\n{reported.right} of {len(ran)} right, {reported.unknown} UNKNOWN, {reported.wrong} wrong"
    )
    wrong = [it for it in ran if it.told not in (it.cause, Cause.UNKNOWN.value)]
    assert not wrong, "\n".join(f"{it.fault} told as {it.told} ({it.setting}): {it.message}" for it in wrong)
    assert reported.unknown <= 0.05 * len(ran)


def test_no_run_is_harmed(ran: list[Outcome]) -> None:
    """No scale moves and no plan changes for a fault that they do not cure; no buffer keeps NaN; no run ends by hf_amp."""
    assert not harmed(ran), harmed(ran)


def test_two_ranks_agree_and_do_no_harm(full_size: bool) -> None:
    """The same for faults that one of two ranks meets alone; both skip the same steps for the same cause, and go on alike."""
    faults = str(4 * len(FAULTS) if full_size else 9)
    ranks = told_by_ranks("tests.fallback.two_rank_faults", faults, ACCELERATE_USE_CPU="true")
    first, second = ([Outcome(**each) if each else None for each in of_rank] for of_rank in ranks)
    pairs = [(here, there) for here, there in zip(first, second, strict=True) if here and there]
    assert len(pairs) >= 0.7 * len(first)
    assert sum(it is None for it in first) == sum(it is None for it in second)
    for here, there in pairs:
        assert here.decided == there.decided, here.setting
        told = {here.told, there.told}  # one of them says where
        assert here.cause in told or told == {Cause.UNKNOWN.value}, f"{here.fault} ({here.setting}): {told}"
    both = [it for pair in pairs for it in pair]
    assert not harmed(both), harmed(both)
