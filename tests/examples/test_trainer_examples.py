"""The Trainer examples run: with their own data, and through the real loading code on a model and data of a folder."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoImageProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.integrations.test_what_people_do import tiny_t5
from tests.integrations.trainers import tiny_gpt2

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["trainer_text", "trainer_vision", "trainer_lora", "trainer_seq2seq_overflow"]
SENTENCES = ["the loss is finite and the gradients are not"] * 40


def output_of(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> list[str]:
    """The last lines of an example that runs two steps in this process: what it has to say at the end."""
    line = [name, "--steps", "2", "--batch_size", "2", "--output_dir", str(folder / "runs"), *options]
    monkeypatch.setattr(sys, "argv", line)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.split("\n\n")[-1].strip().splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--help says what the example does and how to use it on a model of the hub."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "othing is downloaded" in shown
    assert f"examples/{name}.py --model_name_or_path" in shown


@pytest.mark.parametrize("name", ["trainer_text", "trainer_vision", "trainer_lora"])
def test_own_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network, both runs are reported; in FP16 an early step may be skipped for the scale."""
    lines = output_of(name, tmp_path, monkeypatch, capsys)
    assert ["steps applied" in line for line in lines] == [True, True, False]
    assert "2 steps applied, 0 skipped" in lines[0]
    assert "FP16 emulated" in lines[1]


def test_the_overflow_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without fallback nothing is applied; with it one module is named and the rest stays FP16."""
    lines = output_of("trainer_seq2seq_overflow", tmp_path, monkeypatch, capsys)
    assert "0 steps applied, 2 skipped; ended in MIXED" in lines[1]
    large = "encoder.block.1.layer.1.DenseReluDense.wo"
    assert lines[2].endswith(f"1 steps applied, 1 skipped; ended in MIXED; in FP32: {large}")


@pytest.mark.parametrize(("precision", "trials", "why"), [("fp16", 3, "skipped"), ("bf16", 5, "lost updates")])
def test_a_search_prunes_by_what_precision_costs(tmp_path: Path, precision: str, trials: int, why: str) -> None:
    """Trials that skip most steps, or lose most updates, and no others; each has a session that has ended."""
    search = runpy.run_path(str(EXAMPLES / "trainer_search.py"))["search"]
    study = search(precision, trials, 8, tmp_path)
    assert len(study.trials) == trials
    pruned = [trial.state.name == "PRUNED" for trial in study.trials]
    assert pruned == [trial.user_attrs[why] > 0.5 for trial in study.trials]
    assert any(pruned)
    assert np.isfinite(study.best_value)
    lines = [json.loads(line) for line in (tmp_path / "amp_events.jsonl").read_text().splitlines()]
    ended = [line["run_id"] for line in lines if line["event"] == "training_ended"]
    assert len(set(ended)) == len(ended) == trials


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs of the sentences above."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "</s>"]
    inner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("name", ["trainer_text", "trainer_lora", "trainer_seq2seq_overflow"])
def test_text_model_and_data_of_a_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Auto classes load the model and its tokenizer, `load_dataset` the data."""
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    (tiny_t5() if name == "trainer_seq2seq_overflow" else tiny_gpt2()).save_pretrained(model)
    tokenizer().save_pretrained(model)
    rows = [json.dumps({"text": s, "source": s, "target": s}) for s in SENTENCES]
    (data / "train.jsonl").write_text("\n".join(rows))
    lines = output_of(
        name, tmp_path, monkeypatch, capsys,
        "--model_name_or_path", str(model), "--dataset_name", str(data), "--block_size", "16",
    )  # fmt: skip
    assert "2 steps applied, 0 skipped" in lines[-2]


def test_vision_model_and_data_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for images in folders of classes."""
    model = tmp_path / "model"
    shape = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )  # fmt: skip
    ViTForImageClassification(shape).save_pretrained(model)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(model)
    try:
        AutoImageProcessor.from_pretrained(model)
    except ImportError:
        pytest.skip("AutoImageProcessor of this version of transformers needs torchvision")
    for index in range(10):
        file = tmp_path / "data" / "train" / ("cat" if index % 2 else "dog") / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    lines = output_of(
        "trainer_vision", tmp_path, monkeypatch, capsys,
        "--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "data"),
    )  # fmt: skip
    assert "2 steps applied, 0 skipped" in lines[0]
    assert re.search("[12] steps applied", lines[1])  # an early step may be skipped for the scale
