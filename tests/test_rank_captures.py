"""Captures of several ranks stand for the step of one process that has the batches of all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from typer.testing import CliRunner

from hf_amp import StateError, compare
from hf_amp.capture import BUCKETS, Digest, Key, can_be_captured, load_capture
from hf_amp.cli import app
from tests.each import for_each
from tests.forking import printed_by
from tests.rank_captures import by_accelerate, capture, model, whole_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Captures of two ranks of DistributedDataParallel and FSDP2, and of one process that sees all rows."""
    made: Path = tmp_path_factory.mktemp("captures")
    printed_by("tests.rank_captures", str(made), ranks=2, ACCELERATE_USE_CPU="true")
    for precision in ("FP32", "MIXED"):
        capture(made / f"one_{precision}.safetensors", precision)
    return made


@for_each("rows", [1, 3, 4, 257, 40_000])
def test_sketches_of_parts_add_up(rows: int) -> None:
    """Those of two halves are that of the whole, at any length."""
    whole = torch.randn(2 * rows, 5)
    parts = [Digest.of(part, rank=rank).figures for rank, part in enumerate(whole.split(rows))]
    assert torch.allclose(sum(parts)[-BUCKETS:], Digest.of(whole).figures[-BUCKETS:], atol=1e-9)  # type: ignore[index]


@pytest.mark.parametrize("precision", ["FP32", "MIXED"])
def test_two_ranks_are_the_step_of_one_process(folder: Path, precision: str) -> None:
    """Outputs, gradients of activations and of parameters agree; the comparison says what was joined, and misses nothing."""
    found = compare(folder / f"one_{precision}.safetensors", folder / f"{precision}.safetensors")
    assert found.agrees, found.sentence()
    assert not found.state
    assert "B is 2 ranks, joined" in found.notes[0]
    alone = compare(folder / "one_FP32.safetensors", model())
    assert alone.compared - found.compared <= 2  # the gradient of what has no rows, which adds up over ranks
    assert found.facts[1]["loss"] == pytest.approx(found.facts[0]["loss"], rel=1e-3)


@for_each("precision", ["FP32", "MIXED"])
def test_two_ranks_of_fsdp2_are_the_step_of_one_process(folder: Path, precision: str) -> None:
    """Raw and accelerate's: outputs, gradients and gathered parameters agree; to the last bit they are DistributedDataParallel's."""
    by_ddp = folder / f"{precision}.safetensors"
    by_accelerate(folder / f"one_accelerate_{precision}.safetensors", precision)
    for name, one in (("fsdp2", "one"), ("accelerate", "one_accelerate")):
        ours = folder / f"{name}_{precision}.safetensors"
        found = compare(folder / f"{one}_{precision}.safetensors", ours)
        assert found.agrees, found.sentence()
        assert not found.state
        assert not found.attributes
        assert found.compared >= 153
        assert name == "accelerate" or compare(by_ddp, ours).closest == 0.0
    other = model()
    other.transformer.h[0].ln_1.weight.data[3] += 1e-3
    (differs,) = compare(folder / f"fsdp2_{precision}.safetensors", other).state
    assert (differs.module, differs.tensor) == ("transformer.h.0.ln_1", "weight")


@for_each("precision", ["FP32", "MIXED"])
def test_a_module_that_two_ranks_of_fsdp2_compute_otherwise_is_named(folder: Path, precision: str) -> None:
    """By 1%, with equal weights; where values leave FP16's range, these two ways of training still agree."""
    found = compare(folder / f"one_{precision}.safetensors", folder / f"corrupted_{precision}.safetensors")
    assert found.modules[0] == "transformer.h.1.mlp.c_fc"
    assert not found.state
    ways = [folder / f"{name}_{precision}.safetensors" for name in ("overflowing_ddp", "overflowing")]
    assert compare(*ways).agrees
    for way in ways:
        digests = load_capture(way)[0].digests
        left = {key.module for key, d in digests.items() if key.what == "output" and d.figures[:2].any()}
        at = ["h.0", "h.1.mlp.c_proj", "h.1"] if precision == "MIXED" else []
        assert left == {f"transformer.{name}" for name in at}
        inputs = [d for key, d in digests.items() if key.what == "input"]
        assert not any(d.figures[:2].any() for d in inputs), "the step goes on with FP32's"


def test_a_capture_of_shards_changes_nothing(folder: Path) -> None:
    """Three steps have the weights of a run without it, to the last bit, and leave nothing gathered; both ranks give up together."""
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["plain"]["weights"] == rank["captured"]["weights"]
        assert rank["captured"]["gathered"] == rank["plain"]["gathered"] == []
        assert rank["captured"]["messages"][-1].startswith("step 2 was captured in")
        assert rank["on one rank"][0].startswith("step 1 was captured in")
        assert rank["failing"][0].startswith("step 1 could not be captured: ")
        assert "the batch was written into since" in rank["failing"][0]
        assert rank["failing"][1] == "1 applied"
    assert "rank 1 could not repeat it" in ranks[0]["failing"][0]


