"""The trainers on a GPU: batches come to it, a retried step draws the same dropout, memory is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from hf_amp import AdvancedMixedPrecisionManager, MixedPrecisionConfig, StandardMixedPrecisionTrainer
from tests.reference import assert_bitwise_equal, snapshot
from tests.training.loops import FaultyMlp, parameters_of, vectors

pytestmark = pytest.mark.gpu


def train(faults: dict[int, str], **options: Any) -> tuple[list[torch.Tensor], StandardMixedPrecisionTrainer]:
    """Six steps with dropout and batch statistics. Parameters, buffers and AdamW state, and the trainer."""
    torch.manual_seed(0)
    model = FaultyMlp(faults, dropout=0.3).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = MixedPrecisionConfig(init_scale=64.0, min_scale=64.0, **options)
    trainer = StandardMixedPrecisionTrainer(config, loss_fn=mse_loss, on_overflow="retry")
    for batch in vectors(6):
        trainer.train_step(batch, model, optimizer)
    return [*parameters_of(model), *snapshot(model, optimizer)], trainer


@pytest.mark.parametrize("mode", ["FP32", "MIXED"])
def test_a_retried_run_is_an_unfailed_run(mode: str) -> None:
    """To the last bit: the generator of the device was put back before the step was run again."""
    (failed, trainer), (unfailed, _) = (train({2: "overflow"}, precision_mode=mode), train({}, precision_mode=mode))
    assert (trainer.scaler.applied_steps, trainer.scaler.skipped_steps) == (6, 1)
    assert_bitwise_equal(failed, unfailed)


@pytest.mark.parametrize("strategy", ["DYNAMIC", "PERFORMANCE_OPTIMIZED"])
def test_an_epoch_and_its_figures(strategy: str) -> None:
    """Batches from the CPU, a model on the GPU: the steps are applied, and time and memory are the device's."""
    torch.manual_seed(0)
    model = FaultyMlp().cuda()
    config = MixedPrecisionConfig(scaling_strategy=strategy, init_scale=256.0)
    manager = AdvancedMixedPrecisionManager(config, loss_fn=mse_loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    epochs = [manager.train_epoch(vectors(8), model, optimizer) for _ in range(5)]
    assert [epoch["applied_steps"] for epoch in epochs] == [8] * 5
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    stats = manager.get_training_stats()
    assert stats["performance_stats"]["clock"] == "device"
    assert stats["performance_stats"]["steps"] == 40
    assert -1 < stats["precision_stats"]["avg_memory_savings"] < 1
    manager.cleanup()
