"""`hf-amp preflight MODEL`: what precision will do to a model, before the first step.

Its dtypes, and, with a batch, a training step in formats that this machine lacks.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor, nn

from hf_amp.emulation import EmulatedPrecision
from hf_amp.events import join_names
from hf_amp.fallback.module_precision import CurrentPrecision, PlanRunner, PrecisionEntry
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.fallback.replay import float_tensors, replay
from hf_amp.monitoring.frozen import (
    FROZEN_SHARE,
    bytes_a_parameter,
    predicted_lost_share,
    share_in_words,
    size_in_words,
)
from hf_amp.precision import BF16_FORMAT, FP16_FORMAT, NumberFormat, PrecisionMode

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PretrainedConfig, PreTrainedModel

NAMES_SHOWN = 12


def preflight(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or a hub name.")],
    batch: Annotated[
        str | None, typer.Option(help="Do a dry run: rows to make up, or a .safetensors or .pt file with a batch.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens a row of a batch that is made up.")] = 128,
    lr: Annotated[
        float | None,
        typer.Option(min=0.0, help="Predict what rounding would lose of the updates at this learning rate."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what precision will do to a model: dtypes that cause trouble, and, with --batch, what would overflow."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, stderr=as_json)
    with console.status("Loading ..."):
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        loaded = load_model(model, trust_remote_code=trust_remote_code)
        inputs = batch_for(loaded, batch, length) if batch is not None else None
    facts = _facts(loaded) | {"half_parameters": _half_parameters(loaded, lr)}  # before the model is cast to FP32
    runs = [] if inputs is None else _dry_runs(console, loaded, inputs)
    if as_json:
        typer.echo(json.dumps({"model": model, **facts, "dry_runs": [run.to_dict() for run in runs]}, indent=2))
        return
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in facts["parameters_by_dtype"].items())
    console.print(f"{model}: {facts['class']}, parameters: {dtypes}", markup=False)
    for warning in facts["warnings"]:
        console.print(warning, style="yellow", markup=False)
    for line in _half_parameters_in_words(facts["half_parameters"]):
        console.print(line, markup=False, soft_wrap=True)
    if not runs:
        console.print("With --batch 1 a dry run says which modules would leave the range of FP16, BF16 and FP8.")
        return
    table = Table(
        "format", "modules that overflow", "loss scale", "gradient lost", "remedy",
        title="Dry run, emulated", title_justify="left",
        caption="FP8 without a scale for each tensor, which is the worst case.", caption_justify="left",
    )  # fmt: skip
    for run in runs:
        scale = "" if run.scale is None else f"{run.scale:g}"
        lost = "" if run.underflow_fraction is None else f"{run.underflow_fraction:.1%}"
        table.add_row(run.number_format.name, str(len(run.overflowing)), scale, lost, run.remedy)
    console.print(table)
    for run in runs:
        _print_modules(console, run)


def _dry_runs(console: Console, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[DryRun]:
    try:
        with console.status("Dry run in FP16, BF16 and FP8 ..."):
            return list(dry_runs(nn.Module.to(model, torch.float32).train(), inputs))
    except Exception as error:  # whatever the model raises on this batch
        raise typer.BadParameter(
            f"--batch: {type(model).__name__} cannot be run on {', '.join(inputs)} ({type(error).__name__}: "
            f"{str(error)[:200]}); pass its arguments by name, as it takes them in training."
        ) from error


def _facts(model: PreTrainedModel) -> dict[str, Any]:
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


def _half_parameters(model: nn.Module, rate: float | None) -> dict[str, Any]:
    """What the trainable parameters take in BF16 with AdamW, by `half_parameters`; at a learning rate, what BF16 would lose."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    elements = sum(p.numel() for p in trainable.values())
    facts: dict[str, Any] = {"bytes": {name: count * elements for name, count in bytes_a_parameter().items()}}
    if rate is not None and elements:
        lost = {name: predicted_lost_share(p, rate, BF16_FORMAT) for name, p in trainable.items() if p.numel()}
        share = sum(lost[name] * trainable[name].numel() for name in lost) / elements
        still = sorted((name for name in lost if lost[name] >= FROZEN_SHARE), key=lambda name: -lost[name])
        facts |= {"lr": rate, "predicted_lost_share": share, "predicted_frozen": still}
    return facts


