"""Models that FSDP2 shards over two and four real processes: every promise holds as in one process.

With `--full-size` on four ranks as well, and 5,000 random faults.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.each import for_each
from tests.forking import printed_by, run_program

MODELS = ("GPT-2", "Llama", "T5")
Ranks = list[dict[str, Any]]


def told_by(*arguments: str, ranks: int = 2) -> Ranks:
    """What each rank has seen, run by run."""
    printed = printed_by("tests.sharded.worker", *arguments, ranks=ranks, ACCELERATE_USE_CPU="true")
    return list(json.loads(next(line for line in printed.splitlines() if line.startswith("[{"))))


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> Ranks:
    return told_by("models", "40" if request.config.getoption("--full-size") else "6")


@pytest.fixture(scope="module")
def accelerated(request: pytest.FixtureRequest) -> Ranks:
    return told_by("accelerate", "40" if request.config.getoption("--full-size") else "6")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return told_by("faults", str(tmp_path_factory.mktemp("log")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return told_by("trainer", str(tmp_path_factory.mktemp("trainer")))


def _modules_named(run: dict[str, Any]) -> set[str]:
    return {name for _, kind, _, names in run["decided"]["events"] if kind == "step_skipped" for name in names}


def _same_as_whole(results: dict[str, Any], name: str) -> None:
    """At most two skips, the modules of one process, and within 1% the loss of FP32; stock's scaler moves no parameter.

    Six steps, forty in full size, are compared with those of FP32 that leave the first one out: it is the batch that the skip has cost.
    In full size also with those of FP32 that leave none out: by a trainer that runs the batch of a skipped step again.
    """
    run, fp32, whole = (results[f"{name}, {how}"] for how in ("FP16", "FP32", "whole"))
    assert len(run["skips"]) <= 2
    assert run["decided"]["events"][: len(whole["decided"]["events"])] == whole["decided"]["events"]
    assert run["losses"][-1] == pytest.approx(fp32["losses"][-1], rel=0.01)
    if again := results.get(f"{name}, retried"):
        assert again["retries"] == 1
        assert again["losses"] == pytest.approx(results[f"{name}, FP32 of all batches"]["losses"], rel=0.005)
    assert results[f"{name}, stock"] == {"moved": 0, "scale": 1024.0 * 0.5**3}


@for_each("name", MODELS)
def test_a_sharded_model_trains_as_a_whole_one(models: Ranks, name: str) -> None:
    """What one process names is named and cured at the same step; stock FP16 applies no step at all."""
    _same_as_whole(models[0], name)
    assert models[0][f"{name}, FP16"]["decided"] == models[1][f"{name}, FP16"]["decided"]


def test_so_does_accelerates_fsdp2(accelerated: Ranks, models: Ranks) -> None:
    """Its own path, ported to a CPU: same modules; clipping sees unscaled gradients, whose norm is reported."""
    for name in [name for name in MODELS if f"{name}, fp16" in accelerated[0]]:
        run, fp32 = (accelerated[0][f"{name}, {mode}"] for mode in ("fp16", "no"))
        assert run["decided"]["events"] == models[0][f"{name}, whole"]["decided"]["events"]
        assert run["skipped"] == len(run["skips"]) == 1
        assert run["losses"][-1] == pytest.approx(fp32["losses"][-1], rel=0.01)
        assert run["norms"][-1] == pytest.approx(fp32["norms"][-1], rel=0.05)
        assert run["norm"] == run["norms"][-1]
        assert not run["setup"]


def test_what_is_gathered_in_half_is_named_where_it_leaves_the_range(accelerated: Ranks, faults: Ranks) -> None:
    """Attached after `prepare`, and under a policy by hand: weights beyond 65504 become inf as FSDP gathers them."""
    for run in (accelerated[0]["attached late"], faults[0]["half policy"]):
        assert run["decided"]["events"][0][:3] == [1, "step_skipped", "WEIGHTS"]
        assert "param_dtype=None" in run["messages"][0]
        assert "no longer cast" in run["setup"][0]


def test_a_trainer_on_fsdp2_goes_on_exactly(trained: Ranks) -> None:
    """Skip, plan, gradient norm in the log; resumed in the middle it has the same losses, plan, scale and counters."""
    run, resumed = (trained[0][kind] for kind in ("fp16", "resumed"))
    assert run["kind"] == resumed["kind"] == "FSDP"
    assert run["skips"] == [1]
    assert not resumed["skips"]
    assert run["decided"]["plan"]["modules"]
    assert all(run["decided"][key] == resumed["decided"][key] for key in ("plan", "scale", "counts"))
    assert [entry["loss"] for entry in run["history"][3:]] == [entry["loss"] for entry in resumed["history"][3:]]
    # What stock's clip sees on a CPU, scaled gradients, is 1024 times as large.
    assert all(0.1 < entry["grad_norm"] < 10 for entry in run["history"][1:])


@for_each(
    ("fault", "cause", "modules"),
    [
        ("activation", "ACTIVATION", ["layers.1"]),
        ("root", "DERIVATIVE", ["layers.3"]),
        ("division", "LOSS", []),
        ("NaN batch", "INPUT", []),
        ("raises", "UNKNOWN", []),
        ("leaves out", "UNKNOWN", []),
    ],
)
def test_a_fault_of_one_rank_is_found_by_both(faults: Ranks, fault: str, cause: str, modules: list[str]) -> None:
    """One step is skipped, for the cause and the modules of the rank that has it; afterwards all is as on a rank without fault."""
    first, second = (results[fault] for results in faults)
    assert first["decided"] == second["decided"]
    assert first["weights"] == second["weights"]
    assert first["decided"]["events"][0] == [2, "step_skipped", cause, modules]
    assert first["skips"] == [2]
    assert not first["left"], "a replay has left parameters gathered, or gradients"


@for_each("fault", ["raises", "leaves out"])
def test_a_rank_that_cannot_repeat_the_step_keeps_nobody_waiting(faults: Ranks, fault: str) -> None:
    """It raises in the replay, or goes another way: both hear of it, with the reason, at once."""
    first, second = (results[fault] for results in faults)
    reason = {"raises": "rank 1 could not repeat it: MemoryError", "leaves out": "ranks go different ways"}[fault]
    assert reason in first["messages"][0]
    assert max(first["seconds"], second["seconds"]) < 20


def test_a_healthy_step_needs_no_collective_beyond_stocks(faults: Ranks) -> None:
    """One small all-reduce as stock's; with clipping one all-gather for its two. FSDP's own are the same, in the same order."""
    for how, own in (("clips", "allgather_.default"), ("does not", "allreduce_.default")):
        stock, ours = (faults[0][f"collectives, {who}, {how}"] for who in ("stock", "hf_amp"))
        of_fsdp = [name for name in stock if name.startswith("_")]
        assert ours == [*of_fsdp, own]
        assert len(ours) <= len(stock)


def test_the_boundary_of_many_dtensors_calls_no_more_functions_than_stock(faults: Ranks) -> None:
    """Counted between samples, fused AdamW and no clip, because no clock tells so little apart; 5% are for what is not by tensor."""
    for results in faults:
        assert results["calls, hf_amp"] <= 1.05 * results["calls, stock"]


def test_one_console_and_one_log_tell_of_all_ranks(faults: Ranks) -> None:
    """`log_to` on every rank writes one log, and the main process alone speaks, of the other's fault in the other's words."""
    first, second = (results["logged"] for results in faults)
    assert not second["lines"]
    assert any("layers.1: found by rank 1: a forward value left the range" in line for line in first["lines"])
    assert first["runs"] == second["runs"] == 1
    assert first["written"].count("metrics") == 3
    assert first["written"].count("step_skipped") == 1


def test_modules_run_in_fp32_by_choice(faults: Ranks, accelerated: Ranks) -> None:
    """An FP32 head in FP16 under raw FSDP2, and in BF16 under accelerate's, whose default policy would gather it in BF16."""
    for run in (faults[0]["FP16 head"], accelerated[0]["BF16 head"]):
        assert run["head"] == ["float32 float32"]
        assert run["decided"]["plan"]["modules"] == {"lm_head": "FP32"}
        assert run["applied"] == 2


