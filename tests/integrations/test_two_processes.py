"""A Trainer in two real processes, started by `accelerate launch`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("trainer_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks wrote."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of the two ranks saw, by precision."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, "--main_process_port", "0", str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_nan_of_one_rank_skips_on_both_and_is_told_once(
    ranks: list[dict[str, Any]], folder: Path, precision: str
) -> None:
    """Rank 1 alone meets NaN: both skip for the same cause, stay equal, and count alike; one log, one checkpoint."""
    seen = ranks[0][precision]
    assert seen == ranks[1][precision]
    assert seen["world"] == 2
    assert (seen["skips"], seen["applied"]) == ([[2, "INPUT"]], 2)
    assert seen["fractions"] == [0, 1, 0]
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
