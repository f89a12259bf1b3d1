"""SIGKILL, again and again, in the middle of steps and in the middle of saves."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch

from tests.faults.conftest import Tally
from tests.forking import printed_by
from tests.reference import assert_bitwise_equal


def test_runs_killed_again_and_again_end_as_those_that_were_not(tmp_path: Path, full_size: bool, tally: Tally) -> None:
    """Killed at random times and in random file operations of their saves, resumed each time: parameters, optimizer,
    schedule, scale, policy, plan and counters end equal to the bit to those of runs without a break."""
    kills, steps = (100, 200) if full_size else (4, 60)
    output = printed_by("tests.faults.killed_run", str(tmp_path), str(kills), str(steps), ranks=1)
    results = json.loads(output.splitlines()[-1])
    assert sum(result["within a save"] for result in results.values()) > 0
    plan = torch.load(tmp_path / "same folder" / "unbroken.pt", weights_only=True)[1][1]["hf_amp"]["stateful"][
        "fallback"
    ]
    assert plan["demotions"], "the plan was never changed"
    for kind, result in results.items():
        assert result["ended"] == [0, 0], output[-4000:]
        killed, unbroken = (
            torch.load(tmp_path / kind / f"{name}.pt", weights_only=True) for name in ("killed", "unbroken")
        )
        assert_bitwise_equal(killed[0], unbroken[0])
        assert killed[1] == unbroken[1]
        resumed = sum(ending == -signal.SIGKILL for ending in result["endings"])
        tally(f"SIGKILL at random points and in saves ({kind})", kills, resumed)
