"""The facts of this machine: devices, kernels, versions, and how long a matrix product takes in each precision."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hf_amp.hardware import Hardware, probe

PACKAGES = (
    "hf_amp", "torch", "transformers", "accelerate", "datasets", "structlog", "tensorboard", "peft", "bitsandbytes",
    "deepspeed", "transformer_engine", "flash_attn", "triton",
)  # fmt: skip
_SIZE = {"cuda": 4096, "cpu": 512}
"""Rows of the square matrices that are multiplied: large enough for tensor cores, small enough for a second."""
_REPEATS = 5
WORTHWHILE = 1.2
"""How many times as fast as FP32 a precision must be on a CPU to count; less is lost on casts."""


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        hardware: what it can run.
        memory_bytes: how much memory it has; None where it does not say.
        product_seconds: precision → seconds of one square matrix product, the best of five; empty where not measured.
        fused_adamw: whether PyTorch has a fused AdamW for it.
    """

    hardware: Hardware
    memory_bytes: int | None
    product_seconds: dict[str, float]
    fused_adamw: bool

    def speed(self, precision: str) -> float | None:
        """How many times as fast as FP32 a matrix product was; None where not measured."""
        seconds = self.product_seconds
        if precision not in seconds or "FP32" not in seconds:
            return None
        return seconds["FP32"] / seconds[precision]


@dataclass(frozen=True)
class Machine:
    """What there is to know of this machine.

    Attributes:
        devices: accelerators first, the CPU last.
        versions: installed package → version.
        kernels: name of a kernel or compiler → whether it is there.
        system: operating system, Python, number of cores.
    """

    devices: tuple[Device, ...]
    versions: dict[str, str]
    kernels: dict[str, bool]
    system: dict[str, str]


def look_around(measure: bool = True) -> Machine:
    """Finds out what this machine is.

    Args:
        measure: time a matrix product in each precision; a second or two.
    """
    names = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    if torch.backends.mps.is_available():
        names.append("mps")
    devices = tuple(_device(name, measure) for name in (*names, "cpu"))
    return Machine(
        devices=devices,
        versions=installed_versions(),
        kernels={
            "flash attention": bool(names) and torch.backends.cuda.is_flash_attention_available(),
            "Triton": importlib.util.find_spec("triton") is not None,
            "C++ compiler (torch.compile on a CPU)": any(map(shutil.which, ("g++", "clang++", "cl"))),
        },
        system={
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": str(os.cpu_count()),
            "CUDA of PyTorch": str(torch.version.cuda or "none"),
            "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        },
    )


def installed_versions() -> dict[str, str]:
    """Version of every package of interest that is installed; none is imported."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _device(name: str, measure: bool) -> Device:
    device = torch.device(name)
    found = Device(
        hardware=probe(device),
        memory_bytes=_memory(device),
        product_seconds=_product_seconds(device) if measure else {},
        fused_adamw=_has_fused_adamw(device),
    )
    return found if device.type != "cpu" else replace(found, hardware=_cpu(found))


def _cpu(found: Device) -> Hardware:
    """The CPU with the name that Linux has for it."""
    name, cpuinfo = found.hardware.name, Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return replace(found.hardware, name=name)


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _product_seconds(device: torch.device) -> dict[str, float]:
    dtypes = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
    seconds = {}
    for name, dtype in dtypes.items():
        try:
            seconds[name] = _seconds_of_product(device, dtype)
        except (RuntimeError, TypeError):  # no kernel for it
            continue
    return seconds


def _seconds_of_product(device: torch.device, dtype: torch.dtype) -> float:
    size = _SIZE.get(device.type, 1024)
    left = torch.randn(size, size).to(device, dtype)
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first one warms up, and the best counts
        _wait_for(device)
        start = time.perf_counter()
        left @ left
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _has_fused_adamw(device: torch.device) -> bool:
    try:
        torch.optim.AdamW([torch.zeros(1, device=device, requires_grad=True)], fused=True)
    except RuntimeError:
        return False
    return True
