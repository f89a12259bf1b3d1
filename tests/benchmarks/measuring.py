"""Interleaved timing, and where it was done."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import hf_amp

Seconds = list[float]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}
"""Time that passes; CPU time of this thread, which on a machine shared with others is steadier, with OMP_NUM_THREADS=1."""


def interleaved(
    contenders: dict[str, Callable[[], None]], rounds: int, clock: str = "wall"
) -> dict[str, Seconds]:
    """Seconds of each contender in each round, all of them in turn within a round, after two rounds of warm-up."""
    now = CLOCKS[clock]
    seconds: dict[str, Seconds] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, contender in contenders.items():
            start = now()
            contender()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= 2:
                seconds[name].append(now() - start)
    return seconds


def ratio(seconds: Seconds, baseline: Seconds) -> dict[str, float]:
    """Median and quartiles of the round-by-round ratios to the baseline."""
    ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def circumstances() -> dict[str, Any]:
    """Hardware, versions and command of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
        "hf_amp": hf_amp.__version__,  # which need not be installed: a checkout does
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


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


def write(name: str, result: dict[str, Any], out: Path) -> None:
    """Writes the result with its circumstances as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    report = {"circumstances": circumstances(), **result}
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
