"""`hf-amp`, the command line."""

from __future__ import annotations

import typer

from hf_amp.cli.choose import choose
from hf_amp.cli.compare import capture, diff
from hf_amp.cli.demo import demo
from hf_amp.cli.doctor import doctor
from hf_amp.cli.preflight import preflight
from hf_amp.cli.report import report, watch
from hf_amp.cli.rescale import rescale

app = typer.Typer(name="hf-amp", no_args_is_help=True, pretty_exceptions_show_locals=False)
for command in (capture, choose, demo, diff, doctor, preflight, report, rescale, watch):
    app.command()(command)


@app.callback()
def main() -> None:
    """Mixed-precision training that explains itself and keeps going."""