def test_bf16s_default_policy_says_why_no_module_falls_back(accelerated: Ranks) -> None:
    """The cause is named at every skip, and nothing changes; gathered in FP32, because of a choice, what rounds goes to FP32 too."""
    run, chosen = (accelerated[0][f"BF16 {how}"] for how in ("by default", "with a choice"))
    assert "FSDP rounds parameters to BF16 as it gathers them, so modules do not fall back" in run["attached"]
    assert {tuple(event[1:3]) for event in run["decided"]["events"]} == {("step_skipped", "ROUNDING")}
    assert run["applied"] == 0
    assert "modules do not fall back" not in chosen["attached"]
    assert [event[1:3] for event in chosen["decided"]["events"][1:]] == [
        ["step_skipped", "ROUNDING"],
        ["precision_changed", "ROUNDING"],
    ]
    assert chosen["applied"] == 3


def test_an_actor_learns_beside_its_reference(faults: Ranks) -> None:
    """Two sharded models, micro-batches without gradient sync, clipping: the actor's modules go to FP32, then it learns."""
    run = faults[0]["actor"]
    assert run["skips"] == [1]
    assert "model.layers.0.mlp.down_proj" in run["decided"]["plan"]["modules"]
    assert all(map(math.isfinite, run["losses"][1:]))
    assert run["losses"][-1] < run["losses"][1]
    assert run["divergences"][1] == pytest.approx(0.0, abs=1e-4)
    assert run["clipped"] == pytest.approx(run["norm"])


