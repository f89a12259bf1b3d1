"""`hf-amp demo`: FP32, stock FP16 and hf_amp on a model that overflows FP16, and what became of each."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import ConfigError
from hf_amp.events import LOG_FILE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class Precision(str, enum.Enum):
    """Precisions that the demo runs."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"


def demo(
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Optimizer steps of each run. [default: 120, fewer on a slow machine]", show_default=False
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Run folder. [default: runs/demo-<date>-<time>]", show_default=False)
    ] = None,
    precision: Annotated[Precision, typer.Option(case_sensitive=False)] = Precision.FP16,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file with options of MixedPrecisionConfig.")] = None,
) -> None:
    """FP32, stock FP16 and hf_amp side by side on a small GPT-2 that was made to overflow FP16.

    Three stock Trainers on Python's help topics, hf_amp being one callback. The model's function is that of an ordinary
    one. With another precision that one takes the place of FP16; FP32 is then run once without hf_amp.
    """
    from rich.console import Console

    try:
        chosen = MixedPrecisionConfig.from_file(config) if config else MixedPrecisionConfig()
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--config") from error
    folder = output_dir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    steps = _train(Console(), precision, chosen, folder, steps)
    checkpoint = folder / f"checkpoint-{steps}"
    load = f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('{checkpoint}'))"
    typer.echo(
        f"To see more:\n  hf-amp report {folder}\n  tensorboard --logdir {folder}\n  cat {folder / LOG_FILE}\n"
        f'  python -c "{load}"'
    )


LONGEST_NAME = 27
"""Characters of `transformer.h.0.attn.c_proj`, which is not to be broken on a terminal of 80 columns."""


def _train(
    console: Console, precision: Precision, config: MixedPrecisionConfig, folder: Path, steps: int | None
) -> int:
    """Does the runs with a bar for each, prints the table and what it shows; returns the steps of each run."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    with console.status("Loading PyTorch and Transformers ..."):
        from transformers.utils import logging

        from hf_amp.cli.demo_training import affordable_steps, train
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    runs: dict[str, tuple[Precision, MixedPrecisionConfig | None, Path]] = {
        "FP32": (Precision.FP32, None, folder / "fp32"),
        f"stock {precision.name}": (precision, None, folder / "stock"),
        f"hf_amp {precision.name}": (precision, config, folder),
    }
    if precision is Precision.FP32:
        del runs["stock FP32"]
    steps = steps or affordable_steps(len(runs))
    typer.echo(f"{len(runs)} runs of {steps} steps each, written to {folder}")
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )  # fmt: skip
    results = []
    with Progress(*columns, console=console) as progress:
        for heading, (runs_in, options, run_folder) in runs.items():
            bar = progress.add_task(heading, total=steps, loss="")

            def on_step(step: int, loss: float | None, bar: TaskID = bar) -> None:
                progress.update(bar, completed=step, loss="" if loss is None else f"loss {loss:.3f}")

            began = time.perf_counter()
            results.append(train(runs_in.value, options, steps, run_folder, on_step, config.emulate))
            if not console.is_terminal:  # where no bar is drawn
                typer.echo(f"{heading}: done in {time.perf_counter() - began:.0f} s")
    table = Table("", title="hf-amp demo", show_lines=True)
    for heading, result in zip(runs, results, strict=True):
        table.add_column(heading, width=LONGEST_NAME if "." in result["in FP32"] else None)
    for fact in results[0]:
        table.add_row(fact, *(result[fact] for result in results))
    console.print(table)
    seen = [
        f"{heading} applied {result['applied steps']} of {steps} steps and ended at a loss of {result['held-out loss'].split()[-1]}"
        for heading, result in zip(runs, results, strict=True)
    ]
    typer.echo(f"What was seen: {'; '.join(seen)}.")
    return steps
