"""Models with half-precision parameters, as transformers loads them, for the tests of the preflight and of FP16 mode."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from tests.integrations.trainers import tiny_gpt2


def loaded(folder: Path, dtype: torch.dtype) -> GPT2LMHeadModel:
    """The tiny GPT-2 saved in `dtype` and loaded as `from_pretrained` does it by default: in the dtype of the file."""
    torch.manual_seed(0)
    tiny_gpt2().to(dtype).save_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder)
    assert model.dtype == dtype
    return model


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}
