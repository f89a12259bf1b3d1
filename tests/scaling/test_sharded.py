"""Two real processes over gloo: every rank takes the same decision."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("sharded_worker.py")


def decisions(*options: str) -> list[dict[str, Any]]:
    """What each of the two ranks decided."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(WORKER), *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["step only", "unscale first"])
def test_inf_in_one_shard_skips_on_all_ranks(fused: bool, unscale: bool) -> None:
    """FSDP2: an inf in rank 0's shard only; both ranks skip that step, keep the same scale and finite parameters."""
    ranks = decisions("--kind", "sharded", *["--fused"] * fused, *["--unscale"] * unscale)
    assert ranks[0] == ranks[1]
    assert ranks[0]["applied"] == [True, False, True, True, True]
    assert ranks[0]["finite"]


@pytest.mark.parametrize("strategy", ["ADAPTIVE", "DYNAMIC"])
def test_rank_local_gradients_and_losses_are_agreed_on(strategy: str) -> None:
    """sync_grad_scaler: an inf of rank 0 and a NaN loss of rank 1 skip on both, and the scales stay equal."""
    ranks = decisions("--kind", "local", "--strategy", strategy)
    assert ranks[0] == ranks[1]
    assert ranks[0]["applied"] == [True, False, True, False, True]


def test_without_agreement_ranks_diverge() -> None:
    """The same without sync_grad_scaler: decisions differ, so the test above can fail."""
    ranks = decisions("--kind", "local", "--no-sync")
    assert ranks[0]["applied"] != ranks[1]["applied"]
