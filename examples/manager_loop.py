"""Epochs of FP16 training by the manager of hf_amp: a byte-level language model on the help topics of Python.

python examples/manager_loop.py
python examples/manager_loop.py --epochs 3 --retry    # batches of skipped steps are run again
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, random_split

from hf_amp import AdvancedMixedPrecisionManager

BLOCK = 64  # bytes of text in one example


class ByteModel(nn.Module):
    """Predicts the next byte from those before it; returns the loss on text of shape [batch, bytes]."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        hidden, _ = self.layers(self.embedding(text[:, :-1]))
        return cross_entropy(self.head(hidden).flatten(0, 1), text[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batches", type=int, default=200, help="batches of 16 examples in an epoch")
    parser.add_argument("--retry", action="store_true", help="lose no batch to a skipped step")
    options = parser.parse_args()

    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    blocks = text[: len(text) // BLOCK * BLOCK].view(-1, BLOCK)[: 18 * options.batches]
    torch.manual_seed(0)
    training, held_out = random_split(blocks, [0.9, 0.1])  # type: ignore[arg-type]
    model = ByteModel().to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    on_overflow = "retry" if options.retry else "skip"
    with AdvancedMixedPrecisionManager(clip_norm=1.0, on_overflow=on_overflow) as manager:
        for _ in range(options.epochs):
            epoch = manager.train_epoch(DataLoader(training, 16, shuffle=True), model, optimizer)
            held = manager.validate_epoch(DataLoader(held_out, 16), model)
            print(
                f"epoch {epoch['epoch']}: loss {epoch['loss']:.3f}, held out {held['loss']:.3f}, "
                f"{epoch['applied_steps']} steps applied, {epoch['skipped_steps']} skipped"
            )
        stats = manager.get_training_stats()

    precision, performance = stats["precision_stats"], stats["performance_stats"]
    print(stats["description"])
    print(f"{precision['fp16_usage_rate']:.0%} of the steps in FP16, {precision['fallback_count']} fallbacks")
    print(f"{precision['avg_memory_savings']:.1%} of memory saved over FP32")
    print(f"{performance['avg_step_time'] * 1000:.1f} ms a step, {performance['avg_throughput']:.0f} samples/s")


if __name__ == "__main__":
    main()
