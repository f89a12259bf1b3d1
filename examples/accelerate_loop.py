"""An Accelerate loop in FP16 with hf_amp: a byte-level language model on the help topics that every Python ships.

accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml examples/accelerate_loop.py
python examples/accelerate_loop.py --steps 300    # one process, or one GPU
"""

from __future__ import annotations

import argparse
import os
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import hf_amp

BLOCK = 64  # bytes of text in one example


class ByteModel(nn.Module):
    """Predicts the next byte from those before it; shape [batch, bytes] in, [batch, bytes, 256] out."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.zeros(BLOCK, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device)
        hidden = self.embedding(text) + self.positions[: text.shape[1]]
        return self.head(self.layers(hidden, mask=mask, is_causal=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16, help="examples per process and step")
    options = parser.parse_args()

    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    blocks = text[: len(text) // BLOCK * BLOCK].view(-1, BLOCK)
    torch.manual_seed(0)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, options.steps)
    loader = DataLoader(blocks, options.batch_size, shuffle=True, drop_last=True)

    accelerator = Accelerator(
        mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "fp16"),  # a config file's, else FP16
        cpu=not torch.accelerator.is_available(),  # without it accelerate makes two CPU processes two separate runs
    )
    session = hf_amp.attach(accelerator)  # the one line
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    for step, batch in zip(range(options.steps), loader, strict=False):
        logits = model(batch)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == options.steps - 1:
            figures = session.metrics()
            accelerator.print(
                f"step {step:4d}  loss {accelerator.reduce(loss.detach(), 'mean').item():.3f}  "
                f"scale {figures['scale']:g}  skipped {figures['skipped_steps']:g}"
            )
    for event in session.events:
        accelerator.print(event.message)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # not before the models are gone: gloo could wait for ever
