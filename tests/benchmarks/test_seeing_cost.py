"""What monitor and tracker cost a step, in microseconds of Python, and what they hold.

`python -m tests.benchmarks.test_seeing_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

import gc
import pickle
import time

import torch

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, PerformanceTracker, PrecisionMonitor
from hf_amp.scaling.step import StepOutcome
from tests.benchmarks.measuring import Row, parser, spread, write

CHUNK = 1000


def measure(steps: int) -> Row:
    """Microseconds a step over `steps` synthetic ones, with a skip in every hundredth, and bytes at the end."""
    config = MixedPrecisionConfig()
    monitor, tracker = PrecisionMonitor(config), PerformanceTracker(config, "cpu")
    scaler, loss = AdvancedGradScaler(config, "cpu"), torch.tensor(1.0)
    microseconds = []
    for start in range(1, steps + 1, CHUNK):
        outcomes = [
            StepOutcome(attempt=i, applied=i % 100 != 0, scale=2.0 ** (i % 30), loss_finite=True, grad_norm=1.0)
            for i in range(start, start + CHUNK)
        ]
        began = time.perf_counter()
        for outcome in outcomes:
            tracker.start_step()
            scaler.last_outcome = outcome
            monitor.update_metrics(scaler, loss, outcome.attempt)
            tracker.end_step(8)
        microseconds.append((time.perf_counter() - began) / CHUNK * 1e6)
    gc.collect()
    return {
        "what": "PrecisionMonitor and PerformanceTracker",
        "steps": steps,
        "microseconds_a_step": spread(microseconds, 2),
        "in_the_first_quarter": spread(microseconds[: len(microseconds) // 4], 2),
        "in_the_last_quarter": spread(microseconds[-(len(microseconds) // 4) :], 2),
        "bytes_of_monitor": len(pickle.dumps(monitor.state_dict())),
        "bytes_of_tracker": len(pickle.dumps(vars(tracker))),
    }


def main() -> None:
    command = parser()
    command.add_argument("--steps", type=int, default=100_000)
    options = command.parse_args()
    write("seeing_cost", {"rows": [measure(options.steps)]}, options.out)


def test_it_measures() -> None:
    """The benchmark itself is sound: it gives a time and sizes."""
    result = measure(8 * CHUNK)
    assert result["microseconds_a_step"]["median"] > 0
    assert 0 < result["bytes_of_monitor"] < 100_000


if __name__ == "__main__":
    main()
