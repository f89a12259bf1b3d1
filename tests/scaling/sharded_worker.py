"""One of two processes: sharded and rank-local gradients under one scaler. Prints a JSON line with what it decided."""

from __future__ import annotations

import argparse
import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig


def sharded_model() -> nn.Module:
    """Two layers, each sharded over both ranks (FSDP2)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def rank_local_model() -> nn.Module:
    """A model of this rank alone, as FSDP1's flat shards are: gradients are not reduced."""
    torch.manual_seed(dist.get_rank())
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=["sharded", "local"])
    parser.add_argument("--strategy", default="ADAPTIVE")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--unscale", action="store_true")
    parser.add_argument("--no-sync", action="store_true")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = sharded_model() if options.kind == "sharded" else rank_local_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=options.fused)
    config = MixedPrecisionConfig(
        scaling_strategy=options.strategy,
        init_scale=1024.0,
        sync_grad_scaler=options.kind == "local" and not options.no_sync,
    )
    scaler = AdvancedGradScaler(config, "cpu")
    applied, scales = [], []
    for step in range(5):
        optimizer.zero_grad()
        loss = model(torch.full((3, 8), 0.5 + rank)).square().mean()
        if step == 3 and rank == 1:
            loss = loss * float("nan") if options.kind == "local" else loss
        scaler.scale(loss).backward()
        gradient = next(model.parameters()).grad
        if step == 1 and rank == 0:
            local = gradient.to_local() if options.kind == "sharded" else gradient
            local[0, 0] = torch.inf
        if options.unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        applied.append(scaler.last_outcome.applied)
        scales.append(scaler.get_scale())
    finite = all((p.to_local() if hasattr(p, "to_local") else p).isfinite().all() for p in model.parameters())
    gathered = [None, None]
    dist.all_gather_object(gathered, {"applied": applied, "scales": scales, "finite": bool(finite)})
    if rank == 0:
        print(json.dumps(gathered))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
