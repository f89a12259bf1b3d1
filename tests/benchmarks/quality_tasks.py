"""What scaling rules are compared on: real text, handwritten digits, and a T5 that no scale lets train in FP16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_amp.cli.demo_training import text_blocks
from tests.fallback.rescaled import ZOO

Setup = tuple[nn.Module, Iterator[dict[str, Tensor]], torch.optim.Optimizer]
OUTLIER_FACTOR = 64.0
_ZOO = {entry.name: entry for entry in ZOO}


@dataclass(frozen=True)
class Task:
    """A model, its data, and its optimizer.

    Attributes:
        steps: of a run.
        outlier_every: steps between two batches whose loss, and so whose gradients, are 64 times as large; None for none.
        build: seed → model, endless batches, optimizer.
    """

    steps: int
    outlier_every: int | None
    build: Callable[[int], Setup]


def text(seed: int) -> Setup:
    """A GPT-2 of 0.12M parameters over the bytes of Python's help topics, 8 by 64 a batch."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    blocks = torch.tensor(text_blocks())[:, :64]
    generator = torch.Generator().manual_seed(seed + 1)

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            chosen = blocks[torch.randint(len(blocks), (8,), generator=generator)]
            yield {"input_ids": chosen, "labels": chosen}

    return model, batches(), torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)


def digits(seed: int) -> Setup:
    """A ViT of 0.02M parameters on scikit-learn's digits, half of the labels drawn at random, 128 a batch."""
    entry = _ZOO["ViT"]
    model = entry.plain(seed).train()
    return (model, entry.batches(seed), torch.optim.AdamW(model.parameters(), lr=entry.learning_rate, fused=True))


def overflowing_t5(seed: int) -> Setup:
    """A T5 of 0.05M parameters over the same bytes, two layers of which leave FP16's range."""
    model, batches, make_optimizer = _ZOO["T5"].build(seed)
    return model, batches, make_optimizer(model)


TASKS = {
    "text": Task(1000, 100, text),
    "digits": Task(600, 100, digits),
    "T5 that overflows": Task(200, None, overflowing_t5),
}
