"""`hf-amp rescale MODEL -o OUT`: a checkpoint that overflows in FP16 becomes one of the same function that does not."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from hf_amp.cli.preflight import EmulatedEntry, batch_for, load_model
from hf_amp.errors import HfAmpError, in_one_line
from hf_amp.events import join_names
from hf_amp.fallback.module_precision import CurrentPrecision, PlanRunner
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.fallback.replay import replay
from hf_amp.precision import FP16_FORMAT, PrecisionMode
from hf_amp.rescale import TOLERANCE, QuickProducts, RescaleReport, difference, named_outputs, rescale_for_fp16

REPORT_FILE = "fp16_rescale.json"
MODULES_SHOWN = 12
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")


def rescale(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or a hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write, which must not exist yet.")],
    batch: Annotated[
        str,
        typer.Option(
            help="Rows to make up, or a .safetensors or .pt file with a batch: the magnitudes are taken from it."
        ),
    ] = "1",
    length: Annotated[int, typer.Option(min=1, help="Tokens a row of a batch that is made up.")] = 128,
    keep_fp32: Annotated[
        Path | None,
        typer.Option(help="Where something stays out of range, name the modules that need FP32 in this JSON file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Write a checkpoint with the same function that runs in pure FP16, by powers of two between its parameters."""
    from rich.console import Console

    console = Console(highlight=False, stderr=as_json)
    _refuse_places(model, out)
    with console.status("Loading ..."):
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        _refuse_kinds(model)
        loaded = load_model(model, trust_remote_code=False)
        inputs = batch_for(loaded, batch, length)
    try:
        with console.status("Rescaling ..."), _nothing_printed():
            report = rescale_for_fp16(loaded, inputs, partial=keep_fp32 is not None)
        in_fp32 = modules_for_fp32(report.model, inputs) if report.model is not None and not report.safe else []
        written = report.model is not None and (report.safe or bool(in_fp32))
        if written:
            exact = named_outputs(nn.Module.to(loaded, torch.float32), inputs)
            del loaded  # memory
            write_checkpoint(report, exact, inputs, model, out)
        if keep_fp32 is not None and written:
            keep_fp32.write_text(json.dumps({"fp32_modules": in_fp32}, indent=2) + "\n", encoding="utf-8")
    except HfAmpError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(
            json.dumps(
                {"model": model, "out": str(out) if written else None, **report.to_dict(), "fp32_modules": in_fp32}
            )
        )
    else:
        _print(console, report, out if written else None, in_fp32)
    if not written:
        raise typer.Exit(1)


def _refuse_places(model: str, out: Path) -> None:
    if out.exists():
        same = Path(model).expanduser().exists() and out.resolve() == Path(model).expanduser().resolve()
        why = "is the source, which is never written over" if same else "exists already"
        raise typer.BadParameter(f"--out {out} {why}; pass a folder that does not exist yet.")


