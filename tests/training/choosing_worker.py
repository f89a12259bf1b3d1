"""Trains a network of wide layers with both trainers that choose a precision, and prints what they chose as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from hf_amp import (
    DynamicMixedPrecisionTrainer,
    MixedPrecisionConfig,
    PerformanceOptimizedMixedPrecisionTrainer,
)
from hf_amp.fallback.speed import TIMED_STEPS, WARMUP_STEPS
from hf_amp.hardware import probe

WIDTH = 256
"""Rows and columns of every product: without units a half product takes many times as long as one in FP32."""


def choices() -> dict[str, Any]:
    """Name of a trainer → the precision at its end, and what its events say."""
    chosen = {}
    for kind in (DynamicMixedPrecisionTrainer, PerformanceOptimizedMixedPrecisionTrainer):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        trainer = kind(MixedPrecisionConfig(emulate=False, init_scale=1024.0), loss_fn=mse_loss)
        batch = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)
        for _ in range(3 * (WARMUP_STEPS + TIMED_STEPS) + 2):
            trainer.train_step(batch, model, optimizer)
        told = [event.message for event in trainer.session.events]
        chosen[kind.__name__] = {"precision": trainer.session.plan.default.value, "told": told}
    return chosen


if __name__ == "__main__":
    print(json.dumps({"hardware": asdict(probe("cpu")), "choices": choices()}))
