"""One of two processes: a manager on a DistributedDataParallel model, run by run. Prints a JSON line with what each rank saw."""

import faulthandler
import json
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from hf_amp import AdvancedMixedPrecisionManager, MixedPrecisionConfig
from tests.rank_end import leave_together
from tests.training.loops import FaultyMlp, vectors


class RankLocal(torch.nn.Module):
    """The small network, without running statistics, which DDP would broadcast."""

    def __init__(self, faults: dict[int, str]) -> None:
        super().__init__()
        self.inner = FaultyMlp(faults)
        self.inner.normalise = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


OPTIONS = {"usual": {}, "friendly": {"gradient_accumulation_friendly": True}, "retry": {"on_overflow": "retry"}}


def run(rank: int, on_overflow: str = "skip", **options: Any) -> dict[str, Any]:
    """Six windows of two batches; on rank 0 an overflow and a NaN loss."""
    reductions = [0]

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reductions[0] += 1
        done = dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return done.then(lambda future: future.value()[0])

    model = DistributedDataParallel(RankLocal({3: "overflow", 7: "nan"} if rank == 0 else {}))
    model.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = MixedPrecisionConfig(distributed_amp=True, sync_grad_scaler=True, init_scale=1024.0, **options)
    batches = [(x + rank, y) for x, y in vectors(12)]
    with AdvancedMixedPrecisionManager(
        config, loss_fn=mse_loss, on_overflow=on_overflow, accumulation_steps=2
    ) as manager:
        epoch = manager.train_epoch(batches, model, optimizer)
        events = [(e.step, e.cause.value) for e in manager.trainer.session.events if e.cause]
        scale = manager.trainer.scaler.get_scale()
    return {
        "applied": epoch["applied_steps"],
        "skipped": epoch["skipped_steps"],
        "events": events,
        "scale": scale,
        "reductions": reductions[0],
        "parameters": [p.double().sum().item() for p in model.parameters()],
    }


def main() -> None:
    faulthandler.dump_traceback_later(60, exit=True)  # ranks that wait for each other say where
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    gathered = [None, None]
    dist.all_gather_object(gathered, {name: run(rank, **options) for name, options in OPTIONS.items()})
    if rank == 0:
        print(json.dumps(gathered))
    leave_together()


if __name__ == "__main__":
    main()
