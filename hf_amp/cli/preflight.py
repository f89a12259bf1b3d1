"""`hf-amp preflight MODEL`: what precision will do to a model, before the first step.

Its dtypes, and, with a batch, a training step, or inference, in formats that this machine lacks.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import typer
from torch import Tensor, nn

from hf_amp.choose import SCALED_FORMATS, scaled_format_errors
from hf_amp.emulation import EmulatedPrecision, in_backward
from hf_amp.errors import ConfigError, in_one_line
from hf_amp.events import counted_names, join_names
from hf_amp.fallback.inference import FormatCheck, LargestValues, check_inference, leaving_in_backward, loss_of, widened
from hf_amp.fallback.module_precision import CurrentPrecision, PrecisionEntry
from hf_amp.fallback.operators import graph_of, raised_at
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
    if inference and inputs and not loaded.config.is_encoder_decoder:  # where a decoder begins from them
        inputs.pop("labels", None)
    facts = _facts(loaded) | {"half_parameters": _half_parameters(loaded, lr)}  # before the model is cast to FP32
    runs = [] if inputs is None or inference else _dry_runs(console, loaded, inputs)
    checks = _inference_checks(console, loaded, inputs) if inputs is not None and inference else []
    scaled = {} if inputs is None else _scaled_formats(console, loaded, inputs)
    first: FormatCheck | None = next(iter([*runs, *checks]), None)
    verdict = "" if first is None else first.verdict()
    if first is not None and (bad := facts["non_finite_parameters"]):
        verdict = f"The weights hold inf or NaN ({first.names(bad)}): go back to a good checkpoint."
    elif first is not None and (bad := [name for name, x in (inputs or {}).items() if not bool((x < math.inf).all())]):
        verdict = f"The batch holds inf or NaN ({first.names(bad)}): fix the data."
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
    if first is not None and first.not_run:
        names = first.names(first.not_run)
        console.print(f"The batch did not reach {names}: nothing is known there.", style="yellow", markup=False)
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in facts["parameters_by_dtype"].items())
    console.print(f"{model}: {facts['class']}, parameters: {dtypes}", markup=False)
    for warning in facts["warnings"]:
        console.print(warning, style="yellow", markup=False)
    for line in _half_parameters_in_words(facts["half_parameters"]):
        console.print(line, markup=False, soft_wrap=True)
    if inputs is None:
        console.print("With --batch 1 a dry run says which modules would leave the range of FP16, BF16 and FP8.")
    for line in [line for check in checks for line in check.sentences()]:
        console.print(line, markup=False, soft_wrap=True)
    for name, error in scaled.items():
        words = error if isinstance(error, str) else f"{error:.2g} from FP32's (root mean square)"
        console.print(f"{name} log-probabilities: {words}", markup=False, soft_wrap=True)
    if not runs:
        return
    table = Table(
        "format", "modules that overflow", "largest value", "headroom", "loss scale", "gradient lost", "remedy",
        title="Dry run, emulated", title_justify="left",
        caption="Largest of what does not overflow. Lost: zero or subnormal. FP8 without a scale for each tensor: the worst case.", caption_justify="left",
    )  # fmt: skip
    for run in runs:
        scale = "" if run.scale is None else f"{run.scale:g}"
        lost = "" if run.underflow_fraction is None else f"{run.underflow_fraction:.1%}"
        near = ("", "") if run.headroom is None else (f"{run.headroom.amax:.3g}", f"{run.headroom.bits:.1f} bits")
        table.add_row(run.number_format.name, str(len(run.overflowing)), *near, scale, lost, run.remedy)
    console.print(table)
    if runs and not runs[0].has_loss:
        console.print("The model returns no loss on this batch: gradients are those of the mean square of its outputs.")
    for line in [line for run in runs for line in run.sentences()]:
        console.print(line, markup=False, soft_wrap=True)


def _described_batch(inputs: Mapping[str, Tensor], batch: str) -> str:
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
    made_up = "Made-up batch, random: real data may overflow where it does not"
    kind = made_up if batch.isdecimal() else f"Batch of {batch}"
    return f"{kind}: {shapes}."


def _inference_checks(console: Console, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Sequence[FormatCheck]:
    try:
        with console.status("Inference in FP16 and BF16 ..."):
            return check_inference(model, inputs)
    except Exception as error:  # whatever the model raises on this batch
        raise _cannot_run(model, inputs, error) from error


def _dry_runs(console: Console, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[DryRun]:
    try:
        with console.status("Dry run in FP16, BF16 and FP8 ..."):
            return list(dry_runs(nn.Module.to(model, torch.float32).train(), inputs))
    except Exception as error:  # whatever the model raises on this batch
        raise _cannot_run(model, inputs, error) from error


def _cannot_run(model: PreTrainedModel, inputs: Mapping[str, Tensor], error: Exception) -> typer.BadParameter:
    remedy = "pass its arguments by name, as it takes them in training"
    if getattr(model, "is_quantized", False):
        remedy = "its weights are quantized: pass the model from before that"
    elif not any(p.requires_grad for p in model.parameters()):
        remedy = "no parameter can be trained, as where an adapter lies beside the model: pass --inference, or the model alone"
    words = f"{type(model).__name__} cannot be run on {', '.join(inputs)} ({in_one_line(error)}{raised_at(error)})"
    return typer.BadParameter(f"--batch: {words}; {remedy}.")


def _scaled_formats(console: Console, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Name of a format with a scale for each tensor or block → its error in log-probabilities, or why there is none."""
    try:
        with console.status(f"{', '.join(SCALED_FORMATS)} ..."):
            errors = scaled_format_errors(model, inputs)
            return {name: x.rms if math.isfinite(x.rms) else "not finite" for name, x in errors.items()}
    except ConfigError as error:  # no torchao, or a model without logits
        return {", ".join(SCALED_FORMATS): str(error).removeprefix("choose_precision: ").partition("; ")[0]}


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
        # Weights of other shapes are named below; transformers would name a report that it does not print.
        options = {"dtype": "auto", "trust_remote_code": trust_remote_code, "weights_only": True}
        model, seen = factory.from_pretrained(name, **options, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # transformers raises of many kinds
        remedy = "pass a folder that save_pretrained wrote, or a hub name"
        if "trust_remote_code" in str(error):
            remedy = "pass --trust-remote-code, if you trust the code that comes with it"
        raise typer.BadParameter(
            f"{name}: cannot be loaded ({type(error).__name__}: {str(error)[:400]}); {remedy}."
        ) from error
    if other := [key if isinstance(key, str) else key[0] for key in seen["mismatched_keys"]]:
        raise typer.BadParameter(
            f"{name}: weights have other shapes than config.json says ({join_names(sorted(other))}); pass the folder of one model."
        )
    if missing := sorted(seen["missing_keys"]):
        typer.echo(f"{name} lacks {counted_names(missing, 'weight')}: they are random here.", err=True)
    return cast("PreTrainedModel", model)


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
        except Exception as error:  # a configuration that lacks what others have
            words = f"no batch can be made up for {type(model).__name__} ({in_one_line(error)})"
            raise typer.BadParameter(f"{words}: save one as .safetensors and pass it as --batch.") from error
    path = Path(batch)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # safetensors, pickle and the system raise of many kinds
        words = (
            f"--batch {batch}: cannot be read ({in_one_line(error).partition('. ')[0]}); pass a number of rows, or a"
        )
        raise typer.BadParameter(f"{words} .safetensors or .pt file with the model's arguments by name.") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise typer.BadParameter(f"--batch {batch}: must hold a mapping of argument names to tensors.")
    return loaded


def made_up_batch(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens, pixels or audio in the shapes that the configuration asks for, and labels where there is a loss."""
    generator = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    if name == "input_ids":
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
        length = min(length, limit - 2) if limit > 2 else length  # RoBERTa counts positions from 2 on
        choices = (2,) if "MultipleChoice" in type(model).__name__ else ()
        batch = {name: _tokens(config, (rows, *choices, length), generator)}
        if "return_loss" in accepted:  # CLIP's kin
            shape = _shape_of_a_row(config.vision_config, "pixel_values")
            batch |= {"pixel_values": torch.randn(rows, *shape, generator=generator), "return_loss": torch.tensor(True)}
    elif name in ("pixel_values", "input_features", "input_values"):
        batch = {name: torch.randn(rows, *_shape_of_a_row(config, name), generator=generator)}
    else:
        raise ValueError(f"its input is {name}")
    if "token_type_ids" in accepted and accepted["token_type_ids"].default is inspect.Parameter.empty:
        batch["token_type_ids"] = torch.zeros_like(batch[name])
    return batch | _labels(model, batch, rows, length, generator)


def _shape_of_a_row(config: PretrainedConfig, name: str) -> tuple[int, ...]:
    if name == "pixel_values":
        size, frames = getattr(config, "image_size", None) or 224, getattr(config, "num_frames", None)
        sizes = (size, size) if isinstance(size, int) else size
        return (*((frames,) if frames else ()), getattr(config, "num_channels", None) or 3, *sizes)
    if name == "input_features":
        return (config.num_mel_bins, 2 * config.max_source_positions)
    return (config.max_length, config.num_mel_bins) if hasattr(config, "num_mel_bins") else (16_000,)


def _tokens(config: PretrainedConfig, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(int(config.get_text_config().vocab_size), shape, generator=generator)


def _labels(
    model: PreTrainedModel, batch: dict[str, Tensor], rows: int, length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Labels for the model's own loss; without one, what a decoder begins from."""
    config, architecture = model.config, type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    made_up, classes = functools.partial(torch.randint, generator=generator), int(config.num_labels or 1)
    if "start_positions" in accepted and "input_ids" in batch:
        return {f"{end}_positions": made_up(length, (rows,)) for end in ("start", "end")}
    if "labels" in accepted and "TokenClassification" in architecture:
        return {"labels": made_up(classes, (rows, length))}
    if "labels" in accepted and ("MultipleChoice" in architecture or "NextSentence" in architecture):
        return {"labels": made_up(2, (rows,))}
    if "labels" in accepted and "Classification" in architecture:
        if config.problem_type == "multi_label_classification":
            return {"labels": made_up(2, (rows, classes)).float()}
        return {"labels": torch.randn(rows, generator=generator) if classes == 1 else made_up(classes, (rows,))}
    if "labels" in accepted and architecture.endswith("ForCTC"):
        return {"labels": made_up(1, config.vocab_size, (rows, 8))}
    if "labels" in accepted and "input_ids" in batch and not config.is_encoder_decoder:
        return {"labels": batch["input_ids"].clone()}
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        longest = min(length, getattr(config, "max_target_positions", None) or length)
        tokens = _tokens(config, (rows, int(longest)), generator)
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
        return EmulatedPrecision(precision.number_format if precision is PrecisionMode.FP32 else self.number_format)


@dataclass
class DryRun(FormatCheck):
    """What a step in one format would be like.

    Attributes:
        scale: the largest loss scale, a power of two, with which the gradients are finite, with those modules in FP32; in FP8 the larger
            of two at the most; None where there is none.
        underflow_fraction: share of gradient elements that are lost at that scale, of those that are not zero in FP32; None where
            there is no such scale.
        underflowing: module → the same, where it is above 0.1, worst first.
        has_loss: whether gradients are those of the model's own loss, and not of the mean square of all that it returns.
        non_finite_gradients: parameters whose gradients are not finite in FP32 either, which no format and no scale cures.
    """

    scale: float | None = None
    underflow_fraction: float | None = None
    underflowing: dict[str, float] = field(default_factory=dict)
    has_loss: bool = True
    non_finite_gradients: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {**super().to_dict(), "remedy": self.remedy}

    def sentences(self) -> Iterator[str]:
        """What was found, a line each."""
        yield from super().sentences()
        if self.underflowing:
            yield f"{self.number_format.name} loses more than a tenth of its gradient: {self.names(self.underflowing)}"

    def verdict(self) -> str:
        """One sentence, with what the gradients need."""
        name, lost = self.number_format.name, self.underflow_fraction or 0.0
        if self.error is not None or self.first_non_finite is not None:
            return super().verdict()
        if self.non_finite_gradients:
            names = self.names(self.non_finite_gradients)
            return f"Gradients are not finite in FP32 either ({names}): fix the model or the batch first."
        if self.scale is None:
            return f"{name} does not train this model: its gradients overflow at every loss scale; use another format."
        small = f"; gradients this large need a loss scale below 1 ({self.scale:g} fits)" if self.scale < 1.0 else ""
        much = f"; {lost:.0%} of the gradient underflows: use BF16 or FP32" if lost > UNDERFLOW_TO_REPORT else ""
        return f"{super().verdict().removesuffix('.')}{small}{much}."

    @property
    def remedy(self) -> str:
        """What makes a run in this format train, in words."""
        if self.error is not None or self.first_non_finite is not None or self.non_finite_gradients:
            return "none: fix the model or the batch first"
        if self.scale is None:
            return "none: the gradients overflow at every scale; use another format"
        if "" in self.to_widen:
            return "the whole model in FP32 or BF16"
        if count := len(self.to_widen):
            by_itself = " (hf_amp does that)" if self.number_format is FP16_FORMAT else ""
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
    bad = [name for name, g in wide.gradients(1.0).items() if non_finite_tensors(g)] if wide.is_usable else []
    for number_format in FORMATS:
        step = wide if number_format is wide.number_format else _Step(model, batch, number_format)
        result = DryRun.of(number_format, step.findings, step.values)
        result.non_finite_gradients = bad
        if step.is_usable and wide.is_usable and not bad:
            result.has_loss = step.has_loss
            _find_scale(step, wide, result)
            if result.scale is None and step.has_loss and number_format is FP16_FORMAT:
                entry = EmulatedEntry(number_format=number_format)
                result.in_backward = leaving_in_backward(model, batch, result.overflowing, entry)
                with widened(model, result.to_widen, entry):
                    _find_scale(_Step(model, batch, number_format), wide, result)
        yield result


def _find_scale(step: _Step, wide: _Step, result: DryRun) -> None:
    """The largest scale whose gradients are finite, and what is lost with it.

    Gradients grow with the scale, so that the largest that a backward pass rounds to the format says which scale it takes. In
    FP8, whose rounding hides what grows in between, a second pass is the last one once a scale fits.
    """
    exact, largest = wide.gradients(1.0), result.number_format.largest
    is_half, tries = result.number_format in (FP16_FORMAT, BF16_FORMAT), 0
    largest_gradient = wide.largest_gradient(result.overflowing, result.number_format)
    most = 0 if result.number_format is BF16_FORMAT else FIRST_EXPONENT
    fits = math.floor(math.log2(largest / largest_gradient)) if largest_gradient else most
    # `low` is the largest exponent whose gradients are known to be finite, `high` the least whose are not.
    low, high, width, kept = SMALLEST_EXPONENT - 1, most + 1, 4, None
    exponent = max(SMALLEST_EXPONENT, min(fits, most))
    while exact and high > exponent > low and (is_half or tries < 2 or kept is None):
        gradients, tries = step.gradients(2.0**exponent), tries + 1
        if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            low, kept = exponent, gradients
            room = most - low if is_half else int(math.log2(largest / result.number_format.smallest_normal) / 2)
            if step.largest_rounded:
                room = math.floor(math.log2(largest / step.largest_rounded))
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
        values: the largest of each module.
        has_loss: whether the model has returned a loss.
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
            self.values = stack.enter_context(LargestValues(model, number_format))
            half = number_format in (FP16_FORMAT, BF16_FORMAT)
            forward = RecordedForward(model, (), dict(batch))
            self.findings = replay(forward, self._precision, by_operator=half, gradients=True)
        self.is_usable = self.findings.error is None and self.findings.first_non_finite is None
        if self.is_usable:
            self._loss, self.has_loss = loss_of(self.findings.output)
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

    def largest_gradient(self, without: list[str], number_format: NumberFormat) -> float:
        """Magnitude of the largest finite gradient so far, at its scale, that such a step would round to a format; 0.0 for none."""
        inside = tuple(f"{name}." for name in without)
        known = max((x for name, x in self._largest.items() if not f"{name}.".startswith(inside)), default=0.0)
        if not self.largest_rounded:
            return known
        half = number_format in (FP16_FORMAT, BF16_FORMAT)
        return self.largest_rounded if half and not without else min(known, self.largest_rounded)

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
