"""`hf-amp preflight MODEL`: what precision will do to a model, before the first step."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_amp.events import join_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from transformers import PreTrainedModel

    from hf_amp.cli.dry_run import DryRun

NAMES_SHOWN = 12


def preflight(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or a hub name.")],
    batch: Annotated[
        str | None, typer.Option(help="Do a dry run: rows to make up, or a .safetensors or .pt file with a batch.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens a row of a batch that is made up.")] = 128,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what precision will do to a model: dtypes that cause trouble, and, with --batch, what would overflow."""
    from rich.console import Console

    console = Console(highlight=False, stderr=as_json)
    facts, runs = _examine(console, model, batch, length, trust_remote_code)
    if as_json:
        typer.echo(json.dumps({"model": model, **facts, "dry_runs": [run.to_dict() for run in runs]}, indent=2))
        return
    console.print(f"{model}: {_parameters_in_words(facts)}", markup=False, highlight=False)
    for warning in facts["warnings"]:
        console.print(warning, style="yellow", markup=False)
    if not runs:
        console.print("With --batch 1 a dry run says which modules would leave the range of FP16, BF16 and FP8.")
        return
    console.print(_dry_run_table(runs))
    for run in runs:
        _print_modules(console, run)


def _examine(
    console: Console, name: str, batch: str | None, length: int, trust_remote_code: bool
) -> tuple[dict[str, Any], list[DryRun]]:
    with console.status("Loading ..."):
        import torch
        from torch import nn
        from transformers.utils import logging

        from hf_amp.cli.dry_run import PreflightError, batch_for, dry_runs, load_model

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model = load_model(name, trust_remote_code=trust_remote_code)
            inputs = batch_for(model, batch, length) if batch is not None else {}
        except PreflightError as error:
            raise typer.BadParameter(str(error)) from error
    facts = _facts(model)  # before the model is cast to FP32
    if batch is None:
        return facts, []
    try:
        with console.status("Dry run in FP16, BF16 and FP8 ..."):
            return facts, list(dry_runs(nn.Module.to(model, torch.float32).train(), inputs))
    except Exception as error:  # whatever the model raises on this batch
        raise typer.BadParameter(
            f"--batch: {facts['class']} cannot be run on {', '.join(inputs)} ({type(error).__name__}: "
            f"{str(error)[:200]}); pass its arguments by name, as it takes them in training."
        ) from error


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    from hf_amp.cli.dry_run import half_parameter_warnings

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    by_dtype: Counter[str] = Counter()
    for parameter in model.parameters():
        by_dtype[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {
        "class": type(model).__name__,
        "trainable_parameters": trainable,
        "frozen_parameters": model.num_parameters() - trainable,
        "parameters_by_dtype": dict(by_dtype),
        "warnings": half_parameter_warnings(model),
    }


def _parameters_in_words(facts: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in facts["parameters_by_dtype"].items())
    return f"{facts['class']}, parameters: {dtypes}"


def _dry_run_table(runs: list[DryRun]) -> Table:
    from rich.table import Table

    table = Table(
        "format", "modules that overflow", "loss scale", "gradient lost", "remedy",
        title="Dry run, emulated", title_justify="left",
        caption="FP8 without a scale for each tensor, which is the worst case.", caption_justify="left",
    )  # fmt: skip
    for run in runs:
        scale = "" if run.scale is None else f"{run.scale:g}"
        lost = "" if run.underflow_fraction is None else f"{run.underflow_fraction:.1%}"
        table.add_row(run.number_format.name, str(len(run.overflowing)), scale, lost, run.remedy)
    return table


def _print_modules(console: Console, run: DryRun) -> None:
    """The modules behind the figures of one format, and what went wrong."""
    lines = [] if run.error is None else [f"could not be run: {run.error}"]
    non_finite = [run.first_non_finite] if run.first_non_finite is not None else []
    for words, modules in (
        ("not finite in FP32 either", non_finite),
        ("overflow", run.overflowing),
        ("loses more than a tenth of its gradient", list(run.underflowing)),
    ):
        if modules:
            names = join_names([name or "(outside of its modules)" for name in modules], NAMES_SHOWN)
            lines.append(f"{words}: {names}")
    for line in lines:
        console.print(f"{run.number_format.name} {line}", markup=False, soft_wrap=True)
