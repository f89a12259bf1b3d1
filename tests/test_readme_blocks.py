"""Every Python block of README.md, and the diff, runs as it is written, with the names that it leaves open supplied."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.integrations.trainers import text, tiny_gpt2
from tests.readme import README

FENCES = re.findall(r"^```(python|diff)\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)
BLOCKS = [re.sub("^[+ ]", "", text, flags=re.M) if kind == "diff" else text for kind, text in FENCES]
pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_trains(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs to its end, and the model that it was given has moved and is finite."""
    monkeypatch.chdir(tmp_path)
    dataset = text().select(range(8))
    model = tiny_gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {
        "dataset": dataset,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "dataloader": DataLoader(dataset.with_format("torch"), batch_size=4),
    }
    exec(compile(block, "README.md", "exec"), names)
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_no_block_is_missed() -> None:
    """Every way in has its block: as many as README.md has fences of Python, and the diff, which adds two lines."""
    readme = README.read_text(encoding="utf-8")
    assert len(BLOCKS) == readme.count("```python") + readme.count("```diff") >= 4
    assert len(re.findall(r"^\+", dict(FENCES)["diff"], flags=re.M)) == 2
