"""Skipped steps, underflow and final loss of every scaling rule in emulated FP16, on text, digits and a T5 that overflows.

On text and digits the gradients are 64 times as large every 100 steps. Nothing is timed, so runs go side by side.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_scaling_quality --out tests/benchmarks/results`
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn

from hf_amp.precision import FP16_FORMAT
from tests.benchmarks.measuring import Row, parser, spread, write
from tests.benchmarks.quality_scalings import SCALINGS
from tests.benchmarks.quality_tasks import OUTLIER_FACTOR, TASKS


def train(task: str, scaling: str, seed: int, steps: int | None = None) -> dict[str, float]:
    """One run: skipped and repeated steps, mean underflow fraction, mean loss of the last twentieth, modules in FP32 at the
    end."""
    torch.set_num_threads(1)
    what = TASKS[task]
    steps = steps or what.steps
    model, batches, optimizer = what.build(seed)
    run = SCALINGS[scaling](model)
    losses, underflow, skipped, repeated = [], [], 0, 0

    def attempt(batch: dict[str, Tensor], factor: float) -> Tensor | None:
        """One step; its scaled gradients, or None where it was skipped."""
        with run.context():
            loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        (run.scaler.scale(loss) * factor).backward()
        wide = run.scaler.not_sampled() if run.session else ()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if id(p) not in wide])
        run.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.scaler.step(optimizer)
        run.scaler.update()
        return gradients if gradients.isfinite().all() else None

    for step, batch in enumerate(islice(batches, steps), start=1):
        factor = OUTLIER_FACTOR if what.outlier_every is not None and step % what.outlier_every == 0 else 1.0
        gradients = attempt(batch, factor)
        if gradients is None and run.repeats:
            repeated += 1
            losses.pop()
            gradients = attempt(batch, factor)
        if gradients is None:
            skipped += 1
        elif step % 10 == 6 and run.is_half:
            underflow.append((gradients.abs() < FP16_FORMAT.smallest_normal).float().mean().item())
    return {
        "skipped_steps": skipped,
        "repeated_steps": repeated,
        "underflow_fraction": statistics.mean(underflow) if underflow else math.nan,
        "final_loss": statistics.mean(losses[-max(steps // 20, 1) :]),
        "modules_in_fp32": run.session.metrics()["modules_in_fp32"] if run.session else 0,
    }


def row_of(task: str, scaling: str, runs: list[dict[str, float]], reference: list[dict[str, float]]) -> Row:
    """Over the seeds. A figure that is not finite in some run has no median; underflow is that of applied steps in FP16."""

    def over_seeds(values: list[float], digits: int) -> Any:
        return spread(values, digits) if all(map(math.isfinite, values)) else None

    losses = [run["final_loss"] for run in runs]
    against = [loss / other["final_loss"] for loss, other in zip(losses, reference, strict=True)]
    return {
        "task": task,
        "scaling": scaling,
        "skipped_steps": over_seeds([run["skipped_steps"] for run in runs], 1),
        "repeated_steps": over_seeds([run["repeated_steps"] for run in runs], 1),
        "underflow_fraction": over_seeds([run["underflow_fraction"] for run in runs], 5) or "not taken",
        "final_loss": over_seeds(losses, 4),
        "final_loss_over_FP32": over_seeds(against, 4),
        "modules_in_fp32": over_seeds([run["modules_in_fp32"] for run in runs], 0),
    }


def measure(seeds: int, steps: int | None, processes: int) -> list[Row]:
    """All tasks, scalings and seeds; every process runs one at a time."""
    cases = list(product(TASKS, SCALINGS, range(seeds)))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        done = dict(zip(cases, pool.map(train, *zip(*cases, strict=True), [steps] * len(cases)), strict=True))
    runs = {(t, s): [done[t, s, seed] for seed in range(seeds)] for t, s in product(TASKS, SCALINGS)}
    return [row_of(t, s, runs[t, s], runs[t, next(iter(SCALINGS))]) for t, s in runs]


def main() -> None:
    command = parser()
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--steps", type=int, help="default: that of each task")
    options = command.parse_args()
    rows = measure(options.seeds, options.steps, os.cpu_count() or 1)
    write("scaling_quality", {"seeds": options.seeds, "rows": rows}, options.out)


def test_every_scaling_trains() -> None:
    """The benchmark itself is sound: four steps of each end with a loss, on the T5 with that of hf_amp alone."""
    for task, scaling in product(TASKS, SCALINGS):
        result = train(task, scaling, seed=0, steps=4)
        lives = task != "T5 that overflows" or scaling.startswith(("hf_amp", "none"))
        assert math.isfinite(result["final_loss"]) is lives, (task, scaling)
        assert lives or result["skipped_steps"] == 4, (task, scaling)


if __name__ == "__main__":
    main()
