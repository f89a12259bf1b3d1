"""A rank is killed: the other does not wait for it for ever, and what they had saved is whole."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.faults.conftest import Tally
from tests.faults.lost_rank import SAVED_AFTER, Rank1DiesSecondTime
from tests.forking import run_program
from tests.integrations.checkpointed_run import begin
from tests.reference import assert_bitwise_equal


@pytest.mark.usefixtures("fresh_accelerator_state")
@pytest.mark.parametrize("where", ["save", "step"])
def test_the_other_rank_ends_and_the_checkpoint_is_whole(
    tmp_path: Path, where: str, full_size: bool, tally: Tally
) -> None:
    """Rank 1 is killed in the middle of a save over the former checkpoint, or between two steps: rank 0 ends with an
    error of its own, its weights finite, and the former checkpoint loads to the bit and trains on."""
    if where == "step" and not full_size:
        pytest.skip("in python -m tests.faults")
    ended = run_program("tests.faults.lost_rank", str(tmp_path), where, ranks=2, ACCELERATE_USE_CPU="true")
    assert ended.codes == [1, -signal.SIGKILL], ended.output[-4000:]
    survivor = json.loads((tmp_path / "survivor.json").read_text())
    assert "onnect" in survivor["error"] or "closed" in survivor["error"], survivor["error"]
    assert survivor["finite"]
    run = begin()
    run.accelerator.register_for_checkpointing(Rank1DiesSecondTime(0))
    run.accelerator.load_state(str(tmp_path / "saved"))
    assert_bitwise_equal(run.everything()[0], torch.load(tmp_path / "saved.pt", weights_only=True))
    assert run.session.scaler.decided_steps == SAVED_AFTER
    run.train(SAVED_AFTER, SAVED_AFTER + 3)
    assert all(p.isfinite().all() for p in run.model.parameters())
    print(f"rank 0 ended {survivor['seconds']:.2f} s after the last step of both")
    tally(f"rank 1 of 2 killed in a {where}", 1, 1)
