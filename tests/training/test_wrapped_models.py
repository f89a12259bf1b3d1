"""The manager on models that others have wrapped: DataParallel, DistributedDataParallel, an Accelerator's."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import hf_amp
from hf_amp import (
    AdvancedMixedPrecisionManager,
    AttachError,
    ConfigError,
    MixedPrecisionConfig,
    StandardMixedPrecisionTrainer,
)
from tests.forking import told_by_ranks
from tests.reference import assert_bitwise_equal
from tests.training.loops import FaultyMlp, parameters_of, vectors


@pytest.fixture(scope="module")
def ranks():
    """What each of two processes saw, by run."""
    return told_by_ranks("tests.training.ddp_worker")


def test_two_ranks_stay_one(ranks):
    """An overflow and a NaN loss on rank 0 alone: both ranks skip the same steps, for the same cause, by the same scale,
    and end with the same parameters. Gradients are reduced with every micro-batch."""
    first, second = (seen["usual"] for seen in ranks)
    assert first == second
    assert (first["applied"], first["skipped"]) == (4, 2)
    assert [step for step, _ in first["events"]] == [2, 4]
    assert all(math.isfinite(value) for value in first["parameters"])
    assert first["reductions"] == 12


def test_friendly_accumulation_reduces_once_a_step(ranks):
    """Windows of two: 6 reductions where the default has 12, and the same parameters to rounding."""
    first, second = (seen["friendly"] for seen in ranks)
    usual = ranks[0]["usual"]
    assert first == second
    assert first["reductions"] == 6
    assert first["parameters"] == pytest.approx(usual["parameters"], rel=1e-4)


def test_ranks_retry_together(ranks):
    """on_overflow="retry": the step that overflowed on rank 0 is run again on both, and applied."""
    first, second = (seen["retry"] for seen in ranks)
    assert first == second
    assert first["applied"] >= 5


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="several GPUs share a batch")
def test_data_parallel_is_the_model_inside():
    """Without several GPUs DataParallel calls its model: bitwise the same run, modules named without `module.`."""
    runs = []
    for wrap in (lambda model: model, nn.DataParallel):
        model = FaultyMlp({2: "overflow"}).to("cuda" if torch.cuda.is_available() else "cpu")
        wrapped = wrap(model)
        manager = AdvancedMixedPrecisionManager(
            MixedPrecisionConfig(distributed_amp=True, init_scale=256.0), loss_fn=mse_loss
        )
        epoch = manager.train_epoch(vectors(4), wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))
        assert (epoch["applied_steps"], epoch["skipped_steps"]) == (3, 1)
        manager.cleanup()
        runs.append(parameters_of(model))
    assert_bitwise_equal(*runs)


class Gathering(nn.DataParallel):
    """Stands for several GPUs: gives one loss a device, as DataParallel gathers them."""

    def forward(self, *arguments):
        return torch.stack([self.module(*arguments), self.module(*arguments)])


def test_losses_of_several_devices_are_averaged():
    """A vector of losses is what DataParallel gathers: the mean is trained on."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (self.weight * x).mean()

    model = Gathering(Loss())
    trainer = StandardMixedPrecisionTrainer()
    result = trainer.train_step(torch.full((3,), 2.0), model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert result["loss"].item() == 2.0


@pytest.mark.gpu
def test_data_parallel_on_gpus():
    """On CUDA the replicas run in the precision of the plan, and losses are gathered and averaged; so are figures by module."""
    model = nn.DataParallel(FaultyMlp().cuda())
    config = MixedPrecisionConfig(monitor_modules=True, monitoring_interval=1)
    manager = AdvancedMixedPrecisionManager(config, loss_fn=mse_loss)
    epoch = manager.train_epoch(vectors(8), model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert epoch["applied_steps"] > 0
    assert "normalise" in manager.trainer.session.module_metrics()["module_activation_amax"]


# ---- accelerate ---------------------------------------------------------------------------------------------


@pytest.fixture
def make_accelerator():
    """Accelerators on the CPU; accelerate's own global state is gone afterwards."""

    def make(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def prepared(accelerator, faults=None, batches=6):
    model = FaultyMlp(faults)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    loader = DataLoader(vectors(batches), batch_size=None)
    return (model, *accelerator.prepare(model, optimizer, schedule, loader))


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16", "no"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_accelerator_is_followed(make_accelerator, mixed_precision, accumulate):
    """Precision, accumulation and scaler are the Accelerator's; a skip holds its schedule back; cleanup gives it back."""
    accelerator = make_accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate)
    former = accelerator.scaler
    _, model, optimizer, schedule, loader = prepared(accelerator, {accumulate + 1: "overflow"})
    config = MixedPrecisionConfig(init_scale=256.0)
    manager = AdvancedMixedPrecisionManager(config, loss_fn=mse_loss, accelerator=accelerator, clip_norm=1.0)
    epoch = manager.train_epoch(loader, model, optimizer, scheduler=schedule)
    steps = 6 // accumulate
    assert (epoch["batches"], epoch["applied_steps"], epoch["skipped_steps"]) == (6, steps - 1, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (steps - 1))
    assert manager.trainer.performance_tracker.get_stats()["steps"] == steps
    assert math.isfinite(manager.validate_epoch(loader, model)["loss"])
    manager.cleanup()
    assert accelerator.scaler is former
    hf_amp.attach(accelerator).detach()  # nobody is attached any more


def test_with_an_accelerator_it_is_the_loop_of_accelerate(make_accelerator):
    """Parameters are bitwise those of `backward`, `clip_grad_norm_`, `step` by hand under `attach`."""
    results = []
    for by_hand in (True, False):
        accelerator = make_accelerator(mixed_precision="fp16")
        inner, model, optimizer, _, loader = prepared(accelerator)
        config = MixedPrecisionConfig(init_scale=256.0)
        if by_hand:
            with hf_amp.attach(accelerator, config):
                for x, y in loader:
                    optimizer.zero_grad()
                    accelerator.backward(mse_loss(model(x), y))
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
        else:
            with AdvancedMixedPrecisionManager(
                config, loss_fn=mse_loss, accelerator=accelerator, clip_norm=1.0
            ) as manager:
                manager.train_epoch(loader, model, optimizer)
        results.append(parameters_of(inner))
    assert_bitwise_equal(*results)


def test_a_session_of_ones_own_is_used_and_left(make_accelerator):
    """Where hf_amp is attached already, that session tells of the steps, and cleanup leaves it in place."""
    accelerator = make_accelerator(mixed_precision="fp16")
    _, model, optimizer, _, loader = prepared(accelerator)
    with hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=256.0)) as session:
        with AdvancedMixedPrecisionManager(loss_fn=mse_loss, accelerator=accelerator) as manager:
            manager.train_epoch(loader, model, optimizer)
        assert manager.trainer.session is session
        assert session.metrics()["applied_steps"] == 6
        assert accelerator.scaler is session.scaler


