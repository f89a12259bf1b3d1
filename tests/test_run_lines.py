"""What a loop of one's own says of itself: that hf_amp is on, how the run ended, and what a scaler alone skips."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_amp import AdvancedGradScaler, AmpSession, MixedPrecisionConfig
from hf_amp.report.reader import read_run
from tests.each import for_each

LOOP = """
import torch
from hf_amp import AmpSession
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
session = AmpSession.for_model(model, optimizer)
if {folder!r}:
    session.log_to({folder!r})
for _ in range(3):
    session.scaler.scale(model(torch.full((2, 4), 0.01)).float().square().mean()).backward()
    session.scaler.step(optimizer)
    session.scaler.update()
    optimizer.zero_grad()
{ending}
"""


def lines_of(folder: str, ending: str) -> list[str]:
    """What a script says on its console that trains three steps, and ends as told."""
    script = LOOP.format(folder=folder, ending=ending)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    return [line for line in done.stderr.splitlines() if line.startswith("hf_amp:")]


@for_each(
    ("ending", "why"),
    [
        ("session.detach()", "training ended"),
        ("", "the process ended"),
        ("raise ValueError('mine')", "the process ended"),
    ],
)
def test_a_loop_of_ones_own_has_a_line_at_each_end(tmp_path: Path, ending: str, why: str) -> None:
    """Without logging being configured; also where nobody detaches, or an exception ends the script."""
    first, last = lines_of(str(tmp_path / why), ending)
    assert first.startswith("hf_amp: FP16 emulated on the CPU")
    assert first.endswith(f", DYNAMIC, log in {tmp_path / why / 'amp_events.jsonl'}.")
    assert last.startswith(f"hf_amp: {why}. Verdict: Training: all 3 steps were applied. At the end: scale 65536")
    assert read_run(tmp_path / why).state == "finished"


def test_without_a_log_the_line_says_how_to_have_one() -> None:
    """By its first step."""
    assert lines_of("", "")[0].endswith("no log: session.log_to(folder) opens one.")


def session_on(model: nn.Module) -> AmpSession:
    return AmpSession.for_model(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_figures_may_be_tensors_and_numpy_scalars(tmp_path: Path) -> None:
    """Those with one element; text is kept; anything else raises in the call, and names the figure."""
    with session_on(nn.Linear(2, 1)) as session:
        session.log_to(tmp_path)
        session.log_metrics(1, loss=torch.tensor(2.0), rate=np.float32(0.5), one=np.array([3]), note="warm-up")
        for wrong in ([1.0], torch.ones(2), {}, None):
            with pytest.raises(TypeError, match="loss was logged as a"):
                session.log_metrics(2, loss=wrong)
    lines = [json.loads(line) for line in (tmp_path / "amp_events.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if line["event"] == "metrics"]
    assert (logged["loss"], logged["rate"], logged["one"], logged["note"]) == (2.0, 0.5, 3, "warm-up")


def test_figures_before_a_log_are_kept_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once; they stand in the log that is opened later."""
    with session_on(nn.Linear(2, 1)) as session:
        session.log_metrics(1, loss=1.0)
        session.log_metrics(2, loss=0.5)
        session.log_to(tmp_path)
    assert sum("log_metrics before log_to" in message for message in caplog.messages) == 1
    assert list(read_run(tmp_path).figures["loss"]) == [(1, 1.0), (2, 0.5)]


@for_each(
    ("loss", "options", "words"),
    [
        (1e30, {"init_scale": 2.0**30}, "the loss was not finite at scale 1.07374e+09"),
        (
            1.0,
            {"init_scale": 2.0**24, "min_scale": 2.0**24},
            "at scale 1.67772e+07, the smallest that min_scale allows",
        ),
    ],
)
def test_a_scaler_alone_says_what_it_can(
    caplog: pytest.LogCaptureFixture, loss: float, options: dict[str, Any], words: str
) -> None:
    """One line for skips alike in quick succession, with the step, the scale and the floor; who would know the cause."""
    caplog.clear()
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float32))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")
    for _ in range(5):
        scaler.scale((parameter * loss * (torch.inf if loss > 1 else 1.0)).sum()).backward()
        parameter.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said.startswith("hf_amp: step 1 was skipped: ")
    assert words in said
    assert said.endswith("hf_amp.attach and AmpSession.for_model do.")