def test_the_gradient_of_logits_counts_once(tmp_path: Path) -> None:
    """It came through the loss that the model returns: digests are of the gradients that the run had."""
    capture(tmp_path / "one.safetensors", "FP32")
    trace, _ = load_capture(tmp_path / "one.safetensors")
    own = model()
    own(**whole_batch()).loss.backward()
    for name, p in own.named_parameters():
        module, _, of = name.rpartition(".")
        if p.grad is not None:
            found = trace.digests[Key(module, -1, "parameter gradient", of)].norm
            assert found / trace.facts["scale"] == pytest.approx(float(p.grad.norm()), rel=1e-4), name


def test_a_model_is_compared_with_ranks_on_their_batch(folder: Path) -> None:
    """Its batch is theirs, one after the other; a corrupted module is named."""
    _, forward_of = load_capture(folder / "FP32.safetensors")
    assert torch.equal(forward_of(model()).options["input_ids"], whole_batch()["input_ids"])
    assert compare(folder / "FP32.safetensors", model()).agrees
    other = model()
    other.transformer.h[1].mlp.c_fc.weight.data.mul_(1.01)
    found = compare(folder / "FP32.safetensors", other)
    assert found.modules[0] == "transformer.h.1.mlp.c_fc"


def test_a_rank_is_compared_with_itself_alone(folder: Path) -> None:
    """Rank 1's file by itself is its part on the same model; that of another rank is refused."""
    own, other = (folder / f"FP32_rank{rank}.safetensors" for rank in (1, 0))
    assert compare(own, model()).closest == 0.0
    with pytest.raises(StateError, match="captures of ranks 1 and 0; pass one rank's"):
        compare(own, other)


def test_ranks_that_do_not_fit_together_are_an_error(folder: Path, tmp_path: Path) -> None:
    """One is missing, or one has more rows."""
    kept = (folder / "FP32_rank0.safetensors").read_bytes()
    (tmp_path / "a_rank0.safetensors").write_bytes(kept)
    with pytest.raises(StateError, match=r"captures of ranks 0 to 0 of 1 belong together; these are of \[\(0, 2\)\]"):
        compare(tmp_path / "a.safetensors", model())


def test_a_capture_of_another_version_of_transformers(tmp_path: Path) -> None:
    """Transformers 5.17.0's GPT-2, by `capture(path, "MIXED", slice(1), model(4, 1))`; another epsilon is found all the same."""
    recorded = Path(__file__).parent / "data" / "capture_of_transformers_5.17.safetensors.gz"
    path = tmp_path / "capture.safetensors"
    path.write_bytes(gzip.decompress(recorded.read_bytes()))
    other = model(4, 1)
    found = compare(path, other)
    assert found.agrees, found.sentence()
    assert not found.state
    versions = [facts["versions"]["transformers"] for facts in found.facts]
    assert versions == ["5.17.0", transformers.__version__]
    other.transformer.h[0].ln_2.eps = 0.1
    assert "eps is 1e-05 in A and 0.1 in B" in compare(path, other).sentence()


@pytest.mark.gpu
def test_a_capture_of_a_cpu_agrees_on_a_device(tmp_path: Path) -> None:
    """FP16 is emulated in the file, and real on the device; the captured batch and model come along."""
    for precision in ("FP32", "MIXED"):
        capture(tmp_path / f"{precision}.safetensors", precision)
        found = compare(tmp_path / f"{precision}.safetensors", model().to("cuda"))
        assert found.agrees, found.sentence()
        assert [facts["device"] for facts in found.facts] == ["cpu", "cuda:0"]
    other = model().to("cuda")
    other.transformer.h[1].mlp.c_fc.weight.data.mul_(1.1)
    assert compare(tmp_path / "FP32.safetensors", other).modules[0] == "transformer.h.1.mlp.c_fc"


def test_the_command_takes_ranks(folder: Path) -> None:
    """By the name that one process would have given its file."""
    for ranks, code in (("FP32", 0), ("fsdp2_FP32", 0), ("corrupted_FP32", 1)):
        names = [str(folder / f"{name}.safetensors") for name in ("one_FP32", ranks)]
        result = CliRunner().invoke(app, ["diff", *names])
        assert (result.exit_code, "B is 2 ranks, joined" in result.output) == (code, True), result.output
    assert "transformer.h.1.mlp.c_fc" in result.output


def test_shards_of_another_kind_are_refused_at_the_call() -> None:
    """Tensor parallel, alone or under FSDP2: ranks have no rows of their own. FSDP2's are taken."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
        for kind in ("tp", "both", "fsdp2"):
            made = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
            if kind != "fsdp2":
                parallelize_module(made, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
            if kind != "tp":
                fully_shard(made, mesh=mesh["dp"])
            assert can_be_captured(made) == (kind == "fsdp2")
    finally:
        dist.destroy_process_group()
    assert can_be_captured(torch.nn.Linear(2, 2))
