"""`hf-amp demo`: FP32, stock FP16 and hf_amp on a model that overflows FP16, and what became of each."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from hf_amp.config import MixedPrecisionConfig


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
    strategy: Annotated[
        str | None, typer.Option(help="CONSTANT, DYNAMIC (default), ADAPTIVE or PERFORMANCE_OPTIMIZED.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file with options of MixedPrecisionConfig.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of parameters and batches.")] = 0,
    real_half: Annotated[
        bool,
        typer.Option(
            "--real-half",
            help="On a CPU: half kernels, not emulation; many times slower without units for FP16.",
        ),
    ] = False,
) -> None:
    """FP32, stock FP16 and hf_amp side by side on a small GPT-2 that was made to overflow FP16.

    Three stock Trainers on Python's help topics, hf_amp being one callback. The model's function is that of an ordinary
    one. With another precision that one takes the place of FP16; FP32 is then run once without hf_amp.
    """
    from rich.console import Console

    console = Console()
    chosen = _config(config, strategy, real_half)
    folder = output_dir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    with console.status("Loading PyTorch and Transformers ..."):
        from hf_amp.cli.demo_training import table_of, train
    _quieten_libraries()

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )  # fmt: skip
    results = {}
    with Progress(*columns, console=console) as progress:
        for heading, run_precision, run_config, run_folder in _runs(precision, chosen, folder):
            bar = progress.add_task(heading, total=steps, loss="")

            def on_step(step: int, loss: float | None, bar: TaskID = bar) -> None:
                progress.update(bar, completed=step, loss="" if loss is None else f"loss {loss:.3f}")

            results[heading] = train(
                run_precision.value, run_config, steps, seed, run_folder, on_step, chosen.emulate
            )
    console.print(table_of(results, steps))
    _suggest(console, folder, results[heading].checkpoint)


def _runs(
    precision: Precision, config: MixedPrecisionConfig, folder: Path
) -> list[tuple[str, Precision, MixedPrecisionConfig | None, Path]]:
    """Heading, precision, config (None: without hf_amp) and folder of every run; hf_amp's is the last."""
    name = precision.name
    runs: list[tuple[str, Precision, MixedPrecisionConfig | None, Path]] = [
        ("FP32", Precision.FP32, None, folder / "fp32")
    ]
    if precision is not Precision.FP32:
        runs.append((f"stock {name}", precision, None, folder / "stock"))
    return [*runs, (f"hf_amp {name}", precision, config, folder)]


def _suggest(console: Console, folder: Path, checkpoint: Path) -> None:
    """Says where hf_amp's run, and those beside it, can be looked at."""
    console.print("Look at it:")
    console.print(f"  hf-amp report {folder}", highlight=False, soft_wrap=True)
    console.print(f"  tensorboard --logdir {folder}", highlight=False, soft_wrap=True)
    console.print(f"  cat {folder / 'amp_events.jsonl'}", highlight=False, soft_wrap=True)
    console.print(
        f"  python -c \"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('{checkpoint}'))\"",
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
