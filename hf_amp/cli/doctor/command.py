"""`hf-amp doctor`: the command."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hf_amp.cli.doctor.machine import Device, Machine
    from hf_amp.cli.doctor.upstream_bugs import UpstreamBug


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    measure: Annotated[
        bool, typer.Option(help="Time a matrix product in each precision; a second or two.")
    ] = True,
) -> None:
    """Tell what this machine can run, which precision to train in and why, and which upstream bugs are installed."""
    from hf_amp.cli.doctor.machine import look_around
    from hf_amp.cli.doctor.recommendation import recommend
    from hf_amp.cli.doctor.upstream_bugs import bugs_in

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
    told = [f"{name} {speed:.2g}x FP32" for name, speed in measured if speed is not None]
    return ", ".join(told) or "not measured"


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
