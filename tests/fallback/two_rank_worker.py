"""One of two processes, of which only the second meets a fault. Prints a JSON line with what both have made of it."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import hf_amp
from hf_amp import EventKind, MixedPrecisionConfig
from hf_amp.monitoring.throughput import ThroughputMonitor
from tests.rank_end import leave_together

FAULTS = ("activation", "NaN batch", "labels", "division", "failing look", "failing examination", "root", "none")
FAULTY_STEP = 2
SEEN: list[Tensor] = []
"""The batches that the model was given, of which a repeated pass gets the newest again."""


class Network(nn.Module):
    """Two layers and a loss, or none; the fault of this rank is switched on from outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.fault = nn.Linear(8, 8), nn.Linear(8, 4), "none"

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        is_repeated = bool(SEEN) and x is SEEN[-1]
        SEEN.append(x)
        x = self.first(x)
        if self.fault == "division":
            x = x * ((x - x) / (x - x))
        if self.fault == "root":
            x = x + (x - x.detach()).abs().sqrt()
        if self.fault == "failing look":
            if is_repeated:
                raise ValueError("this pass cannot be repeated")
            x = x * torch.inf
        logits = self.last(nn.functional.softsign(x))
        kept = labels >= 0
        losses = nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        return ((losses * kept).sum() / kept.sum(), logits) if self.fault in ("labels", "root") else (logits,)


class Unreadable(dict[str, Any]):
    """Options of a forward pass that raise when they are looked at."""

    def items(self) -> Any:
        raise ValueError("no peeking")


def run(fault: str, rank: int) -> dict[str, Any]:
    """Six steps; from the second on, or in it alone where the data is to blame, rank 1 has the fault."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=1024.0))
    plain = Network()
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3))
    for step in range(1, 7):
        x, labels = torch.randn(3, 8), torch.tensor([0, 1, 2])
        if rank == 1 and step >= FAULTY_STEP:
            plain.fault = fault
            x = x * 1e6 if fault == "activation" else x
            if step == FAULTY_STEP:
                x = x * torch.nan if fault in ("NaN batch", "failing examination") else x
                labels = labels * 0 - 100 if fault == "labels" else labels
        output = model(x, labels=labels)
        loss = output[0] if output[0].dim() == 0 else nn.functional.cross_entropy(output[0], labels)
        accelerator.backward(loss)
        if rank == 1 and fault == "failing examination" and step == FAULTY_STEP:
            kept = session._fallback.recorder._by_step[step].calls
            kept[0] = kept[0]._replace(options=Unreadable(labels=labels))
        optimizer.step()
        optimizer.zero_grad()
    skips = [e for e in session.events if e.kind is EventKind.STEP_SKIPPED]
    decided = {
        "skips": [(e.step, e.cause.value, e.modules) for e in skips],
        "plan": session.plan.to_plain(),
        "scale": session.scaler.get_scale(),
        "weights": [p.double().sum().item() for p in plain.parameters()],
    }
    session.detach()
    return {"decided": decided, "messages": [e.message for e in skips]}


def trial(rank: int) -> dict[str, Any]:
    """A run that looks for its fastest precision by clocks of which each finds another one faster; where it was when.

    Rank 1 is made a machine without units for BF16.
    """
    if rank == 1:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    config = MixedPrecisionConfig(init_scale=1024.0, precision_mode="DYNAMIC")
    session = hf_amp.attach(accelerator, config)
    slow, now = ("FP32", "MIXED")[rank], 0.0

    def clock() -> float:
        nonlocal now
        now += (rank + 2.0) if session.plan.default.value == slow else 1.0
        return now

    throughput = session.throughput = ThroughputMonitor(device="cpu", clock=clock)
    plain = Network()
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3))
    defaults = []
    for step in range(30):
        if rank == 0 and step == 5:
            throughput.pause()  # one rank was held up, and has no time of this step
        loss = nn.functional.cross_entropy(
            model(torch.randn(3, 8), labels=torch.tensor([0, 1, 2]))[0], torch.tensor([0, 1, 2])
        )
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        defaults.append(session.plan.default.value)
    session.detach()
    return {"defaults": defaults, "bf16": session.hardware.bf16}


def scheduled(rank: int) -> dict[str, Any]:
    """A run whose schedule changes precision twice; rank 1 meets a NaN in between."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    schedule = {0.25: "FP32", 0.75: "FP16"}
    session = hf_amp.attach(accelerator, precision_schedule=schedule, total_steps=8, init_scale=1024.0)
    plain = Network()
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3))
    defaults = []
    for step in range(8):
        x = torch.randn(3, 8) * (torch.nan if rank == 1 and step == 3 else 1)
        labels = torch.tensor([0, 1, 2])
        loss = nn.functional.cross_entropy(model(x, labels=labels)[0], labels)
        defaults.append(session.plan.default.value)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    changes = [(e.step, e.before, e.after) for e in session.events if e.kind is EventKind.PRECISION_CHANGED]
    weights = [p.double().sum().item() for p in plain.parameters()]
    skips, scale = session.metrics()["skipped_steps"], session.scaler.get_scale()
    session.detach()
    return {"defaults": defaults, "changes": changes, "weights": weights, "skips": skips, "scale": scale}


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    runs: dict[str, Any] = {}
    for fault in FAULTS:
        AcceleratorState._reset_state(reset_partial_state=False)
        torch.manual_seed(rank)
        runs[fault] = run(fault, rank)
    AcceleratorState._reset_state(reset_partial_state=False)
    torch.manual_seed(rank)
    runs["scheduled"] = scheduled(rank)
    AcceleratorState._reset_state(reset_partial_state=False)
    runs["trial"] = trial(rank)
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, runs)
    if rank == 0:
        print(json.dumps(gathered))
    leave_together()


if __name__ == "__main__":
    main()
