"""The first hour on a GPU in one command, the most telling first; what is known is written as it goes, and another call goes on from there.

`python -m tests.gpu --out DIR` takes under 9 minutes on one GPU; `--tiny` shows on a CPU that everything runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import hf_amp
from hf_amp import EventKind
from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.expectations import expectations
from tests.benchmarks.gpu.measuring import wait
from tests.benchmarks.gpu.models import Subject
from tests.benchmarks.measuring import ratio, spread
from tests.benchmarks.run_metadata import ROOT, run_metadata
from tests.benchmarks.test_gpu_training import measure_what_fits
from tests.benchmarks.test_scaler_cost import SIZES, our_boundary, parameters, stock_boundary
from tests.each import forget_accelerators

STRATEGIES = ("DYNAMIC", "ADAPTIVE", "PERFORMANCE_OPTIMIZED")
BOUNDARIES_A_WAIT = 20
Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One thing to find out.

    Attributes:
        seconds: what it may take on a GPU; it is not begun where less is left.
        run: gives what was found, as JSON.
    """

    name: str
    seconds: float
    run: Callable[[torch.device, bool], Result]


def correctness(device: torch.device, tiny: bool) -> Result:
    """The tests marked `gpu`, in a process of their own."""
    where = ["tests/statistics/test_on_cuda.py"] if tiny else ["tests"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-rfE",
        *where,
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    except subprocess.TimeoutExpired as error:
        return {"ended": "no: 150 s were over", "output": str(error.stdout or "")[-2000:]}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?", done.stdout, re.MULTILINE)
    counts = dict(_counts(done.stdout))
    return {"exit": done.returncode, "counts": counts, "failed": {name: why[:300] for name, why in failed}}


def _counts(output: str) -> list[tuple[str, int]]:
    last = output.strip().splitlines()[-1]
    return [(what, int(number)) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)]


def _attempt(task: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    function, arguments = task
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300], "of": arguments}


def side_by_side(function: Callable[..., Any], each: list[tuple[Any, ...]], tiny: bool) -> list[Any]:
    """Results of `function`, or its error, for the arguments in `each`, in several processes where they are many."""
    tasks = [(function, arguments) for arguments in each]
    if tiny:
        return [_attempt(task) for task in tasks]
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(_attempt, tasks))


def emulation(device: torch.device, tiny: bool) -> Result:
    """Whether FP16 that is emulated on a CPU overflows where that of the device does."""
    from tests.benchmarks.gpu.emulation import differences, summary
    from tests.test_cuda_rules import ALL

    numbers = range(2) if tiny else range(len(ALL))
    return summary(side_by_side(differences, [(number, device.type) for number in numbers], tiny))


def causes(device: torch.device, tiny: bool) -> Result:
    """Random faults in random models, as in the table of causes: what is told of them, and what is done to the runs."""
    from tests.fallback.random_faults import TRIALS, run, told_of

    seeds = 2 if tiny else TRIALS
    ran = side_by_side(run, [(seed, None, device.type) for seed in range(seeds)], tiny)
    failed = [it for it in ran if isinstance(it, dict)]
    told = [it for it in ran if it is not None and not isinstance(it, dict)]
    counts, is_right = told_of(told), lambda it: it.told in (it.cause, "UNKNOWN")
    return {
        "faults": len(told),
        "right": counts.right,
        "UNKNOWN instead": counts.unknown,
        "wrong": [
            f"{it.fault} told as {it.told} ({it.setting}): {it.message[:300]}" for it in told if not is_right(it)
        ],
        "unknown": [
            f"{it.fault} ({it.setting}): {it.message[:300]}" for it in told if it.told == "UNKNOWN" != it.cause
        ],
        "harmed": [f"{it.fault} told as {it.told}: {', '.join(it.harm)} ({it.setting})" for it in told if it.harm],
        "failed": failed,
    }


def skips(device: torch.device, tiny: bool) -> Result:
    """What a skipped step costs whose cause takes a replay, over an applied one."""
    from tests.benchmarks.test_fallback_cost import measure_skips

    sizes, rounds = (("tiny",), 2) if tiny else (("25M", "110M"), 4)
    return {"rows": [row for size in sizes for row in measure_skips(size, rounds, device.type)]}


def launches(device: torch.device, tiny: bool) -> Result:
    """Kernels that the profiler sees in one step boundary of each strategy."""
    from tests.benchmarks.gpu.launches import measure_launches

    return measure_launches(device, 1) if tiny else measure_launches(device)


def scaler_cost(device: torch.device, tiny: bool) -> Result:
    """Step boundaries after a product that stands for forward and backward, many to a wait, over the stock scaler's."""
    size, rounds = (SIZES["tiny"], 2) if tiny else (SIZES["110M"], 6)
    side = 64 if tiny else 4096
    x = torch.randn(side, side, device=device)
    held = parameters(size.width, size.layers, size.vocabulary, str(device))
    ways = {"stock": stock_boundary(held, True)} | {s: our_boundary(held, True, s) for s in STRATEGIES}
    seconds: dict[str, list[float]] = {name: [] for name in ("nothing", *ways)}
    for round_ in range(rounds + 1):
        for name in seconds:
            wait(device)
            started = time.perf_counter()
            for _ in range(BOUNDARIES_A_WAIT):
                x @ x
                if name != "nothing":
                    ways[name]()
            wait(device)
            if round_:
                seconds[name].append((time.perf_counter() - started) / BOUNDARIES_A_WAIT)
    return {
        "parameters": sum(p.numel() for p in held),
        "boundaries_a_wait": BOUNDARIES_A_WAIT,
        "milliseconds": {name: spread([s * 1000 for s in taken], 3) for name, taken in seconds.items()},
        "over stock": {name: ratio(seconds[name], seconds["stock"]) for name in STRATEGIES},
    }


