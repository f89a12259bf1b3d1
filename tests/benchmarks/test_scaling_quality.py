"""Skipped steps, underflow and final loss of every scaling rule on real text in emulated FP16, with outlier batches.

`python -m tests.benchmarks.test_scaling_quality --out tests/benchmarks/results`
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from hf_amp.cli.demo_model import help_topics
from hf_amp.emulation import EmulatedPrecision
from hf_amp.precision import FP16_FORMAT
from tests.benchmarks.measuring import write
from tests.benchmarks.scaling_rules import HistogramRule, HysteresisRule, LogMaxRule, Oracle, RuleScaler

OUTLIER_EVERY, OUTLIER_FACTOR = 100, 64.0
SEQUENCE, BATCH = 64, 8


def ours(strategy: str) -> Callable[[], Any]:
    return lambda: AdvancedGradScaler(MixedPrecisionConfig(scaling_strategy=strategy), "cpu")


SCALERS: dict[str, Callable[[], Any] | None] = {
    "FP32": None,
    "stock GradScaler": lambda: torch.amp.GradScaler("cpu"),
    "hf_amp CONSTANT": ours("CONSTANT"),
    "hf_amp DYNAMIC": ours("DYNAMIC"),
    "hf_amp ADAPTIVE": ours("ADAPTIVE"),
    "hf_amp PERFORMANCE_OPTIMIZED": ours("PERFORMANCE_OPTIMIZED"),
    "DeepSpeed's rule": lambda: RuleScaler(HysteresisRule(2.0**16), 2.0**16),
    "Megatron's rule": lambda: RuleScaler(HysteresisRule(2.0**32), 2.0**32),
    "LogMax": lambda: RuleScaler(LogMaxRule(2.0**16), 2.0**16),
    "Graphcore ALS": lambda: RuleScaler(HistogramRule(2.0**16), 2.0**16),
    "oracle: largest scale at which an outlier would not overflow": lambda: Oracle(OUTLIER_FACTOR, 2.0**16),
}


def model_and_batches(steps: int) -> tuple[GPT2LMHeadModel, torch.Tensor]:
    """A GPT-2 of 0.12M parameters over bytes, and one batch of real text a step; the same for every scaler."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=SEQUENCE, n_embd=64, n_layer=2, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    blocks = torch.tensor(help_topics()["input_ids"][:])[:, :SEQUENCE]
    chosen = torch.randint(len(blocks), (steps, BATCH), generator=torch.Generator().manual_seed(1))
    return model, blocks[chosen]


def train(make_scaler: Callable[[], Any] | None, steps: int) -> dict[str, float]:
    """One run. Returns skipped steps, mean underflow fraction, final loss (mean of the last 50), final scale."""
    model, batches = model_and_batches(steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    scaler = make_scaler() if make_scaler else AdvancedGradScaler(MixedPrecisionConfig(enabled=False))
    if isinstance(scaler, Oracle):
        scaler.parameters = list(model.parameters())
    losses, underflow, skipped = [], [], 0
    for step, batch in enumerate(batches):
        with EmulatedPrecision() if make_scaler else nullcontext():
            loss = model(input_ids=batch, labels=batch).loss
        losses.append(loss.item())
        outlier = (step + 1) % OUTLIER_EVERY == 0
        optimizer.zero_grad()
        scaled = scaler.scale(loss)
        (scaled * OUTLIER_FACTOR if outlier else scaled).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        if not gradients.isfinite().all():
            skipped += 1
        elif step % 10 == 5 and make_scaler:
            underflow.append((gradients.abs() < FP16_FORMAT.smallest_normal).float().mean().item())
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return {
        "skipped_steps": skipped,
        "underflow_fraction": round(statistics.mean(underflow), 5) if underflow else 0.0,
        "final_loss": round(statistics.mean(losses[-50:]), 4),
        "final_scale": scaler.get_scale(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    results = {}
    for name, make_scaler in SCALERS.items():
        results[name] = train(make_scaler, options.steps)
        print(f"{name:60} {results[name]}", flush=True)
    write("scaling_quality", {"steps": options.steps, "results": results}, options.out)


def test_every_scaler_trains() -> None:
    """The benchmark itself is sound: ten steps of each scaler end with a finite loss."""
    for make_scaler in SCALERS.values():
        assert 0 < train(make_scaler, 12)["final_loss"] < 10


if __name__ == "__main__":
    main()
