"""Models, batches and hand-written loops that the tests of the trainers share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_amp.emulation import EmulatedPrecision
from hf_amp.precision import FP16_FORMAT
from tests.reference import OverflowInBackward, tiny_mlp

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

# transformers is imported where it is needed: workers that need none start in a third of the time.


def small_gpt2(seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    """One layer over single bytes; equal for equal seeds."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )
    )  # fmt: skip


def real_text(steps: int, batch: int = 4) -> list[dict[str, Tensor]]:
    """Batches of Python's help topics: `input_ids` and `labels`, int64 of shape [batch, 32]."""
    from hf_amp.cli.demo_training import text_blocks

    blocks = torch.tensor(text_blocks()[: steps * batch])[:, :32]
    return [{"input_ids": block, "labels": block} for block in blocks.split(batch)]


def vectors(steps: int, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Pairs of inputs [rows, 4] and targets [rows, 3]."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(rows, 4, generator=generator), torch.randn(rows, 3, generator=generator)) for _ in range(steps)
    ]


class FaultyMlp(nn.Module):
    """A small network whose forward calls, counted from 1, can be made to fail in different ways."""

    def __init__(self, faults: dict[int, str] | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = tiny_mlp()
        self.dropout = nn.Dropout(dropout)
        self.normalise = nn.BatchNorm1d(3)
        self.faults = faults or {}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        fault = self.faults.get(self.calls)
        if fault == "raise":
            raise RuntimeError("user code failed")
        if fault == "out of memory":
            raise torch.OutOfMemoryError("no room")
        outputs = self.normalise(self.layers(self.dropout(x)))
        if fault == "overflow":
            outputs = OverflowInBackward.apply(outputs)
        return outputs * torch.nan if fault == "nan" else outputs


def autocast(emulate: bool) -> AbstractContextManager[Any]:
    """FP16 on a CPU: emulated, or its half kernels."""
    return EmulatedPrecision(FP16_FORMAT) if emulate else torch.autocast("cpu", torch.float16)


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters and buffers."""
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]