def training(subject: Subject, tiny_subject: Subject, rounds: int) -> Callable[[torch.device, bool], Result]:
    """Whole steps in FP32, TF32, BF16, stock FP16 and FP16 by hf_amp: speed, memory at its peak, synchronisations."""

    def run(device: torch.device, tiny: bool) -> Result:
        chosen = tiny_subject if tiny else subject
        case = measure_what_fits(chosen, chosen.rows[-1], device, 2 if tiny else rounds, 0.0 if tiny else 0.25)
        return {**case, "expectations": expectations({chosen.name: case})}

    return run


def predictions(device: torch.device, tiny: bool) -> Result:
    """What emulated FP16 on a CPU says of models beyond FP16's range, and what the device does: modules in FP32, causes, scale."""
    from tests.fallback.rescaled import ZOO  # loads scikit-learn, where there is one

    found = {}
    for entry in ZOO[: 1 if tiny else None]:
        said = {where: _rescued(entry, where == "cpu") for where in ("cpu", "device")}
        bits = said["cpu"]["log2_scale"] - said["device"]["log2_scale"]
        same = {name: said["cpu"][name] == said["device"][name] for name in ("modules", "causes")}
        found[entry.name] = {**said, "came true": {**same, "scale within 2 bits": abs(bits) <= 2}}
    return found


def _rescued(entry: Any, cpu: bool) -> Result:
    forget_accelerators()
    accelerator = Accelerator(mixed_precision="fp16", cpu=cpu)
    with hf_amp.attach(accelerator) as session:
        plain, batches, make_optimizer = entry.build(0)
        model, optimizer = accelerator.prepare(plain, make_optimizer(plain))
        for _ in range(6):
            batch = {name: x.to(accelerator.device) for name, x in next(batches).items()}
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        causes = [event.cause.value for event in session.events if event.kind is EventKind.STEP_SKIPPED and event.cause]
        scale = torch.tensor(session.scaler.get_scale()).log2().item()
        result = {"modules": sorted(session.plan.modules), "causes": causes, "log2_scale": scale}
    forget_accelerators()
    return result


def compiled_and_graphed(device: torch.device, tiny: bool) -> Result:
    """A model that runs as a CUDA graph, and compiled ones: in a process of their own, for what fails may leave a device in a bad state."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu.tries", device.type, *["--tiny"] * tiny]
    try:
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False).stdout
    except subprocess.TimeoutExpired as error:  # what was found by then counts
        printed = (error.stdout or b"").decode() + json.dumps({"ended": "no: 90 s were over"})
    found: Result = {}
    for line in printed.splitlines():
        found |= json.loads(line) if line.startswith("{") else {}
    return found


STAGES = (
    Stage("correctness", 150, correctness),
    Stage("launches", 10, launches),
    Stage("scaler cost", 10, scaler_cost),
    Stage("training GPT-2 124M", 55, training(models.FULL[0], models.TINY[0], 4)),
    Stage("predictions", 30, predictions),
    Stage("compiled and graphed", 90, compiled_and_graphed),
    Stage("causes", 60, causes),
    Stage("emulation", 40, emulation),
    Stage("skips", 25, skips),
    Stage("training BERT-base", 40, training(models.FULL[2], models.TINY[1], 3)),
)
"""The most telling first."""


def run(options: argparse.Namespace) -> Result:
    """All stages that are not in the file already, of the same commit; what one has found is written before the next begins."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file, metadata = options.out / "gpu.json", run_metadata()
    known: Result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if known.get("circumstances", {}).get("commit") != metadata.get("commit"):
        known = {}
    result: Result = {"circumstances": metadata, "stages": known.get("stages", {})}
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        left = 60 * options.minutes - (time.monotonic() - started)
        if "found" in result["stages"].get(stage.name, {}) or (options.only and stage.name not in options.only):
            continue
        begun = time.monotonic()
        if left < stage.seconds:
            result["stages"][stage.name] = {"not begun": f"{left:.0f} s were left"}
        else:
            try:
                result["stages"][stage.name] = {"found": stage.run(device, options.tiny)}
            except Exception as error:  # what comes after it is worth knowing all the same
                result["stages"][stage.name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        result["stages"][stage.name]["seconds"] = round(time.monotonic() - begun, 1)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{stage.name}: {json.dumps(result['stages'][stage.name])[:600]}", flush=True)
    return result


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument(
        "--out", type=Path, required=True, help="folder for gpu.json; what is there already is not done again"
    )
    command.add_argument("--minutes", type=float, default=8.5, help="after which no other stage is begun")
    command.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES])
    command.add_argument("--tiny", action="store_true", help="the smallest size of everything, also on a CPU")
    return command


def main() -> None:
    command = parser()
    options = command.parse_args()
    if not (torch.cuda.is_available() or options.tiny):
        command.error("there is no CUDA device; --tiny runs everything small on a CPU")
    run(options)


if __name__ == "__main__":
    main()
