"""One planted overflow, followed through everything that tells of it: they agree on step, cause and module."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_amp import AmpEvent, AmpSession, Cause, EventKind, MixedPrecisionCallback, MixedPrecisionConfig
from hf_amp.cli import app
from tests.integrations.trainers import trainer_with
from tests.readme import README

STEP, MODULE = 3, "transformer.h.0.mlp.c_proj"
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]\d+)?")
HEADLINE = f"step {STEP}: step_skipped (ACTIVATION) in {MODULE}"


class LargeWeights(TrainerCallback):
    """Makes one module's weights so large, before one step, that its output is beyond 65504."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == STEP:
            with torch.no_grad():
                kwargs["model"].get_submodule(MODULE).weight.mul_(1e8)


@dataclass
class Told:
    """A run with the planted overflow, and what was said of it."""

    folder: Path
    session: AmpSession
    log_history: list[dict[str, Any]]
    console: list[str]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("incident")
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_amp").addHandler(handler)
    callback = MixedPrecisionCallback(MixedPrecisionConfig(monitor_modules=True, monitoring_interval=1))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tb"))
            trainer, _ = trainer_with(folder, callback, LargeWeights(), report_to="tensorboard")
            trainer.train()
    finally:
        logging.getLogger("hf_amp").removeHandler(handler)
    assert callback.session is not None
    return Told(folder, callback.session, trainer.state.log_history, lines)


def skips(session: AmpSession) -> list[AmpEvent]:
    return [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]


def test_session_events_name_it(reported: Told) -> None:
    """One skipped step, with its cause and its module; then the module's change of precision."""
    (skip,) = skips(reported.session)
    assert (skip.step, skip.cause, skip.modules) == (STEP, Cause.ACTIVATION, (MODULE,))
    (change,) = [event for event in reported.session.events if event.kind is EventKind.PRECISION_CHANGED]
    assert (change.step, change.after, change.modules) == (STEP, "FP32", (MODULE,))


def test_the_console_names_it(reported: Told) -> None:
    """One warning for the skip, with everything in it."""
    assert [line.startswith(HEADLINE) for line in reported.console if "step_skipped" in line] == [True]


def test_the_readme_shows_the_console(reported: Told) -> None:
    """What README.md has of a console is this one's, line by line, but for where lines are broken, and for line numbers of
    transformers and the last digits of values, which differ by version and CPU."""
    block = README.read_text(encoding="utf-8").split("```console\n")[1].split("```")[0]
    shown, told = (
        [NUMBER.sub("#", line) for line in lines]
        for lines in (block.replace("\n  ", " ").splitlines(), reported.console)
    )
    assert shown == told[1:3]


def test_the_json_log_names_it(reported: Told) -> None:
    """The event's line is the session's event."""
    lines = [json.loads(line) for line in (reported.folder / "amp_events.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["event"] == "step_skipped"]
    (skip,) = skips(reported.session)
    assert (line["step"], line["cause"], line["modules"], line["message"], line["level"]) == (
        STEP, "ACTIVATION", [MODULE], skip.message, "warning",
    )  # fmt: skip


def test_log_history_names_it(reported: Told) -> None:
    """The entry of that step counts it and names it; no other entry names anything."""
    entries = [entry for entry in reported.log_history if "loss" in entry]
    assert [entry["amp/skipped_steps"] for entry in entries[STEP - 1 :]] == [1, 1, 1, 1]
    assert [entry["step"] for entry in entries if "amp_incident" in entry] == [STEP]
    assert entries[STEP - 1]["amp_incident"].startswith(HEADLINE)


@pytest.fixture(scope="module")
def board(reported: Told) -> EventAccumulator:
    return EventAccumulator(str(reported.folder / "tb")).Reload()


def test_tensorboard_names_it(reported: Told, board: EventAccumulator) -> None:
    """Read back from the event file: the counter rises at that step, and the words stand there."""
    counted = {point.step: point.value for point in board.Scalars("train/amp/skipped_steps_activation")}
    assert counted == dict.fromkeys(range(STEP, 7), 1.0)
    (words,) = board.Tensors("train/amp_incident/text_summary")
    assert words.step == STEP
    assert HEADLINE in words.tensor_proto.string_val[0].decode()


def test_the_report_names_it(reported: Told, tmp_path: Path) -> None:
    """The figures and the page have the step, the cause, the module and what was done."""
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(reported.folder), "--json", "-o", str(page)])
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)
    (incident,) = [each for each in run["incidents"] if each["event"] == "step_skipped"]
    (skip,) = skips(reported.session)
    assert (incident["first_step"], incident["cause"], incident["modules"], incident["message"]) == (
        STEP, "ACTIVATION", [MODULE], skip.message,
    )  # fmt: skip
    assert f"1 module in FP32 since step {STEP} ({MODULE})" in run["verdict"]["sentence"]
    text = page.read_text()
    assert all(
        word in text
        for word in (run["verdict"]["sentence"], f"<code>{MODULE.replace('.', '.<wbr>')}</code>", ">ACTIVATION<")
    )


def test_the_terminal_names_it(reported: Told) -> None:
    """`watch` shows the verdict and the incident."""
    result = CliRunner().invoke(app, ["watch", str(reported.folder), "--once"], terminal_width=400)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.replace("│", " ").split())
    (skip,) = skips(reported.session)
    assert f"step {STEP}: step skipped ACTIVATION {MODULE}. {skip.message}" in text
