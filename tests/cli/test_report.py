"""`hf-amp report`: what it writes, prints and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_amp.cli import app
from hf_amp.events import LOG_FILE
from hf_amp.report.reader import read_run
from hf_amp.report.verdict import verdict_on
from tests.report.test_run_history import changed, line, skipped, started


def run_folder(folder: Path, *lines: dict[str, Any]) -> Path:
    """A run's folder with these lines in its log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG_FILE).write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def report(*arguments: object) -> Any:
    """`hf-amp report` with these arguments."""
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "400"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(
        tmp_path / "my run",
        started(),
        skipped(2),
        changed(3, "MIXED", "FP32", "h.1"),
        *(line("metrics", s, loss=3.0 / s, scale=4.0, applied_steps=s - 1, skipped_steps=1) for s in range(2, 9)),
    )


def test_the_page_is_written_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    """Into a folder that is made for it, with nothing beside it."""
    page = tmp_path / "new" / "page.html"
    result = report(run, "-o", page)
    assert result.exit_code == 0, result.output
    verdict, path = result.stdout.splitlines()
    assert (verdict, path) == (f"my run: {verdict_on(read_run(run)).sentence}", str(page))
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    assert page.read_text().startswith("<!doctype html>")
    assert "my run" in page.read_text()


def test_the_page_is_report_html_by_default(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the current folder."""
    monkeypatch.chdir(tmp_path)
    assert report(run).exit_code == 0
    assert (tmp_path / "report.html").is_file()


def test_an_interrupt_leaves_the_former_page_whole(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the new page is written: the old one is still there, and no half of a new one."""
    page = tmp_path / "page.html"
    page.write_text("former")

    def interrupted(self: Path, *args: Any, **kwargs: Any) -> None:
        self.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    assert report(run, "-o", page).exit_code == 130
    assert page.read_bytes() == b"former"
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "my run"}


def test_json_prints_the_figures_and_writes_no_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object for each run: verdict, figures with units, incidents, changes of precision."""
    monkeypatch.chdir(tmp_path)
    (reported,) = json.loads(report(run, "--json").stdout)
    assert reported["verdict"]["level"] == "watch"
    assert reported["state"] == "unfinished"
    assert reported["figures"]["scale"] == {"value": 4.0, "unit": "1"}
    assert reported["skipped_by_cause"] == {"SCALE": 1}
    assert [(i["event"], i["first_step"]) for i in reported["incidents"]] == [
        ("step_skipped", 2),
        ("precision_changed", 3),
    ]
    assert reported["precision_changes"][0]["modules"] == ["h.1"]
    assert not (tmp_path / "report.html").exists()


RUNS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "empty": ([], "the log is empty"),
    "just begun": ([started()], "still running on another machine, or killed"),
    "skips alone": ([started(), skipped(1), skipped(2)], "all 2 steps were skipped"),
    "one step": ([started(), line("metrics", 1, loss=1.0, scale=4.0, applied_steps=1)], "the one step was applied"),
    "a loss that is never finite": (
        [started(), *(line("metrics", s, loss="nan", applied_steps=s) for s in (1, 2))],
        "No loss that was logged is finite",
    ),
    "BF16": (
        [started(), *(line("metrics", s, loss=1.0, scale=1.0, applied_steps=s) for s in (1, 2))],
        "Training: all 2 steps were applied",
    ),
    "figures that do not change": (
        [started(), *(line("metrics", s, grad_norm=0.0, headroom_bits=0.0, underflow_fraction=0.0) for s in (1, 2))],
        "underflow fraction",
    ),
    "scales beyond all": (
        [started(), *(line("metrics", s, scale=2.0 ** (127 - 50 * s), applied_steps=s) for s in range(4))],
        "Loss scale",
    ),
}  # fmt: skip


def test_whatever_a_run_has_is_shown(tmp_path: Path) -> None:
    """A run that has just begun, was killed, or went wrong altogether has a page too."""
    page = tmp_path / "page.html"
    for name, (lines, words) in RUNS.items():
        result = report(run_folder(tmp_path / "run", *lines), "-o", page)
        assert result.exit_code == 0, f"{name}: {result.output}"
        assert words in page.read_text(), name


def test_a_torn_line_is_reported(run: Path, tmp_path: Path) -> None:
    """A killed run's last line is left out, and the page says so."""
    with (run / LOG_FILE).open("a") as file:
        file.write('{"timestamp": "2026')
    assert report(run, "-o", tmp_path / "page.html").exit_code == 0
    assert "1 line was cut off by a kill" in (tmp_path / "page.html").read_text()


def test_what_is_no_run_ends_at_once(tmp_path: Path) -> None:
    """Exit code 2, what was found, what to pass; no page."""
    folder, page = tmp_path / "other", tmp_path / "page.html"
    folder.mkdir()
    for content, *all_words in (
        (None, "no amp_events.jsonl in this folder", "in loops of your own where session.log_to(folder) says"),
        (b"hello\n", "not an event log of hf_amp: line 1 is 'hello"),
    ):
        if content is not None:
            (folder / LOG_FILE).write_bytes(content)
        result = report(folder, "-o", page)
        assert result.exit_code == 2
        said = " ".join(result.output.replace("│", " ").split())
        assert [words for words in all_words if words not in said] == []
        assert not page.exists()


def test_figures_need_no_pictures(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON comes without matplotlib, which is slow to load."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hf_amp.report.page", raising=False)
    assert report(run, "--json").exit_code == 0


def test_a_long_run_makes_a_page_of_moderate_size(tmp_path: Path) -> None:
    """20,000 metrics lines and 20,000 skips: pictures are thinned, and the page stays below 2 MB."""
    lines = [started()]
    for step in range(1, 20_001):
        lines.append(
            line("metrics", step, loss=5.0 - step / 1e4, scale=4.0, applied_steps=step, grad_norm=1 + step % 5)
        )
        lines.append(skipped(step))
    page = tmp_path / "page.html"
    assert report(run_folder(tmp_path / "run", *lines), "-o", page).exit_code == 0
    assert page.stat().st_size < 2e6
    assert "20,000 SCALE" in page.read_text()


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_a_loop_of_ones_own_has_a_report_too(tmp_path: Path) -> None:
    """`session.log_to` writes the log that a Trainer's callback would; what the loop adds is in it."""
    import torch
    from accelerate import Accelerator

    import hf_amp

    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    torch.manual_seed(0)
    with hf_amp.attach(accelerator, hf_amp.MixedPrecisionConfig(init_scale=128.0)) as session:
        session.log_to(tmp_path / "loop")
        layer = torch.nn.Linear(4, 1)
        model, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
        for step in range(3):
            loss = model(torch.full((2, 4), 1e9 if step == 1 else 1.0)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            session.log_metrics(loss=loss.item())
    (reported,) = json.loads(report(tmp_path / "loop", "--json").stdout)
    assert reported["state"] == "finished"
    assert reported["what_ran"].startswith("FP16 emulated on the CPU")
    assert reported["newest_step"] == 3
    assert reported["figures"]["applied_steps"]["value"] == 2
    assert reported["incidents"][0]["first_step"] == 2
    assert "loss" in reported["figures"]
