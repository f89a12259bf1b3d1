"""A manager whose model is sharded by FSDP2 over two ranks goes back to its own copy; prints what each rank saw."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_amp import AdvancedMixedPrecisionManager, AmpSession, EventKind, MixedPrecisionConfig, StateError
from hf_amp.tree import map_tensors
from tests.integrations.rewinding import Noisy, differences
from tests.rank_end import leave_together

STEPS, POISONED_AT = 16, 12


def batches() -> list[dict[str, torch.Tensor]]:
    """Of this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    given = [torch.rand(4, 4, generator=generator) - 0.5 for _ in range(STEPS)]
    return [{"x": x, "labels": x.sum(1)} for x in given]


def managed(given: list[dict[str, torch.Tensor]], poisoned_at: int = 0) -> tuple[list[tuple[Any, Any]], dict[str, Any]]:
    """Where the run went back from, and to; what is trained, of which this rank has a part."""
    torch.manual_seed(5)
    model = Noisy()
    for part in (model.hidden, model.output, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def poisoned() -> Iterable[Any]:
        for step, batch in enumerate(given, 1):
            if step == poisoned_at:
                model.hidden.weight.detach().to_local().fill_(torch.nan)  # type: ignore[operator]
            yield batch

    config = MixedPrecisionConfig(on_stalled="rewind", good_after=4, init_scale=1024.0)
    with AdvancedMixedPrecisionManager(config, loss_fn=None) as manager:
        manager.train_epoch(poisoned(), model, optimizer, progress=False)
        back = [(e.before, e.after) for e in manager.trainer.session.events if e.kind is EventKind.REWOUND]
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "torch": torch.get_rng_state()}
    return back, map_tensors(lambda x: x.to_local() if hasattr(x, "to_local") else x, state)


def refused() -> str:
    """What asking for a capture of a tensor-parallel model raises."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "1": RowwiseParallel()})
    session = AmpSession.for_model(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        session.capture(1, "nowhere.safetensors")
    except StateError as error:
        return str(error)
    finally:
        session.detach()
    return ""


def told() -> Iterator[Any]:
    rows = batches()
    back, ours = managed(rows, POISONED_AT)
    yield back
    (before, after), *_ = back
    yield differences(ours, managed(rows[:after] + rows[before:])[1])
    yield ours["model"]["hidden.weight"].shape[0]
    yield refused()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    known: list[Any] = [None, None]
    dist.all_gather_object(known, list(told()))
    if dist.get_rank() == 0:
        print(json.dumps(known), flush=True)
    leave_together()
