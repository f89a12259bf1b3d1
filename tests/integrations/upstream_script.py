"""Runs one of the test scripts that ship in accelerate's wheel, with hf_amp attached to every Accelerator it makes."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import accelerate

import hf_amp


class Attached:
    """How many Accelerators were attached to, and how many optimizer steps their sessions decided."""

    def __init__(self) -> None:
        self.sessions: list[hf_amp.AmpSession] = []

    def make(self, *args: Any, **kwargs: Any) -> accelerate.Accelerator:
        """Stands where the script says `Accelerator(...)`."""
        accelerator = accelerate.Accelerator(*args, **kwargs)
        self.sessions.append(hf_amp.attach(accelerator))
        return accelerator


def main(name: str) -> None:
    script = importlib.import_module(f"accelerate.test_utils.scripts.{name}")
    attached = Attached()
    script.Accelerator = attached.make  # type: ignore[attr-defined]  # the script's own name, for this process
    script.main()
    decided = sum(session.scaler.decided_steps for session in attached.sessions)
    if os.environ.get("RANK", "0") == "0":
        print(f"attached to {len(attached.sessions)} Accelerators, {decided} steps decided")


if __name__ == "__main__":
    main(sys.argv[1])
