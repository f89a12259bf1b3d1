"""Two real processes over gloo, of which one meets a fault: both tell the same cause and follow the same plan."""

from __future__ import annotations

from typing import Any

import pytest

from hf_amp import Cause
from tests.each import for_each
from tests.forking import told_by_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of the two ranks decided, fault by fault."""
    return told_by_ranks("tests.fallback.two_rank_worker", ACCELERATE_USE_CPU="true")


@for_each(
    ("fault", "cause", "modules"),
    [
        ("activation", Cause.ACTIVATION, ["first"]),
        ("NaN batch", Cause.INPUT, []),
        ("labels", Cause.LOSS, []),
        ("division", Cause.MODEL, [""]),
        ("failing look", Cause.UNKNOWN, []),
        ("failing examination", Cause.UNKNOWN, []),
    ],
)
def test_a_fault_of_one_rank_is_told_and_acted_on_by_both(
    ranks: list[dict[str, Any]], fault: str, cause: Cause, modules: list[str]
) -> None:
    """Same skips, cause, plan, scale and weights on both ranks; the cause is that of the rank which has the fault."""
    first, second = (results[fault] for results in ranks)
    assert first["decided"] == second["decided"]
    skip = second["decided"]["skips"][0]
    assert skip == [2, cause.value, modules]
    assert list(second["decided"]["plan"]["modules"]) == [name for name in modules if name]
    assert second["decided"]["weights"]


def test_the_rank_with_the_fault_says_what_failed(ranks: list[dict[str, Any]]) -> None:
    """An exception in the look is in the message of its rank, and the other rank did not wait for it in vain."""
    assert "this pass cannot be repeated" in ranks[1]["failing look"]["messages"][0]
    assert "no peeking" in ranks[1]["failing examination"]["messages"][0]


@for_each("fault", ["activation", "NaN batch", "labels", "division"])
def test_the_rank_without_the_fault_blames_nothing_of_its_own(ranks: list[dict[str, Any]], fault: str) -> None:
    """Rank 0, whose messages are in the log, on the console and in the report, tells what the other has found, in its words."""
    (message, *_), (found, *_) = (results[fault]["messages"] for results in ranks)
    assert message == f"found by rank 1: {found}"


def test_a_derivative_of_one_rank_is_found_by_both_at_the_first_skip(ranks: list[dict[str, Any]]) -> None:
    """DERIVATIVE with the layer; same plan on both."""
    first, second = (results["root"]["decided"] for results in ranks)
    assert first == second
    assert first["skips"][0][1] == "DERIVATIVE"
    assert first["skips"][0][2] == ["first"]


def test_without_a_fault_nothing_is_told(ranks: list[dict[str, Any]]) -> None:
    """Six applied steps, equal weights."""
    first, second = (results["none"]["decided"] for results in ranks)
    assert first == second
    assert first["skips"] == []


def test_ranks_choose_one_precision_by_the_slowest_of_them(ranks: list[dict[str, Any]]) -> None:
    """One rank finds FP16 twice as fast, the other FP32 three times: both time the same steps and choose FP32, also
    where one of them has no time of a step. Without units for BF16 on one rank no rank falls back to it."""
    first, second = (results["trial"] for results in ranks)
    assert first == second
    assert first["bf16"] == "slow"
    assert [first["defaults"].count(mode) for mode in ("MIXED", "FP32")] == [12, 18]


def test_ranks_follow_a_schedule_together(ranks: list[dict[str, Any]]) -> None:
    """Both in FP32 from the third step to the sixth, one step skipped for both; equal weights and scale."""
    first, second = (results["scheduled"] for results in ranks)
    assert first == second
    assert first["defaults"] == ["MIXED"] * 2 + ["FP32"] * 4 + ["MIXED"] * 2
    assert first["changes"] == [[2, "MIXED", "FP32"], [6, "FP32", "MIXED"]]
    assert first["skips"] == 1
