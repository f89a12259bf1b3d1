"""One of two processes whose models wait for each other in forward, of which the second meets a fault. Prints a JSON line."""

from __future__ import annotations

import faulthandler
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.nn import functional as gathering
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import hf_amp
from hf_amp import AmpSession, AttachError, EventKind, MixedPrecisionCallback
from tests.rank_end import leave_together

STEPS, FAULTY_STEP = 5, 3
SECONDS = 150
"""After which a rank that waits in vain is ended."""


def found(session: AmpSession, model: nn.Module) -> dict[str, Any]:
    """What a run came to: skips, plan, and weights, of which each rank knows all."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    skips = [e for e in session.events if e.kind is EventKind.STEP_SKIPPED]
    return {
        "skips": [[e.step, e.cause.value] for e in skips],
        "messages": [e.message for e in skips],
        "applied": session.metrics()["applied_steps"],
        "plan": session.plan.to_plain(),
        "finite": all(bool(p.isfinite().all()) for p in whole),
        "describes": session.describe(),
        "parameters": next(model.parameters()).dtype.itemsize * 8,
        "lost_updates": session.metrics().get("lost_update_fraction"),
    }


class Network(nn.Module):
    """Two layers and a loss; `gathers`: over the batches of both ranks, as contrastive losses are."""

    def __init__(self, gathers: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.gathers = nn.Linear(8, 8), nn.Linear(8, 4), gathers

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = self.last(self.first(inputs_embeds).tanh())
        if self.gathers:
            x = torch.cat(gathering.all_gather(x))
        return x.square().mean()


def sharded_by_hand(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = Network().to(dtype)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_by_fsdp1() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that FSDP1 is old
        return FullyShardedDataParallel(Network(), device_id=torch.device("cpu"))


def llama(folder: str, **parallel: Any) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**parallel)).train()


def inputs(fault: str, step: int, rank: int, width: int) -> Tensor:
    torch.manual_seed(step)
    x = torch.randn(2, 3, width)
    return x * torch.nan if fault == "batch" and step == FAULTY_STEP and rank == 1 else x


def by_hand(model: nn.Module, fault: str, rank: int, mode: str, width: int = 8) -> dict[str, Any]:
    """A raw loop over `AmpSession.for_model`."""
    half = next(model.parameters()).dtype is torch.bfloat16
    optimizer = (
        torch.optim.AdamW(model.parameters(), fused=True) if half else torch.optim.SGD(model.parameters(), lr=0.05)
    )
    options = {"precision_mode": mode, "init_scale": 64.0, "monitoring_interval": 1}
    session = AmpSession.for_model(model, optimizer, **options)
    for step in range(1, STEPS + 1):
        loss = loss_of(model, inputs(fault, step, rank, width))
        if fault == "loss" and step == FAULTY_STEP and rank == 1:
            loss = loss * math.inf
        session.scaler.scale(loss).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
    return found(session, model)


def refusal() -> dict[str, str]:
    """What an option that cannot be followed is answered with."""
    model = sharded_by_hand(torch.bfloat16)
    try:
        AmpSession.for_model(model, torch.optim.SGD(model.parameters()), half_parameters="upcast")
    except AttachError as error:
        return {"refusal": str(error)}
    return {}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, LlamaForCausalLM):
        return model(inputs_embeds=x, labels=torch.arange(6).view(2, 3)).loss
    return model(x)


def by_accelerate(model: nn.Module, fault: str, rank: int, mode: str) -> dict[str, Any]:
    """An Accelerate loop; the model is prepared as a Trainer prepares such."""
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(mixed_precision=mode, cpu=True)
    session = hf_amp.attach(accelerator)
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.05))
    for step in range(1, STEPS + 1):
        loss = loss_of(model, inputs(fault, step, rank, 32))
        accelerator.backward(loss * math.inf if fault == "loss" and step == FAULTY_STEP and rank == 1 else loss)
        optimizer.step()
        optimizer.zero_grad()
    return found(session, model)


class SequentialTrainer(Trainer):
    """Batches in order; one loss of the second rank is not finite where `fault` says so."""

    fault, calls = "", 0

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        bad = self.fault == "loss" and self.calls == FAULTY_STEP and dist.get_rank() == 1
        return super().compute_loss(model, *args, **kwargs) * (math.inf if bad else 1.0)


def by_trainer(model: nn.Module, fault: str, mode: str) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=False)
    torch.manual_seed(0)
    rows = [{"inputs_embeds": torch.randn(3, 32), "labels": torch.arange(3)} for _ in range(4 * STEPS)]
    if fault == "batch":
        rows[4 * (FAULTY_STEP - 1) + 3]["inputs_embeds"] *= torch.nan  # of the second rank
    options = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, mode: True}
    arguments = TrainingArguments(
        use_cpu=True, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.01, **options
    )
    callback = MixedPrecisionCallback(init_scale=64.0)
    trainer = SequentialTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
    trainer.fault = fault
    trainer.train()
    return found(callback.session, model)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    dist.barrier()
    runs: dict[str, Callable[[str], dict[str, Any]]] = {
        "Trainer, FP16": lambda fault: by_trainer(llama(folder, fsdp_size=2), fault, "fp16"),
        "Trainer, BF16": lambda fault: by_trainer(llama(folder, fsdp_size=2), fault, "bf16"),
        "attach": lambda fault: by_accelerate(llama(folder, fsdp_size=2), fault, rank, "bf16"),
        "tensor parallel": lambda fault: by_hand(llama(folder, tp_size=2, tp_plan="auto"), fault, rank, "BF16", 32),
        "fully_shard, FP16": lambda fault: by_hand(sharded_by_hand(), fault, rank, "MIXED"),
        "fully_shard, BF16": lambda fault: by_hand(sharded_by_hand(), fault, rank, "BF16"),
        "BF16 shards in FP16": lambda fault: by_hand(sharded_by_hand(torch.bfloat16), fault, rank, "MIXED"),
        "BF16 shards in BF16": lambda fault: by_hand(sharded_by_hand(torch.bfloat16), fault, rank, "BF16"),
        "FSDP1": lambda fault: by_hand(sharded_by_fsdp1(), fault, rank, "BF16"),
        "gathers": lambda fault: by_hand(Network(gathers=True), fault, rank, "MIXED"),
    }
    results = {}
    for name, run in runs.items():
        for fault in ("none", "batch", "loss"):
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            results[f"{name}, {fault}"] = run(fault)
            print(name, fault, file=sys.stderr, flush=True)
    results["upcast"] = refusal()
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, results)
    if rank == 0:
        print(json.dumps(gathered))
    leave_together()


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
