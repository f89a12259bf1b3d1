"""One rank of a run under DeepSpeed with hf_amp attached; the loss of rank 1 alone is NaN in step 2. Rank 0 tells all."""

from __future__ import annotations

import json

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader

import hf_amp
from tests.peers.gloo_alone import compile_nothing
from tests.rank_end import leave_together
from tests.reference import tiny_mlp


def main() -> None:
    compile_nothing()
    # Without a backend accelerate takes two CPU processes under DeepSpeed for two runs of one.
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend=backend)])
    session = hf_amp.attach(accelerator)
    torch.manual_seed(0)
    model = tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(torch.randn(20, 4), 2))
    for step, batch in enumerate(loader):
        loss = model(batch.half()).float().square().mean()
        accelerator.backward(loss * (torch.nan if (step, accelerator.process_index) == (1, 1) else 1.0))
        optimizer.step()
    mine = {
        "kind": accelerator.distributed_type.value,
        "stage": model.zero_optimization_stage(),
        "precision": accelerator.mixed_precision,
        "skips": [(e.step, e.cause, e.before, e.after) for e in session.events if e.kind == "step_skipped"],
        "counts": [session.metrics()[name] for name in ("applied_steps", "skipped_steps", "non_finite_losses")],
        "parameters": [p.tolist() for p in model.parameters()],
    }  # fmt: skip
    everyone: list[dict] = [{}] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, mine)
    if accelerator.is_main_process:
        print(json.dumps(everyone))
    leave_together()


if __name__ == "__main__":
    main()
