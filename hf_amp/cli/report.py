"""`hf-amp report RUN [RUN ...]`: one page of a run, or of several side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from hf_amp.errors import StateError
from hf_amp.report.reader import RunHistory, read_run
from hf_amp.report.verdict import figures_of


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs, or their event logs.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The page. [default: report.html]", show_default=False),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for the pictures alone, as PNG files.")] = None,
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
    if png is not None:
        from hf_amp.report.pictures import write_pngs

        written = write_pngs(histories, png)
        typer.echo(f"{len(written)} pictures in {png}", err=as_json)
    if output is not None or not (as_json or png):
        path = output or Path("report.html")
        _write_page(histories, path)
        typer.echo(str(path), err=as_json)


def _write_page(histories: list[RunHistory], path: Path) -> None:
    """Writes the page whole or not at all, also when interrupted."""
    from importlib.metadata import version

    from hf_amp.report.page import page

    text = page(histories, version("hf_amp"))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
