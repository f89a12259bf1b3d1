"""`hf-amp diff A B`: where two settings of one step part. `hf-amp capture MODEL`: a file that another machine can compare with."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from hf_amp.capture import captured, rank_files, save_capture
from hf_amp.cli.preflight import batch_for, load_model
from hf_amp.comparison import Comparison, Setting, compare
from hf_amp.device import RandomState, devices_of
from hf_amp.errors import HfAmpError, in_one_line
from hf_amp.fallback.recorder import RecordedForward

_MODEL = (
    "A folder that save_pretrained wrote, a hub name, or file.py:function, a function of yours that returns a model"
)
_BATCH = "Rows to make up, or a .safetensors or .pt file with a batch."
_LENGTH = "Tokens a row of a batch that is made up."


def diff(
    a: Annotated[str, typer.Argument(help=f"{_MODEL}; or a capture file, of ranks without _rank0.")],
    b: Annotated[str, typer.Argument(help="The same; may be A again, with other options.")],
    batch: Annotated[str, typer.Option(help=_BATCH)] = "2",
    length: Annotated[int, typer.Option(min=1, help=_LENGTH)] = 32,
    precision_a: Annotated[str | None, typer.Option(help="FP16, BF16 or FP32, by autocast; else A as it is.")] = None,
    precision_b: Annotated[str | None, typer.Option(help="The same of B.")] = None,
    fp32_modules_b: Annotated[
        list[str] | None, typer.Option(help="Modules of B in FP32, by name, glob or class; may be repeated.")
    ] = None,
    compile_b: Annotated[bool, typer.Option("--compile-b", help="Compile B by torch.compile.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Run the same step in two settings and say where they part, by module. Exits with 1 where they do."""
    from rich.console import Console

    console = Console(highlight=False, stderr=as_json)
    with console.status("Loading ..."):
        loaded = [_side(a), _side(b)]
        models = [side for side in loaded if isinstance(side, nn.Module)]
        inputs = batch_for(models[0], batch, length) if len(models) == 2 else None  # type: ignore[arg-type]
    if compile_b and isinstance(loaded[1], nn.Module):
        loaded[1] = torch.compile(loaded[1])
    options = ({"precision": precision_a}, {"precision": precision_b, "fp32_modules": tuple(fp32_modules_b or ())})
    try:
        with console.status("Comparing ..."):
            found = compare(loaded[0], loaded[1], inputs, a=options[0], b=options[1])
    except HfAmpError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps({"a_is": a, "b_is": b, **found.to_dict()}, indent=2))
    else:
        _print(console, found)
    if not found.agrees or found.state:
        raise typer.Exit(1)


def capture(
    model: Annotated[str, typer.Argument(help=f"{_MODEL}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, .safetensors.")],
    batch: Annotated[str, typer.Option(help=_BATCH)] = "2",
    length: Annotated[int, typer.Option(min=1, help=_LENGTH)] = 32,
    precision: Annotated[
        str | None, typer.Option(help="FP16, BF16 or FP32, by autocast; else the model as it is.")
    ] = None,
) -> None:
    """Write a file that holds what a step did, by module, for `hf-amp diff` on this machine or another."""
    from rich.console import Console

    console = Console(highlight=False)
    with console.status("Loading ..."):
        loaded = _model(model)
        inputs = batch_for(loaded, batch, length)  # type: ignore[arg-type]
    try:
        setting = Setting.of({"precision": precision}, "precision")
        forward = RecordedForward(loaded, (), dict(inputs), RandomState.now(devices_of(loaded)))
        with console.status("Running ..."), setting.entered(loaded) as current:
            trace = captured(forward, current)
        path = save_capture(trace, forward, out)
    except HfAmpError as error:
        raise typer.BadParameter(str(error)) from error
    if trace.raised:
        console.print(f"The step ended in {trace.raised[0] or 'the model'}: {trace.raised[1]}", markup=False)
    size = path.stat().st_size / 2**20
    console.print(
        f"{path}: {len(trace.digests)} tensors of {len(trace.calls)} calls, {size:.1f} MiB",
        markup=False,
        soft_wrap=True,
    )


def _side(name: str) -> Any:
    """A model, or the path of a capture."""
    path = Path(name).expanduser()
    if path.suffix == ".safetensors":
        if not (path.is_file() or rank_files(path)):
            raise typer.BadParameter(f"{name}: no such file; pass a capture, or a model.")
        return path
    return _model(name)


def _model(name: str) -> nn.Module:
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        return load_model(name, trust_remote_code=False)
    try:
        made = runpy.run_path(file)[function]()
    except Exception as error:  # whatever the file raises
        raise typer.BadParameter(
            f"{name}: {in_one_line(error)}; it must be a function without arguments in that file."
        ) from error
    if not isinstance(made, nn.Module):
        raise typer.BadParameter(f"{name}: returned a {type(made).__name__}, where a torch.nn.Module belongs.")
    return made


def _print(console: Any, found: Comparison) -> None:
    from rich.table import Table

    console.print(found.sentence(), style="bold", markup=False, soft_wrap=True)
    for side, facts in zip("AB", found.facts, strict=True):
        known = ", ".join(
            f"{name} {facts[name]}"
            for name in ("model", "precision", "fp32_modules", "device", "loss")
            if facts.get(name)
        )
        console.print(f"{side}: {known}", markup=False)
    for note in found.notes:
        console.print(note, markup=False, soft_wrap=True)
    if not found.worst:
        return
    table = Table("module", "tensor", "kind", "difference", "times rounding", title="The worst", title_justify="left")
    for each in found.worst:
        table.add_row(
            each.module or "(the model itself)",
            each.tensor,
            each.kind,
            f"{each.relative:.2g}",
            f"{each.times_bound:.3g}",
        )
    console.print(table)
