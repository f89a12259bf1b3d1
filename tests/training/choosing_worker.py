"""Trains a GPT-2 on real text with both trainers that choose a precision, and prints what they chose as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from hf_amp import DynamicMixedPrecisionTrainer, MixedPrecisionConfig, PerformanceOptimizedMixedPrecisionTrainer
from hf_amp.device import probe
from hf_amp.fallback.controller import TIMED_STEPS, WARMUP_STEPS
from tests.reference import adamw
from tests.training.loops import real_text, small_gpt2


def choices() -> dict[str, Any]:
    """Name of a trainer → the precision at its end, and what its events say."""
    chosen = {}
    for kind in (DynamicMixedPrecisionTrainer, PerformanceOptimizedMixedPrecisionTrainer):
        torch.manual_seed(0)
        model = small_gpt2()
        optimizer = adamw(model, fused=True)
        trainer = kind(MixedPrecisionConfig(emulate=False))
        for batch in real_text(3 * (WARMUP_STEPS + TIMED_STEPS + 2) + 2, batch=16):
            trainer.train_step(batch, model, optimizer)
        reported = [event.message for event in trainer.session.events]
        chosen[kind.__name__] = {"precision": trainer.session.plan.default.value, "told": reported}
    return chosen


if __name__ == "__main__":
    print(json.dumps({"hardware": asdict(probe("cpu")), "choices": choices()}))
