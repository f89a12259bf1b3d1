"""Loads a model as its architecture says, and a batch for it: real, or made up from its configuration."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from hf_amp.errors import HfAmpError


class PreflightError(HfAmpError, ValueError):
    """The model or the batch cannot be used."""


def load_model(name: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder or hub name, of the class that its configuration names, in the dtypes that it was saved in.

    Weights come from safetensors, or from a pickle that holds tensors only, which is how transformers loads.

    Raises:
        PreflightError: it cannot be loaded.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise PreflightError(
            f"{name}: no such folder; pass a folder that save_pretrained wrote, or a hub name."
        )
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise PreflightError(
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
        raise PreflightError(
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
        PreflightError: neither a number nor such a file, or nothing can be made up for this model.
    """
    if batch.lstrip("-").isdecimal():
        if int(batch) < 1:
            raise PreflightError(f"--batch {batch}: pass a number of rows from 1 on.")
        return made_up_batch(model, int(batch), length)
    path = Path(batch)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # safetensors, pickle and the system raise of many kinds
        raise PreflightError(
            f"--batch {batch}: cannot be read ({type(error).__name__}: {str(error)[:200]}); pass a number of rows, or a "
            ".safetensors or .pt file with the arguments of the model by name."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise PreflightError(f"--batch {batch}: must hold a mapping of argument names to tensors.")
    return loaded


def made_up_batch(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens, pixels or sound in the shapes that the configuration asks for, and labels where there is a loss."""
    generator = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        length = min(length, getattr(config, "max_position_embeddings", None) or length)
        batch = {name: _tokens(config, rows, length, generator)}
    elif name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        batch = {name: torch.randn(rows, config.num_channels, height, width, generator=generator)}
    elif name == "input_features":
        frames = 2 * config.max_source_positions
        batch = {name: torch.randn(rows, config.num_mel_bins, frames, generator=generator)}
    elif name == "input_values":
        batch = {name: torch.randn(rows, 16_000, generator=generator)}
    else:
        raise PreflightError(
            f"no batch can be made up for {type(model).__name__}, whose input is {name}: save one as .safetensors and pass it "
            "as --batch."
        )
    return batch | _labels(model, batch, rows, length, generator)


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