def test_prepared_and_plain_do_not_mix(make_accelerator):
    """An optimizer of accelerate's without accelerator=, and a plain one with it, are refused with what to do."""
    accelerator = make_accelerator(mixed_precision="fp16")
    inner, model, optimizer, _, loader = prepared(accelerator)
    with pytest.raises(AttachError, match="pass accelerator="):
        AdvancedMixedPrecisionManager(loss_fn=mse_loss).train_epoch(loader, model, optimizer)
    with AdvancedMixedPrecisionManager(loss_fn=mse_loss, accelerator=accelerator) as manager:
        plain = torch.optim.SGD(inner.parameters(), lr=0.1)
        with pytest.raises(AttachError, match=r"accelerator\.prepare\(\)"):
            manager.train_epoch(loader, model, plain)


def test_accumulation_is_the_accelerators(make_accelerator):
    """The trainer's own number of steps is refused beside an Accelerator, with where to set it."""
    with pytest.raises(ConfigError, match=r"Accelerator\(gradient_accumulation_steps="):
        StandardMixedPrecisionTrainer(accelerator=make_accelerator(), accumulation_steps=2)


def test_what_needs_an_accelerator_is_not_ignored():
    """Half-precision communication is refused without one, with what to do instead."""
    config = MixedPrecisionConfig(distributed_amp=True, communication_precision="BF16")
    with pytest.raises(ConfigError, match=r"register_comm_hook.*accelerator="):
        StandardMixedPrecisionTrainer(config)
