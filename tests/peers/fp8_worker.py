"""Two ranks that train a Llama in FP8, whole in DistributedDataParallel or sharded by FSDP2: what each is told of it, as JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import hf_amp
from tests.peers.test_fp8_damage import TOKENS, UP, float8, large_weights

STEPS = 3


def trained(way: str, monitored: bool = True, spoiled: bool = False) -> dict[str, Any]:
    """Events that speak of FP8, and a digest of the weights. `spoiled`: rank 1 writes into each batch after its backward."""
    model, batch = large_weights(UP)
    model.requires_grad_(True)
    config = float8.Float8LinearConfig(emulate=True)
    float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name != "lm_head")
    if way == "fsdp2":
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer)
    wrapped: nn.Module = fully_shard(model) if way == "fsdp2" else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    session = hf_amp.AmpSession.for_model(wrapped, optimizer, precision_mode="BF16", enable_monitoring=monitored)
    batch = {name: (x + dist.get_rank()) % 512 for name, x in TOKENS.items()}
    for _ in range(STEPS):
        session.scaler.scale(wrapped(**batch).loss).backward()
        if spoiled and dist.get_rank() == 1:
            batch["input_ids"].add_(0)
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
    whole = [p.full_tensor() if way == "fsdp2" else p for p in model.parameters()]  # type: ignore[operator]
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in whole)).hexdigest()
    told = [(e.kind.value, e.step, e.modules, e.message) for e in session.events if e.kind.value.startswith("fp8_")]
    session.detach()
    return {"way": way, "monitored": monitored, "spoiled": spoiled, "told": told, "weights": weights}


dist.init_process_group("gloo")
runs = [trained("ddp"), trained("fsdp2"), trained("fsdp2", monitored=False), trained("fsdp2", spoiled=True)]
ranks: list[Any] = [None, None]
dist.all_gather_object(ranks, runs)
if dist.get_rank() == 0:
    print("\n" + json.dumps(ranks), flush=True)
dist.destroy_process_group()
