"""GPT-2s of three sizes, which the benchmarks of whole steps share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hf_amp.cli.demo_training import small_gpt2
from hf_amp.emulation import EmulatedPrecision

POSITIONS = 128
INIT_SCALE = 256.0
"""Of every scaler, ours and others': none of these models overflows at it."""


@dataclass(frozen=True)
class Size:
    """A GPT-2 and how long it is measured.

    Attributes:
        tokens: batch and length of a step.
        steps: optimizer steps in a round.
        rounds: rounds by default.
    """

    width: int
    layers: int
    vocabulary: int
    tokens: tuple[int, int]
    steps: int
    rounds: int


SIZES = {
    "tiny": Size(16, 1, 64, (2, 16), steps=1, rounds=2),
    "demo": Size(96, 2, 256, (8, 128), steps=8, rounds=20),
    "1M": Size(128, 5, 256, (4, 128), steps=8, rounds=20),
    "25M": Size(512, 7, 5000, (4, 128), steps=4, rounds=8),
    "110M": Size(768, 12, 30000, (1, 64), steps=2, rounds=6),
}
"""Number of parameters, or "demo" for the model of `hf-amp demo` (0.2M) as it is before it is made to overflow → model. At
110M the sequence is short, so that a CPU takes minutes and not an hour."""
MEASURED = ("1M", "25M", "110M")


def gpt2(size: str, device: str) -> GPT2LMHeadModel:
    """Equal parameters at every call; with dropout, as GPT-2 has it."""
    shape = SIZES[size]
    torch.manual_seed(0)
    if size == "demo":
        return small_gpt2(factor=1.0).to(device)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocabulary, n_positions=POSITIONS, n_embd=shape.width, n_layer=shape.layers, n_head=4,
            bos_token_id=0, eos_token_id=0, use_cache=False,
        )
    ).to(device)  # fmt: skip


def batch(size: str, device: str) -> dict[str, Tensor]:
    """One batch of random tokens, which are their own labels."""
    tokens = torch.randint(SIZES[size].vocabulary, SIZES[size].tokens, device=device)
    return {"input_ids": tokens, "labels": tokens}


def stock_fp16(device: str) -> AbstractContextManager[Any]:
    """`torch.autocast` in FP16; on a CPU emulated, as hf_amp has it there, so that both do the same arithmetic."""
    return EmulatedPrecision() if device == "cpu" else torch.autocast(device, torch.float16)
