"""`hf-amp rescale` writes a checkpoint that runs in pure FP16, or says why not and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from hf_amp.cli import app
from hf_amp.cli.rescale import REPORT_FILE
from tests.rescale.families import FAMILIES
from tests.rescale.trials import distance, outputs

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module", autouse=True)
def quiet_libraries() -> Any:
    """The command quietens transformers for its process, which here is that of all tests."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(verbosity)
    if progress:
        transformers_logging.enable_progress_bar()


def rescale(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["rescale", *map(str, arguments)], env={"COLUMNS": "300"})


def gelu_that_overflows(folder: Path) -> Any:
    """A GPT-2 whose GELU is given far too much, beside values that can be cured."""
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(2.0**22)
        model.transformer.h[1].mlp.c_proj.weight.mul_(2.0**-22)
    model.save_pretrained(folder)
    return model


def test_a_checkpoint_is_written_with_what_lay_beside_it(tmp_path: Path) -> None:
    """Stock `from_pretrained(dtype=torch.float16)` gives a finite model of the same function; the source is as it was."""
    family, source, out = BY_NAME["LlamaForCausalLM"], tmp_path / "source", tmp_path / "out"
    blown = family.blown_up({"stream": 22, "values": 10})
    blown.save_pretrained(source)
    for name, text in (("tokenizer.json", "{}"), ("vocab.txt", "a"), ("pytorch_model.bin", "old weights")):
        (source / name).write_text(text, encoding="utf-8")
    before = {f.name: f.read_bytes() for f in source.iterdir()}
    result = rescale(source, "-o", out, "--batch", 2, "--length", 12, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["safe"] is printed["bitwise"] is True
    assert {f.name: f.read_bytes() for f in source.iterdir()} == before
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt", REPORT_FILE} <= {
        f.name for f in out.iterdir()
    }
    assert not (out / "pytorch_model.bin").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "source"]
    exact, batch = outputs(blown, family.inputs()), family.inputs()
    assert distance(exact, outputs(type(blown).from_pretrained(source, dtype=torch.float16).eval(), batch)) > 1e-3
    assert distance(exact, outputs(type(blown).from_pretrained(out, dtype=torch.float16).eval(), batch)) < 1e-5
    assert json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))["exponents"] == printed["exponents"]


def test_what_is_refused_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    """A GELU that is given too much; the exit code is 1."""
    gelu_that_overflows(tmp_path / "source")
    result = rescale(tmp_path / "source", "-o", tmp_path / "out", "--batch", 1, "--length", 12)
    assert result.exit_code == 1
    assert "transformer.h.1.mlp" in result.output
    assert "Nothing was written" in result.output
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_modules_that_need_fp32_are_written_as_a_plan(tmp_path: Path) -> None:
    """With --keep-fp32 the rest is rescaled, and what FP16 autocast would still overflow in is named."""
    model, plan = gelu_that_overflows(tmp_path / "source"), tmp_path / "plan.json"
    result = rescale(tmp_path / "source", "-o", tmp_path / "out", "--batch", 1, "--length", 12, "--keep-fp32", plan)
    assert result.exit_code == 0, result.output
    named = json.loads(plan.read_text(encoding="utf-8"))["fp32_modules"]
    assert "transformer.h.1.mlp.c_fc" in named
    batch = {"input_ids": torch.arange(12)[None]}
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(model, batch)["logits"], outputs(again, batch)["logits"])


def test_places_and_kinds_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Never over the source or what exists; quantised checkpoints and those with code of their own in a sentence."""
    source = tmp_path / "source"
    BY_NAME["LlamaForCausalLM"].plain().save_pretrained(source)
    assert "never written over" in rescale(source, "-o", source).output
    (tmp_path / "full").mkdir()
    assert "exists already" in rescale(source, "-o", tmp_path / "full").output
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for more, words in (
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "code of its own"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "is quantised"),
    ):
        (source / "config.json").write_text(json.dumps(config | more), encoding="utf-8")
        result = rescale(source, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert words in result.output
    assert not (tmp_path / "out").exists()
