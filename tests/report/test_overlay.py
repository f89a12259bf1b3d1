"""Several runs in one picture say where they part; how they were set up says what differs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hf_amp import AmpSession
from hf_amp.report.overlay import circumstances, compared_steps, overlays_of
from hf_amp.report.page import page
from hf_amp.report.reader import RunHistory, read_run
from tests.each import for_each
from tests.report.test_run_history import history, line, skipped, started


def run(name: str, losses: list[float], *skips: int, **facts: object) -> RunHistory:
    lines = [line("metrics", step, loss=loss, learning_rate=0.1, scale=4.0) for step, loss in enumerate(losses, 1)]
    lines += [line("metrics", len(losses), eval_accuracy=0.5)]
    made = history(started(**facts), *(skipped(step) for step in skips), *lines)
    made.name = name
    return made


def test_what_both_have_is_overlaid() -> None:
    """Loss, scale, skips, learning rate and evaluation metrics, each with a curve of every run."""
    found = list(overlays_of([run("a", [3, 2, 1], 1, 3), run("b", [3, 2, 2])]))
    assert [o.title for o in found] == [
        "Loss",
        "Loss scale",
        "Skipped steps, added up",
        "Learning rate",
        "eval accuracy",
    ]
    assert found[2].curves == [{0: 0, 1: 1, 3: 2}, {0: 0, 3: 0}]
    assert found[0].names == ["a", "b"]


@for_each(
    ("one", "other", "words"),
    [
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.5], "The same until step 2; 1 and 1.5 at step 3."),
        ([3.0, 2.0], [3.0, 2.0, 1.5], "The same at all 2 steps that both have logged."),
        ([3.0], [4.0], "They differ from the beginning: 3 and 4 at step 1."),
    ],
)
def test_a_picture_says_where_runs_part(one: list[float], other: list[float], words: str) -> None:
    """The first logged step at which they differ, with both values."""
    assert next(overlays_of([run("a", one), run("b", other)])).parting() == words


def test_circumstances_that_differ_come_first() -> None:
    """Facts of the log and options; those at their defaults everywhere are left out."""
    one, other = run("a", [1], device="cpu: x", versions={"torch": "1", "hf_amp": "2"}), run("b", [1], device="cpu: y")
    one.config, other.config = {"patience": 50, "init_scale": 2.0}, {"patience": 50, "init_scale": 4.0}
    rows = circumstances([one, other])
    assert [(row.name, row.values) for row in rows if row.differs] == [
        ("device", ["cpu: x", "cpu: y"]),
        ("torch (version)", ["1", ""]),
        ("hf_amp (version)", ["2", ""]),
        ("option init_scale", ["2", "4"]),
    ]
    assert [row.name for row in rows if not row.differs] == ["ran", "precision"]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean()


def captured_run(folder: Path, factor: float) -> RunHistory:
    """Two steps, the second captured, of a model whose last weights are `factor` times as large."""
    torch.manual_seed(0)
    model = Layers()
    with torch.no_grad():
        model.second.weight.mul_(factor)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    session = AmpSession.for_model(model, optimizer)
    session.log_to(folder)
    session.capture(2)
    for _ in range(2):
        session.scaler.scale(model(torch.randn(4, 8))).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
    session.detach()
    return read_run(folder)


def test_captured_steps_of_two_runs_are_compared(tmp_path: Path) -> None:
    """By module, in a table of the page; a file that cannot be read says so, and the page is made."""
    runs = [captured_run(tmp_path / name, factor) for name, factor in (("a", 1.0), ("b", 3.0))]
    (step,) = compared_steps(runs)
    assert step.title == "Step 2"
    assert "They part in second, forward" in step.sentence
    assert {row[0] for row in step.rows} >= {"second"}
    assert "They part in second, forward" in page(runs, "0")
    (tmp_path / "b" / "capture_step_2.safetensors").write_bytes(b"cut off")
    (step,) = compared_steps(runs)
    assert step.rows == []
    assert "capture_step_2" in step.sentence
