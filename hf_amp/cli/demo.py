"""`hf-amp demo`: FP32, stock FP16 and hf_amp on a model that overflows FP16, and what became of each."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

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
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 120,
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
    checkpoint = _train(Console(), _runs(precision, chosen, folder), steps, chosen.emulate)
    load = f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('{checkpoint}'))"
    typer.echo(
        f"To see more:\n  hf-amp report {folder}\n  tensorboard --logdir {folder}\n  cat {folder / LOG_FILE}\n"
        f'  python -c "{load}"'
    )


class Run(NamedTuple):
    """One of the runs.

    Attributes:
        heading: of its column.
        precision: that it trains in.
        config: of hf_amp; None trains without it.
        folder: that it writes into.
    """

    heading: str
    precision: Precision
    config: MixedPrecisionConfig | None
    folder: Path


def _runs(precision: Precision, config: MixedPrecisionConfig, folder: Path) -> list[Run]:
    """All runs; hf_amp's is the last."""
    runs = [Run("FP32", Precision.FP32, None, folder / "fp32")]
    if precision is not Precision.FP32:
        runs.append(Run(f"stock {precision.name}", precision, None, folder / "stock"))
    return [*runs, Run(f"hf_amp {precision.name}", precision, config, folder)]


def _train(console: Console, runs: list[Run], steps: int, emulate: bool) -> Path:
    """Does the runs with a bar for each, and prints the table; returns the last one's checkpoint."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with console.status("Loading PyTorch and Transformers ..."):
        from transformers.utils import logging

        from hf_amp.cli.demo_training import table_of, train
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )  # fmt: skip
    results = {}
    with Progress(*columns, console=console) as progress:
        for run in runs:
            bar = progress.add_task(run.heading, total=steps, loss="")

            def on_step(step: int, loss: float | None, bar: TaskID = bar) -> None:
                progress.update(bar, completed=step, loss="" if loss is None else f"loss {loss:.3f}")

            results[run.heading] = train(run.precision.value, run.config, steps, 0, run.folder, on_step, emulate)
    console.print(table_of(results, steps))
    return results[runs[-1].heading].checkpoint
