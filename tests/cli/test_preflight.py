"""`hf-amp preflight` says before training what training then finds."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import hf_amp
from hf_amp.cli import app
from hf_amp.cli.preflight import FORMATS, batch_for, dry_runs, half_parameter_warnings, load_model, made_up_batch
from tests.fallback.rescaled import ZOO, RescaledModel
from tests.integrations.trainers import tiny_gpt2
from tests.test_cuda_rules import case, gradient, largest_exponent

BY_NAME = {entry.name: entry for entry in ZOO}


@pytest.fixture(scope="module", autouse=True)
def quiet_libraries() -> Any:
    """The command quietens transformers for its process, which here is that of all tests."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(verbosity)
    if progress:
        transformers_logging.enable_progress_bar()


def preflight(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["preflight", *map(str, arguments)], env={"COLUMNS": "200"})


def found_in_training(entry: RescaledModel, steps: int = 12) -> set[str]:
    """The modules that a run in emulated FP16 comes to have in FP32."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    with hf_amp.attach(accelerator) as session:
        plain, batches, make_optimizer = entry.build(0)
        model, optimizer = accelerator.prepare(plain, make_optimizer(plain))
        for _ in range(steps):
            accelerator.backward(model(**next(batches)).loss)
            optimizer.step()
            optimizer.zero_grad()
        return set(session.plan.modules)


@pytest.mark.usefixtures("fresh_accelerator_state")
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_what_it_predicts_is_what_training_finds(entry: RescaledModel) -> None:
    """For each rescaled model, in FP16: the same modules, before the first step, and a scale with which gradients are finite."""
    model, batches, _ = entry.build(0)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    predicted = {run.number_format.name: run for run in dry_runs(model, next(batches))}
    assert predicted["FP16"].error is None
    assert set(predicted["FP16"].overflowing) == found_in_training(entry)
    assert predicted["FP16"].scale is not None
    assert predicted["BF16"].overflowing == []
    assert set(predicted["FP16"].overflowing) <= set(predicted["FP8 E5M2"].overflowing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_ordinary_model_needs_nothing_in_half_precision() -> None:
    """No module overflows, and nearly all of the gradient is kept at the scale that is found."""
    model = BY_NAME["GPT-2"].plain(0)
    runs = {run.number_format.name: run for run in dry_runs(model, next(BY_NAME["GPT-2"].batches(0)))}
    assert list(runs) == [number_format.name for number_format in FORMATS]
    for name in ("FP16", "BF16"):
        assert (runs[name].overflowing, runs[name].remedy) == ([], "nothing needed")
        assert runs[name].underflow_fraction is not None
        assert runs[name].underflow_fraction < 0.01


def test_formats_with_scales_are_told_by_their_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchao's casts, in training and inference; without torchao the reason stands in their place."""
    pytest.importorskip("torchao", reason="the extra hf_amp[peers] brings it")
    for inference in ([], ["--inference"]):
        found = json.loads(preflight(folder, "--batch", 1, "--json", *inference).stdout)["scaled_formats"]
        assert list(found) == ["scaled FP8", "MXFP8", "NVFP4"]
        assert 0 < found["MXFP8"] < found["NVFP4"]
    assert "NVFP4 log-probabilities: " in preflight(folder, "--batch", 1).output
    monkeypatch.setattr("hf_amp.choose.find_spec", lambda name: None)
    assert "pip install torchao" in preflight(folder, "--batch", 1).output


def test_zeros_that_fp32_has_too_are_not_called_lost() -> None:
    """Rows of an embedding that the batch does not use have a gradient of zero in every format."""
    model = tiny_gpt2()
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.zeros(1, 4, dtype=torch.long)}
    (fp16,) = [run for run in dry_runs(model, batch) if run.number_format.name == "FP16"]
    assert "transformer.wpe" not in fp16.underflowing
    assert fp16.underflow_fraction is not None
    assert fp16.underflow_fraction < 0.2


class Product(nn.Module):
    """One product, all of whose results are the same number."""

    def __init__(self, result: float) -> None:
        super().__init__()
        self.product = nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.product.weight, result / 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


EIGHTS = torch.full((1, 4), 8.0)


