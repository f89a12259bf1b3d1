"""One of two processes: sharded and rank-local gradients under one scaler. Prints a JSON line with what was decided."""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from tests.rank_end import leave_together


def layers(seed: int) -> nn.Sequential:
    """Two layers, 8 → 8 → 4."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def fsdp2_model() -> nn.Module:
    """Each layer sharded over both ranks: gradients are DTensors."""
    model = layers(seed=0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1_model(use_orig_params: bool = False) -> nn.Module:
    """One flat parameter, of which each rank holds a half: its gradient is a plain tensor of this rank.

    With `use_orig_params` parameters and gradients are views of the part that this rank holds, some of them empty.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that FSDP1 is old, and that a CPU has no device number
        return FullyShardedDataParallel(layers(seed=0), device_id=torch.device("cpu"), use_orig_params=use_orig_params)


SHARDED = {
    "FSDP2": fsdp2_model,
    "FSDP1": fsdp1_model,
    "FSDP1 original parameters": functools.partial(fsdp1_model, use_orig_params=True),
}


def rank_local_model() -> nn.Module:
    """A model of this rank alone: gradients are not reduced."""
    return layers(seed=dist.get_rank())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def source(model: nn.Module) -> None:
    """Puts an inf into this rank's part of a gradient."""
    held = (local(p.grad) for p in model.parameters() if p.grad is not None)
    next(gradient for gradient in held if gradient.numel()).view(-1)[0] = torch.inf


def run(
    make_model: Callable[[], nn.Module], fused: bool, unscale: bool, late: bool = False, **options: Any
) -> dict[str, Any]:
    """Five steps: an inf in rank 0's part of a gradient in the second, a NaN loss on rank 1 in the fourth.

    Where it is `late`, the inf gets there after unscaling, and the gradients are looked at once more, as fairscale does.
    """
    rank = dist.get_rank()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(init_scale=1024.0, **options), "cpu")
    applied, scales, moved = [], [], []
    for step in range(5):
        before = [local(p).detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = model(torch.full((3, 8), 0.5 + rank)).square().mean()
        if step == 3 and rank == 1 and make_model is rank_local_model:
            loss = loss * torch.nan
        scaler.scale(loss).backward()
        if step == 1 and rank == 0 and not late:
            source(model)
        if unscale:
            scaler.unscale_(optimizer)
        if step == 1 and rank == 0 and late:
            source(model)
        if late:
            scaler._check_inf_per_device(optimizer)
        scaler.step(optimizer)
        scaler.update()
        applied.append(scaler.last_outcome.applied)
        scales.append(scaler.get_scale())
        moved.append(any(not torch.equal(a, local(p)) for a, p in zip(before, model.parameters(), strict=True)))
    states = [value for state in optimizer.state.values() for value in state.values()]
    finite = all(local(tensor).isfinite().all() for tensor in [*model.parameters(), *states])
    return {"applied": applied, "scales": scales, "moved": moved, "finite": bool(finite)}


def in_half(dtype: torch.dtype, remedy: str | None, name: str, sharded: bool = True) -> dict[str, Any]:
    """Twenty steps that BF16 loses: how far the model came, what is kept of it, and whether this rank's part is that of the whole."""
    model = layers(seed=0).to(dtype)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-4)
    config = MixedPrecisionConfig(precision_mode="BF16", half_parameters=remedy)
    scaler = AdvancedGradScaler(config, "cpu")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(torch.full((3, 8), 0.5).to(dtype)).float() - 1.0).square().mean()
        losses.append(loss.item())
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
    exact = [p.full_tensor() if sharded else p for p in model.parameters()]
    kinds = {type(v).__name__ for p in model.parameters() for v in optimizer.state[p].values() if v.dim()}
    dtypes = {str(v.dtype) for p in model.parameters() for v in optimizer.state[p].values() if v.dim() == p.dim()}
    held = sum(local(p).detach().float().sum().item() for p in model.parameters())
    whole = [p.detach().float().sum().item() for p in exact]
    return {
        "gain": losses[0] - losses[-1],
        "kinds": sorted(kinds),
        "dtypes": sorted(dtypes),
        "whole": whole,
        "held": held,
    }


def main() -> None:
    dist.init_process_group("gloo")
    results = {}
    for name in ("AdamW", "RMSprop"):
        results[f"FP32 {name}"] = in_half(torch.float32, None, name)
        for remedy in ("stochastic_rounding", "kahan"):
            results[f"{remedy} {name}"] = in_half(torch.bfloat16, remedy, name)
            results[f"{remedy} {name} replicated"] = in_half(torch.bfloat16, remedy, name, sharded=False)
    for (kind, make_model), fused, unscale in itertools.product(SHARDED.items(), (False, True), (False, True)):
        results[f"{kind} {fused} {unscale}"] = run(
            make_model, fused, unscale, scaling_strategy="ADAPTIVE", sync_grad_scaler=kind != "FSDP2"
        )
    for kind, make_model in (("FSDP2", fsdp2_model), ("local", rank_local_model)):
        options = {"sync_grad_scaler": kind == "local"}
        results[f"{kind} late"] = run(make_model, False, unscale=True, late=True, **options)
    for strategy in ("ADAPTIVE", "DYNAMIC"):
        for switch in ("sync_grad_scaler", "distributed_amp"):
            options = {"scaling_strategy": strategy, switch: True}
            results[f"local {strategy} {switch}"] = run(rank_local_model, False, False, **options)
    results["local alone"] = run(rank_local_model, False, False, scaling_strategy="ADAPTIVE")
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        print(json.dumps(gathered))
    leave_together()


if __name__ == "__main__":
    main()
