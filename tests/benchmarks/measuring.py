"""Interleaved timing, and the JSON file that it is written to."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.run_metadata import run_metadata

Seconds = list[float]
Row = dict[str, Any]
"""Column → text, number, or median and quartiles. Every benchmark writes its results as `rows`."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}
"""Time that passes; CPU time of this thread, which on a machine shared with others is steadier, with OMP_NUM_THREADS=1."""


def interleaved(contenders: dict[str, Callable[[], None]], rounds: int, clock: str = "wall") -> dict[str, Seconds]:
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


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, digits), "quartile_1": round(low, digits), "quartile_3": round(high, digits)}


def ratio(seconds: Seconds, baseline: Seconds) -> dict[str, float]:
    """Median and quartiles of the round-by-round ratios to the baseline."""
    return spread([a / b for a, b in zip(seconds, baseline, strict=True)])


def compared(seconds: Mapping[str, Seconds], baseline: str, steps: int = 1, **labels: Any) -> list[Row]:
    """A row for each contender but the baseline: its time as a ratio to the baseline's, and a step's time in ms.

    Args:
        steps: optimizer steps in a round.
        labels: columns that stand before.
    """
    return [
        {
            **labels,
            "what": name,
            "over": baseline,
            "ratio": ratio(taken, seconds[baseline]),
            "milliseconds_a_step": spread([second / steps * 1000 for second in taken], 3),
            "baseline_milliseconds_a_step": spread([second / steps * 1000 for second in seconds[baseline]], 3),
        }
        for name, taken in seconds.items()
        if name != baseline
    ]


def parser(sizes: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line of a benchmark: where the result goes, and how much is measured."""
    made = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    made.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    if sizes:
        made.add_argument("--sizes", nargs="+", default=list(sizes), choices=list(sizes))
        made.add_argument("--rounds", type=int, help="default: that of each size")
    return made


def device() -> str:
    """Where benchmarks run: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def write(name: str, result: dict[str, Any], out: Path) -> None:
    """Writes the result with its circumstances as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    report = {"circumstances": run_metadata(), **result}
    (out / f"{name}.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
