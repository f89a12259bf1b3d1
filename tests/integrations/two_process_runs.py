"""One of two processes: several short runs, each with another fault. Prints one JSON line.

What a run gives is a list over ranks; of each rank a record a step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

import hf_amp
from hf_amp import AmpSession, AttachError, ConfigError, MixedPrecisionConfig
from tests.integrations.bytes_sent import bytes_written
from tests.rank_end import leave_together
from tests.reference import OverflowInBackward

STEPS = 6
FAULTY_STEP = 2
ROWS = 8
"""Examples in a step, over all processes."""


class Perceptron(nn.Module):
    """4 → `width` → 3. With `looks_fail` an attempt to repeat its forward pass, to find a cause, raises."""

    looks_fail = False
    newest: Tensor | None = None

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.looks_fail and x is self.newest:
            raise RuntimeError("nothing is to be seen here")
        type(self).newest = x
        return self.second(torch.relu(self.first(x)))


def batch(step: int, rank: int, ranks: int) -> Tensor:
    """This rank's rows of the batch that all have together."""
    rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(step))
    return rows[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]


def begin(
    config: MixedPrecisionConfig, precision: str = "fp16", width: int = 8, micro_batches: int = 1
) -> tuple[Accelerator, AmpSession, nn.Module, Any]:
    """A new Accelerator with a session, a model and an optimizer."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=True, gradient_accumulation_steps=micro_batches)
    session = hf_amp.attach(accelerator, config)
    model = Perceptron(width)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    return accelerator, session, model, optimizer


def faulty(fault: str, step: int, rank: int, x: Tensor) -> Tensor:
    """The batch, with `fault` in it where it is rank 1's turn."""
    if step == FAULTY_STEP and rank == 1:
        if fault == "nan batch":
            return x * torch.nan
        if fault in ("activation", "look fails"):
            return x * 60000.0
    if fault == "empty last batch" and step == STEPS - 1 and rank == 1:
        return x[:0]
    return x


def faulty_loss(fault: str, step: int, rank: int, loss: Tensor) -> Tensor:
    """The loss, with `fault` in it where it is rank 1's turn."""
    if step == FAULTY_STEP and rank == 1:
        if fault == "nan loss":
            return loss * torch.nan
        if fault == "gradient":
            return OverflowInBackward.apply(loss)
    return loss


def train(
    fault: str, precision: str = "fp16", agree: bool = True, micro_batches: int = 1, **options: Any
) -> list[dict[str, Any]]:
    """A record after each step: whatever must be equal on both ranks, and the rank's own loss, the mean of its micro-batches."""
    config = MixedPrecisionConfig(**{"init_scale": 1024.0, **options})
    accelerator, session, model, optimizer = begin(config, precision, micro_batches=micro_batches)
    if not agree:
        session.scaler.ranks_agree = False
    rank, ranks = accelerator.process_index, accelerator.num_processes
    accelerator.unwrap_model(model).looks_fail = fault == "look fails" and rank == 1
    records = []
    for step in range(STEPS):
        seen = []
        for part in range(rank * micro_batches, (rank + 1) * micro_batches):
            with accelerator.accumulate(model):
                x = faulty(fault, step, rank, batch(step, part, ranks * micro_batches))
                loss = (model(x) - 1.0).square().mean()
                accelerator.backward(faulty_loss(fault, step, rank, loss))
                optimizer.step()
                optimizer.zero_grad()
            seen.append(loss.item())
        records.append(
            {
                "scale": session.scaler.get_scale(),
                "plan": [session.plan.default.value, sorted(session.plan.modules)],
                "counters": [session.scaler.applied_steps, session.scaler.skipped_steps],
                "skipped": accelerator.optimizer_step_was_skipped,
                "causes": [event.cause for event in session.events if event.cause],
                "parameters": [p.tolist() for p in model.parameters()],
                "loss": sum(seen) / len(seen),
            }
        )
    session.detach()
    return records


