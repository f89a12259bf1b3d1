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

ROWS = 6


def model() -> GPT2LMHeadModel:
    """Two layers without dropout; equal parameters at every call."""
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))


def whole_batch() -> dict[str, Tensor]:
    """Of all ranks."""
    tokens = torch.randint(40, (ROWS, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def capture(path: Path, precision: str, rows: slice = slice(None)) -> None:
    """Writes what a step on these rows did."""
    trained: torch.nn.Module = model()
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
