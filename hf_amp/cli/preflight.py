"""`hf-amp preflight MODEL`: what precision will do to a model, before the first step.

Its dtypes, and, with a batch, a training step, or inference, in formats that this machine lacks.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor, nn

from hf_amp.choose import SCALED_FORMATS, scaled_format_errors
from hf_amp.emulation import EmulatedPrecision, in_backward
from hf_amp.errors import ConfigError, in_one_line
from hf_amp.events import join_names
from hf_amp.fallback.inference import Headroom, InferenceCheck, check_inference, largest_output, operators_in
from hf_amp.fallback.module_precision import CurrentPrecision, PrecisionEntry
from hf_amp.fallback.operators import graph_of
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.fallback.replay import float_tensors, non_finite_tensors, nothing_changes, replay
from hf_amp.monitoring.frozen import (
    FROZEN_SHARE,
    bytes_a_parameter,
    predicted_lost_share,
    share_in_words,
    size_in_words,
)
from hf_amp.patch_log import takes_hooks
from hf_amp.precision import BF16_FORMAT, EMULATED_FORMATS, FP16_FORMAT, FP32_FORMAT, NumberFormat, PrecisionMode

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
    inference: Annotated[
        bool, typer.Option("--inference", help="Ask for FP16 and BF16 copies in inference, not for training.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what precision will do to a model: dtypes that cause trouble, and, with --batch, what would overflow."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, stderr=as_json)
    with console.status("Loading ..."):
        loaded = load_model(model, trust_remote_code=trust_remote_code)
        batch = "1" if batch is None and inference else batch
        inputs = batch_for(loaded, batch, length) if batch is not None else None
    facts = _facts(loaded) | {"half_parameters": _half_parameters(loaded, lr)}  # before the model is cast to FP32
    runs = [] if inputs is None or inference else _dry_runs(console, loaded, inputs)
    checks = _inference_checks(console, loaded, inputs) if inputs is not None and inference else []
    scaled = {} if inputs is None else _scaled_formats(console, loaded, inputs)
    verdict = _verdict(runs, checks, facts["non_finite_parameters"])
    facts["batch"] = None if inputs is None else _described_batch(inputs, str(batch))
    if as_json:
        found: dict[str, Any] = {"dry_runs": [run.to_dict() for run in runs]}
        found |= {"inference": [check.to_dict() for check in checks]} if inference else {}
        found |= {"scaled_formats": scaled}
        typer.echo(json.dumps({"model": model, "verdict": verdict, **facts, **found}, indent=2))
        return
    if verdict:
        console.print(verdict, style="bold", markup=False, soft_wrap=True)
        console.print(facts["batch"], markup=False, soft_wrap=True)
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in facts["parameters_by_dtype"].items())
    console.print(f"{model}: {facts['class']}, parameters: {dtypes}", markup=False)
    for warning in facts["warnings"]:
        console.print(warning, style="yellow", markup=False)
    for line in _half_parameters_in_words(facts["half_parameters"]):
        console.print(line, markup=False, soft_wrap=True)
    if inputs is None:
        console.print("With --batch 1 a dry run says which modules would leave the range of FP16, BF16 and FP8.")
    for line in [line for check in checks for line in _lines_of(check)]:
        console.print(line, markup=False, soft_wrap=True)
    for name, error in scaled.items():
        words = error if isinstance(error, str) else f"{error:.2g} from FP32's (root mean square)"
        console.print(f"{name} log-probabilities: {words}", markup=False, soft_wrap=True)
    if not runs:
        return
    table = Table(
        "format", "modules that overflow", "largest activation", "headroom", "loss scale", "gradient lost", "remedy",
        title="Dry run, emulated", title_justify="left",
        caption="FP8 without a scale for each tensor, which is the worst case.", caption_justify="left",
    )  # fmt: skip
    for run in runs:
        scale = "" if run.scale is None else f"{run.scale:g}"
        lost = "" if run.underflow_fraction is None else f"{run.underflow_fraction:.1%}"
        near = ("", "") if run.headroom is None else (f"{run.headroom.amax:.4g}", f"{run.headroom.bits:.1f} bits")
        table.add_row(run.number_format.name, str(len(run.overflowing)), *near, scale, lost, run.remedy)
    console.print(table)
    for run in runs:
        _print_modules(console, run)


def _verdict(runs: list[DryRun], checks: list[InferenceCheck], non_finite: list[str]) -> str:
    """One sentence on FP16; "" where nothing was run."""
    fp16 = runs[0] if runs else checks[0] if checks else None
    if fp16 is None:
        return ""
    if non_finite:
        return f"The weights hold inf or NaN ({join_names(non_finite, NAMES_SHOWN)}): go back to a good checkpoint."
    if fp16.error is not None:
        return f"FP16: the model could not be run on this batch ({fp16.error})."
    if fp16.first_non_finite is not None:
        return f"{_named(fp16.first_non_finite)} is not finite in FP32 either: fix the model or the batch first."
    does = "training" if runs else "inference"
    weights = fp16.weights if isinstance(fp16, InferenceCheck) else []
    if fp16.overflowing or weights:
        count = len(fp16.overflowing) or len(weights)
        what = ("module" if fp16.overflowing else "weight") + ("s" if count > 1 else "")
        remedy = f": {fp16.remedy}" if isinstance(fp16, DryRun) else ": use BF16, or keep them in FP32"
        return f"FP16 overflows in {count} {what} in {does}{remedy}."
    near = (
        ""
        if fp16.headroom is None
        else f", with {fp16.headroom.bits:.1f} bits to spare in {_named(fp16.headroom.module)}"
    )
    return f"FP16 overflows nowhere in {does}{near}."


def _named(module: str) -> str:
    return module or "the model itself"


def _described_batch(inputs: Mapping[str, Tensor], batch: str) -> str:
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
    kind = (
        "Made-up batch, random: real data may overflow where it does not" if batch.isdecimal() else f"Batch of {batch}"
    )
    return f"{kind}: {shapes}."


def _inference_checks(console: Console, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[InferenceCheck]:
    taken = {name: x for name, x in inputs.items() if name != "labels" or model.config.is_encoder_decoder}
    try:
        with console.status("Inference in FP16 and BF16 ..."):
            return check_inference(model, taken)
    except Exception as error:  # whatever the model raises on this batch
        raise _cannot_run(model, inputs, error) from error


def _lines_of(check: InferenceCheck) -> Iterator[str]:
    """What was found of one format, a sentence each."""
    name = check.number_format.name
    if check.error is not None or check.first_non_finite is not None:
        yield f"{name} {check.error or 'not finite in FP32 either: ' + _named(check.first_non_finite or '')}"
    if check.weights:
        yield f"{name} weights beyond its range: {join_names(check.weights, NAMES_SHOWN)}"
    if check.overflowing:
        yield f"{name} overflow: {join_names([_named(each) for each in check.overflowing], NAMES_SHOWN)}"
    for module, operator in list(check.operators.items())[:NAMES_SHOWN]:
        yield f"{name} in {_named(module)}: {operator}"
    if (near := check.headroom) is not None:
        yield f"{name} largest value: {near.amax:.4g} in {_named(near.module)}, {near.bits:.1f} bits below overflow"
    if check.log_probability_error is not None:
        yield f"{name} log-probabilities: {check.log_probability_error:.2g} from FP32's (root mean square)"


def _dry_runs(console: Console, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[DryRun]:
    try:
        with console.status("Dry run in FP16, BF16 and FP8 ..."):
            return list(dry_runs(nn.Module.to(model, torch.float32).train(), inputs))
    except Exception as error:  # whatever the model raises on this batch
        raise _cannot_run(model, inputs, error) from error


def _cannot_run(model: PreTrainedModel, inputs: Mapping[str, Tensor], error: Exception) -> typer.BadParameter:
    return typer.BadParameter(
        f"--batch: {type(model).__name__} cannot be run on {', '.join(inputs)} ({in_one_line(error)}); pass its arguments by "
        "name, as it takes them in training."
    )


def _scaled_formats(console: Console, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Name of a format with a scale for each tensor or block → its error in log-probabilities, or why there is none."""
    try:
        with console.status(f"{', '.join(SCALED_FORMATS)} ..."):
            return {name: error.rms for name, error in scaled_format_errors(model, inputs).items()}
    except ConfigError as error:  # no torchao, or a model without logits
        return {", ".join(SCALED_FORMATS): str(error)}


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
        "non_finite_parameters": [name for name, p in model.named_parameters() if not p.isfinite().all()],
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
    if (near := run.headroom) is not None and near.module:
        lines.append(f"largest activation: {near.amax:.4g} in {near.module}, {near.bits:.1f} bits below overflow")
    lines += [f"in {_named(module)}: {what}" for module, what in list(run.operators.items())[:NAMES_SHOWN]]
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
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
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
        # Code that comes with the model says which of transformers' classes loads it.
        own = {of.rpartition(".")[2]: kind for kind, of in (getattr(config, "auto_map", None) or {}).items()}
        factory: Any = getattr(transformers, own.get(architecture, architecture), AutoModel)
        model: PreTrainedModel = factory.from_pretrained(
            name, dtype="auto", trust_remote_code=trust_remote_code, weights_only=True
        )
    except Exception as error:  # transformers raises of many kinds
        remedy = "pass a folder that save_pretrained wrote, or a hub name"
        if "trust_remote_code" in str(error):
            remedy = "pass --trust-remote-code, if you trust the code that comes with it"
        raise typer.BadParameter(
            f"{name}: cannot be loaded ({type(error).__name__}: {str(error)[:400]}); {remedy}."
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
        try:
            return made_up_batch(model, int(batch), length)
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # a configuration that lacks what others have
            raise typer.BadParameter(
                f"no batch can be made up for {type(model).__name__} ({in_one_line(error)}): save one as .safetensors and pass "
                "it as --batch."
            ) from error
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
    return torch.randint(int(config.get_text_config().vocab_size), (rows, length), generator=generator)


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
                f"{len(names)} trainable parameters are {str(dtype).removeprefix('torch.')} ({join_names(names)}): "
                f"{consequence}. Set half_parameters, load with dtype=torch.float32, or call model.float() before training."
            )
    return found


