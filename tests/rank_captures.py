"""Captures one step of a GPT-2 under DistributedDataParallel, of which each rank has its own rows of the batch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hf_amp import AmpSession
from tests.rank_end import leave_together

ROWS, WORDS = 6, 40


def model(width: int = 16, layers: int = 2) -> GPT2LMHeadModel:
    """Without dropout; equal parameters at every call, on every machine."""
    shape = {"n_embd": width, "n_layer": layers, "n_head": 2, "vocab_size": WORDS, "n_positions": 16}
    made = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    for index, p in enumerate(made.parameters()):
        p.data = ((torch.arange(p.numel()) * 37 + index * 11) % 101 - 50).reshape(p.shape) / 256
    return made


def whole_batch(rows: int = ROWS) -> dict[str, Tensor]:
    """Of all ranks."""
    tokens = (torch.arange(9 * rows) * 7 % WORDS).reshape(rows, 9)
    return {"input_ids": tokens, "labels": tokens}


def capture(path: Path, precision: str, rows: slice = slice(None), trained: torch.nn.Module | None = None) -> None:
    """Writes what a step on these rows did."""
    trained = model() if trained is None else trained
    entry = DistributedDataParallel(trained) if dist.is_initialized() else trained
    optimizer = torch.optim.SGD(entry.parameters(), lr=0.1)
    session = AmpSession.for_model(entry, optimizer, precision_mode=precision, init_scale=256.0)
    session.capture(1, path)
    session.scaler.scale(entry(**{name: x[rows] for name, x in whole_batch().items()}).loss).backward()
    session.scaler.step(optimizer)
    session.scaler.update()
    session.detach()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    own = ROWS // int(os.environ["WORLD_SIZE"])
    for precision in ("FP32", "MIXED"):
        begin = own * dist.get_rank()
        capture(Path(sys.argv[1]) / f"{precision}.safetensors", precision, slice(begin, begin + own))
    leave_together()
