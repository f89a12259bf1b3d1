"""`hf-amp watch RUN`: a run, live in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hf_amp.report.reader import EventLogReader, RunHistory

INCIDENTS_SHOWN = 8
NAMES_SHOWN = 3
_SHOWN = (
    "loss", "scale", "applied_steps", "skipped_steps", "skip_rate", "grad_norm", "headroom_bits", "underflow_fraction",
    "modules_in_fp32", "step_seconds", "samples_per_second", "memory_bytes",
)  # fmt: skip
_STYLES = {"sound": "green", "watch": "yellow", "broken": "red", "empty": "dim"}
_BARS = "▁▂▃▄▅▆▇█"


def watch(
    run: Annotated[Path, typer.Argument(help="Output folder of a run, or its event log.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
) -> None:
    """Follow a run in the terminal until it ends or you press Ctrl-C. The run is only read."""
    from rich.console import Console
    from rich.live import Live

    from hf_amp.errors import StateError
    from hf_amp.report.reader import EventLogReader, named_run

    try:
        history = named_run(run)
        log = EventLogReader(history.path)
        take_in(log, history)
        console = Console()
        if once or not console.is_terminal:
            console.print(panel(history))
            return
        with Live(panel(history), console=console, auto_refresh=False) as live:
            follow(log, history, lambda: live.update(panel(history), refresh=True), interval)
    except (StateError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="RUN") from error
    except KeyboardInterrupt:
        return


def take_in(log: EventLogReader, history: RunHistory) -> None:
    """Adds what the log has more than before."""
    for line in log.read():
        history.add(line)
    history.torn_lines = log.torn_lines


def follow(log: EventLogReader, history: RunHistory, show: Callable[[], None], interval: float) -> None:
    """Shows the run again and again, until it has ended."""
    while not history.ended:
        time.sleep(interval)
        take_in(log, history)
        show()


def panel(history: RunHistory) -> RenderableType:
    """The run as it is now: verdict, newest figures with their course, newest incidents."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from hf_amp.events import printable
    from hf_amp.report.pictures import formatted
    from hf_amp.report.verdict import verdict_on

    verdict = verdict_on(history)
    parts: list[RenderableType] = [
        Text(printable(verdict.sentence), style=_STYLES[verdict.level.value]),
        Text(""),
    ]
    figures = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name in _SHOWN:
        series = history.figures.get(name)
        if series is not None and len(series):
            figures.add_row(
                Text(name, style="dim"),
                formatted(series.values[-1]),
                Text(course(list(series.values)), style="cyan"),
            )
    parts.append(figures)
    for incident in history.incidents[-INCIDENTS_SHOWN:]:
        times = f" ({incident.count:,} times)" if incident.count > 1 else ""
        unnamed = [name for name in incident.modules if name not in incident.message][:NAMES_SHOWN]
        where = f" {', '.join(unnamed)}" if unnamed else ""
        what = f"{incident.event.replace('_', ' ')} {incident.cause}".rstrip()
        line = f"step {incident.last_step:,}: {what}{where}{times}. {incident.message}"
        parts.append(Text(printable(line), style="yellow"))
    state = "ended" if history.ended else "running, or killed"
    title = Text(printable(f"{history.name} · step {history.newest_step:,} · {state}"))
    return Panel(Group(*parts), title=title, title_align="left", border_style="dim")


def course(values: list[float], width: int = 32) -> str:
    """The newest values as a line of bars, from their lowest to their highest."""
    newest = [value for value in values[-width:] if abs(value) != float("inf") and value == value]
    if len(newest) < 2:
        return ""
    low, high = min(newest), max(newest)
    if low == high:
        return _BARS[0] * len(newest)
    return "".join(_BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in newest)
