"""Every code block of the document that the project was created from runs as it is written."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.utils.tensorboard import SummaryWriter

import hf_amp
from tests.each import for_each

SEED = (Path(__file__).parent / "data" / "seed.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", SEED, flags=re.MULTILINE | re.DOTALL)
FORMER_IMPORT, IMPORT = "from advanced_mixed_precision_training import", "from hf_amp import"


class TestModel(nn.Module):
    """Four numbers in, the loss of three classes out."""

    __test__ = False  # not for pytest to collect

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(outputs, labels), "logits": outputs}


def create_test_dataloader() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"inputs": torch.randn(6, 4, generator=generator), "labels": torch.randint(3, (6,), generator=generator)}
        for _ in range(3)
    ]


@contextmanager
def open_names() -> Iterator[dict[str, Any]]:
    """What the blocks leave open, and what the imports of one block are to another."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    model = TestModel()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    batches = create_test_dataloader()
    config = hf_amp.MixedPrecisionConfig(init_scale=256.0)
    trainer = hf_amp.StandardMixedPrecisionTrainer(config)
    result = trainer.train_step(batches[0], model, optimizer)
    names = {
        **{name: getattr(hf_amp, name) for name in hf_amp.__all__},
        **{"torch": torch, "optim": optim, "pytest": pytest, "time": time, "SummaryWriter": SummaryWriter},
        **{"model": model, "optimizer": optimizer, "config": config, "trainer": trainer, "batch": batches[0]},
        **{"dataloader": batches, "train_dataloader": batches, "val_dataloader": batches, "num_epochs": 2},
        **{"TestModel": TestModel, "create_test_dataloader": create_test_dataloader},
        **{"monitor": trainer.precision_monitor, "tracker": trainer.performance_tracker},
        **{"scaler": trainer.scaler, "loss": result["loss"], "precision_mode": result["precision_mode"]},
        **{"step": 1, "batch_idx": 0, "memory_usage": 0.5, "total_memory": 16.0},
        **{"expected_time": 60.0, "max_memory_increase": 2**20, "logger": structlog.get_logger("seed")},
    }
    try:
        yield names
    finally:
        dist.destroy_process_group()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to write into, and where the other ranks would be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def run(block: str, names: dict[str, Any]) -> SimpleNamespace:
    """Executes a block with only its import line changed; returns the names that it has made."""
    made = dict(names)
    exec(compile(block.replace(FORMER_IMPORT, IMPORT), "seed.md", "exec"), made)
    return SimpleNamespace(**{name: value for name, value in made.items() if names.get(name) is not value})


@pytest.mark.usefixtures("elsewhere")
@for_each("block", BLOCKS)
def test_a_block_runs_as_written(block: str) -> None:
    """It runs; the tests that it defines pass; what it makes trains two more steps and ends with finite parameters."""
    with open_names() as names:
        if "scaler.step" in block and "scaler.scale" not in block:
            names["config"] = hf_amp.MixedPrecisionConfig(precision_mode="FP32")  # no loss is scaled: a guard
        made = run(block, names)
        for test in [value for name, value in vars(made).items() if name.startswith("test_")]:
            outcome = test()
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)
        model = getattr(made, "model", names["model"])
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        for loop in (getattr(made, "manager", None), getattr(made, "trainer", None)):
            if isinstance(loop, hf_amp.AdvancedMixedPrecisionManager) and "cleanup" not in block:
                assert len(loop.train_epoch(names["dataloader"], model, optimizer)["losses"]) == 3
            elif isinstance(loop, hf_amp.StandardMixedPrecisionTrainer):
                assert loop.train_step(names["batch"], model, optimizer)["loss"].isfinite()
        if isinstance(getattr(made, "config", None), hf_amp.MixedPrecisionConfig):
            manager = hf_amp.AdvancedMixedPrecisionManager(made.config)
            assert manager.train_epoch(names["dataloader"], model, optimizer)["batches"] == 3
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_every_block_is_found() -> None:
    """None is missed: there are as many as fences, each is Python, and nothing but the one import line is changed."""
    assert len(BLOCKS) == SEED.count("```python") == SEED.count("```") // 2
    assert len(BLOCKS) > 25
    for block in BLOCKS:
        ast.parse(block)
    assert SEED.count(FORMER_IMPORT) == SEED.count("advanced_mixed_precision_training") == 1


def test_every_name_of_the_document_is_public() -> None:
    """Classes that the document names are importable from `hf_amp`; nothing in it is left to a private module."""
    named = set(re.findall(r"\b(?:\w+MixedPrecision\w+|MixedPrecision\w+|AdvancedGradScaler|PrecisionMonitor)\b", SEED))
    classes = {name for name in named if re.search(rf"\b{name}\(", SEED)}
    assert len(classes) >= 7
    assert classes <= set(hf_amp.__all__)
    used = set(re.findall(r"MixedPrecisionConfig\((.*?)\)", SEED, flags=re.DOTALL))
    options = {name for text in used for name in re.findall(r"(\w+)=", text)}
    assert len(options) >= 10
    assert options <= set(hf_amp.MixedPrecisionConfig().to_dict())


@pytest.mark.usefixtures("elsewhere")
def test_a_block_that_does_not_work_is_found() -> None:
    """The check can fail: a misspelt result key raises."""
    block = next(block for block in BLOCKS if "['fp16_usage_rate']" in block)
    with open_names() as names, pytest.raises(KeyError):
        run(block.replace("fp16_usage_rate", "fp16_usage"), names)
