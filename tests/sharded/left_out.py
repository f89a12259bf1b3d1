"""A rank that takes another way through its loop than the others.

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
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import hf_amp
from hf_amp import AmpSession, EventKind
from hf_amp.scaling import desync
from tests.rank_end import leave_together
from tests.sharded.runs import Layers, accelerator_of_fsdp2, layers, sharded

STEPS, AT, SECONDS = 6, 3, 8
"""Steps of a run, the step at which rank 1 is different, and the timeout of the process group."""
PATIENCE, SLOW = 1.0, 3.0
"""Seconds after which a rank that has not moved says where it is, and that one which is slow sleeps."""


class Loop:
    """A training loop of two ranks: "raw" or "accelerate", or "stock" with torch's own scaler; the model in "ddp", "fsdp2" or "hsdp"."""

    def __init__(self, by: str, kind: str) -> None:
        torch.manual_seed(0)
        self.by, self.session = by, None
        options: dict[str, Any] = {"init_scale": 256.0}
        if by == "accelerate":
            self.accelerator = (
                Accelerator(mixed_precision="fp16", cpu=True)
                if kind == "ddp"
                else accelerator_of_fsdp2("fp16", "Layer")
            )
            self.session = hf_amp.attach(self.accelerator, **options)
            plain = Layers()
            fresh = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
            self.model, self.optimizer = self.accelerator.prepare(plain, fresh)
            return
        if kind == "hsdp":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
            self.model = sharded(Layers(), "Layer", mesh)
        else:
            self.model = DistributedDataParallel(Layers()) if kind == "ddp" else layers()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        if by == "raw":
            self.session = AmpSession.for_model(self.model, self.optimizer, **options)
        self.scaler = self.session.scaler if self.session else torch.amp.GradScaler("cpu", init_scale=256.0)

    def told(self) -> dict[str, Any]:
        """What it has come to here, and what the session has said of skips."""
        weights = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]
        found: dict[str, Any] = {"weights": torch.cat([w.detach().reshape(-1) for w in weights]).tolist()}
        if self.session is not None:
            metrics = self.session.metrics()
            found |= {name: metrics[name] for name in ("applied_steps", "skipped_steps", "scale")}
            found["skips"] = [[e.step, e.message] for e in self.session.events if e.kind is EventKind.STEP_SKIPPED]
        return found

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
    """Rank 1 "leaves out" step AT after backward, "continues" before it, "raises" after it, "stops", or "runs out" of batches.

    Or it "is slow" there: a while before forward, in backward, and before the step; then rank 0 is, which evaluates alone.
    Where "a replica is slow", its ranks 0 and 1 take another batch in place of that one, after a while.
    """
    other = dist.get_rank() == 1
    for number in range(1, STEPS + 1):
        here = number == AT and (other or way in ("all leave out", "all continue"))
        slow = SLOW if way == "is slow" and here else 0.0
        if way == "runs out" and other and number > AT:
            return
        torch.manual_seed(10 * number + dist.get_rank())
        time.sleep(slow)
        loss = loop.model(torch.randn(3, 16))
        if way == "a replica is slow" and number == AT and dist.get_rank() < 2:
            time.sleep(SLOW)
            loss = loop.model(torch.randn(3, 16))
        if way in ("continues", "all continue") and here:
            continue
        if slow:
            loss.register_hook(lambda gradient: time.sleep(SLOW))
        loop.backward(loss)
        time.sleep(slow)
        if way.endswith("raises") and here:
            raise MemoryError("nothing is left")
        if way == "stops" and here:
            return
        if way in ("leaves out", "all leave out") and here:
            loop.optimizer.zero_grad()
            if way == "all leave out":
                evaluate(loop)
            continue
        loop.step()
        if way == "is slow" and number == AT:
            evaluate(loop, SLOW)


def evaluate(loop: Loop, seconds: float = 0.0) -> None:
    """By the main process alone, where no parameters are gathered, while the other waits."""
    time.sleep(seconds if dist.get_rank() == 0 else 0.0)
    if dist.get_rank() == 0 or not isinstance(loop.model, DistributedDataParallel):
        with torch.no_grad():
            loop.model(torch.randn(3, 16))
    dist.barrier()


def main(loops: str, ways: str, timeout: str = str(SECONDS), patience: str = "", folder: str = "") -> None:
    """`loops`: such as "raw ddp,accelerate fsdp2"; `ways`: such as "leaves out,all leave out"; all of them, one after the other.

    `timeout` of the process group, `patience` of what looks for ranks that have gone different ways, in seconds. With a
    `folder` there is a log in it, and Python's logger is off.
    """
    warnings.simplefilter("ignore")
    desync.PATIENCE_SECONDS = float(patience or desync.PATIENCE_SECONDS)  # shorter than anybody would have it
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(timeout)))
    for way in ways.split(","):
        for by, kind in (loop.split() for loop in loops.split(",")):
            loop, began, ended = Loop(by, kind), time.monotonic(), None
            if folder and loop.session is not None:
                loop.session.log_to(folder)
                logging.getLogger("hf_amp").disabled = True
            try:
                train(loop, way)
                dist.barrier()
            except Exception as error:
                ended = error
            told = {"way": way, "loop": f"{by} {kind}", "rank": dist.get_rank(), "seconds": time.monotonic() - began}
            text = "trained" if ended is None else f"{type(ended).__name__}: {ended}"
            print(json.dumps({**told, "ended": text, **loop.told()}), flush=True)
            if ended is not None:
                sys.excepthook(type(ended), ended, ended.__traceback__)  # as where nobody catches it
                sys.stderr.flush()
                os._exit(1)
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
