"""Starts programs as a user does: `accelerate launch` with one of our configurations."""

from __future__ import annotations

from pathlib import Path

from tests.forking import printed_by

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"


def launch(config: str | Path, *program: str) -> str:
    """Output of `program` under `accelerate launch`; fails where it fails. Any free port is taken."""
    options = ["--config_file", str(CONFIGS / config), "--main_process_port", "0"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return printed_by("accelerate.commands.launch", *options, *program, ranks=1, **environment)
