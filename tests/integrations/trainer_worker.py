"""One of two processes under `accelerate launch`: a Trainer whose rank 1 alone meets NaN. Rank 0 prints what both saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_amp import EventKind, MixedPrecisionCallback
from tests.integrations.trainers import logged, numbers, regression_trainer
from tests.rank_end import leave_together

ROWS_OF_RANK_1 = (13, 14)  # in the second batch of rank 1, in training and in evaluation


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
    seen = {precision: seen_in(precision, Path(sys.argv[1]) / precision) for precision in ("fp16", "fp32")}
    gathered: list[object] = [None, None]
    dist.all_gather_object(gathered, seen)
    if dist.get_rank() == 0:
        print(json.dumps(gathered))
    leave_together()


if __name__ == "__main__":
    main()