@pytest.mark.parametrize(
    ("result", "formats"),
    [
        (400.0, set()),
        (1_000.0, {"FP8 E4M3"}),
        (62_000.0, {"FP8 E4M3", "FP8 E5M2"}),
        (1_000_000.0, {"FP8 E4M3", "FP8 E5M2", "FP16"}),
    ],
)
def test_formats_differ_by_their_range(result: float, formats: set[str]) -> None:
    """The largest values are 448 in E4M3, 57,344 in E5M2, 65,504 in FP16; BF16 holds them all."""
    runs = dry_runs(Product(result), {"x": EIGHTS})
    assert {run.number_format.name for run in runs if run.overflowing} == formats


class Faint(Product):
    """The same, of which little comes out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2.0**-14


def test_gradients_that_are_lost_are_not_called_fine() -> None:
    """Nothing overflows, and with the largest scale tried the gradient is subnormal in E4M3 alone."""
    runs = {run.number_format.name: run for run in dry_runs(Faint(1.0), {"x": EIGHTS})}
    lost = {name for name, run in runs.items() if "wider range" in run.remedy}
    assert lost == {"FP8 E4M3"}
    assert (runs["FP8 E4M3"].overflowing, runs["FP8 E4M3"].underflow_fraction) == ([], 1.0)


def test_a_model_with_a_nan_is_not_blamed_on_precision() -> None:
    """A NaN in a weight is not finite in FP32 either, and no precision cures that."""
    model = Product(1.0)
    with torch.no_grad():
        model.product.weight[0, 0] = torch.nan
    for run in dry_runs(model, {"x": EIGHTS}):
        assert run.overflowing == []
        assert run.first_non_finite == "product"
        assert run.remedy.startswith("none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved rescaled GPT-2 with a batch."""
    path = tmp_path_factory.mktemp("model")
    model, batches, _ = BY_NAME["GPT-2"].build(0)
    model.save_pretrained(path)
    save_file({name: x.clone() for name, x in next(batches).items()}, path / "batch.safetensors")
    return path


def test_the_command_prints_it(folder: Path) -> None:
    """Memory, dtypes, the overflowing modules by name, and the remedy."""
    result = preflight(folder, "--batch", folder / "batch.safetensors")
    assert result.exit_code == 0, result.output
    for words in (
        "GPT2LMHeadModel", "64,896 float32",
        "FP16 overflow: transformer.h.0.attn.c_proj, transformer.h.0.mlp.c_proj, transformer.h.1.attn.c_proj",
        "4 modules in FP32 (hf_amp does that)",
    ):  # fmt: skip
        assert words in " ".join(result.stdout.split())


def test_json_has_the_same(folder: Path) -> None:
    """On standard output there is nothing else."""
    reported = json.loads(preflight(folder, "--batch", 2, "--json").stdout)
    assert reported["trainable_parameters"] == 64_896
    assert [run["number_format"] for run in reported["dry_runs"]] == [f.name for f in FORMATS]
    assert len(reported["dry_runs"][0]["overflowing"]) == 4


