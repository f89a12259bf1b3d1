"""The examples of loops that are ours, or the user's own, run and learn."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(name: str, monkeypatch, capsys, *options: str) -> str:
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--retry"]], ids=["skip", "retry"])
def test_manager_loop(monkeypatch, capsys, options):
    """Two short epochs: the loss falls, all steps are accounted for, and what ran is named."""
    shown = output_of("manager_loop", monkeypatch, capsys, "--batches", "20", *options)
    losses = [float(loss) for loss in re.findall(r": loss ([\d.]+)", shown)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert "100% of the steps in FP16, 0 fallbacks" in shown


def test_plain_pytorch(monkeypatch, capsys):
    """The digits are learned in FP16, and every step is accounted for."""
    shown = output_of("plain_pytorch", monkeypatch, capsys)
    assert float(re.search(r"([\d.]+)% of the digits right", shown)[1]) > 90
    applied, skipped = map(int, re.search(r"(\d+) steps applied, (\d+) skipped", shown).groups())
    assert applied + skipped == 300
