"""The event log: one JSON object a line, whatever is in it."""

import json
import logging
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from hf_amp import AmpEvent, Cause, EventKind
from hf_amp.events import LOG_FILE
from hf_amp.monitoring.sinks.jsonl import JsonLinesSink
from tests.each import for_each

SKIP = AmpEvent(
    step=7,
    kind=EventKind.STEP_SKIPPED,
    cause=Cause.SCALE,
    before=65536.0,
    after=32768.0,
    modules=("lm_head", "h.0.mlp"),
    message="the gradients overflow",
    figures={"inf_elements": 3, "nan_elements": 0},
)
# Whatever ends a line or hides text for Python, JSON, terminals or Unicode.
HOSTILE = ["\n", "\r\n", "\x00", "\x1b[2J", "\x85", "\u2028", "\u2029", "\x0b\x0c", '"}\n{"event": "forged', "\ud800"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / LOG_FILE


@pytest.fixture
def sink(path):
    sink = JsonLinesSink(path, run_id="abc123", rank=2)
    yield sink
    sink.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """The log, each line by itself as a strict parser sees it."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_event_is_one_line_of_json(sink, path):
    """Whatever happened is one JSON object with run, rank and step."""
    for kind in EventKind:
        sink.write(AmpEvent(3, kind))
    written = [(line["event"], line["run_id"], line["rank"], line["step"]) for line in lines(path)]
    assert written == [(kind.value, "abc123", 2, 3) for kind in EventKind]


def test_a_line_holds_the_whole_event(sink, path):
    """Cause, change, modules, message and figures are fields of their own."""
    sink.write(SKIP)
    (line,) = lines(path)
    assert {name: line[name] for name in ("cause", "before", "after", "modules", "message")} == {
        "cause": "SCALE",
        "before": 65536.0,
        "after": 32768.0,
        "modules": ["lm_head", "h.0.mlp"],
        "message": "the gradients overflow",
    }
    assert (line["inf_elements"], line["nan_elements"]) == (3, 0)


def test_what_is_not_known_is_null(sink, path):
    """Every line has the same fields, so that columns do not come and go."""
    sink.write(AmpEvent(0, EventKind.ATTACHED))
    sink.write(SKIP)
    bare, full = lines(path)
    assert (bare["cause"], bare["before"], bare["after"], bare["modules"]) == (None, None, None, [])
    assert set(full) - set(bare) == set(SKIP.figures)


def test_the_fields_to_look_for_come_first(sink, path):
    """A person reading the raw file finds time, level and event at the left."""
    sink.write(SKIP)
    (line,) = lines(path)
    assert list(line)[:6] == ["timestamp", "level", "event", "run_id", "rank", "step"]


def test_the_time_is_utc_in_iso_8601(sink, path):
    """Logs of several machines can be merged."""
    sink.write(SKIP)
    (line,) = lines(path)
    assert line["timestamp"].endswith("Z")
    assert datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).utcoffset() == timedelta(0)


def test_trouble_is_a_warning_and_the_rest_is_info(sink, path):
    """A log collector can filter by level."""
    for kind in EventKind:
        sink.write(AmpEvent(1, kind))
    levels = {line["event"]: line["level"] for line in lines(path)}
    assert levels == {k.value: "warning" if k.needs_attention else "info" for k in EventKind}


@for_each("hostile", HOSTILE)
@for_each("field", ["message", "modules", "figures"])
def test_control_characters_cannot_forge_a_line(sink, path, field, hostile):
    """A newline or an escape in a module's name or a message stays inside of its field."""
    text = f"layer{hostile}end"
    value, key, expected = {
        "message": (text, "message", text),
        "modules": ((text,), "modules", [text]),
        "figures": ({"note": text}, "note", text),
    }[field]
    sink.write(AmpEvent(1, EventKind.STEP_SKIPPED, **{field: value}))
    sink.write(SKIP)
    *_, first, second = lines(path)
    assert first[key] == expected
    assert second["message"] == SKIP.message
    assert all(32 <= byte < 127 for byte in path.read_bytes().replace(b"\n", b""))


def test_lines_are_on_disk_before_the_file_is_closed(sink, path):
    """A killed run leaves every event that it had."""
    for written in range(1, 4):
        sink.write(SKIP)
        assert len(lines(path)) == written


def test_a_resumed_run_appends(path):
    """What an earlier run has logged stays."""
    for run_id in ("first", "second"):
        sink = JsonLinesSink(path, run_id, rank=0)
        sink.write(SKIP)
        sink.close()
    assert [line["run_id"] for line in lines(path)] == ["first", "second"]


def test_two_sinks_do_not_mix(tmp_path):
    """Each run writes its own file under its own name."""
    sinks = [JsonLinesSink(tmp_path / name, name, rank=0) for name in ("a.jsonl", "b.jsonl")]
    for sink in sinks:
        sink.write(SKIP)
        sink.close()
    assert [lines(sink.path)[0]["run_id"] for sink in sinks] == ["a.jsonl", "b.jsonl"]


def test_a_missing_folder_is_made(tmp_path):
    """The log can be opened before the Trainer has made its output folder."""
    sink = JsonLinesSink(tmp_path / "runs" / "new" / LOG_FILE, "abc", rank=0)
    sink.close()
    assert lines(sink.path) == []


def test_a_path_that_cannot_be_written_is_an_error(tmp_path):
    """The run is told, at once, that there will be no log."""
    with pytest.raises(OSError, match=tmp_path.name):
        JsonLinesSink(tmp_path, "abc", rank=0)


def test_closing_twice_is_harmless(sink, path):
    """The second close does nothing, and the lines are still there."""
    sink.write(SKIP)
    sink.close()
    sink.close()
    assert len(lines(path)) == 1


@pytest.fixture
def untouched_structlog():
    """structlog as it is before anybody has configured it; afterwards as it was."""
    configured, config = structlog.is_configured(), structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    if configured:
        structlog.configure(**config)


def test_the_logging_of_the_user_is_left_alone(untouched_structlog, path):
    """Neither structlog's configuration nor the root logger changes."""
    before = structlog.get_config()
    processors = list(before["processors"])
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    sink = JsonLinesSink(path, "abc", rank=0)
    sink.write(SKIP)
    sink.close()
    assert not structlog.is_configured()
    assert structlog.get_config() == before
    assert structlog.get_config()["processors"] == processors
    assert (root.handlers, root.level) == (handlers, level)


def test_the_users_structlog_settings_do_not_change_our_lines(untouched_structlog, path):
    """A user who drops events below CRITICAL, or binds context, still gets our log whole."""
    structlog.configure(
        processors=[structlog.processors.KeyValueRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
    )
    sink = JsonLinesSink(path, "abc", rank=0)
    with structlog.contextvars.bound_contextvars(user="theirs"):
        sink.write(AmpEvent(0, EventKind.ATTACHED))
    sink.close()
    (line,) = lines(path)
    assert "user" not in line