@pytest.mark.parametrize("lr", [1e-5, 1e-4])
def test_what_rounding_would_lose_is_predicted(folder: Path, lr: float) -> None:
    """Within 0.03 of what AdamW's first step in BF16 leaves as it is; bytes of every remedy; what would stand still."""
    reported = json.loads(preflight(folder, "--lr", lr, "--json").stdout)["half_parameters"]
    model, batches, _ = BY_NAME["GPT-2"].build(0)
    model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=0.0, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    model(**next(batches)).loss.backward()
    due = [p.grad != 0 for p in model.parameters()]
    optimizer.step()
    lost = sum(((p == b) & d).sum().item() for p, b, d in zip(model.parameters(), before, due, strict=True))
    assert reported["predicted_lost_share"] == pytest.approx(lost / sum(d.sum().item() for d in due), abs=0.03)
    assert "transformer.h.0.ln_1.weight" in reported["predicted_frozen"]
    assert reported["bytes"]["stochastic_rounding"] == reported["bytes"]["None"] == 8 * 64_896
    assert reported["bytes"]["upcast"] == 16 * 64_896
    printed = " ".join(preflight(folder, "--lr", lr).stdout.split())
    assert f"At a learning rate of {lr:g} BF16 without half_parameters would lose about" in printed
    assert "kahan 649 kB" in printed


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_a_batch_can_be_made_up_for_every_kind_of_model(entry: RescaledModel) -> None:
    """Text, images, audio; with a decoder or without: the model runs on it and has a loss."""
    model = entry.plain(0)
    batch = made_up_batch(model, 2, 12)
    assert all(len(value) == 2 for value in batch.values())
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(("dtype", "words"), [(torch.float16, "unscale FP16"), (torch.bfloat16, "1/256")])
def test_half_precision_parameters_are_named(dtype: torch.dtype, words: str) -> None:
    """The first of them, what it leads to and what to do; frozen ones are fine."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(dtype))
    (warning,) = half_parameter_warnings(model)
    assert "(1.weight" in warning
    assert words in warning
    assert "float32" in warning
    model.requires_grad_(False)
    assert half_parameter_warnings(model) == []


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path: Path) -> None:
    """Neither as weights nor as a batch."""
    model: PreTrainedModel = tiny_gpt2()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    for name in ("pytorch_model.bin", "batch.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(typer.BadParameter):
        load_model(str(tmp_path), trust_remote_code=False)
    with pytest.raises(typer.BadParameter, match=r"batch\.pt: cannot be read"):
        batch_for(model, str(tmp_path / "batch.pt"), 4)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        ("./nowhere", "1", "no such folder"),
        ("{folder}", "0", "pass a number of rows"),
        ("{folder}", "-1", "--batch -1: pass a number of rows from 1 on"),
        ("{folder}", "x.pt", "cannot be read"),
        (
            "{folder}",
            "{folder}/other.safetensors",
            "GPT2LMHeadModel cannot be run on input_ids (IndexError: index out of",
        ),
        ("{folder}/adapter", "1", "an adapter of peft, without the model under it"),
    ],
)
def test_what_cannot_be_loaded_ends_at_once(folder: Path, model: str, batch: str, words: str) -> None:
    """Exit code 2, what was passed and what is allowed."""
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"input_ids": torch.tensor([[10**6]])}, folder / "other.safetensors")
    result = preflight(model.format(folder=folder), "--batch", batch.format(folder=folder))
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


class Stepwise(nn.Module):
    """Overflows in the operator that is asked for, and only there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x) * 0
        wide = h + 4e4
        if self.kind == "product":
            h = h + wide * wide * 1e-9
        elif self.kind == "sum":
            h = h + (wide + wide) * 1e-9
        else:
            h = h + (wide @ wide.T)[:, :1] * 1e-12
        return h + self.inner(x)


@pytest.mark.parametrize("kind", ["product", "sum", "matrix product"])
def test_the_operator_that_overflows_is_named_by_kind(kind: str) -> None:
    """A product, a sum, a matrix product of half-precision values, with its line; each is finite in FP32."""
    (fp16, *_) = dry_runs(Stepwise(kind), {"x": torch.ones(4, 4)})
    assert fp16.overflowing == [""]
    assert fp16.operators[""].startswith(f"{kind}: ")
    assert "test_preflight.py" in fp16.operators[""]


def test_headroom_is_that_of_the_largest_output() -> None:
    """62,000 is 0.08 bits below overflow in FP16, 102 bits in BF16; in E4M3 it overflows, and no headroom is given."""
    runs = {run.number_format.name: run for run in dry_runs(Product(62_000.0), {"x": EIGHTS})}
    near = runs["FP16"].headroom
    assert near is not None
    assert near.amax == pytest.approx(62_000, rel=1e-3)
    assert near.bits == pytest.approx(0.08, abs=0.01)
    assert runs["BF16"].headroom.bits > 100
    assert runs["FP8 E4M3"].headroom is None


def test_few_passes_are_needed(full_size: bool) -> None:
    """At most 10 passes in all, forward and backward ones counted alike; with modules that overflow in FP16 and FP8, and without."""
    entries = ZOO if full_size else ZOO[:2]
    overflowing = [(entry.build(0)[0], next(entry.build(0)[1])) for entry in entries]
    for model, batch in [*overflowing, *((entry.plain(0), next(entry.batches(0))) for entry in entries)]:
        passes: list[str] = []
        norm = [module for module in model.modules() if "norm" in type(module).__name__.lower()][-1]
        norm.register_forward_hook(lambda *_, passes=passes: passes.append("forward"))
        norm.weight.register_hook(lambda _, passes=passes: passes.append("backward"))
        for run in dry_runs(model, batch):
            assert run.scale is not None
        assert passes.count("forward") >= passes.count("backward") - 1 >= 3
        assert len(passes) <= 10


