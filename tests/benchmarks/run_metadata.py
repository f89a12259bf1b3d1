"""Where and with what a benchmark was run."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hf_amp

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "accelerate", "lightning-fabric")


def run_metadata() -> dict[str, Any]:
    """Hardware, versions, commit and command of this run; no commit where this is no Git checkout."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES if _version(name)},
        "hf_amp": hf_amp.__version__,  # which need not be installed: a checkout does
        **({"commit": _COMMIT} if _COMMIT else {}),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that is checked out; "-dirty" after it where a tracked file but the results is changed."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != ROOT.resolve():
            return None  # a copy inside of some other repository
        results = [f":!{path.relative_to(ROOT)}" for path in (RESULTS, RESULTS.with_name("RESULTS.md"))]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else "?"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor()


_COMMIT = _commit()
"""As the run began; by its end the checkout may be another."""
