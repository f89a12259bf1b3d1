"""A folder of files that appears whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_WRITING = ".incomplete"
_WRITTEN = ".complete"


class Staging:
    """Where a checkpoint is written before it takes its place.

    A new one is written beside its place and renamed. One that replaces another is written inside it, marked as
    whole by a rename, and then moved file by file, which `finish_interrupted` completes after a kill; what else lies
    in that folder stays.

    Args:
        target: the folder that the checkpoint is to be.
        beside: the folder, on the same file system, to write a new one in; None for that of `target`.

    Attributes:
        folder: where to write.
    """

    def __init__(self, target: Path, beside: Path | None = None) -> None:
        self.target = target
        self.replaces = target.exists()
        self.folder = (
            target / _WRITING if self.replaces else (beside or target.parent) / f".{target.name}{_WRITING}"
        )

    def clear(self) -> None:
        """Removes what an interrupted save has left, after completing it where it was whole."""
        if self.replaces:
            finish_interrupted(self.target)
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, stale: str) -> None:
        """Puts what was written in its place; does nothing where another process has.

        Args:
            stale: the name of a file that a checkpoint in that place may hold and that this one supersedes.
        """
        if not self.folder.is_dir():
            return
        if not self.replaces:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.rename(self.target)
            return
        self.folder.rename(self.target / _WRITTEN)
        finish_interrupted(self.target)
        (self.target / stale).unlink(missing_ok=True)


def finish_interrupted(target: Path) -> None:
    """Moves into `target` what a process had written whole when it was killed; nothing to do otherwise."""
    whole = target / _WRITTEN
    if not whole.is_dir():
        return
    for file in sorted(path for path in whole.rglob("*") if path.is_file()):
        place = target / file.relative_to(whole)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(whole)
