"""What the GPU benchmark measures: time, memory, synchronisations and energy of a step. On a CPU, time and host reads."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_amp.monitoring.monitor import PrecisionMonitor
from hf_amp.training.trainers import MemoryCalibration
from tests.benchmarks.gpu.contenders import Contender
from tests.benchmarks.gpu.models import Batch
from tests.benchmarks.measuring import ratio
from tests.host_reads import count_host_reads, count_synchronisations

WARM_UP_STEPS = 4
COUNTED_STEPS = 3
"""Steps whose synchronisations are counted."""
MOST_STEPS_A_ROUND = 60


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """FP32 matrix products and convolutions in TF32, or not."""
    former = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former[0])
        torch.backends.cudnn.allow_tf32 = former[1]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class EnergyCounter:
    """Energy that a GPU has used since its driver was loaded, other programs included; the driver updates it some ten times a second.

    Source: NVML, `nvmlDeviceGetTotalEnergyConsumption`, in mJ.

    Attributes:
        missing: why there is none; None where there is one.
    """

    def __init__(self, device: torch.device) -> None:
        self.missing: str | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self._read()
        except Exception as error:
            self.missing = f"not measured: {type(error).__name__}: {error}".splitlines()[0]

    def joules(self) -> float:
        """0 where there is none."""
        return 0.0 if self.missing is not None else self._read() / 1000


def synchronisations(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """How often the host waits for the device in a step, and in which lines; on a CPU, host reads."""
    count = count_synchronisations if device.type == "cuda" else count_host_reads
    with count() as reads:
        for _ in range(COUNTED_STEPS):
            step()
    sources = reads.sources
    return {
        "synchronisations_per_step": len(sources) / COUNTED_STEPS,
        "synchronisations_by_source": {s: sources.count(s) / COUNTED_STEPS for s in dict.fromkeys(sources)},
    }


def memory_of_step(contender: Contender, batch: Batch, device: torch.device) -> dict[str, int]:
    """Bytes before a step, those that its forward pass has stored by its end, and most at once; none on a CPU.

    The allocator counts when work is queued, so nothing is waited for.
    """
    if device.type != "cuda":
        contender.step(batch)
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    loss = contender.forward(batch)
    stored = torch.cuda.memory_allocated(device) - resident
    contender.finish(loss)
    peak = torch.cuda.max_memory_allocated(device)
    return {"resident_bytes": resident, "stored_bytes": stored, "peak_bytes": peak}


def estimated_saving(
    contender: Contender, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
) -> dict[str, Any]:
    """What the package's own metric says of memory, from one step."""
    calibration, monitor = MemoryCalibration(enabled=True), PrecisionMonitor()
    with calibration.around_forward(model):
        loss = contender.forward(batch)
    contender.finish(loss)
    calibration.finish(model, optimizer, monitor)
    estimate = calibration.estimate
    return {
        "memory_saving_fraction": monitor.metrics()["memory_saving_fraction"],
        "resident_bytes": estimate.resident,
        "stored_bytes": estimate.stored,
        "fp32_resident_bytes": estimate.fp32_resident,
        "fp32_stored_bytes": estimate.fp32_stored,
    }


def facts_of(contender: Contender, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Warms a way up; then its memory and its synchronisations."""
    with float32_products(contender.tf32):
        for _ in range(WARM_UP_STEPS):
            contender.step(batch)
        return {
            **contender.facts,
            **memory_of_step(contender, batch, device),
            **synchronisations(lambda: contender.step(batch), device),
        }


def timed_in_turn(
    contenders: dict[str, Contender], batches: list[Batch], units: int, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Rate and energy of all ways, warmed up, in turn within a round; the host waits once a round and way.

    Args:
        units: tokens or images in a batch.
        seconds: about how long a way runs in a round, of whole steps, one at least.
    """
    device = next(iter(batches[0].values())).device
    energy, coming = EnergyCounter(device), itertools.cycle(batches)

    def run(contender: Contender, steps: int) -> tuple[float, float]:
        with float32_products(contender.tf32):
            wait(device)
            joules, start = energy.joules(), time.perf_counter()
            for _ in range(steps):
                contender.step(next(coming))
            wait(device)
            return (time.perf_counter() - start) / steps, (energy.joules() - joules) / steps

    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    steps = {
        name: min(MOST_STEPS_A_ROUND, max(1, round(seconds / run(contender, 1)[0])))
        for name, contender in contenders.items()
    }
    for _ in range(rounds):
        for name, contender in contenders.items():
            taken[name].append(run(contender, steps[name]))
    figures = {}
    baselines = {name: [s for s, _ in taken[name]] for name in ("FP32", "FP32 with TF32", "FP16 stock", "FP16 DYNAMIC")}
    for name, runs in taken.items():
        step_seconds = [s for s, _ in runs]
        low, middle, high = statistics.quantiles([units / s for s in step_seconds], n=4)
        figures[name] = {
            "units_per_second": {"median": round(middle, 1), "quartile_1": round(low, 1), "quartile_3": round(high, 1)},
            "steps_a_round": steps[name],
            **{f"speed over {base}": ratio(its, step_seconds) for base, its in baselines.items()},
            "joules_per_unit": energy.missing or statistics.fmean(j for _, j in runs) / units,
            "scale": contenders[name].scale(),
        }
    return figures
