"""`hf-amp watch` follows a run that is being written."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_amp.cli import app
from hf_amp.cli.report import course, follow, panel
from hf_amp.events import LOG_FILE
from hf_amp.report.reader import EventLogReader, named_run, take_in
from tests.report.test_run_history import line, skipped, started


def append(log: Path, *lines: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in lines)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    append(tmp_path / LOG_FILE, started(), skipped(1, modules=["h.1\x1b[2J"]), line("metrics", 2, loss=3.5, scale=4.0))
    return tmp_path / LOG_FILE


def output_of(log: Path) -> str:
    """The panel as text."""
    history = named_run(log)
    take_in(EventLogReader(log), history)
    console = Console(width=200, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(panel(history))
    return capture.get()


def test_once_shows_the_run_as_it_is_and_ends(log: Path) -> None:
    """In a pipe it does so by itself; the verdict, the figures and the incident are there."""
    for arguments in (["--once"], []):
        result = CliRunner().invoke(app, ["watch", str(log.parent), *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        for words in ("running, or killed", "step skipped SCALE", "3.5"):
            assert words in result.stdout


def test_names_cannot_move_the_cursor(log: Path) -> None:
    """Control characters from the run are shown as escapes."""
    assert "\x1b" not in output_of(log)
    assert r"h.1\x1b[2J" in output_of(log)


def test_it_follows_until_the_run_ends(log: Path) -> None:
    """Lines that are written while it watches are shown, those of the end last."""

    def write() -> None:
        append(log, line("metrics", 3, loss=2.5))
        time.sleep(0.05)
        append(log, line("training_ended", 4, scale=8.0))

    history, reader, seen = named_run(log), EventLogReader(log), []
    writer = threading.Thread(target=write)
    writer.start()
    follow(reader, history, lambda: seen.append(dict(history.latest)), interval=0.01)
    writer.join()
    assert history.ended
    assert seen[-1] == {"loss": 2.5, "scale": 8.0}


def test_a_course_goes_from_lowest_to_highest() -> None:
    """What is not finite has no height."""
    inf, nan = float("inf"), float("nan")
    for values, expected in (
        ([], ""), ([1.0], ""), ([1.0, 1.0], "▁▁"), ([0.0, 7.0], "▁█"), ([0.0, inf, nan, 7.0], "▁█"),
    ):  # fmt: skip
        assert course(values) == expected


def test_a_course_is_of_the_newest_values() -> None:
    """A long run does not fill the screen."""
    assert len(course([float(i) for i in range(1000)])) == 32


def test_what_is_no_run_ends_at_once(tmp_path: Path) -> None:
    """Exit code 2 and what to pass."""
    result = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert result.exit_code == 2
    assert LOG_FILE in result.output
