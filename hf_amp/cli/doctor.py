"""`hf-amp doctor`: what this machine can run, and which precision to train in and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch.utils.benchmark import Timer

from hf_amp.device import Hardware, probe
from hf_amp.monitoring.frozen import bytes_a_parameter

PACKAGES = (
    "hf_amp", "torch", "transformers", "accelerate", "datasets", "structlog", "tensorboard", "peft", "bitsandbytes",
    "deepspeed", "torchao", "transformer_engine", "flash_attn", "triton",
)  # fmt: skip
WORTHWHILE = 1.2
"""How many times as fast as FP32 a precision must be on a CPU to count; less is lost on casts."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    measure: Annotated[bool, typer.Option(help="Time a matrix product in each precision; a second or two.")] = True,
) -> None:
    """Say what this machine can run, and which precision to train in and why."""
    devices, system, versions = find_devices(measure), _system(), installed_versions()
    recommendation = recommend(devices[0])
    if as_json:
        plain = {
            "recommendation": recommendation._asdict(),
            "devices": [asdict(device) for device in devices],
            "half_parameters": bytes_a_parameter(),
            "versions": versions,
            "system": system,
        }
        typer.echo(json.dumps(plain, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    flags = f"  [dim]TrainingArguments({recommendation.trainer})[/dim]" if recommendation.trainer else ""
    console.print(f"[bold]Train in {recommendation.precision}[/bold]{flags}\n{recommendation.why}\n")
    columns = ("device", "memory", "FP16", "BF16", "TF32", "FP8", "fused AdamW")
    table = Table(*columns, title="Devices", title_justify="left")
    for device in devices:
        table.add_row(*device.cells())
    console.print(table)
    for device in devices:
        console.print(f"matrix product on {device.hardware.device}: {device.products_in_words()}", markup=False)
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    sizes = ", ".join(f"{name} {count}" for name, count in bytes_a_parameter().items())
    for name, fact in {
        **system,
        "bytes a BF16 parameter with AdamW, by half_parameters": sizes,
        "packages": packages,
    }.items():
        console.print(f"{name}: {fact}", markup=False)


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        hardware: what it can run.
        memory_bytes: how much memory it has; None where it does not say.
        product_seconds: precision → seconds of one square matrix product; without those that could not be measured.
        fused_adamw: whether PyTorch has a fused AdamW for it.
    """

    hardware: Hardware
    memory_bytes: int | None
    product_seconds: dict[str, float]
    fused_adamw: bool

    def speed(self, precision: str) -> float | None:
        """How many times as fast as FP32 a matrix product was; None where not measured."""
        seconds = self.product_seconds
        return seconds["FP32"] / seconds[precision] if {precision, "FP32"} <= seconds.keys() else None

    def products_in_words(self) -> str:
        """The time of a matrix product in FP32, and how much faster or slower the others were."""
        seconds, measured = self.product_seconds.get("FP32"), [(name, self.speed(name)) for name in ("FP16", "BF16")]
        faster, slower = "{:.2g} times as fast", "{:.2g} times as long"
        others = [
            f"{name} {faster.format(x) if x >= 1 else slower.format(1 / x)}" for name, x in measured if x is not None
        ]
        return f"FP32 {1000 * seconds:.3g} ms; {', '.join(others)}" if seconds else "not measured, or not steady"

    def cells(self) -> tuple[str, ...]:
        """Its row of the table of devices."""
        hardware = self.hardware
        major_minor = ".".join(map(str, hardware.capability or ()))
        units = {"native": "in hardware", "slow": "slow: no units", "none": "no"}
        return (
            f"{hardware.device}: {hardware.name}" + (f" (compute capability {major_minor})" if major_minor else ""),
            f"{self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else "not known",
            *(units.get(value, value) for value in (hardware.fp16, hardware.bf16, hardware.tf32, hardware.fp8)),
            "yes" if self.fused_adamw else "no",
        )  # fmt: skip


def find_devices(measure: bool = True) -> list[Device]:
    """The devices of this machine, accelerators first, the CPU last.

    Args:
        measure: time a matrix product in each precision; a second or two.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [f"cuda:{index}" for index in range(count)] + ["mps"] * torch.backends.mps.is_available()
    devices = []
    for device in map(torch.device, (*names, "cpu")):
        hardware = probe(device)
        if device.type == "cpu":
            hardware = replace(hardware, name=_cpu_name() or hardware.name)
        seconds = _product_seconds(device) if measure else {}
        devices.append(Device(hardware, _memory_bytes(device), seconds, _has_fused_adamw(device)))
    return devices


def _cpu_name() -> str | None:
    """The name that Linux has for the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _memory_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


ROUNDS = 7
STEADY = 1.5
"""Times its minimum that the second fastest product may take, so that a measurement counts: else other programs disturb it."""
LARGEST_GAIN = 64.0
"""Over FP32, beyond which a measurement is not plausible: FP16 on tensor cores gains 16-fold over FP32 units without TF32."""


def _product_seconds(device: torch.device) -> dict[str, float]:
    """Precision → seconds of one square matrix product: the fastest of seven, taken in turns; without what is not steady."""
    size = 4096 if device.type == "cuda" else 512  # enough for tensor cores; a second in all
    timers = {}
    for name, dtype in {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}.items():
        with suppress(RuntimeError, TypeError):  # no kernel for it
            timers[name] = Timer("x @ x", globals={"x": torch.randn(size, size).to(device, dtype)})
            timers[name].timeit(1)
    taken: dict[str, list[float]] = {name: [] for name in timers}
    with torch.accelerator.device_index(device.index):  # which the timer waits for
        for _ in range(ROUNDS):
            for name, timer in timers.items():
                taken[name].append(timer.timeit(1).median)
    steady = {name: min(times) for name, times in taken.items() if sorted(times)[1] < STEADY * min(times)}
    return {name: seconds for name, seconds in steady.items() if steady.get("FP32", 0.0) <= LARGEST_GAIN * seconds}


def _has_fused_adamw(device: torch.device) -> bool:
    try:
        torch.optim.AdamW([torch.zeros(1, device=device, requires_grad=True)], fused=True)
    except RuntimeError:
        return False
    return True


def _system() -> dict[str, str]:
    compilers = [name for name in ("g++", "clang++", "cl", "nvcc") if shutil.which(name)]
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "CUDA of PyTorch": str(torch.version.cuda or "none"),
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        "compilers": ", ".join(compilers) or "none: torch.compile on a CPU needs one",
    }


def installed_versions() -> dict[str, str]:
    """Version of every package of interest that is installed; none is imported."""
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


class Recommendation(NamedTuple):
    """What to train in.

    Attributes:
        precision: `BF16`, `FP16` or `FP32`.
        trainer: what to pass to `TrainingArguments`.
        why: one or two sentences.
    """

    precision: str
    trainer: str
    why: str


def recommend(device: Device) -> Recommendation:
    """The precision for `device`: BF16 where it is native, else FP16 where that is, else FP32."""
    hardware = device.hardware
    if hardware.device == "cpu":
        return _recommend_for_cpu(device)
    if hardware.device != "cuda":
        why = "has FP16 and BF16, but hf_amp has not been measured there: begin with FP32."
        return Recommendation("FP32", "", f"{hardware.name} {why}")
    if hardware.bf16 == "native":
        why = (
            "has units for BF16, which has the range of FP32: nothing to scale, nothing overflows that FP32 would hold. FP16 "
            "(fp16=True) is as fast and has 3 more bits of precision, for models whose activations stay below 65504: "
            "`hf-amp preflight` says which do."
        )
        return Recommendation("BF16", "bf16=True", f"{hardware.name} {why}")
    if hardware.fp16 == "native":
        why = (
            "has units for FP16 and none for BF16, which would be slow. hf_amp adjusts the scale, and runs modules that leave "
            "the range in FP32."
        )
        return Recommendation("FP16", "fp16=True", f"{hardware.name} {why}")
    why = "has no units for half precision: FP16 saves memory there, but no time."
    return Recommendation("FP32", "", f"{hardware.name} {why}")


def _recommend_for_cpu(device: Device) -> Recommendation:
    speed = device.speed("BF16")
    if speed is not None and speed >= WORTHWHILE:
        why = f"BF16 products were {speed:.1f} times as fast as FP32's, as measured just now."
        return Recommendation("BF16", "bf16=True, use_cpu=True", why)
    if speed is None and device.hardware.bf16 == "native":
        why = "This CPU has units for BF16; whether BF16 is faster has not been measured, or not steadily: run it on an idle machine."
        return Recommendation("FP32", "use_cpu=True", why)
    measured = f" BF16 products took {1 / speed:.1f} times as long as FP32's, as measured just now." if speed else ""
    return Recommendation(
        "FP32",
        "use_cpu=True",
        f"Half precision gains nothing on this CPU.{measured} To find out whether a model overflows in FP16, run it with "
        "fp16=True and hf_amp, which emulates FP16 at about FP32's speed.",
    )
