"""Whatever is in a log's file: its whole lines are kept, or it is refused by hf_amp's own error."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hf_amp import EventKind, StateError
from hf_amp.cli.report import panel, take_in
from hf_amp.events import LOG_FILE
from hf_amp.monitoring.metrics import NAMES
from hf_amp.report import reader
from hf_amp.report.page import page
from hf_amp.report.reader import CHANGES_KEPT, EventLogReader, RunHistory, read_run
from hf_amp.report.verdict import figures_of
from tests.fuzz.anything import PLAIN

KINDS = st.just("metrics") | st.sampled_from([kind.value for kind in EventKind]) | st.sampled_from(["of_the_future"])
STEPS = st.integers(0, 40)
FIGURES = st.dictionaries(
    st.sampled_from([*sorted(NAMES), "loss"]), st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=3
)
PRECISIONS = st.sampled_from(["MIXED", "FP32", "BF16"])
VALID = st.builds(
    lambda kind, step, figures, more: {"timestamp": "2026-01-01T00:00:00Z", "event": kind, "run_id": "r", "step": step, **figures, **more},
    KINDS,
    STEPS,
    FIGURES,
    st.fixed_dictionaries(
        {"message": st.text(max_size=8), "before": PRECISIONS, "after": PRECISIONS},
        optional={"cause": st.sampled_from(["SCALE", "INPUT", None]), "modules": st.lists(st.sampled_from(["a", "a.b"]), max_size=2)},
    ),
)  # fmt: skip
FIELDS = st.sampled_from(["loss", "before", "after", "module_headroom_bits", "applied_steps", "modules", "cause"]) | st.sampled_from(
    ["timestamp", "event", "run_id", "step", "message", "config", "precision", "scale", "skipped_steps", "x",
     "non_finite_loss_fraction"]
)  # fmt: skip
HUGE = st.sampled_from([10**400, 2**64, 1e308, -1, 0.5, math.nan, math.inf, [], "\ud800\x1b[2J"])
CHANGED = st.builds(
    lambda line, more: {**line, **more}, VALID, st.dictionaries(FIELDS, HUGE | PLAIN, min_size=1, max_size=3)
)


def as_bytes(line: Any) -> bytes:
    try:
        return json.dumps(line).encode()
    except ValueError:  # an int of more than 4300 digits
        return b"{}"


def torn(line: dict[str, Any], share: float) -> bytes:
    whole = as_bytes(line)
    return whole[: int(share * len(whole))]


PASSED_OVER = st.one_of(
    st.builds(torn, VALID, st.floats(0, 0.999)),
    st.sampled_from([b"", b"\0" * 7, b"\r", b'{"timestamp": \xff\xfe', b'{"timestamp": ' + b"[" * 5000]),
)
"""What kills, crashes and file systems leave in place of a line."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / LOG_FILE


def see(run: RunHistory) -> None:
    """Everything that is made of a run but pictures; it prints, also where a terminal knows UTF-8 alone."""
    json.dumps(figures_of(run), allow_nan=False)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    Console(file=stream, width=80).print(panel(run))
    stream.flush()


@given(parts=st.lists(VALID | PASSED_OVER, max_size=12), cut=st.integers(0, 200), chunk=st.integers(1, 400))
def test_whole_lines_are_kept(path: Path, parts: list[Any], cut: int, chunk: int) -> None:
    """Between torn lines and zeros, cut off anywhere, read at once or while it grows: every whole line, once, in order."""
    pieces = [part if isinstance(part, bytes) else as_bytes(part) for part in parts]
    content = b"".join(piece + b"\n" for piece in pieces)
    content = content[: len(content) - cut] if cut else content
    ended = content[: content.rfind(b"\n") + 1].count(b"\n")
    expected = [part for part in parts[:ended] if isinstance(part, dict)]
    path.write_bytes(content)
    log = EventLogReader(path)
    assert list(log.read()) == expected
    assert log.unfinished == (not content.endswith(b"\n") and bool(content))

    path.write_bytes(b"")
    growing, seen, run = EventLogReader(path), [], RunHistory("run", path)
    for start in range(0, len(content), chunk):
        with path.open("ab") as file:
            file.write(content[start : start + chunk])
        if chunk % 2:
            seen += list(growing.read())
        else:
            take_in(growing, run)
    assert seen == expected if chunk % 2 else run.lines == len(expected)
    see(read_run(path))


