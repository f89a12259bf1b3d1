"""The reader of the event log takes what a run leaves, whatever became of the run, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_amp import AmpEvent, Cause, EventKind, StateError
from hf_amp.events import LOG_FILE
from hf_amp.monitoring.sinks.jsonl import JsonLinesSink
from hf_amp.report.reader import EventLogReader, find_log


def written(path: Path, *events: AmpEvent) -> Path:
    """A log with these events, as the sink writes it."""
    sink = JsonLinesSink(path, "abc123", rank=0)
    for event in events:
        sink.write(event)
    sink.close()
    return path


def skip(step: int, **fields: Any) -> AmpEvent:
    """A skipped step."""
    return AmpEvent(step, EventKind.STEP_SKIPPED, Cause.SCALE, 4.0, 2.0, **fields)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / LOG_FILE


def test_what_the_sink_writes_is_read(path: Path) -> None:
    """Every event comes back, with its fields, in order."""
    written(path, AmpEvent(0, EventKind.TRAINING_STARTED), *(skip(step, modules=("a\nb",)) for step in range(1, 4)))
    lines = list(EventLogReader(path).read())
    assert [line["event"] for line in lines] == ["training_started", *["step_skipped"] * 3]
    assert [(line["step"], line["cause"], line["modules"]) for line in lines[1:]] == [
        (step, "SCALE", ["a\nb"]) for step in range(1, 4)
    ]


def test_a_torn_last_line_is_left_out(path: Path) -> None:
    """Wherever a kill cuts the newest line off, the lines before it are read and it is called unfinished."""
    whole = written(path, skip(1), skip(2)).read_bytes()
    first = whole.index(b"\n") + 1
    for kept in range(len(whole) - first):
        path.write_bytes(whole[: first + kept])
        log = EventLogReader(path)
        assert [line["step"] for line in log.read()] == [1]
        assert log.unfinished == (kept > 0)


def test_a_run_that_goes_on_after_a_torn_line_loses_nothing_of_its_own(path: Path) -> None:
    """The line that the kill cut off is ended and passed over; the first event after it is whole."""
    whole = written(path, skip(1), skip(2)).read_bytes()
    for kept in (1, 12, 60, 150):
        path.write_bytes(whole[: whole.index(b"\n") + 1 + kept])
        written(path, skip(3), skip(4))
        log = EventLogReader(path)
        assert [line["step"] for line in log.read()] == [1, 3, 4]
        assert log.torn_lines == 1


def test_blocks_of_zeros_that_a_crash_has_left_are_passed_over(path: Path) -> None:
    """File systems pad with NUL bytes where data did not arrive before the power went."""
    line = written(path, skip(1)).read_bytes()
    path.write_bytes(line + b"\0" * 4096 + line)
    assert [line["step"] for line in EventLogReader(path).read()] == [1, 1]


def test_a_growing_log_is_read_piece_by_piece(path: Path) -> None:
    """Every line comes once, as soon as it is whole, however the writing is cut up."""
    whole = written(path, *(skip(step) for step in range(1, 6))).read_bytes()
    path.write_bytes(b"")
    log, seen = EventLogReader(path), []
    for start in range(0, len(whole), 50):
        with path.open("ab") as file:
            file.write(whole[start : start + 50])
        seen += [line["step"] for line in log.read()]
    assert seen == [1, 2, 3, 4, 5]
    assert not log.unfinished


def test_an_empty_log_has_no_lines(path: Path) -> None:
    """A run that has just begun is no error."""
    path.write_bytes(b"")
    assert list(EventLogReader(path).read()) == []


FOREIGN = {
    "text": b"epoch 1 loss 3.2\n",
    "text without an end": b"loss",
    "JSON of another kind": b'{"loss": 3.2, "step": 1}\n',
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "a binary": bytes(range(256)) * 4,
    "deep nesting": b"[" * 100_000 + b"\n",
    "a step that is no number": b'{"timestamp": "x", "event": "e", "run_id": "r", "step": "one"}\n',
    "one endless line": b"x" * 100_000,
}


def test_a_foreign_file_is_a_clear_error(path: Path) -> None:
    """The file and the line are named, and what an event log has to look like."""
    words = rf"{LOG_FILE}: not an event log of hf_amp: line 1 .* timestamp, event"
    for content in FOREIGN.values():
        path.write_bytes(content)
        with pytest.raises(StateError, match=words):
            list(EventLogReader(path).read())


def test_a_foreign_line_in_the_middle_is_named(path: Path) -> None:
    """Something else has written into the log: the line's number is given."""
    path.write_bytes(written(path, skip(1), skip(2)).read_bytes() + b"hello\n")
    with pytest.raises(StateError, match="line 3 is 'hello"):
        list(EventLogReader(path).read())


def test_a_run_is_its_folder_or_its_file(path: Path) -> None:
    """Both lead to the same log."""
    written(path)
    assert find_log(path) == find_log(path.parent) == path


def test_a_folder_without_a_log_names_the_runs_below_it(tmp_path: Path) -> None:
    """Who passes the folder above a run reads which one to pass."""
    written(tmp_path / "runs" / "first" / LOG_FILE)
    with pytest.raises(StateError, match=r"no amp_events.jsonl .* Runs below it: .*runs/first"):
        find_log(tmp_path)
    with pytest.raises(StateError, match="no such file or folder"):
        find_log(tmp_path / "nothing")


def test_a_line_that_an_older_reader_does_not_know_is_still_a_line(path: Path) -> None:
    """Events that a later version adds are handed on."""
    line = {"timestamp": "t", "event": "of_the_future", "run_id": "r", "step": 3, "new": [1]}
    path.write_text(json.dumps(line) + "\n")
    assert list(EventLogReader(path).read()) == [line]
