"""A process that stands still with a `DesyncMonitor`, alone: it "was told to end" before it began, "ends" itself, or "has no store".

Or there are two, of which rank 1 "comes late" to where all meet. Prints that it is alive, or how long rank 1 waits the next time.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from hf_amp import AmpSession
from hf_amp.scaling import desync
from hf_amp.scaling.desync import DesyncMonitor
from tests.rank_end import leave_together
from tests.sharded.runs import layers

PATIENCE = 0.3
"""Seconds; next to none where the thread is to be in the store whenever the interpreter ends."""


def come_late() -> None:
    dist.init_process_group("gloo")
    model = layers()
    session = AmpSession.for_model(model, torch.optim.AdamW(model.parameters()), init_scale=256.0)
    late = dist.get_rank() == 1
    time.sleep(5 * PATIENCE * late)
    session.scaler.desync.before_forward(model, follows_forward=True, may_gather=True)
    dist.barrier()
    began = time.monotonic()
    if late:
        session.scaler.desync.before_forward(model, follows_forward=True, may_gather=True)
        print(json.dumps({"waited": time.monotonic() - began}), flush=True)
    leave_together()


def main(way: str) -> list[object]:
    desync.PATIENCE_SECONDS = 1e-6 if way == "ends" else PATIENCE
    if way == "comes late":
        come_late()
    kept: list[object] = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    ]
    store = dist.TCPStore("127.0.0.1", cast(dist.TCPStore, kept[0]).port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if way == "was told to end":
        desync.default_store().set("hf_amp run 1 reason", json.dumps(["rank 7 has parted", ["of a former start"]]))
    model = layers()
    session = AmpSession.for_model(model, torch.optim.AdamW(model.parameters()), init_scale=256.0)
    monitor = DesyncMonitor(session.scaler, session.note)
    if way == "has no store":
        kept.clear()
        for _ in range(3):
            monitor.before_forward(model, follows_forward=True, may_gather=True)
            model(torch.randn(3, 16)).backward()
    time.sleep(10 * PATIENCE)
    print("alive", flush=True)
    return [*kept, session]


if __name__ == "__main__":
    kept = main(*sys.argv[1:])  # alive until the interpreter ends
