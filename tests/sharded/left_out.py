"""A rank that takes another way through its loop than the others: one program for each way, because some end it.

Prints what a rank has come to, one JSON line each.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hf_amp
from hf_amp import AmpSession, EventKind
from tests.sharded.runs import Layers, accelerator_of_fsdp2, layers, sharded

STEPS, AT, SECONDS = 6, 3, 8
"""Steps of a run, the step at which rank 1 is different, and the timeout of the process group."""


class Loop:
    """A training loop of two ranks: "raw" or "accelerate", or "stock" with torch's own scaler; the model in "ddp" or "fsdp2"."""

    def __init__(self, by: str, kind: str, strategy: str) -> None:
        torch.manual_seed(0)
        self.by, self.session = by, None
        options: dict[str, Any] = {"init_scale": 256.0, "scaling_strategy": strategy}
        if by == "accelerate":
            self.accelerator = (
                Accelerator(mixed_precision="fp16", cpu=True) if kind == "ddp" else accelerator_of_fsdp2("fp16", "Layer")
            )
            self.session = hf_amp.attach(self.accelerator, **options)
            plain = Layers()
            fresh = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
            self.model, self.optimizer = self.accelerator.prepare(plain, fresh)
            return
        self.model = DistributedDataParallel(Layers()) if kind == "ddp" else layers()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        if by == "raw":
            self.session = AmpSession.for_model(self.model, self.optimizer, **options)
        self.scaler = self.session.scaler if self.session else torch.amp.GradScaler("cpu", init_scale=256.0)

    def backward(self, loss: Tensor) -> None:
        if self.by == "accelerate":
            self.accelerator.backward(loss)
        else:
            self.scaler.scale(loss).backward()

    def step(self) -> None:
        if self.by == "accelerate":
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()


def train(loop: Loop, way: str) -> None:
    other = dist.get_rank() == 1
    for number in range(1, STEPS + 1):
        if way == "runs out" and other and number > AT:
            return
        torch.manual_seed(10 * number + dist.get_rank())
        x = torch.randn(3, 16)
        here = number == AT and (other or way == "all leave out") or (way == "leaves out last" and other and number == STEPS)
        if way == "raises" and here:
            x = x[:, :3]
        if way.startswith("raises non-finite") and here:
            x = x * torch.nan
        loss = loop.model(x)
        if way.startswith("raises non-finite") and here:
            raise ValueError("the loss is NaN")
        if way == "continues" and here:
            continue
        loop.backward(loss)
        if way in ("leaves out", "leaves out last", "all leave out") and here:
            loop.optimizer.zero_grad()
            continue
        if way == "raises in step" and here:
            raise MemoryError("nothing is left")
        if way == "stops" and here:
            return
        loop.step()


def main(by: str, kind: str, way: str, strategy: str = "DYNAMIC") -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    loop = Loop(by, kind, strategy)
    began, ended = time.monotonic(), "trained"
    try:
        train(loop, way)
        dist.barrier()
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
        if way.startswith("raises") and dist.get_rank() == 1:
            print(json.dumps({"rank": dist.get_rank(), "ended": ended, "seconds": time.monotonic() - began}), flush=True)
            raise  # what Python does then is part of it
    seconds = time.monotonic() - began
    found: dict[str, Any] = {"rank": dist.get_rank(), "ended": ended, "seconds": seconds}
    weights = [p.to_local() if hasattr(p, "to_local") else p for p in loop.model.parameters()]
    found["weights"] = torch.cat([w.detach().reshape(-1) for w in weights]).double().sum().item()
    if loop.session is not None:
        found["metrics"] = {name: loop.session.metrics()[name] for name in ("applied_steps", "skipped_steps", "scale")}
        found["skips"] = [[e.step, e.message] for e in loop.session.events if e.kind is EventKind.STEP_SKIPPED]
    print(json.dumps(found), flush=True)
    time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