@pytest.mark.parametrize("entry", ZOO[:3], ids=lambda entry: entry.name)
def test_inference_of_half_precision_copies(entry: RescaledModel) -> None:
    """Weights that FP16 does not hold are named, BF16 holds all; an ordinary model is near FP32, nearer in FP16 than in BF16."""
    model, batches, _ = entry.build(0)
    batch = next(batches)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    fp16, bf16 = hf_amp.check_inference(model, batch)
    assert fp16.weights
    assert bf16.weights == bf16.overflowing == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fp16, bf16 = hf_amp.check_inference(entry.plain(0), batch)
    assert fp16.weights == fp16.overflowing == []
    assert fp16.log_probability_error < 0.002 < bf16.log_probability_error < 0.02
    assert 5 < fp16.headroom.bits < 16 < bf16.headroom.bits


class Scores(nn.Module):
    """Products of queries are 40,000, then 10,000 under a mask, and no module returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.query = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.query.weight, 50.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(x)
        scores = q @ (q / 4).T
        mask = torch.tensor([[0.0, torch.finfo(q.dtype).min]], dtype=q.dtype).expand(2, 2).reshape(1, 4)
        return self.inner(x) + (scores / 4 + mask).softmax(-1).sum()


def test_headroom_is_that_of_half_precision_values_inside_of_modules_too() -> None:
    """Scores that no module returns count; a residual stream in FP32, a mask of -65504 and weights do not."""
    x = torch.ones(4, 4)
    exact = (Scores().query(x) @ (Scores().query(x) / 4).T).abs().max().item()
    for near in (next(dry_runs(Scores(), {"x": x})).headroom, hf_amp.check_inference(Scores(), {"x": x})[0].headroom):
        assert near is not None
        assert (near.module, near.amax) == ("", pytest.approx(exact, rel=1e-3))
        assert near.bits == pytest.approx(math.log2(65504 / exact), abs=0.01)
    stream = nn.Sequential(nn.Linear(4, 4), Wide())
    (fp16, *_) = dry_runs(stream, {"input": x})
    assert fp16.overflowing == []
    assert fp16.headroom is not None
    assert (fp16.headroom.module, fp16.headroom.bits > 10) == ("0", True)


class Wide(nn.Module):
    """A residual stream of 200,000, which is FP32 under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() + 2e5


