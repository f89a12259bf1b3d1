"""Models beyond the range of FP16, trained in it: with hf_amp, with the stock scaler, and in FP32 as the reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from accelerate import Accelerator
from torch import nn

import hf_amp
from hf_amp import AmpSession, MixedPrecisionConfig
from hf_amp.emulation import EmulatedPrecision
from tests.fallback.rescaled import ZOO, RescaledModel

STEPS = 200
BY_NAME = {entry.name: entry for entry in ZOO}


@dataclass
class Run:
    """A training run, and what is left of it."""

    losses: list[float]
    model: nn.Module
    session: AmpSession

    @property
    def final_loss(self) -> float:
        """Mean of the last 20 steps."""
        return sum(self.losses[-20:]) / 20


def train(entry: RescaledModel, steps: int, precision: str = "fp16", **options: object) -> Run:
    """A raw Accelerate loop that tries a skipped batch again, so that the data of `steps` FP32 steps is learned."""
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(**options))
    plain, batches, make_optimizer = entry.build(0)
    model, optimizer = accelerator.prepare(plain, make_optimizer(plain))
    losses = []
    batch = next(batches)
    while len(losses) < steps:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            losses.append(loss.item())
            batch = next(batches)
    return Run(losses, plain, session)


@cache
def final_loss_in_fp32(name: str, steps: int = STEPS) -> float:
    """Of the same run without hf_amp."""
    entry = BY_NAME[name]
    model, batches, make_optimizer = entry.build(0)
    optimizer = make_optimizer(model)
    losses = []
    for _ in range(steps):
        loss = model(**next(batches)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def outermost(names: Iterable[str]) -> set[str]:
    """Those that are not inside of another one."""
    held = set(names)
    return {n for n in held if not any(n != other and n.startswith(f"{other}.") for other in held)}


def stock_skips(entry: RescaledModel, steps: int) -> int:
    """Steps that the stock scaler skips in the same emulated FP16."""
    model, batches, make_optimizer = entry.build(0)
    optimizer, scaler, skipped = make_optimizer(model), torch.amp.GradScaler("cpu"), 0
    for _ in range(steps):
        with EmulatedPrecision():
            loss = model(**next(batches)).loss
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
    return skipped
