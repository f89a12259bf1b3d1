"""Events as JSON lines, for people with `jq` and for log collectors."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import structlog

from hf_amp.events import AmpEvent

_FIRST_KEYS = ("timestamp", "level", "event", "run_id", "rank", "step")
_TAKEN_KEYS = (*_FIRST_KEYS, "cause", "before", "after", "modules", "message")

_log = logging.getLogger("hf_amp")


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become text."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _ends_within_a_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class JsonLinesSink:
    """Appends one line per event: UTC ISO-8601 timestamp, level, event, run id, rank, step, and the event's fields.

    Every line is written at once; one that was left unfinished is ended first. Where a line cannot be written, as on a full
    disk, it is lost, a warning says so once, and the next ones are tried again. The user's logging configuration is not
    touched.

    Raises:
        OSError: the file cannot be opened for appending.
    """

    def __init__(self, path: str | Path, run_id: str, rank: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._torn = _ends_within_a_line(self.path)
        self._lost_lines = 0
        self._file = self.path.open("ab", buffering=0)
        self._log: Any = structlog.wrap_logger(
            structlog.ReturnLogger(),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                lambda _logger, _method, line: {name: line[name] for name in _FIRST_KEYS} | dict(line),
                structlog.processors.JSONRenderer(serializer=json.dumps, allow_nan=False),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(0),
            context_class=dict,
            run_id=run_id,
            rank=rank,
        )

    def write(self, event: AmpEvent) -> None:
        """Writes one event. Control characters in names and messages are escaped, so they cannot forge a line."""
        line: str = (self._log.warning if event.kind.needs_attention else self._log.info)(
            event.kind.value,
            step=event.step,
            cause=event.cause.value if event.cause else None,
            before=_plain(event.before),
            after=_plain(event.after),
            modules=list(event.modules),
            message=event.message,
            **{f"{'figure_' * (name in _TAKEN_KEYS)}{name}": _plain(value) for name, value in event.figures.items()},
        )
        self._append(f"{line}\n".encode())

    def _append(self, line: bytes) -> None:
        rest = memoryview(b"\n" + line if self._torn else line)  # an unfinished line must not swallow this one
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
                self._torn = bool(rest)
        except OSError as error:
            if not self._lost_lines:
                _log.warning("%s: events are lost until it can be written to again (%s)", self.path, error)
            self._lost_lines += 1
            return
        if self._lost_lines:
            _log.warning("%s: is written to again; %d events are not in it", self.path, self._lost_lines)
            self._lost_lines = 0

    def close(self) -> None:
        """Closes the file. Harmless when called again."""
        self._file.close()