def test_random_faults_leave_ranks_alike(full_size: bool) -> None:
    """Random faults at random ranks: scale, plan, counters and weights never differ, and nobody hangs. 5,000 steps in full size."""
    for seed, (steps, ranks) in enumerate([(2500, 2), (2500, 4)] if full_size else [(24, 2)]):
        results = [result["storm"] for result in told_by("storm", str(steps), str(seed), ranks=ranks)]
        assert results[0]["differ"] == 0
        assert results[0]["finite"]
        assert all(result["weights"] == results[0]["weights"] for result in results)
        counts = results[0]["decided"]["counts"]
        assert counts["applied_steps"] + counts["skipped_steps"] == steps
        assert counts["skipped_steps"] >= steps * 0.1


def _goes_on(folder: Path, saved_by: int, resumed_by: list[int]) -> None:
    first = told_by("saves", str(folder), ranks=saved_by)[0]["run"]
    assert first["saved"]["plan"]["modules"] == {"layers.1": "FP32"}
    assert first["saved"]["counts"]["skipped_steps"] == 2
    for ranks in resumed_by:
        second = told_by("resumes", str(folder), ranks=ranks)[0]["run"]
        assert second["saved"] == first["saved"]
        assert second["after"] == first["after"]
        assert second["losses"] == pytest.approx(first["losses"], rel=1e-4)


def test_another_number_of_ranks_goes_on(tmp_path: Path, full_size: bool) -> None:
    """Saved by `torch.distributed.checkpoint`: plan, scale, counters and losses on fewer ranks; four, two and one in full size."""
    saved_by, resumed_by = (4, [2, 1]) if full_size else (2, [1])
    _goes_on(tmp_path / "checkpoint", saved_by, resumed_by)


@pytest.fixture
def full_size_only(full_size: bool) -> None:
    if not full_size:
        pytest.skip("takes four ranks: with --full-size")


