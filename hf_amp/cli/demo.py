"""`hf-amp demo`: FP16 training on real text, and what became of it."""

from __future__ import annotations

import enum
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from hf_amp.cli.demo_training import DemoResult
    from hf_amp.config import MixedPrecisionConfig


class Precision(str, enum.Enum):
    """Precisions that the demo runs."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 120,
    output_dir: Annotated[
        Path | None, typer.Option(help="Run folder. [default: runs/demo-<date>-<time>]", show_default=False)
    ] = None,
    precision: Annotated[Precision, typer.Option(case_sensitive=False)] = Precision.FP16,
    strategy: Annotated[
        str | None, typer.Option(help="CONSTANT, DYNAMIC (default), ADAPTIVE or PERFORMANCE_OPTIMIZED.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file with options of MixedPrecisionConfig.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of parameters and batches.")] = 0,
    real_half: Annotated[
        bool,
        typer.Option("--real-half", help="On a CPU: half kernels, about 20 times slower, not emulation."),
    ] = False,
) -> None:
    """Train a small GPT-2 on Python's help topics with a stock Trainer and one callback."""
    from rich.console import Console

    console = Console()
    chosen = _config(config, strategy, real_half)
    folder = output_dir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    with console.status("Loading PyTorch and Transformers ..."):
        from hf_amp.cli.demo_training import train
    _quieten_libraries()

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"Training in {precision.value}", total=steps, loss="")

        def on_step(step: int, loss: float | None) -> None:
            progress.update(bar, completed=step, loss="" if loss is None else f"loss {loss:.3f}")

        result = train(precision.value, chosen, steps, seed, folder, on_step)
    console.print(_summary(result))
    console.print("Look at it:")
    console.print(f"  tensorboard --logdir {folder}", highlight=False)
    console.print(f"  cat {folder / 'amp_events.jsonl'}", highlight=False)
    console.print(
        f"  python -c \"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('{result.checkpoint}'))\"",
        highlight=False,
        soft_wrap=True,
    )


def _config(file: Path | None, strategy: str | None, real_half: bool) -> MixedPrecisionConfig:
    """The file's options, with those of the command line over them."""
    from hf_amp.config import MixedPrecisionConfig
    from hf_amp.errors import ConfigError

    parameter = "--config"
    try:
        options = MixedPrecisionConfig.from_file(file).to_dict() if file else {}
        parameter = "--strategy"
        if strategy is not None:
            options["scaling_strategy"] = strategy
        if real_half:
            options["emulate"] = False
        return MixedPrecisionConfig.from_dict(options)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=parameter) from error


def _quieten_libraries() -> None:
    """The progress display tells what there is to tell; warnings of hf_amp itself still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _summary(result: DemoResult) -> Table:
    from rich.table import Table

    figures = result.session.metrics()
    table = Table(title="hf-amp demo", show_header=False)
    table.add_row("ran", result.session.what_runs())
    table.add_row("loss", f"{result.losses[0][1]:.4f} first, {result.losses[-1][1]:.4f} last")
    if result.session.scaler.guards_only:
        table.add_row("scale", "none: only FP16 is scaled; non-finite steps are skipped all the same")
    else:
        table.add_row("scale", f"{figures['scale']:g} ({result.session.config.scaling_strategy.value})")
    table.add_row("applied steps", f"{figures['applied_steps']:g}")
    causes = [
        f"{value:g} {name.removeprefix('skipped_steps_').upper()}"
        for name, value in figures.items()
        if name.startswith("skipped_steps_")
    ]
    table.add_row("skipped steps", ", ".join(causes) or "0")
    measured = math.isfinite(result.step_seconds)
    table.add_row(
        "step time", f"{result.step_seconds * 1000:.0f} ms" if measured else "not measured: one step only"
    )
    return table
