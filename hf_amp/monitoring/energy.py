"""Joules an applied step, where the hardware counts them: NVML's counter of a GPU, RAPL's of the CPU packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
"""Where Linux has RAPL's counters, which only root may read unless the machine says otherwise."""
Counter = Callable[[], float]


class EnergyMeter:
    """Energy since it was made. Reads a counter of the driver or of Linux: no GPU-CPU sync.

    Args:
        device: what trains: a CUDA device's own energy, through `pynvml` (the extra `hf_amp[energy]`) from Volta on; for "cpu"
            that of all CPU packages, whatever else runs on them. Others have no counter.
        applied: steps applied so far, which it does not count.
        powercap: folder of RAPL's counters; None for Linux's own.
    """

    def __init__(self, device: str, applied: int, powercap: Path | None = None) -> None:
        self._applied = applied
        self._counters = (
            _rapl_counters(powercap or POWERCAP) if device == "cpu" else _nvml_counters() if device == "cuda" else []
        )

    def metrics(self, applied: int) -> dict[str, float]:
        """`joules_per_step`, where anything counts and a step was applied since; `applied`: steps applied so far."""
        try:
            joules = sum(counter() for counter in self._counters)
        except Exception:  # no longer to be read: NVML has errors of its own, and training goes on
            joules, self._counters = 0.0, []
        steps = applied - self._applied
        return {"joules_per_step": joules / steps} if self._counters and steps > 0 else {}


def _rapl_counters(powercap: Path) -> list[Counter]:
    """One a CPU package. Source: Linux, Documentation/power/powercap/powercap.rst: microjoules, which begin at 0 again."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        return [_since_now(_file(zone / "energy_uj"), 1e-6, limit) for zone, limit in zip(zones, ranges, strict=True)]
    except (OSError, ValueError):  # not for us to read
        return []


def _file(path: Path) -> Callable[[], int]:
    return lambda: int(path.read_text())


def _nvml_counters() -> list[Counter]:
    """That of the current CUDA device. Source: NVML, nvmlDeviceGetTotalEnergyConsumption: millijoules since the driver was loaded."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        )
        return [_since_now(lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)), 1e-3)]
    except Exception:  # no library, an old one, an old GPU, no rights: NVML has errors of its own
        return []


def _since_now(read: Callable[[], int], joules: float, limit: int = 0) -> Counter:
    """Joules since this call; `limit` is the largest value of a counter that begins at 0 again."""
    newest, total = read(), 0

    def since() -> float:
        nonlocal newest, total
        now = read()
        total += now - newest + (limit + 1 if now < newest else 0)
        newest = now
        return total * joules

    return since
