"""One of two processes: a Trainer whose rank 1 alone meets NaN, or has it in a weight. Rank 0
prints what both saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_amp import EventKind, MixedPrecisionCallback
from tests.integrations.trainers import logged, numbers, regression_trainer
from tests.rank_end import leave_together

ROWS_OF_RANK_1 = (13, 14)  # in the second batch of rank 1, in training and in evaluation


class PoisonRank1(TrainerCallback):
    """Makes a weight of rank 1 NaN before the last step, as memory that fails does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and dist.get_rank() == 1:
            torch.nn.init.constant_(kwargs["model"].output.bias, torch.nan)


def withheld_by(folder: Path) -> list[int]:
    """The steps of the checkpoints that this rank lets nobody write."""
    callback = MixedPrecisionCallback()
    trainer = regression_trainer(folder, callback, PoisonRank1(), max_steps=3, save_strategy="steps", save_steps=1)
    trainer.train()
    events = callback.session.events
    return [event.step for event in events if event.kind is EventKind.CHECKPOINT_WITHHELD]


def seen_in(precision: str, folder: Path) -> dict[str, Any]:
    """Three steps and an evaluation; what this rank knows of them."""
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    trainer = regression_trainer(
        folder, callback, nan_rows=ROWS_OF_RANK_1, eval_dataset=numbers(ROWS_OF_RANK_1), max_steps=3,
        eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=4, save_strategy="steps", save_steps=3,
        fp16=precision == "fp16",
    )  # fmt: skip
    trainer.train()
    figures = callback.session.metrics()
    skips = [event for event in callback.session.events if event.kind is EventKind.STEP_SKIPPED]
    return {
        "world": trainer.args.world_size,
        "skips": [(event.step, event.cause.value) for event in skips],
        "applied": figures["applied_steps"],
        "scale": callback.session.scaler.get_scale(),
        "plan": callback.session.plan.to_plain(),
        "fractions": logged(trainer, "amp/non_finite_loss_fraction"),
        "lost_batches": figures["eval_non_finite_batches"],
        "parameters": [p.flatten().tolist() for p in trainer.model.parameters()],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    seen: dict[str, Any] = {precision: seen_in(precision, folder / precision) for precision in ("fp16", "fp32")}
    seen["withheld"] = withheld_by(folder / "poisoned")
    gathered: list[object] = [None, None]
    dist.all_gather_object(gathered, seen)
    if dist.get_rank() == 0:
        print(json.dumps(gathered))
    leave_together()


if __name__ == "__main__":
    main()
