"""Reads the JSON-lines log of a run: whole, growing, cut off by a kill, empty, or not ours at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_amp.errors import StateError

FILE_NAME = "amp_events.jsonl"
"""What a run's log is called in its folder."""

LONGEST_LINE = 2**24
"""Bytes; with figures for 100,000 modules a line is shorter."""

_LINE_START = b'{"timestamp": '
_BLANK = b"\0\r\n "
_NEEDED = ("timestamp", "event", "run_id", "step")


def find_log(run: str | Path) -> Path:
    """The log file of a run, given as its folder or as the file itself.

    Raises:
        StateError: there is none. Names the folders below that have one.
    """
    path = Path(run)
    if path.is_file():
        return path
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    if not path.is_dir():
        raise StateError(
            f"{path}: no such file or folder; pass a run's output folder, or the {FILE_NAME} in it."
        )
    below = sorted(str(found.parent) for depth in ("*", "*/*") for found in path.glob(f"{depth}/{FILE_NAME}"))
    hint = f" Runs below it: {', '.join(below[:5])}." if below else ""
    raise StateError(
        f"{path}: no {FILE_NAME} in this folder. hf_amp writes it into the output folder of a Trainer that has a "
        f"MixedPrecisionCallback, and in loops of your own where session.log_to(folder) says; pass such a folder.{hint}"
    )


class EventLog:
    """Reads a log from the beginning, and then what is added to it.

    A line that is not finished is left for the next `read`: the run is writing it, or was killed there. Lines that a
    kill has cut off in the middle of the file are counted and passed over.

    Args:
        path: the log file.

    Attributes:
        torn_lines: lines in the middle of the file that were cut off.
        unfinished: whether the newest line had no end when the file was last read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.torn_lines = 0
        self.unfinished = False
        self._offset = 0
        self._lines = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yields every whole line that has not been read yet, as parsed; holds one line in memory.

        Raises:
            StateError: the file is not an event log of hf_amp; names the line.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset)
            self.unfinished = False
            while raw := file.readline(LONGEST_LINE):
                if not raw.endswith(b"\n"):
                    self.unfinished = True
                    if len(raw) == LONGEST_LINE or not _may_become_ours(raw):
                        raise self._foreign(raw)
                    return
                self._offset += len(raw)
                self._lines += 1
                line = self._parsed(raw.strip(_BLANK))
                if line is not None:
                    yield line

    def _parsed(self, raw: bytes) -> dict[str, Any] | None:
        if not raw:
            return None
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            if not _may_become_ours(raw):
                raise self._foreign(raw) from None
            self.torn_lines += 1
            return None
        if not isinstance(line, dict) or any(name not in line for name in _NEEDED):
            raise self._foreign(raw)
        if type(line["step"]) is not int or not 0 <= line["step"] < 2**63:
            raise self._foreign(raw)
        return line

    def _foreign(self, raw: bytes) -> StateError:
        shown = ascii(raw[:60].decode("utf-8", "replace"))
        return StateError(
            f"{self.path}: not an event log of hf_amp: line {max(self._lines, 1)} is {shown}. Every line must be a JSON "
            f"object with {', '.join(_NEEDED)}; pass a run's output folder, or the {FILE_NAME} in it."
        )


def _may_become_ours(raw: bytes) -> bool:
    """Whether `raw` is how one of our lines begins."""
    start = raw.lstrip(_BLANK)[: len(_LINE_START)]
    return _LINE_START.startswith(start)
