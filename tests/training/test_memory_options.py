"""`memory_efficient` and `gradient_accumulation_friendly` do what their docstrings say, and change no result."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp import AdvancedMixedPrecisionManager, MixedPrecisionConfig, StandardMixedPrecisionTrainer
from tests.reference import assert_bitwise_equal
from tests.training.loops import vectors


class ParameterCasts(TorchDispatchMode):
    """Counts the casts of one model's parameters, and how many of them are alive at most."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = {parameter.data_ptr() for parameter in model.parameters()}
        self.counts: Counter[int] = Counter()
        self._results: list[Any] = []
        self.most_alive = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._parameters:
            self.counts[args[0].data_ptr()] += 1
            self._results.append(torch.multiprocessing.reductions.StorageWeakRef(result.untyped_storage()))
        alive = sum(not reference.expired() for reference in self._results)
        self.most_alive = max(self.most_alive, alive)
        return result


def network() -> nn.Module:
    """Four layers of equal size."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))


def epoch(**options):
    """Eight batches in two windows. Returns the model, its casts and the manager."""
    model = network()
    config = MixedPrecisionConfig(precision_mode="BF16", enable_monitoring=False, **options)
    manager = AdvancedMixedPrecisionManager(
        config, loss_fn=lambda outputs, targets: mse_loss(outputs.float(), targets), accumulation_steps=4
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ParameterCasts(model) as casts:
        manager.train_epoch(vectors(8), model, optimizer)
    return model, casts, manager


def test_parameters_are_cast_once_a_window():
    """Two windows of four batches: every parameter is cast twice, by default eight times; parameters end up equal."""
    usual, friendly = epoch(), epoch(gradient_accumulation_friendly=True)
    assert set(usual[1].counts.values()) == {8}
    assert set(friendly[1].counts.values()) == {2}
    assert_bitwise_equal(list(usual[0].parameters()), list(friendly[0].parameters()))


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_evaluation_keeps_no_casts(memory_efficient):
    """Without gradients: at most two casts (one layer's) are alive at a time, by default those of all four layers."""
    model = network()
    config = MixedPrecisionConfig(precision_mode="BF16", memory_efficient=memory_efficient)
    trainer = StandardMixedPrecisionTrainer(config, loss_fn=mse_loss)
    with torch.no_grad(), ParameterCasts(model) as casts:
        trainer.evaluate(vectors(1)[0], model)
    assert casts.most_alive == (2 if memory_efficient else 8)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_gradients_are_freed_right_after_the_step(memory_efficient):
    """No gradient is left between steps, by default they all are; parameters end up equal either way."""
    model, _, _ = epoch(memory_efficient=memory_efficient)
    assert [parameter.grad is None for parameter in model.parameters()] == [memory_efficient] * 8
    assert_bitwise_equal(list(model.parameters()), list(epoch()[0].parameters()))


def test_memory_comes_before_fewer_casts():
    """With both options nothing is kept over a window."""
    _, casts, _ = epoch(memory_efficient=True, gradient_accumulation_friendly=True)
    assert set(casts.counts.values()) == {8}


def test_no_autocast_region_is_left_open():
    """After an epoch, and after one that fails in the middle of a window, a weight that changes is cast anew."""
    model, _, manager = epoch(gradient_accumulation_friendly=True)
    with pytest.raises(TypeError):
        manager.train_epoch([vectors(1)[0], (None, None)], model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.ones(1, 4)
    outputs = []
    for value in (1.0, 2.0):
        nn.init.constant_(model[0].weight, value)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(model[0](x))
    assert not torch.equal(*outputs)
