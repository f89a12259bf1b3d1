"""Quantisation-aware training by torchao under a stock Trainer with hf_amp, and which module's quantisation costs the loss.

Three small models learn what is on this machine already, then train on, with fake quantisation and without it, and are quantised to
`--bits`; nothing is downloaded:

    python examples/trainer_qat.py --bits 2

Two lines of torchao's own API make it, one before the Trainer and one after `train()`. What hf_amp does (skips, causes, fallback,
master weights) holds for fake-quantised modules as for any other.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import QATConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from hf_amp import MixedPrecisionCallback
from hf_amp.choose import errors_by_module

HELD_OUT = 160


class Network(nn.Module):
    """Three layers over 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.middle(self.first(pixel_values.flatten(1)).relu()).relu())
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def vit() -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=2, num_channels=1, num_labels=10))


def llama() -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=256, max_position_embeddings=32))


def images() -> list[dict[str, Any]]:
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, digits.target, strict=True)]


def text() -> list[dict[str, Any]]:
    tokens = list("\n".join(topics[name] for name in sorted(topics)).encode())
    rows = [tokens[start : start + 32] for start in range(0, 32 * 1200, 32)]
    return [{"input_ids": row, "labels": row} for row in rows]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[dict[str, Any]]], float]] = {
    "network": (Network, images, 1e-2),
    "vit": (vit, images, 5e-3),
    "llama": (llama, text, 1e-2),
}
"""Name → what makes the model and its data, and a learning rate."""


def trained(model: nn.Module, data: list[dict[str, Any]], steps: int, rate: float, folder: Path) -> nn.Module:
    """`model`, trained in FP16 with the callback from the same seed."""
    set_seed(0)
    callback = MixedPrecisionCallback()
    Trainer(
        model,
        TrainingArguments(
            str(folder), fp16=True, use_cpu=True, max_steps=steps, per_device_train_batch_size=16, learning_rate=rate,
            logging_steps=steps, save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=data[:-HELD_OUT],
        callbacks=[callback],
    ).train()  # fmt: skip
    if callback.session is not None:
        callback.session.detach()
    return model


@torch.no_grad()
def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """In FP32 and evaluation mode."""
    return float(model.eval()(**batch)["loss"])


def compare(name: str, bits: int, steps: int, folder: Path) -> dict[str, Any]:
    """Losses on held-out rows of post-training quantisation and of QAT, after as many steps from one seed; costs by module."""
    make, rows, rate = MODELS[name]
    base = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32))
    data = rows()
    held_out = default_data_collator(data[-HELD_OUT:])
    set_seed(0)
    begun = trained(make(), data, steps, rate, folder)
    plain = trained(copy.deepcopy(begun), data, steps // 2, rate / 4, folder)
    few = {key: x[:32] for key, x in held_out.items()}
    costs = errors_by_module(plain, few, lambda twin: quantize_(twin, QATConfig(base, step="prepare")))
    losses = {"in FP32": loss_of(plain, held_out)}
    quantize_(plain, base)

    aware = copy.deepcopy(begun)
    quantize_(aware, QATConfig(base, step="prepare"))  # before the Trainer
    trained(aware, data, steps // 2, rate / 4, folder)
    quantize_(aware, QATConfig(base, step="convert"))  # after train()
    return {**losses, "quantised after": loss_of(plain, held_out), "QAT": loss_of(aware, held_out), "costs": costs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2, choices=[2, 3, 4, 8], help="of weights, in groups of 32")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/trainer_qat"))
    options = parser.parse_args()
    found = {name: compare(name, options.bits, options.steps, options.output_dir) for name in MODELS}
    for name, losses in found.items():
        dearest = losses.pop("costs")[0]
        figures = ", ".join(f"{what} {loss:.4f}" for what, loss in losses.items())
        print(f"{name}: loss {figures}; the dearest alone is {dearest.module}, {dearest.rms:.4f} a row")


if __name__ == "__main__":
    main()
