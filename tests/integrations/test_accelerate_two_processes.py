"""Two real processes over gloo through Accelerate: what one rank meets, both decide on alike."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from tests.each import for_each
from tests.forking import told_by_ranks
from tests.integrations.launching import launch
from tests.integrations.two_process_runs import FAULTS, FAULTY_STEP, STEPS, train

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two ranks has recorded, of all runs."""
    folder = str(tmp_path_factory.mktemp("two processes"))
    return told_by_ranks("tests.integrations.two_process_runs", folder, ACCELERATE_USE_CPU="true")


def shared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that must be equal on every rank: everything but the rank's own loss."""
    return [{name: value for name, value in record.items() if name != "loss"} for record in records]


@for_each("run", [*FAULTS, "guard", "fp32"])
def test_ranks_stay_equal(ranks: Ranks, run: str) -> None:
    """After every step scale, plan, counters, causes and parameters are equal to the bit, whatever rank 1 alone met."""
    assert shared(ranks[0][run]) == shared(ranks[1][run])
    assert len(ranks[0][run]) == STEPS


@for_each(
    ("run", "cause"),
    [
        ("nan batch", "INPUT"),
        ("activation", "ACTIVATION"),
        ("gradient", "SCALE"),
        ("nan loss", "LOSS"),
        ("look fails", "UNKNOWN"),
        ("guard", "INPUT"),
    ],
)
def test_what_rank_1_met_skips_one_step_of_both(ranks: Ranks, run: str, cause: str) -> None:
    """The faulty step, and no other, is skipped on both ranks, for the cause that is rank 1's."""
    for records in (ranks[0][run], ranks[1][run]):
        assert [record["skipped"] for record in records] == [step == FAULTY_STEP for step in range(STEPS)]
        assert set(records[-1]["causes"]) == {cause}


def test_modules_of_rank_1_fall_back_on_both(ranks: Ranks) -> None:
    """The layers that overflow on rank 1 only run in FP32 on rank 0 too."""
    for records in ranks:
        assert records["activation"][FAULTY_STEP - 1]["plan"] == ["MIXED", []]
        assert records["activation"][-1]["plan"] == ["MIXED", ["first", "second"]]


def test_an_empty_last_batch_of_one_rank_is_survived(ranks: Ranks) -> None:
    """A mean over nothing is NaN on rank 1, with gradients of zero: both apply the step."""
    assert math.isnan(ranks[1]["empty last batch"][-1]["loss"])
    assert not ranks[0]["empty last batch"][-1]["skipped"]


def test_without_the_all_reduce_ranks_part(ranks: Ranks) -> None:
    """The same NaN loss without agreement: the scales differ from then on, so the tests above can fail."""
    scales = [[record["scale"] for record in records["without agreement"]] for records in ranks]
    assert scales[0][:FAULTY_STEP] == scales[1][:FAULTY_STEP]
    assert scales[0][FAULTY_STEP:] != scales[1][FAULTY_STEP:]


@pytest.mark.parametrize(
    ("run", "precision", "micro_batches", "tolerance"),
    [("fp32", "no", 1, 1e-5), ("none", "fp16", 1, 1e-4), ("none", "fp16", 2, 1e-6)],
    ids=["fp32", "fp16", "fp16 in halves"],
)
@pytest.mark.usefixtures("fresh_accelerator_state")
def test_two_processes_train_as_one_with_twice_the_batch(
    ranks: Ranks, run: str, precision: str, micro_batches: int, tolerance: float
) -> None:
    """The mean of both ranks' losses is the loss of one process on the whole batch: to 1e-5 in FP32, to 1e-4 in FP16,
    where each rank rounds its half of a gradient to 11 bits before the halves are added. Where the one process takes
    the halves one after the other, and so rounds like them, to 1e-6."""
    strategy = "ADAPTIVE" if precision == "fp16" else "DYNAMIC"
    alone = train("none", precision, micro_batches=micro_batches, scaling_strategy=strategy)
    for step, record in enumerate(alone):
        both = (ranks[0][run][step]["loss"] + ranks[1][run][step]["loss"]) / 2
        assert both == pytest.approx(record["loss"], abs=tolerance)


@pytest.mark.parametrize("precision", ["FP16", "BF16"])
def test_gradients_in_half_precision_are_half_the_bytes(ranks: Ranks, precision: str) -> None:
    """Bytes that each rank writes to its sockets in a backward: half of FP32's to 1%; losses within 1%, and falling."""
    for records in ranks:
        whole, half = records["sent in None"], records[f"sent in {precision}"]
        assert half["bytes"] == pytest.approx(whole["bytes"] / 2, rel=0.01)
        assert half["losses"] == pytest.approx(whole["losses"], rel=0.01)
        assert half["losses"] != whole["losses"] or precision == "FP16"  # emulated FP16 gradients are FP16 already
        assert half["losses"][-1] < 0.7 * half["losses"][0]


def test_what_travels_in_fp16_is_the_mean(ranks: Ranks) -> None:
    """Two gradients of 40,000, whose sum FP16 cannot hold, are applied; a mean of 70,000 is an overflow on both."""
    assert [records["beyond FP16"] for records in ranks] == [[False, True], [False, True]]


def test_what_cannot_work_is_refused(ranks: Ranks) -> None:
    """Uneven inputs, FP16 for gradients that are not scaled, a hook after prepare: errors that leave nothing behind."""
    for records in ranks:
        refused = records["refused"]
        assert "even_batches=True" in refused["uneven"]
        assert "communication_precision=BF16" in refused["unscaled"]
        assert "before prepare" in refused["late"]
        assert refused["left"] == []


def test_checkpoints_of_two_processes_are_whole(ranks: Ranks) -> None:
    """Both ranks' files are in one folder, nothing is left beside it, and a new session goes on from it."""
    for records in ranks:
        saved = records["checkpoint"]
        assert {"random_states_0.pkl", "random_states_1.pkl", "scaler.pt"} < set(saved["files"])
        assert saved["siblings"] == ["saved"]
        assert (saved["applied"], saved["scale"]) == (2, 1024.0)


@pytest.mark.parametrize("run", ["FSDP2", "FSDP2, fused"])
def test_fsdp2_through_accelerate_skips_on_both(ranks: Ranks, run: str) -> None:
    """An inf in rank 0's shard and a NaN loss on rank 1 skip on both, weights stay finite, and a run that resumes from
    the checkpoint, whose loading steps the new optimizer on zeros (accelerate#4289), is the same to the bit."""
    first, second = (records[run] for records in ranks)
    assert [first[name] for name in ("skipped", "causes", "saved")] == [
        second[name] for name in ("skipped", "causes", "saved")
    ]
    assert first["skipped"] == [False, False, True, False, True, False]
    assert first["causes"] == ["SCALE", "LOSS"]
    for records in (first, second):
        assert records["finite"]
        assert records["loaded"] == records["saved"]
        assert records["resumed weights"] == records["weights"]


def test_join_is_refused_before_the_first_batch() -> None:
    """torch's Join around the loop, and DistributedDataParallel's, also of a model prepared before attach: an error on all ranks, nobody waits; after detach it works."""
    printed = launch("cpu_2_processes.yaml", "-m", "tests.integrations.join_worker")
    # Two ranks may print on one line.
    assert sorted(re.findall(r"rank \d: \d refused, \d applied", printed)) == [
        f"rank {rank}: 4 refused, 1 applied" for rank in range(2)
    ]