LIKE_OURS = st.lists(CHANGED.map(as_bytes), min_size=1, max_size=3)
MIXED_UP = st.lists(
    st.one_of(VALID.map(as_bytes), CHANGED.map(as_bytes), PASSED_OVER, PLAIN.map(as_bytes), st.binary(max_size=30)),
    max_size=8,
)


@given(pieces=LIKE_OURS | LIKE_OURS | MIXED_UP)
def test_anything_is_read_or_refused(path: Path, pieces: list[bytes]) -> None:
    """Any bytes and any JSON among valid lines: a run that can be shown, or a StateError that names the file and the line."""
    path.write_bytes(b"".join(piece + b"\n" for piece in pieces))
    try:
        run = read_run(path)
    except StateError as error:
        assert f"{path}: " in str(error)  # noqa: PT017
        assert "line " in str(error)  # noqa: PT017
    else:
        see(run)


@settings(max_examples=8)
@given(st.lists(CHANGED, min_size=1, max_size=8))
def test_whatever_is_read_makes_a_page(path: Path, lines: list[Any]) -> None:
    """Pictures included."""
    path.write_bytes(b"".join(as_bytes(line) + b"\n" for line in lines))
    try:
        run = read_run(path)
    except StateError:
        return
    assert page([run], "1").encode("utf-8", "backslashreplace").endswith(b"</html>\n")


def history(lines: Iterable[dict[str, Any]]) -> RunHistory:
    run = RunHistory("run", Path("log"))
    for each in lines:
        run.add(each)
    return run


def line(kind: EventKind, step: int, **fields: Any) -> dict[str, Any]:
    return {"timestamp": "t", "event": kind.value, "run_id": "r", "step": step, **fields}


@pytest.mark.parametrize(
    "flood",
    [
        lambda i: line(EventKind.METRICS, i, **{f"figure {i}": 1.0}),
        lambda i: line(EventKind.STEP_SKIPPED, i, cause=f"cause {i}"),
        lambda i: line(EventKind.METRICS, i, module_headroom_bits={f"module {50 * i + j}": 1.0 for j in range(50)}),
    ],
)
def test_names_without_end_are_refused(monkeypatch: pytest.MonkeyPatch, flood: Callable[[int], dict[str, Any]]) -> None:
    """A log in which every line has another figure, cause or module is none of hf_amp's, and does not fill the memory."""
    monkeypatch.setattr(reader, "MOST_MODULES", 2000)
    lines = map(flood, range(1100))
    with pytest.raises(StateError, match=r"line \d+ .*more than"):
        history(lines)


def test_changes_without_end_are_thinned_out() -> None:
    """The first and the newest changes of precision stay, of which the page tells what runs where."""
    run = history(
        each
        for i in range(CHANGES_KEPT + 100)
        for each in (
            line(EventKind.PRECISION_CHANGED, i, before="MIXED", after="FP32", modules=[f"m{i % 7}"]),
            line(EventKind.TRAINING_STARTED, i + 1),
        )
    )
    assert len(run.precision_changes) == len(run.resumed_at) == CHANGES_KEPT
    assert (run.precision_changes[0].step, run.precision_changes[-1].step) == (0, CHANGES_KEPT + 99)
    assert sorted(run.changed_modules) == [f"m{i}" for i in range(7)]


def test_a_verdict_does_not_break_the_terminal() -> None:
    """Half of a surrogate pair, which JSON can hold and no terminal can show, in what the verdict repeats."""
    metrics = line(EventKind.METRICS, 3, applied_steps=3)
    see(history([metrics, line(EventKind.STALLED, 3, message="\ud800")]))
