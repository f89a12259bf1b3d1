"""A rank that takes another way through its loop: all skip the step, or each ends in bounded time and says why."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hf_amp import EventKind
from hf_amp.events import LOG_FILE
from hf_amp.scaling.desync import mismatch_of
from tests.each import for_each
from tests.forking import Ended, run_program
from tests.integrations.launching import CONFIGS, ROOT
from tests.sharded import stands_still
from tests.sharded.left_out import AT, PATIENCE, SECONDS, STEPS

LOOPS = ("raw ddp", "raw fsdp2", "accelerate ddp", "accelerate fsdp2")


def run(loops: str, ways: str, *options: object) -> tuple[Ended, dict[tuple[str, str, int], dict[str, Any]]]:
    """How it ended, and what each rank has come to, by (way, loop, rank)."""
    ended = run_program("tests.sharded.left_out", loops, ways, *map(str, options), ranks=2, ACCELERATE_USE_CPU="true")
    lines = ended.output.replace("}{", "}\n{").splitlines()
    told = [json.loads(line) for line in lines if line.startswith('{"way"')]
    return ended, {(each["way"], each["loop"], each["rank"]): each for each in told}


def test_a_step_that_one_rank_leaves_out_after_backward_is_skipped_by_all(full_size: bool) -> None:
    """DistributedDataParallel and FSDP2, raw and accelerate's: the weights are those of a run in which all have left it out.

    One raw and one of accelerate's, all four in full size.
    """
    loops = LOOPS if full_size else LOOPS[::3]
    ended, found = run(",".join(loops), "leaves out,all leave out")
    assert ended.codes == [0, 0], ended.output[-3000:]
    for loop in loops:
        for rank in (0, 1):
            one, everyone = found["leaves out", loop, rank], found["all leave out", loop, rank]
            assert one["weights"] == everyone["weights"]
            assert one["scale"] == everyone["scale"] == 256.0
            assert (one["applied_steps"], one["skipped_steps"]) == (STEPS - 1, 1)
            assert (everyone["applied_steps"], everyone["skipped_steps"]) == (STEPS - 1, 0)
            assert one["skips"][0][0] == AT
            assert "rank 1 has left this step out after its backward" in one["skips"][0][1]
            assert not everyone["skips"]


def test_a_rank_that_ends_before_a_verdict_says_so_and_why_others_cannot_go_on() -> None:
    """It raises between backward and step: at once the other ends with a sentence, and its own console says where it ended."""
    ended, found = run("raw ddp", "raises")
    assert ended.codes == [1, 1]
    assert found["raises", "raw ddp", 0]["ended"].startswith("ScalerError: this rank has waited in vain")
    assert found["raises", "raw ddp", 0]["seconds"] < SECONDS
    assert f"rank 1 of 2 ends in step {AT}: MemoryError: nothing is left." in ended.output


@for_each("loop", ["raw ddp", "raw fsdp2"])
@for_each("way", ["stops", "continues", "runs out"])
def test_no_rank_waits_longer_than_stock(full_size: bool, way: str, loop: str) -> None:
    """What stock waits in (its backward, its gathering) until the process group's timeout ends before it here; each rank says where it was."""
    if not full_size:
        pytest.skip("waits for timeouts: with --full-size")
    ended, found = run(loop, way)
    assert 0 not in ended.codes
    assert found[way, loop, 0]["seconds"] < SECONDS
    assert "rank 0 of 2 ends in step" in ended.output
    assert ended.output.count("; rank 1 is in") >= 2
    if way == "stops":
        assert found[way, loop, 0]["ended"].startswith("ScalerError: this rank has waited in vain")
    stock = run(loop.replace("raw", "stock"), way)[1]
    if not (way == "stops" and loop.endswith("ddp")):  # there stock's rank 0 steps alone, and the ranks part
        assert all(each["ended"] != "trained" and each["seconds"] > SECONDS / 2 for each in stock.values())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("way", ["continues", "runs out"])
def test_ranks_that_have_gone_different_ways_end_and_say_where_each_is(full_size: bool, way: str, loop: str) -> None:
    """One leaves a batch out before its backward, or has fewer: with minutes left until gloo's timeout, both name ranks and lines.

    Raw DistributedDataParallel and accelerate's FSDP2, all four in full size.
    """
    if not full_size and loop in LOOPS[1:3]:
        pytest.skip("two loops are enough: all four with --full-size")
    began = time.monotonic()
    ended, found = run(loop, way, 600, PATIENCE)
    assert time.monotonic() - began < 60
    assert ended.codes == [1, 1]
    assert found[way, loop, 0]["ended"].startswith("RuntimeError"), (
        "rank 1 ends first, so that this one may still do something"
    )
    said = [line for line in ended.output.splitlines() if line.startswith("hf_amp: ra") and "; rank 1 is in" in line]
    assert len(said) == 2, "each rank says it"
    sentence = said[0]
    assert "left_out.py, line" in sentence
    if way == "continues" and loop.endswith("fsdp2"):
        assert f"rank 0 is in backward pass {AT} (left_out.py" in sentence
        assert f"rank 1 is in the forward pass after backward pass {AT - 1} (left_out.py" in sentence
        assert found[way, loop, 1]["ended"].startswith("ScalerError: rank 1 has left a batch out before its backward")
    else:
        done = STEPS - 1 if way == "continues" else AT
        assert f"rank 1 is in torch.distributed.barrier after backward pass {done} (left_out.py" in sentence
        assert "barrier on rank 1" in sentence
        assert ("Batches left out before their backward: 1 by rank 1." in sentence) == (way == "continues")


