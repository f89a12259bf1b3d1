"""`hf-amp preflight MODEL`: the command."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_amp.events import join_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_amp.cli.dry_run import DryRun

NAMES_SHOWN = 12


def preflight(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or a hub name.")],
    batch: Annotated[
        str | None,
        typer.Option(help="Do a dry run: rows to make up, or a .safetensors or .pt file with a batch."),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens a row of a batch that is made up.")] = 128,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Tell what precision will do to a model: memory, trouble with its dtypes, and, with --batch, what would overflow."""
    from rich.console import Console

    console = Console(highlight=False, stderr=as_json)
    with console.status("Loading ..."):
        from transformers.utils import logging

        from hf_amp.cli.dry_run import PreflightError, batch_for, load_model

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            loaded = load_model(model, trust_remote_code=trust_remote_code)
            inputs = batch_for(loaded, batch, length) if batch is not None else None
        except PreflightError as error:
            raise typer.BadParameter(str(error)) from error
    facts = _facts(loaded)
    runs: list[DryRun] = []
    if inputs is not None:
        with console.status("Dry run in FP16, BF16 and FP8 ..."):
            runs = _dry_runs(loaded, inputs)
    if as_json:
        reported = [run.to_dict() for run in runs]
        typer.echo(json.dumps({"model": model, **facts, "dry_runs": reported}, indent=2))
        return
    console.print(_memory_table(model, facts))
    for trouble in facts["trouble"]:
        console.print(trouble, style="yellow", markup=False)
    if runs:
        console.print(_dry_run_table(runs))
        for run in runs:
            _print_modules(console, run)
    else:
        console.print(
            "With --batch 1 a dry run tells which modules would leave the range of FP16, BF16 and FP8."
        )


def _dry_runs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[DryRun]:
    import torch
    from torch import nn

    from hf_amp.cli.dry_run import dry_runs

    try:
        return list(dry_runs(nn.Module.to(model, torch.float32).train(), inputs))
    except Exception as error:  # whatever the model raises on this batch
        raise typer.BadParameter(
            f"--batch: {type(model).__name__} cannot be run on {', '.join(inputs)} ({type(error).__name__}: "
            f"{str(error)[:200]}); pass its arguments by name, as it takes them in training."
        ) from error


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    from hf_amp.cli.dry_run import RECIPES, counted, elements_by_dtype, half_precision_trouble

    trainable, frozen = counted(model)
    return {
        "class": type(model).__name__,
        "trainable_parameters": trainable,
        "frozen_parameters": frozen,
        "parameters_by_dtype": dict(elements_by_dtype(model)),
        "trouble": half_precision_trouble(model),
        "memory": [
            {**asdict(recipe), "total_bytes": recipe.total_bytes(trainable, frozen)} for recipe in RECIPES
        ],
    }


def _memory_table(name: str, facts: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in facts["parameters_by_dtype"].items())
    table = Table(
        title=Text(f"{name}: {facts['class']}, parameters: {dtypes}"), title_justify="left",
        caption="With Adam. Activations come on top: they depend on the batch.", caption_justify="left",
    )  # fmt: skip
    for column in ("bytes a parameter", "weights", "gradients", "optimizer", "casts", "in all"):
        table.add_column(column, justify="left" if column == "bytes a parameter" else "right")
    for recipe in facts["memory"]:
        bytes_each = [str(recipe[part]) for part in ("weights", "gradients", "optimizer", "casts")]
        table.add_row(recipe["name"], *bytes_each, f"{recipe['total_bytes'] / 2**30:,.3f} GiB")
    return table


def _dry_run_table(runs: list[DryRun]) -> Table:
    from rich.table import Table

    table = Table(
        title="Dry run, emulated", title_justify="left",
        caption="FP8 without a scale for each tensor, which is the worst case.", caption_justify="left",
    )  # fmt: skip
    for column in ("format", "modules that overflow", "loss scale", "gradient lost", "what saves the run"):
        table.add_column(column)
    for run in runs:
        scale = "" if run.scale is None else f"{run.scale:g}"
        lost = "" if run.underflow_fraction is None else f"{run.underflow_fraction:.1%}"
        table.add_row(run.number_format.name, str(len(run.overflowing)), scale, lost, run.saved_by)
    return table


def _print_modules(console: Console, run: DryRun) -> None:
    """The modules behind the figures of one format, and what went wrong."""
    from rich.text import Text

    lines = []
    if run.error is not None:
        lines.append(f"could not be run: {run.error}")
    if run.first_non_finite is not None:
        lines.append(f"not finite in FP32 either: {_names([run.first_non_finite])}")
    if run.overflowing:
        lines.append(f"overflow: {_names(run.overflowing)}")
    if run.underflowing:
        lines.append(f"loses more than a tenth of its gradient: {_names(list(run.underflowing))}")
    for line in lines:
        console.print(Text(f"{run.number_format.name} {line}"), soft_wrap=True)


def _names(modules: list[str]) -> str:
    return join_names([name or "(outside of its modules)" for name in modules], NAMES_SHOWN)
