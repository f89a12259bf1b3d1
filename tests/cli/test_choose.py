"""`hf-amp choose` prints the audit, and writes a plan that a config reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from hf_amp import MixedPrecisionConfig, PrecisionMode
from hf_amp.cli import app
from tests.each import for_each
from tests.integrations.trainers import text_rows, tiny_gpt2


@pytest.fixture(scope="module", autouse=True)
def quiet_libraries() -> Any:
    """The command quietens transformers for its process, which here is that of all tests."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(verbosity)
    if progress:
        transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved GPT-2, and a batch of text beside it."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny_gpt2().save_pretrained(path)
    save_file({"input_ids": torch.tensor([row["input_ids"] for row in text_rows()[:4]])}, path / "batch.safetensors")
    return path


def choose(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["choose", *map(str, arguments)], env={"COLUMNS": "200"})


def test_it_says_what_to_do_and_writes_the_plan(folder: Path, tmp_path: Path) -> None:
    """One sentence first, then errors, modules, the way there and the settings of other tools; the file is a plan."""
    out = tmp_path / "plan.json"
    result = choose(folder, "--batch", folder / "batch.safetensors", "--format", "BF16", "--out", out)
    assert result.exit_code == 0, result.output
    first, *rest = result.output.splitlines()
    assert first.startswith("BF16, in FP32: lm_head: error ")
    assert first.endswith("of the products not in FP32.")
    text = "\n".join(rest)
    assert "Error of 124 log-probabilities" in text
    assert all(name in text for name in ("TF32", "FP8 E5M2", "NVFP4", "lm_head in FP32", "head_dtype"))
    config = MixedPrecisionConfig(plan=out)
    assert (config.precision_mode, config.fp32_modules) == (PrecisionMode.BF16, ("lm_head",))


def test_json_is_all_of_it(folder: Path) -> None:
    """On stdout, alone; with a made-up batch that is reported as such elsewhere."""
    found = json.loads(choose(folder, "--json", "--length", 16, "--metric", "loss").stdout)
    assert found["plan"]["default"] == "MIXED"
    assert found["metric"] == "loss"
    assert found["formats"]["FP32"] == {"rms": 0.0, "largest": 0.0}
    assert "The batch is made up" in choose(folder, "--length", 16, "--format", "FP16").output


def test_a_bound_that_nothing_meets_is_said(folder: Path) -> None:
    """With how near one gets."""
    result = choose(folder, "--batch", folder / "batch.safetensors", "--max-error", "1e-12")
    assert result.output.startswith("No set of modules brings the error from ")
    assert "Use FP32, or a larger --max-error" in result.output


@for_each(
    ("options", "words"),
    [
        (["--metric", "x"], "metric must be one of"),
        (["--format", "FP4"], "it must be one of"),
        (["--max-error", "-1"], "must be a positive"),
        (["--out", "/nowhere/plan.json"], "cannot be written"),
    ],
)
def test_a_wrong_option_is_an_error(folder: Path, options: list[str], words: str) -> None:
    """It says what is allowed."""
    result = choose(folder, "--length", 16, *options)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
