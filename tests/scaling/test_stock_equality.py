"""DYNAMIC at stock settings is `torch.amp.GradScaler`, to the last bit."""

from __future__ import annotations

import random

import pytest
import torch

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from tests.each import for_each
from tests.reference import adamw, assert_bitwise_equal, losses, snapshot, tiny_mlp

STEPS = 300


@pytest.mark.parametrize(
    ("fused", "clip", "interval"),
    [(False, None, 5), (True, None, 2000), (False, 0.05, 2000), (True, 0.05, 5)],
    ids=["plain", "fused", "plain, clipped", "fused, clipped"],
)
def test_trajectory_is_the_stock_scalers(fused: bool, clip: float | None, interval: int) -> None:
    """Over 300 random steps with 10% overflows: same scale, parameters and AdamW state after every step."""
    dice = random.Random(interval)
    overflowing = {step for step in range(STEPS) if dice.random() < 0.1}
    assert 20 < len(overflowing) < 40
    config = MixedPrecisionConfig(growth_interval=interval)
    scalers = [torch.amp.GradScaler("cpu", growth_interval=interval), AdvancedGradScaler(config, "cpu")]
    models = [tiny_mlp(), tiny_mlp()]
    optimizers = [adamw(model, fused) for model in models]
    streams = [losses(model, STEPS, overflowing.__contains__) for model in models]
    for step_losses in zip(*streams, strict=True):
        for loss, scaler, model, optimizer in zip(step_losses, scalers, models, optimizers, strict=True):
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_bitwise_equal(*map(snapshot, models, optimizers))
    assert scalers[1].skipped_steps == len(overflowing)
    assert scalers[1].applied_steps == STEPS - len(overflowing)


@for_each("direction", ["stock to ours", "ours to stock"])
@for_each("after_first_step", [False, True])
def test_checkpoints_move_both_ways(direction: str, after_first_step: bool) -> None:
    """Either class continues from the other's state, before lazy initialisation and after it."""
    options = {"init_scale": 64.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 7}
    stock = torch.amp.GradScaler("cpu", **options)
    ours = AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")
    source, target = (stock, ours) if direction == "stock to ours" else (ours, stock)
    model = tiny_mlp()
    optimizer = adamw(model, fused=False)
    for loss in losses(model, 3, lambda step: step == 1) if after_first_step else ():
        source.scale(loss).backward()
        source.step(optimizer)
        source.update()
        optimizer.zero_grad()
    fresh = AdvancedGradScaler(MixedPrecisionConfig(), "cpu") if target is ours else torch.amp.GradScaler("cpu")
    fresh.load_state_dict(source.state_dict())
    stock_keys = ["scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"]
    assert {k: fresh.state_dict()[k] for k in stock_keys} == {k: source.state_dict()[k] for k in stock_keys}
    assert fresh.get_scale() == source.get_scale()


@for_each("interval", [3, 6, 7, 20])
def test_a_growth_interval_set_later_acts_as_in_the_stock_class(interval: int) -> None:
    """After 5 clean steps: one that is behind the tracker takes effect after the next overflow alone, which is in step 13."""
    options = {"init_scale": 64.0, "growth_interval": 10}
    scalers = [torch.amp.GradScaler("cpu", **options), AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")]
    scales: list[list[float]] = [[], []]
    for scaler, seen in zip(scalers, scales, strict=True):
        model = tiny_mlp()
        optimizer = adamw(model, fused=False)
        for step, loss in enumerate(losses(model, 24, lambda step: step == 12)):
            if step == 5:
                scaler.set_growth_interval(interval)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append(scaler.get_scale())
    assert scales[0] == scales[1]
    assert max(scales[0]) > 64.0 or interval == 20


def test_is_a_grad_scaler() -> None:
    """Code that asks `isinstance(scaler, torch.amp.GradScaler)` is content."""
    assert isinstance(AdvancedGradScaler(), torch.amp.GradScaler)
