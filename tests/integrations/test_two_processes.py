"""A Trainer in two real processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.forking import told_by_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks wrote."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of the two ranks saw, by precision."""
    return told_by_ranks("tests.integrations.trainer_worker", str(folder), ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_nan_of_one_rank_skips_on_both_and_is_told_once(
    ranks: list[dict[str, Any]], folder: Path, precision: str
) -> None:
    """Rank 1 alone meets NaN: both skip for the same cause, stay equal, and count alike; one log, one checkpoint."""
    seen = ranks[0][precision]
    assert seen == ranks[1][precision]
    assert seen["world"] == 2
    assert (seen["skips"], seen["applied"]) == ([[2, "INPUT"]], 2)
    assert seen["fractions"] == [None, 1, None]
    assert seen["lost_batches"] == 1
    assert all(math.isfinite(value) for parameter in seen["parameters"] for value in parameter)
    log = folder / precision / "amp_events.jsonl"
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("step_skipped") == events.count("evaluation_lost_batches") == 1
    assert (folder / precision / "checkpoint-3").exists()


def test_a_weight_that_is_nan_on_one_rank_holds_the_checkpoint_back_on_both(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    """Of a sharded model one rank alone sees it; if the others went on to write, they would wait for it."""
    assert [rank["withheld"] for rank in ranks] == [[3], [3]]
    assert sorted(path.name for path in (folder / "poisoned").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
