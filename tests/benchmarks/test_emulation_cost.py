"""What emulated half precision costs on a CPU: forward and backward of tiny to BERT-sized models, as a ratio to FP32's.

`python -m tests.benchmarks.test_emulation_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import hf_amp
from tests.benchmarks.measuring import Row, compared, interleaved, parser, write

Batch = dict[str, torch.Tensor]

_TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], int]] = {
    "GPT-2, 1M": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=128, n_embd=128, n_layer=5, n_head=4)),
        lambda: tokens(256, 4, 128),
        40,
    ),
    "ViT, 5M": (
        lambda: ViTForImageClassification(
            ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=10)
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.randint(10, (2,))},
        20,
    ),
    "Llama, 25M": (
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=5000, hidden_size=512, num_hidden_layers=7, num_attention_heads=8, intermediate_size=1376, use_cache=False
            )
        ),
        lambda: tokens(5000, 4, 128),
        12,
    ),
    "BERT, 110M": (lambda: BertForMaskedLM(BertConfig()), lambda: tokens(30522, 2, 128), 10),
    "tiny": (
        lambda: LlamaForCausalLM(LlamaConfig(vocab_size=64, **_TINY)), lambda: tokens(64, 2, 8), 2
    ),
}  # fmt: skip
"""Family and number of parameters → how it is built, a batch, rounds."""


def tokens(vocabulary: int, rows: int, length: int) -> Batch:
    """Random tokens, which are their own labels."""
    drawn = torch.randint(vocabulary, (rows, length))
    return {"input_ids": drawn, "labels": drawn}


def measure(name: str, rounds: int | None) -> list[Row]:
    """FP16 and BF16 as under autocast on a device, over FP32; CPU time of this thread."""
    torch.manual_seed(0)
    build, batch, usual = MODELS[name]
    model, inputs = build().train(), batch()

    def contender(context: Callable[[], Any]) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            with context():
                loss = model(**inputs).loss
            loss.backward()

        return step

    contenders = {
        "FP32": contender(nullcontext),
        "emulated FP16": contender(lambda: hf_amp.emulate(torch.float16)),
        "emulated BF16": contender(lambda: hf_amp.emulate(torch.bfloat16)),
    }
    return compared(interleaved(contenders, rounds or usual, "thread"), "FP32", model=name)


def main() -> None:
    options = parser([name for name in MODELS if name != "tiny"]).parse_args()
    write(
        "emulation_cost",
        {"rows": [row for name in options.sizes for row in measure(name, options.rounds)]},
        options.out,
    )


def test_every_contender_runs() -> None:
    """The benchmark itself is sound: there is a ratio for each format."""
    assert [row["what"] for row in measure("tiny", None)] == ["emulated FP16", "emulated BF16"]


if __name__ == "__main__":
    main()
