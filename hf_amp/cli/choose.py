"""`hf-amp choose MODEL`: the error of each format on a batch, and which modules need FP32 for a bound on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_amp.choose import PrecisionTable, choose_precision
from hf_amp.cli.preflight import batch_for, load_model
from hf_amp.errors import HfAmpError
from hf_amp.events import join_names
from hf_amp.fallback.inference import NAMES_SHOWN
from hf_amp.fallback.plan import PrecisionPlan


def choose(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or a hub name.")],
    batch: Annotated[
        str, typer.Option(help="Rows to make up, or a .safetensors or .pt file with a batch, which says more.")
    ] = "4",
    length: Annotated[int, typer.Option(min=1, help="Tokens a row of a batch that is made up.")] = 128,
    metric: Annotated[str, typer.Option(help="logprob: of each token that follows; loss: of each row.")] = "logprob",
    max_error: Annotated[
        float | None,
        typer.Option(help="Bound on the root mean square error; without it a fifth of the format's, or BF16's."),
    ] = None,
    number_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="FP16, BF16, FP8 E4M3, FP8 E5M2, scaled FP8, MXFP8, NVFP4; without it FP16 or BF16."
        ),
    ] = None,
    inference: Annotated[
        bool, typer.Option("--inference", help="Ask for half-precision copies, as vLLM runs them, not for training.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write all of it as JSON, which MixedPrecisionConfig(plan=...) reads."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure what each format costs in precision, module by module, and name those that need FP32."""
    from rich.console import Console

    console = Console(highlight=False, stderr=as_json)
    with console.status("Loading ..."):
        loaded = load_model(model, trust_remote_code=trust_remote_code)
        inputs = batch_for(loaded, batch, length)
    try:
        with console.status("Measuring, in about three forward passes a module ..."):
            plan, table = choose_precision(
                loaded, inputs, metric=metric, max_error=max_error, number_format=number_format, inference=inference  # type: ignore[arg-type]
            )  # fmt: skip
    except HfAmpError as error:
        raise typer.BadParameter(str(error)) from error
    found = {
        "model": model,
        "batch": batch,
        "verdict": verdict(plan, table),
        "plan": plan.to_plain(),
        **table.to_dict(),
    }
    text = json.dumps(found, indent=2)
    if out is not None:
        try:
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(
                f"--out {out}: cannot be written ({error}); pass a path in a folder that exists."
            ) from error
    if as_json:
        typer.echo(text)
        return
    _print(console, plan, table, batch.isdecimal())
    if out is not None:
        console.print(f"Written to {out}: MixedPrecisionConfig(plan={str(out)!r}).", markup=False, soft_wrap=True)


def verdict(plan: PrecisionPlan, table: PrecisionTable) -> str:
    """One sentence: the plan, its error beside that of BF16, and what of the products stays in the format."""
    if table.number_format == "FP32":
        start, end = table.curve[0], table.curve[-1]
        return (
            f"No set of modules brings the error from {start.rms:.2g} down to {table.max_error:.2g}: the best has {end.rms:.2g}, with "
            f"{end.half_products:.0%} of the products not in FP32. Use FP32, or a larger --max-error."
        )
    where = "nowhere in FP32" if not plan.modules else f"in FP32: {join_names(list(plan.modules), NAMES_SHOWN)}"
    bf16 = table.formats["BF16"].rms
    times = f" ({table.chosen.rms / bf16:.2f} times BF16's)" if bf16 else ""
    return (
        f"{table.number_format}, {where}: error {table.chosen.rms:.2g}{times}, bound {table.max_error:.2g}, with "
        f"{table.chosen.half_products:.1%} of the products not in FP32."
    )


def _print(console: Any, plan: PrecisionPlan, table: PrecisionTable, made_up: bool) -> None:
    from rich.table import Table

    console.print(verdict(plan, table), style="bold", markup=False, soft_wrap=True)
    if made_up:
        console.print("The batch is made up, random: pass real data as --batch FILE.", markup=False, soft_wrap=True)
    what = "log-probabilities" if table.metric == "logprob" else "losses"
    errors = Table(
        "format", "root mean square", "largest", title=f"Error of {table.tokens} {what}", caption=table.missing or None
    )  # fmt: skip
    for name, error in table.formats.items():
        errors.add_row(name, f"{error.rms:.2g}", f"{error.largest:.2g}")
    console.print(errors)
    modules = Table(
        "module", "products", "alone in the format", "alone in FP32", title="Errors, by gain for each product"
    )
    for module in table.modules[:NAMES_SHOWN]:
        modules.add_row(module.module, f"{module.products:.1%}", f"{module.rms:.2g}", f"{module.widened:.2g}")
    console.print(modules)
    for point in table.curve[1:]:
        step = f"{point.module} in FP32" if point.module else "without the needless ones"
        console.print(f"{step}: {point.rms:.2g}, {point.half_products:.1%} not in FP32", markup=False, soft_wrap=True)
    for tool, options in table.settings.items():
        console.print(f"{tool}: {json.dumps(options)}", markup=False, soft_wrap=True)