def _half_parameters_in_words(facts: Mapping[str, Any]) -> Iterator[str]:
    sizes = ", ".join(f"{name} {size_in_words(count)}" for name, count in facts["bytes"].items())
    yield f"In BF16 with AdamW, parameters, gradients and state by half_parameters: {sizes}."
    if "lr" not in facts:
        yield "With --lr 1e-5 it is predicted what rounding would lose of the updates."
        return
    still = facts["predicted_frozen"]
    names = f"; {len(still)} parameters would stand still ({join_names(still)})" if still else ""
    lost = share_in_words(facts["predicted_lost_share"])
    yield f"At a learning rate of {facts['lr']:g} BF16 without half_parameters would lose about {lost} of the first updates{names}."


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


def load_model(name: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder or hub name, of the class that its configuration names, in the dtypes that it was saved in.

    Weights come from safetensors, or from a pickle that holds tensors only, which is how transformers loads.

    Raises:
        typer.BadParameter: it cannot be loaded.
    """
    import transformers
    from transformers import AutoConfig, AutoModel

    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise typer.BadParameter(f"{name}: no such folder; pass a folder that save_pretrained wrote, or a hub name.")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise typer.BadParameter(
            f"{name}: an adapter of peft, without the model under it; pass that model, or what merge_and_unload() gave to "
            "save_pretrained."
        )
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        architecture = (config.architectures or [""])[0]
        factory: Any = AutoModel if trust_remote_code else getattr(transformers, architecture, AutoModel)
        model: PreTrainedModel = factory.from_pretrained(
            name, dtype="auto", trust_remote_code=trust_remote_code, weights_only=True
        )
    except Exception as error:  # transformers raises of many kinds
        raise typer.BadParameter(
            f"{name}: cannot be loaded ({type(error).__name__}: {str(error)[:400]}); pass a folder that save_pretrained wrote, or "
            "a hub name."
        ) from error
    return model


def batch_for(model: PreTrainedModel, batch: str, length: int) -> dict[str, Tensor]:
    """The batch for a dry run.

    Args:
        batch: a number of rows to make up, with a fixed seed; or a `.safetensors` or `.pt` file with a mapping of
            argument names to tensors, loaded with `weights_only`.
        length: tokens a row of what is made up.

    Raises:
        typer.BadParameter: neither a number nor such a file, or nothing can be made up for this model.
    """
    if batch.lstrip("-").isdecimal():
        if int(batch) < 1:
            raise typer.BadParameter(f"--batch {batch}: pass a number of rows from 1 on.")
        return made_up_batch(model, int(batch), length)
    path = Path(batch)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # safetensors, pickle and the system raise of many kinds
        raise typer.BadParameter(
            f"--batch {batch}: cannot be read ({type(error).__name__}: {str(error)[:200]}); pass a number of rows, or a "
            ".safetensors or .pt file with the arguments of the model by name."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise typer.BadParameter(f"--batch {batch}: must hold a mapping of argument names to tensors.")
    return loaded


def made_up_batch(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens, pixels or audio in the shapes that the configuration asks for, and labels where there is a loss."""
    generator = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        length = min(length, getattr(config, "max_position_embeddings", None) or length)
        batch = {name: _tokens(config, rows, length, generator)}
    elif name in ("pixel_values", "input_features", "input_values"):
        batch = {name: torch.randn(rows, *_shape_of_a_row(config, name), generator=generator)}
    else:
        raise typer.BadParameter(
            f"no batch can be made up for {type(model).__name__}, whose input is {name}: save one as .safetensors and pass it "
            "as --batch."
        )
    return batch | _labels(model, batch, rows, length, generator)


def _shape_of_a_row(config: PretrainedConfig, name: str) -> tuple[int, ...]:
    if name == "pixel_values":
        size = config.image_size
        return (config.num_channels, *((size, size) if isinstance(size, int) else size))
    return (config.num_mel_bins, 2 * config.max_source_positions) if name == "input_features" else (16_000,)


def _tokens(config: PretrainedConfig, rows: int, length: int, generator: torch.Generator) -> Tensor:
    vocabulary = int(config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (rows, length), generator=generator)


def _labels(
    model: PreTrainedModel, batch: dict[str, Tensor], rows: int, length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Labels for the model's own loss; without one, what a decoder begins from."""
    config, architecture = model.config, type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    if "labels" in accepted and "Classification" in architecture and "Token" not in architecture:
        return {"labels": torch.randint(int(config.num_labels or 1), (rows,), generator=generator)}
    if "labels" in accepted and "input_ids" in batch and not config.is_encoder_decoder:
        return {"labels": batch["input_ids"].clone()}
    if config.is_encoder_decoder:
        longest = min(length, getattr(config, "max_target_positions", None) or length)
        tokens = _tokens(config, rows, int(longest), generator)
        return {"labels" if "labels" in accepted else "decoder_input_ids": tokens}
    return {}


def half_parameter_warnings(model: nn.Module) -> list[str]:
    """What the dtypes of the parameters will lead to, a sentence each; empty where all trainable ones are FP32."""
    consequences = {
        torch.float16: "the stock scaler raises 'Attempting to unscale FP16 gradients'",
        torch.bfloat16: "updates smaller than 1/256 of a weight are lost, and norm weights do not move at small learning rates",
    }
    found = []
    for dtype, consequence in consequences.items():
        names = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == dtype]
        if names:
            found.append(
                f"{len(names)} trainable parameters are {str(dtype).removeprefix('torch.')} ({names[0]} among them): "
                f"{consequence}. Set half_parameters, load with dtype=torch.float32, or call model.float() before training."
            )
    return found


FORMATS = (
    FP16_FORMAT,
    BF16_FORMAT,
    NumberFormat("FP8 E4M3", torch.float8_e4m3fn),
    NumberFormat("FP8 E5M2", torch.float8_e5m2),
)
UNDERFLOW_TO_REPORT = 0.1
"""The catalogue's limit for `underflow_fraction`."""
FIRST_SCALE, SMALLEST_SCALE = 2.0**16, 2.0**-24


@dataclass(frozen=True)
class EmulatedEntry(PrecisionEntry):
    """Enters one format by emulation, whichever half precision is asked for, and FP32 for FP32."""

    device_type: str = "cpu"
    emulate: bool = True
    number_format: NumberFormat = FP16_FORMAT

    def context(self, precision: PrecisionMode) -> AbstractContextManager[Any]:
        exact = precision is PrecisionMode.FP32
        return EmulatedPrecision(precision.number_format if exact else self.number_format)


@dataclass
class DryRun:
    """What a step in one format would be like.

    Attributes:
        number_format: whose range is in question.
        overflowing: modules whose output leaves its range although their inputs are in it; "" is the model's own forward.
        first_non_finite: the first module whose output is not finite in FP32 either; None where there is none.
        scale: a loss scale with which the gradients are finite, with those modules in FP32; None where there is none.
        underflow_fraction: share of gradient elements that are lost at that scale, of those that are not zero in FP32; None where
            there is no such scale.
        underflowing: module → the same, where it is above 0.1, worst first.
        error: why it could not be run; None where it could.
    """

    number_format: NumberFormat
    overflowing: list[str] = field(default_factory=list)
    first_non_finite: str | None = None
    scale: float | None = None
    underflow_fraction: float | None = None
    underflowing: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {**asdict(self), "number_format": self.number_format.name, "remedy": self.remedy}

    @property
    def remedy(self) -> str:
        """What makes a run in this format train, in words."""
        if self.error is not None or self.first_non_finite is not None:
            return "none: fix the model or the batch first"
        if self.scale is None:
            return "none: the gradients overflow at every scale; use another format"
        if "" in self.overflowing:
            return "the whole model in FP32 or BF16"
        if self.overflowing:
            count = len(self.overflowing)
            by_itself = ": hf_amp does that" if self.number_format is FP16_FORMAT else ""
            return f"{count} module{'s' if count > 1 else ''} in FP32{by_itself}"
        if (self.underflow_fraction or 0.0) > UNDERFLOW_TO_REPORT:
            return "nothing overflows, but much is lost: a format of wider range"
        return "nothing needed"


def dry_runs(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[DryRun]:
    """One forward and backward of `model` on `batch` in each format, by emulation on the CPU. Nothing of the model changes.

    FP8 is cast without a scale for each tensor, which real FP8 recipes have; so its figures are the worst case.

    Args:
        model: in FP32.
        batch: arguments of the model by name.
    """
    exact = gradients_of(model, batch, CurrentPrecision(EmulatedEntry(), PrecisionMode.FP32), 1.0)
    for number_format in FORMATS:
        entry = EmulatedEntry(number_format=number_format)
        forward = RecordedForward(model, (), dict(batch))
        findings = replay(forward, CurrentPrecision(entry, PrecisionMode.MIXED))
        result = DryRun(number_format, findings.overflowing, findings.first_non_finite, error=findings.error)
        if result.error is None and result.first_non_finite is None:
            _find_scale(model, batch, exact, result)
        yield result


def _find_scale(model: nn.Module, batch: Mapping[str, Tensor], exact: Mapping[str, Tensor], result: DryRun) -> None:
    """With the overflowing modules in FP32, looks for a scale, the largest first, and for what is lost with it."""
    runner = PlanRunner(EmulatedEntry(number_format=result.number_format), PrecisionMode.MIXED)
    runner.register_model(model)
    in_fp32 = dict.fromkeys(result.overflowing, PrecisionMode.FP32)
    runner.apply(PrecisionPlan(PrecisionMode.MIXED, in_fp32))
    scale = FIRST_SCALE if result.number_format is not BF16_FORMAT else 1.0
    try:
        while exact and scale >= SMALLEST_SCALE:
            gradients = gradients_of(model, batch, runner.current, scale)
            if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
                result.scale = scale
                _note_underflow(gradients, exact, result)
                return
            scale /= 2
    finally:
        runner.remove()


def gradients_of(
    model: nn.Module, batch: Mapping[str, Tensor], precision: CurrentPrecision, scale: float
) -> dict[str, Tensor]:
    """Name of a parameter → its gradient of the scaled loss; the model's own are left empty."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same dropout in every format
        with precision():
            loss = _loss(model(**batch))
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def _loss(output: Any) -> Tensor:
    """The model's own loss; without one, the mean square of all that it returns."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return torch.as_tensor(loss)
    return torch.stack([x.float().square().mean() for _, x in float_tensors(output) if x.requires_grad]).sum()


def _note_underflow(gradients: Mapping[str, Tensor], exact: Mapping[str, Tensor], result: DryRun) -> None:
    """What of the gradient is zero or subnormal; elements that are zero in FP32 as well, and so lose nothing, left out."""
    lost: Counter[str] = Counter()
    kept_in_fp32: Counter[str] = Counter()
    for name, gradient in gradients.items():
        module, nonzero = name.rpartition(".")[0], exact[name] != 0
        small = gradient.abs() < result.number_format.smallest_normal
        lost[module] += int((small & nonzero).sum())
        kept_in_fp32[module] += int(nonzero.sum())
    result.underflow_fraction = lost.total() / max(1, kept_in_fp32.total())
    shares = {module: lost[module] / count for module, count in kept_in_fp32.items() if count}
    reported = {module: share for module, share in shares.items() if share > UNDERFLOW_TO_REPORT}
    result.underflowing = dict(sorted(reported.items(), key=lambda item: -item[1]))
