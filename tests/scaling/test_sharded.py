"""Two real processes over gloo: every rank takes the same decision."""

from __future__ import annotations

from typing import Any

import pytest

from tests.each import for_each
from tests.forking import told_by_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of the two ranks decided, run by run."""
    return told_by_ranks("tests.scaling.sharded_worker")


@for_each("kind", ["FSDP2", "FSDP1", "FSDP1 original parameters"])
@for_each("fused", [False, True])
@for_each("unscale", [False, True])
def test_inf_in_one_shard_skips_on_all_ranks(
    ranks: list[dict[str, Any]], kind: str, fused: bool, unscale: bool
) -> None:
    """An inf in rank 0's shard only: both ranks skip that step and move nothing, keep the same scale, stay finite."""
    first, second = (results[f"{kind} {fused} {unscale}"] for results in ranks)
    assert first == second
    assert first["applied"] == first["moved"] == [True, False, True, True, True]
    assert first["finite"]


@for_each("strategy", ["ADAPTIVE", "DYNAMIC"])
@for_each("switch", ["sync_grad_scaler", "distributed_amp"])
def test_rank_local_gradients_and_losses_are_agreed_on(ranks: list[dict[str, Any]], strategy: str, switch: str) -> None:
    """With either option an inf of rank 0 and a NaN loss of rank 1 skip on both, and the scales stay equal."""
    first, second = (results[f"local {strategy} {switch}"] for results in ranks)
    assert first == second
    assert first["applied"] == [True, False, True, False, True]


@pytest.mark.parametrize("kind", ["FSDP2", "local"])
def test_what_is_found_by_a_recheck_is_agreed_on(ranks: list[dict[str, Any]], kind: str) -> None:
    """An inf that gets into rank 0's gradients after unscaling skips on both ranks, where somebody rechecks them."""
    first, second = (results[f"{kind} late"] for results in ranks)
    assert first == second
    assert first["applied"][:3] == first["moved"][:3] == [True, False, True]


def test_without_agreement_ranks_diverge(ranks: list[dict[str, Any]]) -> None:
    """The same with neither: decisions differ, so the test above can fail."""
    first, second = (results["local alone"] for results in ranks)
    assert first["applied"] != second["applied"]


@for_each("name", ["AdamW", "RMSprop"])
@for_each("remedy", ["stochastic_rounding", "kahan"])
def test_bf16_shards_lose_no_update(ranks: list[dict[str, Any]], remedy: str, name: str) -> None:
    """BF16 shards of FSDP2 gain what FP32 shards gain, keep shards of BF16 as state, and are one model on both ranks."""
    first, second = (results[f"{remedy} {name}"] for results in ranks)
    assert first["gain"] == second["gain"] == pytest.approx(ranks[0][f"FP32 {name}"]["gain"], rel=0.15)
    assert first["whole"] == second["whole"]
    assert first["held"] + second["held"] == pytest.approx(sum(first["whole"]), abs=0.05)
    assert first["kinds"] == ["DTensor"]
    assert first["dtypes"] == ["torch.bfloat16"]


@for_each("remedy", ["stochastic_rounding", "kahan"])
def test_replicas_round_alike(ranks: list[dict[str, Any]], remedy: str) -> None:
    """Ranks that hold the same parameters have the same ones twenty steps later."""
    first, second = (results[f"{remedy} AdamW replicated"] for results in ranks)
    assert first == second