def sent(precision: str | None) -> dict[str, Any]:
    """Bytes that this rank writes a step, and the losses, with gradients sent in `precision`."""
    config = MixedPrecisionConfig(
        distributed_amp=True, communication_precision=precision, init_scale=1024.0, enable_monitoring=False
    )
    accelerator, session, model, optimizer = begin(config, width=20_000)
    rank, losses, written = accelerator.process_index, [], []
    optimizer.param_groups[0]["lr"] = 1e-4
    for step in range(4 * STEPS):
        loss = (model(batch(step, rank, 2)) - 1.0).square().mean()
        dist.barrier()
        before = bytes_written()
        accelerator.backward(loss)
        written.append(bytes_written() - before)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    session.detach()
    return {"bytes": sorted(written)[len(written) // 2], "losses": losses}


def sums_beyond_fp16() -> list[bool]:
    """Whether gradients of 40,000 on both ranks, and of 70,000 on rank 1, are skipped when sent in FP16."""
    config = MixedPrecisionConfig(distributed_amp=True, communication_precision="FP16", init_scale=1.0, emulate=True)
    accelerator, session, _, _ = begin(config)
    model = nn.Linear(1, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    skipped = []
    for gradient in (40_000.0, 140_000.0 * accelerator.process_index):
        weight = next(model.parameters())
        accelerator.backward(model(torch.zeros(1, 1)).sum() * 0.0)  # so that DDP is ready
        optimizer.zero_grad()
        loss = model(torch.full((1, 1), 1.0)).sum()
        weight.register_hook(lambda g, value=gradient: torch.full_like(g, value))
        accelerator.backward(loss)
        optimizer.step()
        skipped.append(accelerator.optimizer_step_was_skipped)
    session.detach()
    return skipped


def refusals() -> dict[str, str]:
    """What is refused with several processes, and how."""
    reported = {}
    accelerator, session, model, _ = begin(MixedPrecisionConfig())
    accelerator.state.distributed_type = DistributedType.MULTI_GPU
    try:
        accelerator.join_uneven_inputs([model], even_batches=False)
    except AttachError as error:
        reported["uneven"] = str(error)
    session.detach()
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    try:
        hf_amp.attach(accelerator, MixedPrecisionConfig(distributed_amp=True, communication_precision="FP16"))
    except ConfigError as error:
        reported["unscaled"] = str(error)
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    accelerator.prepare(Perceptron())
    before = dict(vars(accelerator))
    try:
        hf_amp.attach(accelerator, MixedPrecisionConfig(distributed_amp=True, communication_precision="FP16"))
    except AttachError as error:
        reported["late"] = str(error)
    reported["left"] = sorted(set(vars(accelerator)) - set(before))
    return reported


def checkpoint(folder: Path) -> dict[str, Any]:
    """Saved and loaded by both ranks together: what is there, and the counters of a new session."""
    accelerator, session, model, optimizer = begin(MixedPrecisionConfig(init_scale=1024.0))
    for step in range(2):
        accelerator.backward(model(batch(step, accelerator.process_index, 2)).square().mean())
        optimizer.step()
    for _ in range(2):  # new, then in the place of the old one
        accelerator.save_state(str(folder))
    session.detach()
    accelerator, session, model, optimizer = begin(MixedPrecisionConfig())
    accelerator.load_state(str(folder))
    session.detach()
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "siblings": sorted(path.name for path in folder.parent.iterdir()),
        "applied": session.scaler.applied_steps,
        "scale": session.scaler.get_scale(),
    }


def begin_sharded(fused: bool) -> tuple[Accelerator, AmpSession, nn.Module, Any]:
    """FSDP2 through accelerate, which shards on accelerators only; told that it runs FSDP it does so on a CPU too."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=False
    )
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=1024.0))
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    return accelerator, session, *accelerator.prepare(model, optimizer)


def own(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def train_sharded(accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: range) -> list[bool]:
    """An inf in rank 0's shard in one step, a NaN loss on rank 1 in another; whether each step was skipped."""
    rank, skipped = accelerator.process_index, []
    for step in steps:
        loss = (model(batch(step, rank, 2)) - 1.0).square().mean()
        accelerator.backward(loss * torch.nan if step == FAULTY_STEP + 2 and rank == 1 else loss)
        if step == FAULTY_STEP and rank == 0:
            next(own(p.grad) for p in model.parameters() if p.grad is not None).view(-1)[0] = torch.inf
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
    return skipped


def sharded(folder: Path, fused: bool) -> dict[str, Any]:
    """A run, and another that resumes the checkpoint which the first has saved in its middle."""
    former = PartialState().distributed_type
    accelerator, session, model, optimizer = begin_sharded(fused)
    skipped = train_sharded(accelerator, model, optimizer, range(STEPS))
    accelerator.save_state(str(folder))
    saved = session.scaler.state_dict()
    train_sharded(accelerator, model, optimizer, range(STEPS, STEPS + 2))
    causes = [event.cause for event in session.events if event.cause]
    weights = [own(p).tolist() for p in model.parameters()]
    finite = all(bool(own(p).isfinite().all()) for p in model.parameters())
    session.detach()
    accelerator, session, model, optimizer = begin_sharded(fused)
    accelerator.load_state(str(folder))
    loaded = session.scaler.state_dict()
    train_sharded(accelerator, model, optimizer, range(STEPS, STEPS + 2))
    session.detach()
    PartialState().distributed_type = accelerator.state.distributed_type = former
    return {
        "skipped": skipped,
        "causes": causes,
        "weights": weights,
        "finite": finite,
        "saved": [saved["scale"], saved["hf_amp"]["counters"]],
        "loaded": [loaded["scale"], loaded["hf_amp"]["counters"]],
        "resumed weights": [own(p).tolist() for p in model.parameters()],
    }


FAULTS = ("none", "nan batch", "activation", "gradient", "nan loss", "empty last batch", "look fails")


def main(folder: str) -> None:
    results: dict[str, Any] = {
        **{fault: train(fault, scaling_strategy="ADAPTIVE") for fault in FAULTS},
        "guard": train("nan batch", precision="bf16"),
        "fp32": train("none", precision="no"),
        "without agreement": train("nan loss", agree=False, scaling_strategy="ADAPTIVE"),
        **{f"sent in {precision}": sent(precision) for precision in (None, "FP16", "BF16")},
        "beyond FP16": sums_beyond_fp16(),
        "refused": refusals(),
        "checkpoint": checkpoint(Path(folder) / "checkpoints" / "saved"),
        "FSDP2": sharded(Path(folder) / "fsdp2", fused=False),
        "FSDP2, fused": sharded(Path(folder) / "fused", fused=True),
    }
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        print(json.dumps(gathered))
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1])