def test_why_ranks_end_is_an_event_and_on_the_console_where_no_logger_speaks(tmp_path: Path) -> None:
    """Rank 0's log has it, as a process that ends so writes nothing later; both consoles have it, though `hf_amp`'s logger is off."""
    ended, _ = run("raw ddp", "runs out", 600, PATIENCE, tmp_path)
    assert ended.codes == [1, 1]
    assert sum(line.startswith("hf_amp: ranks have gone different ways") for line in ended.output.splitlines()) == 2
    log = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    (parted,) = [line for line in log if line["event"] == EventKind.RANKS_PARTED]
    assert "; rank 1 is in torch.distributed.barrier" in parted["message"]


def test_replicas_of_which_one_takes_another_batch_are_waited_for() -> None:
    """HSDP: a forward pass gathers from the ranks of one replica, and the other waits in its backward, which comes."""
    ended = run_program("tests.sharded.left_out", "raw hsdp", "a replica is slow", "60", str(PATIENCE), ranks=4)
    assert ended.codes == [0] * 4, ended.output[-3000:]
    assert ended.output.count('"ended": "trained"') == 4
    assert "left a batch out" not in ended.output


def test_what_ended_a_former_start_ends_no_other() -> None:
    """A store may still have it after an elastic restart: it names other standstills."""
    ended = run_program("tests.sharded.stands_still", "was told to end")
    assert ended.codes == [0], ended.output
    assert "alive" in ended.output


def test_a_thread_that_is_in_the_store_when_the_interpreter_ends_does_not_abort_it(full_size: bool) -> None:
    """C++ ends the process ("terminate called") where a daemon thread comes back from a call then: in most of all ends, tried once or five times."""
    for _ in range(5 if full_size else 1):
        command = [sys.executable, "-m", "tests.sharded.stands_still", "ends"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
        assert (ended.returncode, ended.stdout) == (0, b"alive\n"), ended.stderr


def test_a_store_that_is_gone_stops_no_forward_pass() -> None:
    """Ranks are asked nothing any more, which a warning says once; the model is trained on."""
    ended = run_program("tests.sharded.stands_still", "has no store")
    assert ended.codes == [0], ended.output
    assert ended.output.count("asks the others no more") == 1
    assert "alive" in ended.output


def test_where_one_rank_has_waited_in_vain_no_rank_waits_any_more() -> None:
    """One comes so late that another goes on alone: the late one does not wait for it from then on, nor takes it for one that is stuck."""
    ended = run_program("tests.sharded.stands_still", "comes late", ranks=2)
    assert ended.codes == [0, 0], ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith('{"waited"')]
    assert json.loads(line)["waited"] < stands_still.PATIENCE
    assert ended.output.count("asks the others no more") == 2


def test_accelerate_launch_ends_soon_where_batches_are_uneven() -> None:
    """Its command fails in a minute, with the reason of each rank on the console."""
    config = CONFIGS / "cpu_2_processes.yaml"
    options = ["--config_file", str(config), "--main_process_port", "0", "-m", "tests.sharded.left_out"]
    began, worker = time.monotonic(), ["accelerate ddp", "runs out", "600", str(PATIENCE)]
    ended = run_program(
        "accelerate.commands.launch", *options, *worker, PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true"
    )
    assert ended.codes == [1], ended.output[-3000:]
    assert time.monotonic() - began < 60
    assert ended.output.count(f"rank 0 is in backward pass {AT + 1} (left_out.py") == 2


def test_a_rank_that_is_slow_is_waited_for() -> None:
    """Three times as long as ranks are silent: before forward, in backward, before the step, and while the main process evaluates.

    And where all ranks leave a batch out before its backward, nobody waits.
    """
    loops = ",".join(LOOPS)
    ended, found = run(loops, "is slow,all continue", 60, PATIENCE)
    assert ended.codes == [0, 0], ended.output[-3000:]
    assert "different ways" not in ended.output
    assert {each["ended"] for each in found.values()} == {"trained"}
    for (way, _, _), each in found.items():
        assert each["applied_steps"] == STEPS - (way == "all continue")
        assert way == "is slow" or each["seconds"] < PATIENCE


def test_operations_that_do_not_fit_are_a_proof() -> None:
    """Only at the newest collective that all ranks have begun, in one backend, and where sizes are those of all."""
    one, other = {"1": "all_gather of 2 Float", "2": "barrier"}, {"1": "all_reduce of 2 Float"}
    assert mismatch_of([{"gloo": one}, {"gloo": one}]) == ""
    assert mismatch_of([{"gloo": {"1": "barrier"}}, {"gloo": one}]).startswith(
        "Collective 1 of the process group is barrier on rank 0"
    )
    assert mismatch_of([{"gloo": one}, {"gloo": {**other, "2": "barrier"}}]) == "", "it is over"
    assert mismatch_of([{"gloo": one}, {"nccl": other}]) == ""
    assert mismatch_of([{"gloo": one}, {"gloo": {"3": "barrier"}}]) == "", "unknown on one of them"
    assert mismatch_of([{}, {}]) == ""