def test_four_ranks_train_as_two(full_size_only: None) -> None:
    """The three models on four ranks."""
    results = told_by("models", "40", ranks=4)[0]
    for name in MODELS:
        _same_as_whole(results, name)


@for_each("kind", ["HSDP", "accelerate's HSDP", "TP"])
def test_two_axes(full_size_only: None, axes: Callable[[], Ranks], kind: str) -> None:
    """Copies of shards, also by `parallelism_config`, and shards of layers that are spread over ranks: cause, module, norm; no rank differs."""
    results = axes()
    for fault, first in {
        "none": None,
        "activation": [3, "step_skipped", "ACTIVATION", ["1"]],
        "NaN batch": [3, "step_skipped", "INPUT", []],
        "loss": [3, "step_skipped", "LOSS", []],
        **({"one part": [1, "step_skipped", "ACTIVATION", ["1.up"]]} if kind == "TP" else {}),
    }.items():
        runs = [result[f"{kind}, {fault}"] for result in results]
        assert all(run["decided"] == runs[0]["decided"] and run["weights"] == runs[0]["weights"] for run in runs)
        assert runs[0]["decided"]["events"][:1] == ([first] if first else [])
        assert len(runs[0]["skips"]) == bool(first)
        assert runs[0]["norm"] == pytest.approx(runs[0]["norms"][-1], rel=1e-4)


@pytest.fixture(scope="module")
def axes() -> Callable[[], Ranks]:
    kept: list[Ranks] = []

    def run() -> Ranks:
        if not kept:
            kept.append(told_by("axes", ranks=4))
        return kept[0]

    return run


def test_what_people_put_together(full_size: bool) -> None:
    """Checkpointing of both kinds, LoRA, frozen parameters, a loss outside of the model, other strategies: the same four modules."""
    kinds = [
        "checkpointing, reentrant",
        "LoRA",
        "checkpointing",
        "frozen",
        "loss outside",
        "ADAPTIVE",
        "PERFORMANCE_OPTIMIZED",
    ]
    first, second = told_by("kinds", *kinds[: None if full_size else 2])
    for kind, run in first.items():
        assert run["decided"] == second[kind]["decided"]
        skip = run["decided"]["events"][0]
        assert skip[:3] == [1, "step_skipped", "ACTIVATION"]
        expected = {f"model.layers.{n}.{m}" for n in (0, 1) for m in ("self_attn.o_proj", "mlp.down_proj")}
        assert {name.removeprefix("base_model.model.") for name in skip[3]} == expected, kind
        assert len(run["skips"]) <= 2


def test_a_rank_that_is_killed_in_a_replay_ends_the_other(full_size_only: None) -> None:
    """SIGKILL in the middle of what both repeat: the other ends with an error of its own, within the minute."""
    began = time.monotonic()
    ended = run_program("tests.sharded.worker", "dies", ranks=2, ACCELERATE_USE_CPU="true")
    assert ended.codes == [1, -signal.SIGKILL], ended.output[-4000:]
    assert "onnect" in ended.output or "closed" in ended.output
    assert time.monotonic() - began < 60


def test_a_run_whose_rank_is_killed_resumes_exactly(full_size_only: None, tmp_path: Path) -> None:
    """SIGKILL in a backward pass: the other rank ends, and from the newest checkpoint both go on, to the last bit as if nothing had been."""
    whole = told_by("killed", str(tmp_path / "whole"), "whole")[0]["whole"]
    ended = run_program(
        "tests.sharded.worker", "killed", str(tmp_path / "cut"), "killed", ranks=2, ACCELERATE_USE_CPU="true"
    )
    assert ended.codes == [1, -signal.SIGKILL], ended.output[-4000:]
    resumed = told_by("killed", str(tmp_path / "cut"), "resumed")[0]["resumed"]
    assert resumed.pop("begins") == 3
    assert whole.pop("begins") == 0
    assert whole["counts"]["skipped_steps"] == 3
    assert whole["plan"]["modules"]
    assert resumed == whole
