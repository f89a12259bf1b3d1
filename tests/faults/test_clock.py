"""The wall clock goes backwards, as when it is set: durations stay durations, and logs can be read."""

from __future__ import annotations

import json
import random
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from torch.nn.functional import mse_loss
from typer.testing import CliRunner

from hf_amp import AdvancedMixedPrecisionManager, MixedPrecisionCallback
from hf_amp.cli import app
from hf_amp.events import LOG_FILE
from hf_amp.report.reader import read_run
from tests.faults.conftest import Tally
from tests.integrations.trainers import OverflowAt, regression_trainer
from tests.reference import TIMINGS, adamw, tiny_mlp
from tests.training.loops import vectors

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


class BackwardsClock:
    """An hour earlier every time that somebody looks."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        self.now -= 3600
        return self.now


def set_back(log: Path, seed: int = 0) -> int:
    """Makes the log's timestamps jump backwards at random lines; returns how often."""
    chance, shift, jumps, lines = random.Random(seed), timedelta(0), 0, []
    for line in map(json.loads, log.read_text().splitlines()):
        if chance.random() < 0.5:
            shift, jumps = shift + timedelta(hours=chance.uniform(0, 48)), jumps + 1
        then = datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")) - shift
        lines.append(json.dumps({**line, "timestamp": then.isoformat().replace("+00:00", "Z")}))
    log.write_text("".join(f"{line}\n" for line in lines))
    return jumps


def test_no_duration_is_of_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
    """Trainer, manager, events and report while `time.time` runs backwards: every time that is told is at least 0, and a
    log whose timestamps go backwards is reported on, its lines in the order in which they were written."""
    clock = BackwardsClock()
    set_at = clock.now
    monkeypatch.setattr(time, "time", clock)
    callback = MixedPrecisionCallback()
    regression_trainer(tmp_path, callback, OverflowAt(2), fp16=True, logging_steps=1).train()
    reported = {name: v for name, v in callback.session.metrics().items() if name in TIMINGS}
    with AdvancedMixedPrecisionManager(loss_fn=mse_loss) as manager:
        model = tiny_mlp()
        epoch = manager.train_epoch(vectors(3), model, adamw(model, fused=True))
    reported |= {f"epoch {name}": value for name, value in epoch.items() if "second" in name}
    monkeypatch.undo()
    assert clock.now < set_at - 3600, "nobody looked at the clock"
    assert len(reported) > 3
    assert all(value >= 0 for value in reported.values()), reported
    lines = read_run(tmp_path).lines
    jumps = set_back(tmp_path / LOG_FILE)
    history = read_run(tmp_path)
    assert (history.lines, history.ended) == (lines, True)
    assert history.newest < history.started
    assert history.skipped_by_cause == {"SCALE": 1}
    steps = list(history.figures["scale"].steps)
    assert steps == sorted(steps)
    done = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").stat().st_size > 1000
    tally("clock set back, in a run's log", jumps, jumps)