def _refuse_kinds(model: str) -> None:
    """Checkpoints that stock loaders cannot take back in FP16."""
    from transformers import PretrainedConfig

    try:
        options, _ = PretrainedConfig.get_config_dict(model)
    except Exception:  # loading says it better
        return
    if options.get("auto_map"):
        raise typer.BadParameter(
            f"{model}: comes with code of its own, which stock loaders do not run; load it yourself and call "
            "hf_amp.rescale_for_fp16(model, batch)."
        )
    if options.get("quantization_config"):
        raise typer.BadParameter(
            f"{model}: is quantised; rescale the checkpoint that it was made from, and quantise the result."
        )


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """The solver may print a line of its own past Python, which would spoil --json."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def modules_for_fp32(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """The modules that leave FP16's range under autocast, emulated on the CPU; with them in FP32 the outputs are tried and finite.

    Raises:
        HfAmpError: that does not make it finite.
    """
    single = nn.Module.to(copy.deepcopy(model), torch.float32)
    entry = EmulatedEntry()
    found = replay(RecordedForward(single, (), dict(batch)), CurrentPrecision(entry, PrecisionMode.MIXED))
    runner = PlanRunner(entry, PrecisionMode.MIXED)
    runner.register_model(single)
    runner.apply(PrecisionPlan(PrecisionMode.MIXED, dict.fromkeys(found.overflowing, PrecisionMode.FP32)))
    try:
        with runner.current(), torch.no_grad():
            output = single(**batch)
    finally:
        runner.remove()
    if found.error or not all(bool(x.isfinite().any()) for x in output.values() if isinstance(x, Tensor) and x.numel()):
        raise HfAmpError(
            f"with {join_names(found.overflowing, MODULES_SHOWN)} in FP32 it is not finite either: {found.error or ''}"
        )
    return found.overflowing


def write_checkpoint(
    report: RescaleReport, exact: dict[str, Tensor], batch: dict[str, Tensor], source: str, out: Path
) -> None:
    """Writes model, tokenizer and what else lies beside the source, and takes it back if a stock load is not what was verified.

    Args:
        report: its `model` is written, and let go of.
        exact: what the given model returns for `batch` in FP32.

    Raises:
        HfAmpError: what `from_pretrained` gives is not the rescaled model; nothing is left behind.
    """
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        kind = type(report.model)
        report.model.save_pretrained(unfinished)
        report.model = None  # memory
        for file in _files_beside(source):
            if not (unfinished / file.name).exists():
                shutil.copy2(file, unfinished / file.name)
        (unfinished / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        _verify_loaded(kind, report.safe, exact, batch, unfinished)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _verify_loaded(kind: Any, safe: bool, exact: dict[str, Tensor], batch: dict[str, Tensor], folder: Path) -> None:
    dtype, within = FP16_FORMAT.dtype, QuickProducts()  # type: ignore[no-untyped-call]
    try:
        again = named_outputs(kind.from_pretrained(folder, dtype=torch.float32).eval(), batch)
        half = named_outputs(kind.from_pretrained(folder, dtype=dtype).eval(), batch, dtype, within)
    except Exception as error:  # whatever a load or a forward raises
        raise HfAmpError(
            f"The rescaled checkpoint cannot be loaded back: {in_one_line(error)}. Nothing was written."
        ) from error
    apart = difference(exact, again)
    if not apart <= TOLERANCE:
        raise HfAmpError(
            f"The rescaled checkpoint gives other outputs when it is loaded back (relative difference {apart:.1g}): something that moved, "
            "such as an epsilon, is not saved by this model. Nothing was written."
        )
    if safe and not all(torch.equal(half[name].isfinite(), x.isfinite()) for name, x in exact.items()):
        raise HfAmpError(
            "The rescaled checkpoint is not finite when it is loaded with dtype=torch.float16. Nothing was written."
        )


def _files_beside(source: str) -> list[Path]:
    """Tokenizer, processor and other small files of the source; weights are left out."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        ignored = [f"*{ending}" for ending in _WEIGHTS]
        try:
            folder = Path(snapshot_download(source, ignore_patterns=ignored))
        except Exception:  # offline: what is there already
            folder = Path(snapshot_download(source, ignore_patterns=ignored, local_files_only=True))
    kept = (f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith("."))
    return [f for f in kept if f.name != "config.json" and not f.name.endswith(_WEIGHTS)]


def _print(console: Any, report: RescaleReport, out: Path | None, in_fp32: list[str]) -> None:
    from rich.table import Table

    console.print(report.sentence if report.safe else "Not safe in FP16:", markup=False, soft_wrap=True)
    for sentence in [] if report.safe else report.refused:
        console.print(f"  {sentence}", markup=False, soft_wrap=True)
    rows = sorted(report.headroom_bits.items(), key=lambda row: row[1][0])[:MODULES_SHOWN]
    if rows:
        table = Table(
            "module", "before", "after", title="Bits up to FP16's largest value, nearest first", title_justify="left"
        )
        for module, (before, after) in rows:
            table.add_row(module or "(outside of its modules)", f"{before:.1f}", f"{after:.1f}")
        console.print(table)
    if report.divergence is not None:
        console.print(f"FP16 is {report.divergence:.2g} nats from FP32 on the batch.")
    if report.unused:
        console.print(
            f"The batch did not use {join_names(report.unused, MODULES_SHOWN)}: left as they were.", markup=False
        )
    if in_fp32:
        console.print(f"Under FP16 autocast these need FP32: {join_names(in_fp32, MODULES_SHOWN)}", markup=False)
    console.print(f"Written to {out}" if out else "Nothing was written.", markup=False)
