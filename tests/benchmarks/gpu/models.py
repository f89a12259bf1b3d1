"""What the GPU benchmark trains: GPT-2, BERT and ViT from their config classes, on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model and its data.

    Attributes:
        make: a new one, on the CPU.
        batch: random data of so many rows, on the CPU.
        unit: what is counted.
        units_a_row: how many of them a row holds.
        rows: batch sizes: one that leaves most of the device idle, and one that fills it.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    unit: str
    units_a_row: int
    rows: tuple[int, ...]


class LossOnly(nn.Module):
    """Gives the loss and nothing else, because accelerate casts all that a forward pass gives to FP32, logits included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).loss


def _text(vocabulary: int, length: int) -> Callable[[int], Batch]:
    def batch(rows: int) -> Batch:
        tokens = torch.randint(vocabulary, (rows, length))
        return {"input_ids": tokens, "labels": tokens}

    return batch


def gpt2(name: str, width: int, layers: int, heads: int, vocabulary: int, length: int, *rows: int) -> Subject:
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=heads, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    make = lambda: LossOnly(GPT2LMHeadModel(config))  # noqa: E731
    return Subject(name, make, _text(vocabulary, length), "tokens", length, rows)


def bert(name: str, width: int, layers: int, heads: int, vocabulary: int, length: int, *rows: int) -> Subject:
    config = BertConfig(
        vocab_size=vocabulary, max_position_embeddings=length, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * width,
    )  # fmt: skip
    make = lambda: LossOnly(BertForMaskedLM(config))  # noqa: E731
    return Subject(name, make, _text(vocabulary, length), "tokens", length, rows)


def vit(name: str, width: int, layers: int, heads: int, pixels: int, classes: int, *rows: int) -> Subject:
    config = ViTConfig(
        image_size=pixels, patch_size=16, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, num_labels=classes,
    )  # fmt: skip

    def batch(rows: int) -> Batch:
        return {"pixel_values": torch.randn(rows, 3, pixels, pixels), "labels": torch.randint(classes, (rows,))}

    return Subject(name, lambda: LossOnly(ViTForImageClassification(config)), batch, "images", 1, rows)


FULL = [
    gpt2("GPT-2 124M", 768, 12, 12, 50257, 1024, 1, 16),
    gpt2("GPT-2 350M", 1024, 24, 16, 50257, 1024, 1, 8),
    bert("BERT-base", 768, 12, 12, 30522, 512, 2, 64),
    vit("ViT-B/16", 768, 12, 12, 224, 1000, 4, 256),
]
"""Rows are for 80 GB: the larger number is halved where memory runs out."""
SHALLOW = [
    gpt2("GPT-2", 256, 2, 4, 1000, 128, 4),
    bert("BERT", 256, 2, 4, 1000, 128, 4),
    vit("ViT", 256, 2, 4, 64, 10, 4),
]
"""The same kinds with two layers, for what takes long and says yes or no."""
TINY = [gpt2("GPT-2", 16, 1, 2, 64, 8, 2), vit("ViT", 16, 1, 2, 32, 4, 2)]
"""To see on a CPU that everything runs."""
