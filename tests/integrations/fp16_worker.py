"""One of two processes: FP16 mode under DistributedDataParallel, run by run. Prints a JSON line with what each rank has."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

import hf_amp
from hf_amp import AttachError, MixedPrecisionConfig
from hf_amp.scaling.master_weights import STATE_KEY
from tests.rank_end import leave_together
from tests.reference import OverflowInBackward, tiny_mlp


def train(accelerator: Accelerator, set_to_none: bool) -> dict[str, object]:
    """Six steps on this rank's own data; rank 1's gradients overflow in the third."""
    config = MixedPrecisionConfig(precision_mode="FP16", init_scale=1024.0)
    session = hf_amp.attach(accelerator, config)
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    rank = accelerator.process_index
    applied = []
    for step in range(6):
        loss = model(torch.full((3, 4), 0.5 + rank + step)).float().square().mean()
        accelerator.backward(OverflowInBackward.apply(loss) if (step, rank) == (2, 1) else loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        applied.append(session.scaler.last_outcome.applied)
    masters = optimizer.state_dict()[STATE_KEY].values()
    parameters = list(model.parameters())
    session.detach()
    return {
        "applied": applied,
        "masters": [master.double().sum().item() for master in masters],
        "parameters": [p.double().sum().item() for p in parameters],
        "dtypes": sorted({str(p.dtype) for p in parameters}),
    }


def attached_late(accelerator: Accelerator) -> str:
    """What attach says to a BF16 model that is inside DDP already."""
    accelerator.free_memory()
    accelerator.prepare(tiny_mlp().to(torch.bfloat16))
    try:
        hf_amp.attach(accelerator)
    except AttachError as error:
        return str(error)
    return ""


def run(zeroing: str) -> dict[str, object]:
    """How gradients are cleared, and whether they are views into DDP's buckets."""
    AcceleratorState._reset_state()
    cleared, held = zeroing.split()
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=held == "views")
    accelerator = Accelerator(mixed_precision="fp16", cpu=True, kwargs_handlers=[views])
    result = train(accelerator, set_to_none=cleared == "none")
    result["late"] = attached_late(accelerator)
    return result


def main() -> None:
    Accelerator(cpu=True)
    results = {zeroing: run(zeroing) for zeroing in ("none copies", "none views", "zeros views")}
    gathered: list[dict[str, object] | None] = [None, None]
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        print(json.dumps(gathered))
    leave_together()


if __name__ == "__main__":
    main()
