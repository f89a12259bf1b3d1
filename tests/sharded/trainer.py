"""A stock Trainer on accelerate's FSDP2, ported to a CPU, where accelerate makes no FSDP."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from hf_amp import MixedPrecisionCallback
from tests.sharded.runs import BLOCKS, CASES, as_fsdp2, told

STEPS = 6
_make_state = AcceleratorState.__init__


def _make_state_of_fsdp2(state: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    _make_state(state, *args, **kwargs)
    if state.__dict__.get("fsdp_plugin") is None:
        as_fsdp2(state, state._mixed_precision, BLOCKS["GPT-2"])
    state.distributed_type = DistributedType.FSDP


class SequentialTrainer(Trainer):
    """Batches in order, the optimizer of the rescaled model."""

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        self.optimizer = CASES["GPT-2"].optimizer(self.model)
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def by_trainer(kind: str, folder: str) -> dict[str, Any]:
    """`kind`: "fp16", which saves in the middle, or "resumed" from there."""
    AcceleratorState._reset_state(reset_partial_state=False)
    AcceleratorState.__init__ = _make_state_of_fsdp2
    try:
        model, batches, _ = CASES["GPT-2"].build(seed=0)
        rows: list[dict[str, Any]] = []
        for _ in range(STEPS):
            batch = next(batches)
            rows += [{name: x[i] for name, x in batch.items()} for i in range(len(batch["input_ids"]))]
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=len(rows) // STEPS // dist.get_world_size(),
            logging_steps=1,
            save_strategy="steps" if kind == "fp16" else "no",
            save_steps=STEPS // 2,
            report_to="none",
            disable_tqdm=True,
            lr_scheduler_type="constant",
            max_grad_norm=1e6,
            fp16=True,
        )
        callback = MixedPrecisionCallback(init_scale=1024.0)
        trainer = SequentialTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}" if kind == "resumed" else None)
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        found = {"kind": trainer.accelerator.distributed_type.value, "history": history, **told(callback.session)}
        callback.session.detach()
        return found
    finally:
        AcceleratorState.__init__ = _make_state
