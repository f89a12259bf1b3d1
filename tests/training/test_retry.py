"""`on_overflow="retry"`: a skipped step is run again with the same data, and no data is lost."""

from __future__ import annotations

import weakref
from statistics import median

import pytest
import torch
from torch.nn.functional import mse_loss

from hf_amp import Cause, ConfigError, EventKind, MixedPrecisionConfig, StandardMixedPrecisionTrainer
from tests.each import for_each
from tests.reference import assert_bitwise_equal, snapshot
from tests.training.loops import FaultyMlp, parameters_of, vectors


def train(faults, *, on_overflow="retry", steps=6, accumulate=1, init_scale=1024.0, **options):
    """A run with dropout and batch statistics. Returns model, optimizer, results and trainer."""
    torch.manual_seed(0)
    model = FaultyMlp(faults, dropout=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = MixedPrecisionConfig(init_scale=init_scale, **options)
    trainer = StandardMixedPrecisionTrainer(
        config, loss_fn=mse_loss, on_overflow=on_overflow, accumulation_steps=accumulate
    )
    results = [trainer.train_step(batch, model, optimizer) for batch in vectors(steps)]
    return model, optimizer, results, trainer


@for_each("accumulate", [1, 3])
@for_each("mode", ["FP32", "MIXED"])
def test_a_retried_run_is_an_unfailed_run(mode, accumulate):
    """Overflows in two steps, with dropout and batch norm: parameters, running statistics and AdamW state to the last bit.

    In FP16 the scale stands at the floor from the start, so that both runs round alike.
    """
    options = {"precision_mode": mode, "accumulate": accumulate, "init_scale": 64.0, "min_scale": 64.0}
    # The step that fails, its retry, and what a look for the cause calls, count as calls of the forward.
    failed = train({2: "overflow"} if accumulate == 1 else {3: "overflow"}, **options)
    unfailed = train({}, **options)
    assert sum(result["retries"] for result in failed[2]) == 1
    assert failed[3].scaler.skipped_steps == 1
    assert_bitwise_equal(parameters_of(failed[0]), parameters_of(unfailed[0]))
    assert_bitwise_equal(snapshot(*failed[:2]), snapshot(*unfailed[:2]))
    assert_bitwise_equal(*([result["loss"] for result in run[2]] for run in (failed, unfailed)))


def test_skipping_loses_the_batch():
    """The same with "skip", the default: the run differs, so the test above can fail."""
    failed, unfailed = (train(faults, on_overflow="skip", precision_mode="FP32") for faults in ({2: "overflow"}, {}))
    assert not torch.equal(failed[0].layers[0].weight, unfailed[0].layers[0].weight)


def test_a_retry_goes_on_until_the_scale_fits():
    """The first step at 2^100, far beyond FP16: 32 retries at most, all of them told; the batch is applied if one fits."""
    _, _, results, trainer = train({}, steps=1, init_scale=2.0**30)
    assert 1 < results[0]["retries"] <= 32
    assert results[0]["skipped"] is False
    skips = [event for event in trainer.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert len(skips) == results[0]["retries"] == trainer.scaler.skipped_steps
    assert trainer.scaler.applied_steps == 1


def test_outliers_lose_no_batch_and_need_no_room():
    """Losses 64 times as large every 50 steps, ADAPTIVE without room for them: each is run again, none is skipped, and
    between them the scale is at least four times what it is with the room that is kept by default."""

    def outlier(outputs, targets):
        return 64.0 * mse_loss(outputs, targets)

    middle = {}
    for headroom, budget in ((64.0, 1e-3), (1.0, 0.1)):
        torch.manual_seed(0)
        model = FaultyMlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        config = MixedPrecisionConfig(scaling_strategy="ADAPTIVE", overflow_budget=budget, outlier_headroom=headroom)
        trainer = StandardMixedPrecisionTrainer(config, loss_fn=mse_loss, on_overflow="retry")
        results = [
            trainer.train_step(batch, model, optimizer, outlier if step % 50 == 0 else None)
            for step, batch in enumerate(vectors(200), start=1)
        ]
        assert not any(result["skipped"] for result in results)
        middle[headroom] = median(result["scale"] for result in results)
    assert sum(result["retries"] for result in results) >= 4  # of the run without room
    assert middle[1.0] >= 4 * middle[64.0]


def test_what_no_scale_cures_is_not_retried():
    """A NaN in the batch: told as INPUT, skipped once, not run again."""
    torch.manual_seed(0)
    model = FaultyMlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = StandardMixedPrecisionTrainer(loss_fn=mse_loss, on_overflow="retry")
    x, y = vectors(1)[0]
    x[0, 0] = torch.nan
    result = trainer.train_step((x, y), model, optimizer)
    assert (result["skipped"], result["cause"], result["retries"]) == (True, Cause.INPUT, 0)


def test_retry_needs_a_verdict_in_the_step():
    """With PERFORMANCE_OPTIMIZED the batch is gone when the verdict comes: refused, with what to do."""
    with pytest.raises(ConfigError, match="use ADAPTIVE, or leave on_overflow out"):
        StandardMixedPrecisionTrainer(
            MixedPrecisionConfig(scaling_strategy="PERFORMANCE_OPTIMIZED"), on_overflow="retry"
        )


def test_out_of_memory_that_no_plan_has_caused_is_the_users():
    """It is raised as it came, with gradients cleared; the next step trains."""
    model = FaultyMlp({2: "out of memory"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = StandardMixedPrecisionTrainer(MixedPrecisionConfig(init_scale=64.0), loss_fn=mse_loss)
    batches = vectors(3)
    trainer.train_step(batches[0], model, optimizer)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        trainer.train_step(batches[1], model, optimizer)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert trainer.train_step(batches[2], model, optimizer)["skipped"] is False


class Wide(torch.nn.Module):
    """Two layers whose product leaves FP16, and which runs out of memory in FP32 when it is told to."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 3, bias=False)
        torch.nn.init.constant_(self.first.weight, 300.0)
        torch.nn.init.constant_(self.second.weight, 300.0)
        self.has_room = True
        self.failed = lambda: None
        self.first.register_forward_hook(self._check)

    def _check(self, module, arguments, output):
        assert self.failed() is None, "what the failed pass has stored is still there"
        upcast = len(module._forward_hooks) > 1 or len(self.second._forward_hooks) > 0
        if upcast and not self.has_room:
            self.has_room = True
            self.failed = weakref.ref(output)
            raise torch.OutOfMemoryError("no room for FP32")

    def forward(self, x):
        return self.second(self.first(x)) / 1e6


@pytest.mark.parametrize("has_room", [True, False])
def test_out_of_memory_under_a_wider_plan_takes_the_plan_back(has_room):
    """An activation overflow widens the plan; where memory does not suffice, the plan goes back and the step is run again.

    By then all memory of the pass that failed is free.
    """
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = StandardMixedPrecisionTrainer(MixedPrecisionConfig(init_scale=2.0), loss_fn=mse_loss)
    batch = (torch.ones(2, 4), torch.zeros(2, 3))
    first = trainer.train_step(batch, model, optimizer)
    assert (first["skipped"], first["cause"]) == (True, Cause.ACTIVATION)
    assert trainer.session.plan.modules
    model.has_room = has_room
    second = trainer.train_step(batch, model, optimizer)
    assert bool(trainer.session.plan.modules) is has_room
    assert second["skipped"] is not has_room
    stats = trainer.precision_monitor.get_precision_stats()
    assert stats["fallback_count"] == 1
    assert stats["fp16_usage_rate"] < 1.0 if has_room else stats["fp16_usage_rate"] == 1.0
