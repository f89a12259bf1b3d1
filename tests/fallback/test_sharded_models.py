"""Two real processes over gloo whose models wait for each other in forward: they repeat it together, and nobody waits in vain."""

from __future__ import annotations

from typing import Any

import pytest

from tests.each import for_each
from tests.forking import told_by_ranks

SHARDED = [
    "Trainer, FP16",
    "Trainer, BF16",
    "attach",
    "tensor parallel",
    "fully_shard, FP16",
    "fully_shard, BF16",
    "BF16 shards in FP16",
    "BF16 shards in BF16",
    "FSDP1",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks came to, run by run."""
    folder = tmp_path_factory.mktemp("sharded")
    return told_by_ranks("tests.fallback.sharded_models_worker", str(folder / "model"), ACCELERATE_USE_CPU="true")


@for_each("run", [*SHARDED, "gathers"])
@for_each(("fault", "skips"), [("none", 0), ("batch", 1), ("loss", 1)])
def test_a_fault_of_one_rank_skips_one_step_on_both(
    ranks: list[dict[str, Any]], run: str, fault: str, skips: int
) -> None:
    """The bad step alone is skipped, for one cause on both; the other four are applied, in the precision asked for."""
    first, second = (results[f"{run}, {fault}"] for results in ranks)
    assert first["skips"] == second["skips"]
    assert [step for step, _ in first["skips"]] == [3] * skips
    assert first["applied"] == second["applied"] == 5 - skips
    assert first["plan"] == second["plan"]
    assert not first["plan"]["modules"]
    assert first["finite"]
    assert second["finite"]


@for_each("run", [*SHARDED, "gathers"])
def test_a_bad_batch_is_named_on_both(ranks: list[dict[str, Any]], run: str) -> None:
    """The rank that has it says where, the other that it is the other's."""
    first, second = (results[f"{run}, batch"] for results in ranks)
    assert [cause for _, cause in first["skips"]] == ["INPUT"]
    assert "found by rank 1" in first["messages"][0]
    assert "the batch holds NaN in" in second["messages"][0]


@for_each("run", [run for run in SHARDED if run != "FSDP1"])
def test_a_loss_of_one_rank_is_told_from_its_model(ranks: list[dict[str, Any]], run: str) -> None:
    """LOSS on both, because the forward pass, which both repeat, is finite; also where transformers has sharded the model."""
    for results in ranks:
        said = results[f"{run}, loss"]
        assert [cause for _, cause in said["skips"]] == ["LOSS"]
        assert "outputs are finite when its forward pass is repeated" in said["messages"][0]


def test_what_cannot_be_known_without_a_replay_is_said(ranks: list[dict[str, Any]]) -> None:
    """Under FSDP1: UNKNOWN on both, with what was seen and why no forward pass was repeated."""
    for results in ranks:
        said = results["FSDP1, loss"]
        assert [cause for _, cause in said["skips"]] == ["UNKNOWN"]
        assert "the loss was not finite" in said["messages"][0]
        assert "its parameters are sharded" in said["messages"][0]
        assert said["describes"].endswith("no forward pass is repeated, modules do not fall back")


@for_each("run", ["BF16 shards in FP16", "BF16 shards in BF16"])
def test_half_precision_shards_stay_what_they_are(ranks: list[dict[str, Any]], run: str) -> None:
    """FSDP gives their gradients in the format that it has found; what rounding loses of the updates is measured."""
    for results in ranks:
        assert results[f"{run}, none"]["parameters"] == 16
        assert 0 <= results[f"{run}, none"]["lost_updates"] <= 1


def test_shards_are_not_upcast(ranks: list[dict[str, Any]]) -> None:
    """Who asks for it hears what to do instead, before the first step."""
    assert "dtype=torch.float32 in from_pretrained" in ranks[0]["upcast"]["refusal"]
