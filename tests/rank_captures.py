"""Captures one step of a GPT-2 under DistributedDataParallel or FSDP2, of which each rank has its own rows of the batch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

import hf_amp
from hf_amp import AmpSession
from hf_amp.statistics import is_sharded
from tests.rank_end import leave_together
from tests.sharded.runs import accelerator_of_fsdp2

ROWS, WORDS = 6, 40


def model(width: int = 16, layers: int = 2) -> GPT2LMHeadModel:
    """Without dropout; equal parameters at every call, on every machine."""
    shape = {"n_embd": width, "n_layer": layers, "n_head": 2, "vocab_size": WORDS, "n_positions": 16}
    made = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    for index, p in enumerate(made.parameters()):
        p.data = ((torch.arange(p.numel()) * 37 + index * 11) % 101 - 50).reshape(p.shape) / 256
    return made


def whole_batch(rows: int = ROWS) -> dict[str, Tensor]:
    """Of all ranks."""
    tokens = (torch.arange(9 * rows) * 7 % WORDS).reshape(rows, 9)
    return {"input_ids": tokens, "labels": tokens}


def capture(
    path: Path,
    precision: str,
    rows: slice = slice(None),
    trained: torch.nn.Module | None = None,
    wrap: Any = DistributedDataParallel,
) -> None:
    """Writes what a step on these rows did."""
    trained = model() if trained is None else trained
    entry = wrap(trained) if dist.is_initialized() else trained
    optimizer = torch.optim.SGD(entry.parameters(), lr=0.1)
    session = AmpSession.for_model(entry, optimizer, precision_mode=precision, init_scale=256.0)
    session.capture(1, path)
    session.scaler.scale(entry(**{name: x[rows] for name, x in whole_batch().items()}).loss).backward()
    session.scaler.step(optimizer)
    session.scaler.update()
    session.detach()


def by_fsdp2(whole: GPT2LMHeadModel) -> torch.nn.Module:
    """Each block a unit of its own, of which one keeps its parameters after forward."""
    for number, block in enumerate(whole.transformer.h):
        fully_shard(block, reshard_after_forward=bool(number))
    return fully_shard(whole)


def by_accelerate(path: Path, precision: str, rows: slice = slice(None)) -> None:
    """The same by an Accelerator, which shards by FSDP2 where there are ranks."""
    mode = "fp16" if precision == "MIXED" else "no"
    is_alone = not dist.is_initialized()
    accelerator = Accelerator(mixed_precision=mode, cpu=True) if is_alone else accelerator_of_fsdp2(mode, "GPT2Block")
    session = hf_amp.attach(accelerator, init_scale=256.0)
    trained = model()
    entry, optimizer = accelerator.prepare(trained, torch.optim.SGD(trained.parameters(), lr=0.1))
    session.capture(1, path)
    accelerator.backward(entry(**{name: x[rows] for name, x in whole_batch().items()}).loss)
    optimizer.step()
    session.detach()


def corrupted() -> GPT2LMHeadModel:
    """One module of it computes something else, and its weights are those of `model`."""
    made = model()
    made.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, given, output: output * 1.01)
    return made


def overflowing(factor: float = 1e5) -> GPT2LMHeadModel:
    """Activations inside of its second block leave FP16's range, and so do those that blocks themselves return."""
    made = model()
    made.transformer.h[1].mlp.c_fc.bias.data += 3e4
    made.transformer.h[1].mlp.c_proj.weight.data *= 64

    def there_and_back(module: torch.nn.Module, given: Any, output: Tensor) -> Tensor:
        return torch.nn.functional.linear(output, torch.eye(16) * factor) / factor

    for block in made.transformer.h:
        block.register_forward_hook(there_and_back)
    return made


def trained_by_fsdp2(path: Path | None) -> dict[str, Any]:
    """Three steps, of which the second is captured where there is a path: weights, and what is left gathered."""
    entry = by_fsdp2(model())
    optimizer = torch.optim.AdamW(entry.parameters(), lr=1e-2)
    session = AmpSession.for_model(entry, optimizer, init_scale=256.0)
    if path is not None:
        session.capture(2, path)
    for number in range(3):
        rows = slice(number + dist.get_rank(), number + dist.get_rank() + 2)
        session.scaler.scale(entry(**{name: x[rows] for name, x in whole_batch().items()}).loss).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
    gathered = [name for name, p in entry.named_parameters() if not is_sharded(p)]
    messages = [event.message for event in session.events]
    session.detach()
    weights = [x for p in entry.parameters() for x in p.full_tensor().flatten().tolist()]
    return {"weights": weights, "gathered": gathered, "messages": messages}


def on_one_rank(path: Path) -> list[str]:
    """Values leave FP16's range on the second rank alone, inside of a unit and in what holds units: what the session says."""
    whole, factor = model(), 1e8 ** dist.get_rank()

    def half(module: torch.nn.Module, given: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.half() * factor
        return output

    whole.transformer.h[1].mlp.c_proj.register_forward_hook(lambda module, given, output: output * factor)
    whole.transformer.register_forward_hook(half)
    entry = by_fsdp2(whole)
    optimizer = torch.optim.AdamW(entry.parameters(), lr=1e-2)
    session = AmpSession.for_model(entry, optimizer, init_scale=256.0)
    session.capture(1, path)
    session.scaler.scale(entry(**{name: x[:2] for name, x in whole_batch().items()}).loss).backward()
    session.scaler.step(optimizer)
    session.scaler.update()
    messages = [event.message for event in session.events if "captured" in event.message]
    session.detach()
    return messages


def failing(path: Path) -> list[str]:
    """One rank's batch is written into before its step is captured: what each session says of it; training goes on."""
    entry = by_fsdp2(model())
    optimizer = torch.optim.AdamW(entry.parameters(), lr=1e-2)
    session = AmpSession.for_model(entry, optimizer, init_scale=256.0)
    session.capture(1, path)
    batch = {name: x[:2].clone() for name, x in whole_batch().items()}
    session.scaler.scale(entry(**batch).loss).backward()
    if dist.get_rank():
        batch["input_ids"].add_(0)
    session.scaler.step(optimizer)
    session.scaler.update()
    messages = [event.message for event in session.events if "captured" in event.message]
    session.detach()
    return [*messages, f"{session.scaler.applied_steps} applied"]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    own = ROWS // int(os.environ["WORLD_SIZE"])
    begin = own * dist.get_rank()
    rows = slice(begin, begin + own)
    for precision in ("FP32", "MIXED"):
        capture(folder / f"{precision}.safetensors", precision, rows)
        for name, make in (("fsdp2", model), ("corrupted", corrupted), ("overflowing", overflowing)):
            capture(folder / f"{name}_{precision}.safetensors", precision, rows, make(), by_fsdp2)
        capture(folder / f"overflowing_ddp_{precision}.safetensors", precision, rows, overflowing())
        by_accelerate(folder / f"accelerate_{precision}.safetensors", precision, rows)
    found = {
        "plain": trained_by_fsdp2(None),
        "captured": trained_by_fsdp2(folder / "second.safetensors"),
        "on one rank": on_one_rank(folder / "on_one_rank.safetensors"),
        "failing": failing(folder / "failing.safetensors"),
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
