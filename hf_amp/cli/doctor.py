"""The facts of this machine: devices, kernels, versions, and how long a matrix product takes in each precision."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
import typer
from packaging.specifiers import SpecifierSet

from hf_amp.device import Hardware, probe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


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


@dataclass(frozen=True)
class Recommendation:
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
        return Recommendation(
            "FP32",
            "",
            f"{hardware.name} has FP16 and BF16, but hf_amp has not been measured there: begin with FP32.",
        )
    if hardware.bf16 == "native":
        return Recommendation(
            "BF16",
            "bf16=True",
            f"{hardware.name} has units for BF16, which has the range of FP32: nothing to scale, nothing overflows that FP32 "
            "would hold. FP16 (fp16=True) is as fast and has 3 more bits of precision, for models whose activations "
            "stay below 65504: `hf-amp preflight` tells.",
        )
    if hardware.fp16 == "native":
        return Recommendation(
            "FP16",
            "fp16=True",
            f"{hardware.name} has units for FP16 and none for BF16, which would be slow. hf_amp keeps the scale, and takes "
            "modules that leave the range to FP32.",
        )
    return Recommendation(
        "FP32", "", f"{hardware.name} has no units for half precision: FP16 saves memory there, but no time."
    )


def _recommend_for_cpu(device: Device) -> Recommendation:
    speed = device.speed("BF16")
    if speed is not None and speed >= WORTHWHILE:
        return Recommendation(
            "BF16",
            "bf16=True, use_cpu=True",
            f"BF16 products were {speed:.1f} times as fast as FP32's, as measured just now.",
        )
    if speed is None and device.hardware.bf16 == "native":
        return Recommendation(
            "FP32",
            "use_cpu=True",
            "This CPU has units for BF16; whether BF16 is faster there has not been measured, as `hf-amp doctor` does unless it "
            "is told not to.",
        )
    measured = (
        ""
        if speed is None
        else f" BF16 products took {1 / speed:.1f} times as long as FP32's, as measured just now."
    )
    return Recommendation(
        "FP32",
        "use_cpu=True",
        f"Half precision gains nothing on this CPU.{measured} To find out whether a model overflows in FP16, run it with fp16=True "
        "and hf_amp, which emulates FP16 at about FP32's speed.",
    )


class UpstreamBug(NamedTuple):
    """One bug.

    Attributes:
        package: whose it is.
        seen_in: versions that have it, as far as is known: it was seen in the lowest, and no release is known to mend it.
        symptom: what a user sees.
        link: where it is discussed; "" where it is not.
        with_hf_amp: what happens to it in a run with hf_amp.
    """

    package: str
    seen_in: str
    symptom: str
    link: str
    with_hf_amp: str


_PYTORCH, _ACCELERATE = (
    "https://github.com/pytorch/pytorch/issues/",
    "https://github.com/huggingface/accelerate/issues/",
)

KNOWN: tuple[UpstreamBug, ...] = (
    UpstreamBug(
        "torch", ">=2.11", "after about 144 overflows in a row the loss scale is so small that a clean step writes inf "
        "into the parameters", f"{_PYTORCH}99640", "cured: the scale has a floor",
    ),
    UpstreamBug(
        "torch", ">=2.11", "ShardedGradScaler with a fused optimizer and no unscale_: one rank skips, another steps",
        "", "cured: all ranks agree on every verdict",
    ),
    UpstreamBug(
        "accelerate", ">=1.15", "with a fused optimizer (the Trainer's default) a skipped step is not noticed: the "
        "learning-rate schedule runs on", f"{_ACCELERATE}4242", "cured: a skipped optimizer is not called",
    ),
    UpstreamBug(
        "accelerate", ">=1.15", "several optimizers: clip_grad_norm_ unscales the second one's gradients twice",
        f"{_ACCELERATE}439", "cured: gradients are divided once, by the scale of their backward",
    ),
    UpstreamBug(
        "accelerate", ">=1.15", "mixed_precision='fp16' on a CPU is FP32, and says nothing", "",
        "cured: FP16, emulated or real, and named",
    ),
    UpstreamBug(
        "transformers", ">=5.17", "one non-finite step puts a bare NaN into trainer_state.json, which is no JSON", "",
        "cured: a skipped step has no gradient norm",
    ),
    UpstreamBug(
        "transformers", ">=5.17", "logging_nan_inf_filter shows a loss of 0.0 while every weight is NaN", "",
        "cured: non-finite steps are skipped, counted and told, in BF16 and FP32 as well",
    ),
)  # fmt: skip


def bugs_in(versions: Mapping[str, str]) -> list[UpstreamBug]:
    """The known bugs of the installed versions.

    Args:
        versions: package → version.
    """
    return [
        bug
        for bug in KNOWN
        if bug.package in versions
        and SpecifierSet(bug.seen_in, prereleases=True).contains(versions[bug.package])
    ]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    measure: Annotated[
        bool, typer.Option(help="Time a matrix product in each precision; a second or two.")
    ] = True,
) -> None:
    """Tell what this machine can run, which precision to train in and why, and which upstream bugs are installed."""

    machine = look_around(measure)
    recommendation = recommend(machine.devices[0])
    bugs = bugs_in(machine.versions)
    if as_json:
        plain = {
            "recommendation": asdict(recommendation),
            **asdict(machine),
            "upstream_bugs": [bug._asdict() for bug in bugs],
        }
        typer.echo(json.dumps(plain, indent=2))
        return

    from rich.console import Console

    console = Console(highlight=False)
    flags = f"  [dim]TrainingArguments({recommendation.trainer})[/dim]" if recommendation.trainer else ""
    console.print(f"[bold]Train in {recommendation.precision}[/bold]{flags}")
    console.print(f"{recommendation.why}\n")
    console.print(_devices(machine))
    console.print(_installed(machine))
    _print_bugs(console, bugs)


def _devices(machine: Machine) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Devices", title_justify="left")
    for column in ("device", "memory", "FP16", "BF16", "TF32", "FP8", "fused AdamW", "speed of a product"):
        table.add_column(column)
    for device in machine.devices:
        hardware = device.hardware
        name = hardware.name + (
            f" (compute capability {hardware.capability[0]}.{hardware.capability[1]})"
            if hardware.capability
            else ""
        )
        memory = f"{device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else "not known"
        table.add_row(
            Text(f"{hardware.device}: {name}"), memory, hardware.fp16, hardware.bf16, hardware.tf32, hardware.fp8,
            "yes" if device.fused_adamw else "no", _speeds(device),
        )  # fmt: skip
    return table


def _speeds(device: Device) -> str:
    measured = [(name, device.speed(name)) for name in ("FP16", "BF16")]
    reported = [f"{name} {speed:.2g}x FP32" for name, speed in measured if speed is not None]
    return ", ".join(reported) or "not measured"


def _installed(machine: Machine) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Installed", title_justify="left", show_header=False)
    table.add_row("packages", ", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    table.add_row(
        "kernels", ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in machine.kernels.items())
    )
    for name, value in machine.system.items():
        table.add_row(name, Text(value))
    return table


def _print_bugs(console: Console, bugs: list[UpstreamBug]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not bugs:
        console.print("No known upstream bug in the installed versions.")
        return
    table = Table(title="Known bugs in the installed versions", title_justify="left")
    for column in ("package", "what happens", "with hf_amp"):
        table.add_column(column)
    for bug in bugs:
        symptom = Text(bug.symptom, overflow="fold")
        if bug.link:
            symptom.append(f" ({bug.link})", style="dim")
        table.add_row(bug.package, symptom, bug.with_hf_amp)
    console.print(table)