class Passes(nn.Module):
    """Gives what it is given, by an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 1


def test_the_module_that_makes_the_largest_value_is_named() -> None:
    """And not one that hands it on: here an embedding."""
    model = nn.Sequential(nn.Embedding(4, 4), Passes())
    nn.init.constant_(model[0].weight, 1_000.0)
    for found in hf_amp.check_inference(model, {"input": torch.arange(4)}):
        assert found.headroom is not None
        assert (found.headroom.module, found.headroom.amax) == ("0", 1_000.0)


def test_headroom_beside_what_overflows_is_that_of_the_rest() -> None:
    """A module that overflows goes to FP32; how near the others are is told all the same, by the largest value beside it."""
    model = nn.Sequential(Product(30_000.0), Product(1e3), Product(1_000_000.0))
    with torch.no_grad():
        model[1].product.weight /= 1e3
    x = {"input": EIGHTS}
    inputs = model[0](EIGHTS).abs().max().item()
    for found in (next(dry_runs(model, x)), hf_amp.check_inference(model, x)[0]):
        assert found.overflowing == ["2.product"]
        assert found.headroom is not None
        assert found.headroom.amax == pytest.approx(inputs, rel=1e-2)


def test_few_passes_are_needed_where_gradients_leave_the_format() -> None:
    """At most 10 as well, and FP8 is given a scale that fits, within four bits of the largest."""
    for name in ("gpt2", "gemma3", "t5"):
        model, batch = case(name, gradient, half=False)
        passes: list[str] = []

        def note(_module: Any, _arguments: Any, output: Any, passes: list[str] = passes) -> None:
            passes.append("forward")
            if output.logits.requires_grad:
                output.logits.register_hook(lambda _: passes.append("backward"))

        model.register_forward_hook(note)
        runs = {run.number_format.name: run for run in dry_runs(model, batch)}
        assert runs["FP16"].scale < 1
        assert len(passes) <= 10
        with hf_amp.emulate(torch.float8_e4m3fn):
            logits = model(**batch).logits
        parameters = [p for p in model.parameters() if p.requires_grad]
        fits = largest_exponent(logits.float().square().mean(), parameters)
        assert fits - 4 <= math.log2(runs["FP8 E4M3"].scale) <= fits, name


def test_inference_needs_few_passes() -> None:
    """Three forward passes, and at most one more for each format that overflows."""
    for model, most in ((BY_NAME["GPT-2"].plain(0), 3), (BY_NAME["GPT-2"].build(0)[0], 4)):
        passes: list[str] = []
        model.register_forward_pre_hook(lambda *_, passes=passes: passes.append("forward"))
        hf_amp.check_inference(model, made_up_batch(model, 1, 8))
        assert 3 <= len(passes) <= most


class Residual(nn.Module):
    """A residual stream beyond 65504, of outputs that are in the range."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        for layer in (self.first, self.second):
            nn.init.constant_(layer.weight, 1e4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = self.first(x).float() if torch.is_autocast_enabled("cpu") else self.first(x)
        return nn.functional.layer_norm(stream + self.second(x), (4,))


def test_inference_overflows_where_training_does_not() -> None:
    """The sum that training keeps in FP32 is half precision in inference, and named."""
    fp16, bf16 = hf_amp.check_inference(Residual(), {"x": torch.ones(2, 4)})
    assert fp16.overflowing == [""]
    assert fp16.operators[""].startswith("sum: ")
    assert bf16.overflowing == []
    assert next(dry_runs(Residual(), {"x": torch.ones(2, 4)})).overflowing == []


def test_inputs_beyond_fp16_are_not_blamed_on_fp32(tmp_path: Path) -> None:
    """Of a batch that FP16 cannot hold that is said, with its names; NaN in it is said to be there."""
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    x = torch.tensor([[1e5, 2e5, 3e5, 4e5]])
    fp16, bf16 = hf_amp.check_inference(model, {"input": x})
    assert (fp16.inputs, fp16.first_non_finite, bf16.inputs) == (["input"], None, [])
    assert "FP16 inputs beyond its range: input" in fp16.sentences()
    tiny_gpt2().save_pretrained(tmp_path)
    width = tiny_gpt2().config.n_embd
    batch = {"inputs_embeds": torch.full((1, 4, width), torch.nan), "labels": torch.ones(1, 4, dtype=torch.long)}
    save_file(batch, tmp_path / "batch.safetensors")
    for options in ([], ["--inference"]):
        result = preflight(tmp_path, "--batch", tmp_path / "batch.safetensors", *options)
        assert result.stdout.startswith("The batch holds inf or NaN (inputs_embeds): fix the data.")


def test_a_buffer_beyond_fp16_is_what_is_said() -> None:
    """Also where a kernel does not take it in FP32 beside half precision, so that the rest cannot be seen."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].running_var.fill_(1e6)
    fp16, bf16 = hf_amp.check_inference(model, {"input": torch.randn(2, 3, 8, 8)})
    assert fp16.weights == ["1.running_var"]
    assert fp16.verdict() == "FP16 overflows in 1 weight in inference: use BF16, or keep it in FP32."
    assert bf16.verdict().startswith("BF16 overflows nowhere in inference, with ")


def test_quantized_weights_are_run_as_they_are() -> None:
    """Those of torchao, of which nothing is known element by element."""
    quantization = pytest.importorskip("torchao.quantization", reason="the extra hf_amp[peers] brings it")
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    fp16, _ = hf_amp.check_inference(model, {"input": torch.randn(2, 32)})
    assert (fp16.error, fp16.weights, fp16.overflowing) == (None, [], [])


def test_labels_that_are_all_ignored_are_named() -> None:
    """A mean over no label is NaN in every format: the line says so."""
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}
    fp16 = next(dry_runs(tiny_gpt2(), batch))
    assert fp16.first_non_finite == ""
    assert fp16.verdict().startswith(
        "What the model itself returns is not finite in FP32 either: fix the model or the batch"
    )
    assert "every label of the batch is ignored (-100)" in fp16.operators[""]


class ScaledEmbedding(nn.Embedding):
    """Of Gemma: what is looked up is multiplied by a constant in the dtype of the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.tensor(8.0).to(self.weight.dtype)


def test_inference_compares_to_fp32_parameters() -> None:
    """A scaled embedding that overflows in FP16 alone is to blame, and not FP32; its FP32 values are those of FP32 weights."""
    embedding = ScaledEmbedding(4, 4)
    nn.init.constant_(embedding.weight, 10_003.0)
    model = nn.Sequential(embedding, nn.LayerNorm(4))
    fp16, bf16 = hf_amp.check_inference(model, {"input": torch.arange(4)})
    assert (fp16.first_non_finite, fp16.overflowing[0], bf16.overflowing) == (None, "0", [])
    assert fp16.operators["0"].startswith("product: ")
    assert "its output is from 8e+04 to 8e+04 in FP32 and inf in FP16" in fp16.operators["0"]


def test_the_command_says_first_what_matters(folder: Path) -> None:
    """A verdict, then whether the batch was made up and how long it is; with --inference likewise."""
    lines = preflight(folder, "--batch", 2, "--length", 12).stdout.splitlines()
    assert lines[0].startswith("FP16 overflows in 4 modules in training: 4 modules in FP32")
    assert (
        lines[1]
        == "Made-up batch, random: real data may overflow where it does not: input_ids (2, 12), labels (2, 12)."
    )
    result = preflight(folder, "--inference")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("FP16 overflows in ")
    assert ", labels (" not in result.stdout
    assert "FP16 weights beyond its range: transformer.wte.weight" in result.stdout
    assert "BF16 log-probabilities: " in result.stdout


def test_non_finite_weights_and_odd_configurations_are_sentences(tmp_path: Path) -> None:
    """No traceback: the weight is named; a configuration without a vocabulary says what to pass."""
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    result = preflight(tmp_path, "--batch", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("The weights hold inf or NaN (transformer.h.0.mlp.c_fc.weight)")
    vars(model.config)["vocab_size"] = None
    with pytest.raises(typer.BadParameter, match="no batch can be made up for GPT2LMHeadModel"):
        batch_for(model, "1", 4)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {"vocab_size": 32, "max_position_embeddings": 34, "pad_token_id": 0, **SIZES}
IMAGE = {"image_size": 16, "patch_size": 8, **SIZES}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
XLNET = {"vocab_size": 32, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
KINDS = [
    ("BertForMultipleChoice", "BertConfig", TEXT),
    ("BertForNextSentencePrediction", "BertConfig", TEXT),
    ("BertForTokenClassification", "BertConfig", {**TEXT, "num_labels": 3}),
    ("BertForQuestionAnswering", "BertConfig", TEXT),
    ("BertForSequenceClassification", "BertConfig", {**TEXT, "num_labels": 1}),
    ("BertForSequenceClassification", "BertConfig", {**TEXT, "problem_type": "multi_label_classification"}),
    ("RobertaForMaskedLM", "RobertaConfig", {**TEXT, "pad_token_id": 1}),
    ("XLNetLMHeadModel", "XLNetConfig", XLNET),
    ("CLIPModel", "CLIPConfig", {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": IMAGE}),
    ("ResNetForImageClassification", "ResNetConfig", RESNET),
    ("ASTForAudioClassification", "ASTConfig", {"num_mel_bins": 16, "max_length": 32, "patch_size": 8, **SIZES}),
    ("VideoMAEForVideoClassification", "VideoMAEConfig", {**IMAGE, "num_frames": 2}),
]


@pytest.mark.parametrize(("architecture", "configuration", "options"), KINDS)
def test_a_batch_is_made_up_for_what_people_train(
    architecture: str, configuration: str, options: dict[str, Any]
) -> None:
    """Inputs and labels of the kinds, shapes and dtypes that the model takes, with as many tokens as are asked for at most."""
    model = getattr(transformers, architecture)(getattr(transformers, configuration)(**options))
    batch = made_up_batch(model, 2, 64)
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()


def llava() -> PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(num_key_value_heads=2, **TEXT),
        vision_config=transformers.CLIPVisionConfig(**IMAGE),
        image_token_id=31,
    )
    return transformers.LlavaForConditionalGeneration(config)


def test_what_the_batch_does_not_reach_is_said(tmp_path: Path) -> None:
    """Of a vision tower nothing is known where the made-up batch holds tokens alone; of a model whose parts all ran, nothing is said."""
    llava().save_pretrained(tmp_path)
    for options in ([], ["--inference"]):
        printed = " ".join(preflight(tmp_path, "--batch", 1, "--length", 8, *options).stdout.split())
        words = "The batch did not reach model.vision_tower, model.multi_modal_projector: nothing is known there."
        assert words in printed
    assert next(dry_runs(tiny_gpt2(), made_up_batch(tiny_gpt2(), 1, 8))).not_run == []


def test_a_model_without_a_loss_says_what_gradients_are_of(tmp_path: Path) -> None:
    """The mean square of its outputs; and that its log-probabilities are unknown, without words of another command."""
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path)
    printed = preflight(tmp_path, "--batch", 1).stdout
    assert "The model returns no loss on this batch: gradients are those of the mean square of its outputs." in printed
    assert "choose_precision" not in printed


class Returns(nn.Module):
    """A loss, in the kinds of output that a Trainer takes it from."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
        return {"loss": loss, "logits": logits} if self.kind is dict else (loss, logits)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_a_loss_is_found_where_a_trainer_finds_it(kind: type) -> None:
    """In a plain dict or at the beginning of a tuple: gradients are those of the loss, and no other is spoken of."""
    model = Returns(kind)
    fp16 = next(dry_runs(model, {"x": EIGHTS}))
    assert fp16.has_loss
    in_inference = hf_amp.check_inference(model, {"x": EIGHTS})[0].log_probability_error
    assert (in_inference is not None) is (kind is dict)


def test_weights_that_are_missing_or_of_another_shape_are_named(tmp_path: Path) -> None:
    """What is random because the folder lacks it is said, and what does not fit config.json is an error with its names."""
    tiny_gpt2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = {name: x for name, x in weights.items() if name != "transformer.ln_f.weight"}
    save_file(lost, tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = preflight(tmp_path)
    assert result.exit_code == 0, result.output
    assert "lacks 1 weight (transformer.ln_f.weight): they are random here" in result.stderr
    weights["transformer.ln_f.weight"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = preflight(tmp_path)
    assert result.exit_code == 2
    assert "other shapes than config.json says (transformer.ln_f.weight)" in " ".join(result.output.split())


class Derivative(Product):
    """Finite in every format, with a gradient of 0 times infinity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = super().forward(x)
        return (h - h).abs().sqrt() + h


def test_gradients_that_no_format_cures_are_not_blamed_on_one() -> None:
    """They are not finite in FP32 either: the parameters are named, and no other format is recommended."""
    for run in dry_runs(Derivative(1.0), {"x": EIGHTS}):
        assert run.non_finite_gradients == ["product.weight"]
        assert run.verdict().startswith("Gradients are not finite in FP32 either (product.weight): fix the model")
        assert run.remedy.startswith("none: fix the model")


class Root(nn.Module):
    """Its root is taken of what is zero in FP16 and not in FP32, so that its derivative is infinite there alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.sigmoid(self.inner(x)) * 1e-9).sqrt() * 1e4


class RootInside(nn.Module):
    """The same with a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.root = nn.Linear(4, 4), Root()

    def forward(self, x: torch.Tensor) -> Any:
        return {"loss": self.root(self.first(x)).float().square().mean()}


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_gradients_that_overflow_at_every_scale_are_named_as_training_names_them() -> None:
    """Those modules go to FP32 in a run: preflight names them, and the scale with which it trains then."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    fp16, bf16, *_ = dry_runs(RootInside(), {"x": x})
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    with hf_amp.attach(accelerator, init_scale=fp16.scale) as session:
        model, optimizer = accelerator.prepare(plain := RootInside(), torch.optim.SGD(plain.parameters(), lr=1e-6))
        for _ in range(4):
            accelerator.backward(model(x)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        assert set(fp16.in_backward) == set(session.plan.modules) != set()
        assert session.metrics()["applied_steps"] == 3
    assert "in 2 modules in training: 2 modules in FP32 (hf_amp does that)" in fp16.verdict()
    assert (fp16.overflowing, bf16.in_backward) == ([], [])
    assert "FP16 overflow in backward, at every loss scale: root, root.inner" in fp16.sentences()


class Masked(Product):
    """A mask that no FP16 tensor can be filled with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).masked_fill(x > 1, -1e9)  # the line


def test_a_mask_that_fp16_cannot_hold_is_said_with_its_line() -> None:
    """As on a device it raises, in training and inference: what is said names file and line."""
    for found in (next(dry_runs(Masked(1.0), {"x": EIGHTS})), hf_amp.check_inference(Masked(1.0), {"x": EIGHTS})[0]):
        assert "without overflow at test_preflight.py:" in found.verdict()
        assert "masked_fill(x > 1, -1e9)" in found.verdict()


def test_a_loss_scale_below_one_is_said_at_once() -> None:
    """A loss ten million times too large overflows nowhere, and the verdict says what it needs."""
    model, batch = tiny_gpt2(), made_up_batch(tiny_gpt2(), 1, 8)
    model.register_forward_hook(lambda module, arguments, output: output.__setitem__("loss", output.loss * 1e7))
    fp16 = next(dry_runs(model, batch))
    assert fp16.scale is not None
    assert f"need a loss scale below 1 ({fp16.scale:g} fits)" in fp16.verdict()


CONFIGURATION = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=32, **options):
        self.vocab_size = vocab_size
        super().__init__(**options)
"""
MODEL = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.head = nn.Embedding(config.vocab_size, 16), nn.Linear(16, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, token_type_ids, labels=None):
        assert token_type_ids.shape == input_ids.shape
        logits = self.head(self.embedding(input_ids) * 1e6)
        return CausalLMOutput(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)
"""


def test_custom_code_and_hub_names_without_a_network(
    tmp_path: Path, full_size: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback: what to pass; with --trust-remote-code the class that the code names, its head included."""
    for name, text in (("configuration_own.py", CONFIGURATION), ("modeling_own.py", MODEL)):
        (tmp_path / name).write_text(text)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    save_file({"input_ids": torch.ones(1, 4).long(), "token_type_ids": torch.ones(1, 2)}, tmp_path / "bad.safetensors")
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {
        "embedding.weight": torch.randn(32, 16),
        "head.weight": torch.randn(32, 16),
        "head.bias": torch.zeros(32),
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    commands = [
        [tmp_path, "--trust-remote-code", "--batch", "1", "--length", "4"],
        [tmp_path, "--trust-remote-code", "--batch", tmp_path / "bad.safetensors"],
        [tmp_path],
        ["nobody/no-such-model"],
    ]
    if full_size:
        printed = in_a_process_of_its_own(commands, HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"))
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        results = [preflight(*command) for command in commands]
        printed = " ".join(f"{each.exit_code} {type(each.exception).__name__} {each.output}" for each in results)
    assert "Traceback" not in printed
    for words in (
        "0 NoneType", "FP16 overflows in 1 module in training: 1 module in FP32 (hf_amp does that)", "OwnForCausalLM, parameters",
        "FP16 overflow: head", "2 SystemExit", "(AssertionError at modeling_own.py:", "pass --trust-remote-code, if you trust the code", "no-such-model: cannot be loaded (OSError",
        "pass a folder that save_pretrained wrote, or a hub name",
    ):  # fmt: skip
        assert words in " ".join(printed.replace("│", " ").split())


def in_a_process_of_its_own(commands: list[list[object]], **environment: str) -> str:
    """Exit codes, exceptions and what is printed."""
    program = f"""
from typer.testing import CliRunner
from hf_amp.cli import app
for command in {[[str(word) for word in command] for command in commands]}:
    result = CliRunner().invoke(app, ["preflight", *command], env={{"COLUMNS": "200"}})
    print(result.exit_code, type(result.exception).__name__, result.output)
"""
    variables = {**os.environ, **environment}
    ran = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
