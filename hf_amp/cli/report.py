"""`hf-amp report` and `hf-amp watch`: the commands that read a run's log."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_amp.errors import StateError
from hf_amp.events import join_names, printable
from hf_amp.report.reader import EventLogReader, Incident, RunHistory, named_run, read_run, take_in
from hf_amp.report.verdict import figures_of, formatted, verdict_on

if TYPE_CHECKING:
    from rich.console import RenderableType


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs, or their event logs.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page. [default: report.html]", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON; no page unless -o is given.")
    ] = False,
) -> None:
    """Make one self-contained page of a run, or of several side by side: verdict, pictures, incidents, what to do."""
    try:
        histories = [read_run(run) for run in runs]
    except (StateError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="RUN") from error
    if as_json:
        typer.echo(json.dumps([figures_of(history) for history in histories], indent=2, allow_nan=False))
    if output is not None or not as_json:
        path = output or Path("report.html")
        _write_page(histories, path)
        for history in histories if not as_json else ():
            typer.echo(printable(f"{history.name}: {verdict_on(history).sentence}"))
        typer.echo(str(path), err=as_json)


def _write_page(histories: list[RunHistory], path: Path) -> None:
    """Writes the page whole or not at all, also when interrupted."""
    from hf_amp.report.page import page

    text = page(histories, str(sys.modules["hf_amp"].__version__))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


INCIDENTS_SHOWN = 8
_FIGURES = (
    "loss", "scale", "applied_steps", "skipped_steps", "skip_rate", "grad_norm", "headroom_bits", "underflow_fraction",
    "modules_in_fp32", "step_seconds", "samples_per_second", "joules_per_step", "memory_bytes",
)  # fmt: skip
_STYLES = {"sound": "green", "watch": "yellow", "broken": "red", "empty": "dim"}
_BARS = "▁▂▃▄▅▆▇█"


def watch(
    run: Annotated[Path, typer.Argument(help="Output folder of a run, or its event log.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
) -> None:
    """Follow a run in the terminal until it ends or you press Ctrl-C. The run is only read."""
    from rich.console import Console
    from rich.live import Live

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


def follow(log: EventLogReader, history: RunHistory, show: Callable[[], None], interval: float) -> None:
    """Shows the run every `interval` seconds, until it has ended."""
    while history.state not in ("finished", "killed"):
        time.sleep(interval)
        take_in(log, history)
        show()


def panel(history: RunHistory) -> RenderableType:
    """The run as it is now: verdict, newest figures with their course, newest incidents."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    verdict = verdict_on(history)
    figures = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name in filter(history.latest.__contains__, _FIGURES):
        bars = Text(course(list(history.figures[name].values)), style="cyan")
        figures.add_row(Text(name, style="dim"), formatted(history.latest[name]), bars)
    incidents = [Text(printable(_line(incident)), style="yellow") for incident in history.incidents[-INCIDENTS_SHOWN:]]
    state = {"finished": "ended", "unfinished": "running, or killed"}.get(history.state, history.state)
    return Panel(
        Group(Text(printable(verdict.sentence), style=_STYLES[verdict.level.value]), Text(""), figures, *incidents),
        title=Text(printable(f"{history.name} · step {history.newest_step:,} · {state}")),
        title_align="left",
        border_style="dim",
    )


def _line(incident: Incident) -> str:
    what = f"{incident.event.replace('_', ' ')} {incident.cause}".rstrip()
    unnamed = [name or "the model" for name in incident.modules if not name or name not in incident.message]
    where = f" {join_names(unnamed)}" if unnamed else ""
    times = f" ({incident.count:,} times)" if incident.count > 1 else ""
    return f"step {incident.last_step:,}: {what}{where}{times}. {incident.message}"


def course(values: list[float], width: int = 32) -> str:
    """The newest values as a line of bars, from their lowest to their highest."""
    newest = [value for value in values[-width:] if math.isfinite(value)]
    if len(newest) < 2:
        return ""
    low, high = min(newest), max(newest)
    if low == high:
        return _BARS[0] * len(newest)
    return "".join(_BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in newest)