FORMATS = EMULATED_FORMATS
UNDERFLOW_TO_REPORT = 0.1
"""The catalogue's limit for `underflow_fraction`."""
FIRST_EXPONENT, SMALLEST_EXPONENT = 16, -24
"""Of the loss scales that are tried."""


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
        operators: module → the operator in it that overflows, its line and its values; for FP16 and BF16.
        headroom: the largest value that a module returns, with those modules in FP32; None where nothing is known.
        scale: the largest loss scale, a power of two, with which the gradients are finite, with those modules in FP32; None where there is none.
        underflow_fraction: share of gradient elements that are lost at that scale, of those that are not zero in FP32; None where
            there is no such scale.
        underflowing: module → the same, where it is above 0.1, worst first.
        error: why it could not be run; None where it could.
    """

    number_format: NumberFormat
    overflowing: list[str] = field(default_factory=list)
    first_non_finite: str | None = None
    operators: dict[str, str] = field(default_factory=dict)
    headroom: Headroom | None = None
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
    """A step of `model` on `batch` in each format, by emulation on the CPU. Nothing of the model changes.

    A forward and a backward pass in each format, in which the modules that overflow go on in FP32; a further forward pass,
    operator by operator, where FP16 or BF16 overflows; a further backward pass for each loss scale that did not fit. What is lost
    is told by BF16's gradients, whose range is FP32's; by FP32's, with a pass in it, where those are not finite.
    FP8 is cast without a scale for each tensor, which real FP8 recipes have; so its figures are the worst case.

    Args:
        model: in FP32.
        batch: arguments of the model by name.
    """
    wide = _Step(model, batch, BF16_FORMAT)
    if wide.findings.error is not None:
        with nothing_changes(model):
            model(**batch)  # raises what it raises in FP32 too
    if not wide.is_usable or non_finite_tensors(wide.gradients(1.0)):
        wide = _Step(model, batch, FP32_FORMAT)
    for number_format in FORMATS:
        step = wide if number_format is wide.number_format else _Step(model, batch, number_format)
        findings = step.findings
        result = DryRun(number_format, findings.overflowing, findings.first_non_finite, error=findings.error)
        result.operators = operators_in(findings.operators)
        if step.is_usable and wide.is_usable:
            if not result.overflowing:
                result.headroom = max(step.outputs, key=lambda each: each.amax, default=None)
            _find_scale(step, wide, result)
        yield result


def _find_scale(step: _Step, wide: _Step, result: DryRun) -> None:
    """The largest scale whose gradients are finite, and what is lost with it.

    Gradients grow with the scale, so that the largest that a backward pass rounds to the format says which scale it takes.
    """
    exact, largest = wide.gradients(1.0), result.number_format.largest
    largest_gradient = wide.largest_gradient(result.overflowing)
    most = 0 if result.number_format is BF16_FORMAT else FIRST_EXPONENT
    fits = math.floor(math.log2(largest / largest_gradient)) if largest_gradient else most
    # `low` is the largest exponent whose gradients are known to be finite, `high` the least whose are not.
    low, high, width, kept = SMALLEST_EXPONENT - 1, most + 1, 4, None
    exponent = max(SMALLEST_EXPONENT, min(fits, most))
    while exact and high > exponent > low:
        gradients = step.gradients(2.0**exponent)
        if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            low, kept = exponent, gradients
            room = math.floor(math.log2(largest / step.largest_rounded)) if step.largest_rounded else most - low
            exponent = min(high - 1, low + room)
        else:
            high = exponent
            exponent = max(SMALLEST_EXPONENT, high - width) if kept is None else (low + high) // 2
            width *= 4
    if kept is not None:
        result.scale = 2.0**low
        _note_underflow(kept, exact, result)


class _Step:
    """One forward pass of `model`, whose overflowing modules run in FP32, and as many backward passes behind it as are asked for.

    Attributes:
        number_format: that of the forward pass.
        findings: what was seen in it.
        is_usable: whether it is finite, with modules in FP32.
        outputs: what modules returned.
        largest_rounded: magnitude of the largest finite gradient that the last backward pass has rounded to the format.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], number_format: NumberFormat) -> None:
        self.number_format = number_format
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        mode = PrecisionMode.FP32 if number_format is FP32_FORMAT else PrecisionMode.MIXED
        self._precision = CurrentPrecision(EmulatedEntry(number_format=number_format), mode)
        self._found: dict[float, dict[str, Tensor]] = {}
        self._largest: dict[str, float] = defaultdict(float)
        self.largest_rounded = 0.0
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if takes_hooks(module):
                    stack.callback(module.register_forward_hook(functools.partial(self._watch, name)).remove)
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(0)  # the same dropout in every format
            self.outputs = stack.enter_context(largest_output(model, number_format))
            half = number_format in (FP16_FORMAT, BF16_FORMAT)
            forward = RecordedForward(model, (), dict(batch))
            self.findings = replay(forward, self._precision, by_operator=half, gradients=True)
        self.is_usable = self.findings.error is None and self.findings.first_non_finite is None
        if self.is_usable:
            self._loss = _loss(self.findings.output)
            for node, _ in graph_of([self._loss.grad_fn]):
                node.register_hook(functools.partial(self._note_rounded, "round_to" in node.name()))

    def gradients(self, scale: float) -> dict[str, Tensor]:
        """Name of a parameter → its gradient of the scaled loss."""
        if scale in self._found:
            return self._found[scale]
        self.largest_rounded = 0.0
        parameters, start = tuple(self._parameters.values()), torch.full_like(self._loss, scale)
        with in_backward(self._precision()):
            found = torch.autograd.grad(self._loss, parameters, start, retain_graph=True, allow_unused=True)
        self._found = {scale: {name: g for name, g in zip(self._parameters, found, strict=True) if g is not None}}
        for name, gradient in self._found[scale].items():
            self._note(name.rpartition(".")[0], gradient)
        return self._found[scale]

    def largest_gradient(self, without: list[str]) -> float:
        """Magnitude of the largest finite gradient so far, also of activations, at its scale; but for those of modules in FP32."""
        inside = tuple(f"{name}." for name in without)
        return max((x for name, x in self._largest.items() if not f"{name}.".startswith(inside)), default=0.0)

    def _watch(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        for _, x in float_tensors(output):
            if x.requires_grad and x.dim():  # a loss is FP32, and its gradient the scale
                x.register_hook(functools.partial(self._note, name))  # type: ignore[no-untyped-call]

    def _note(self, name: str, gradient: Tensor) -> None:
        self._largest[name] = max(self._largest[name], _largest_finite(gradient))

    def _note_rounded(self, rounds: bool, gradients: tuple[Any, ...], _given: tuple[Any, ...]) -> None:
        for x in gradients:
            if isinstance(x, Tensor) and (rounds or x.element_size() < 4):
                self.largest_rounded = max(self.largest_rounded, _largest_finite(x.float()))


def _largest_finite(x: Tensor) -> float:
    return x.where(x.isfinite(), 0.0).abs().amax().item() if x.numel() else 0.0


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
