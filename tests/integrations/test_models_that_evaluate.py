"""Models that are prepared in evaluation mode beside the one that is trained, as reference models, teachers and rewards are."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hf_amp
from hf_amp import AmpEvent, Cause, EventKind, MixedPrecisionCallback, MixedPrecisionConfig
from hf_amp.fallback.recorder import KEPT_EVALUATIONS
from tests.each import for_each
from tests.integrations.trainers import numbers, regression_trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
X = torch.linspace(-1, 1, 24).reshape(3, 8) + 0.01
GAIN = 2.0**24


class Network(nn.Module):
    """Two layers; with `gain`, the output of the first is too large for FP16, and brought back before the second."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x * self.gain).float() / self.gain))


class Distillation:
    """A raw Accelerate loop: the trained model follows another one, which is prepared first, as TRL does."""

    def __init__(self, precision: str, trained: nn.Module, reference: nn.Module, **options: Any) -> None:
        self.accelerator = Accelerator(mixed_precision=precision, cpu=True)
        self.session = hf_amp.attach(self.accelerator, MixedPrecisionConfig(**options))
        self.reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        self.trained, self.optimizer = self.accelerator.prepare(trained, optimizer)

    def step(self, batch: Tensor = X) -> None:
        with torch.no_grad():
            target = self.reference(batch).float()
        self.accelerator.backward((self.trained(batch).float() - target).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reported(self, kind: EventKind) -> list[AmpEvent]:
        return [event for event in self.session.events if event.kind is kind]


def test_the_trained_model_is_the_first_whatever_was_prepared_before() -> None:
    """Its modules have no prefix, and its parameters alone are the run's."""
    loop = Distillation("fp16", Network(GAIN), Network())
    loop.step()
    assert [event.modules for event in loop.reported(EventKind.STEP_SKIPPED)] == [("first",)]
    loop.reference.first.weight.data[0, 0] = torch.nan
    assert loop.session.non_finite_parameters() == []
    loop.trained.first.weight.data[0, 0] = torch.nan
    assert loop.session.non_finite_parameters() == ["first.weight"]


@pytest.mark.parametrize("gain", [1.0, GAIN])
def test_a_reference_that_overflows_is_named_and_runs_in_fp32(gain: float) -> None:
    """ACTIVATION, not a fault of the loss; after one skipped step for each model that overflows the run learns."""
    loop = Distillation("fp16", Network(gain), Network(GAIN))
    for _ in range(4):
        loop.step()
    skips = loop.reported(EventKind.STEP_SKIPPED)
    expected = [("eval_model_1.first",)] if gain == 1 else [("first",), ("eval_model_1.first",)]
    assert [(skip.cause, skip.modules) for skip in skips] == [(Cause.ACTIVATION, m) for m in expected]
    assert loop.session.metrics()["applied_steps"] == 4 - len(expected)
    assert loop.reference(X).isfinite().all()


def test_what_a_reference_gave_before_it_ran_in_fp32_is_told_as_that() -> None:
    """As in GRPO, which takes what the reference gives for several steps: no fault of the loss, no further change, and
    the scale stays."""
    loop = Distillation("fp16", Network(), Network(GAIN))
    with torch.no_grad():
        target = loop.reference(X)
    for _ in range(2):
        loop.accelerator.backward((loop.trained(X) - target).square().mean())
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    loop.step()
    skips = loop.reported(EventKind.STEP_SKIPPED)
    causes = [(skip.cause, skip.modules) for skip in skips]
    assert causes == [(Cause.ACTIVATION, ("eval_model_1.first",)), (Cause.ACTIVATION, ())]
    assert {skip.after for skip in skips} == {skips[0].before}
    assert len(loop.reported(EventKind.PRECISION_CHANGED)) == 1


@for_each("precision", ["fp16", "bf16", "no"])
def test_a_reference_whose_weights_are_not_finite_is_told(precision: str) -> None:
    """WEIGHTS, of the reference; the run is stalled, and the trained model's precision stays."""
    reference = Network()
    reference.last.bias.data[0] = torch.inf
    loop = Distillation(precision, Network(), reference)
    before = loop.session.plan
    loop.step()
    loop.step()
    assert [skip.cause for skip in loop.reported(EventKind.STEP_SKIPPED)] == [Cause.WEIGHTS] * 2
    assert "eval_model_1.last.bias" in loop.reported(EventKind.STEP_SKIPPED)[0].message
    assert len(loop.reported(EventKind.STALLED)) == 1
    assert loop.session.plan == before


class DividedByZero(nn.Module):
    """Not finite in any precision."""

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.zeros(())


@for_each("precision", ["fp16", "bf16", "no"])
def test_a_reference_that_is_not_finite_in_fp32_either_is_named(precision: str) -> None:
    """UNKNOWN, and where to look: a fault of the reference, not of the loss."""
    loop = Distillation(precision, Network(), nn.Sequential(nn.Linear(8, 4), DividedByZero()))
    loop.step()
    (skip,) = loop.reported(EventKind.STEP_SKIPPED)
    assert skip.cause is Cause.MODEL
    assert skip.modules == ("eval_model_1.1",)


def test_a_fault_of_the_loss_stays_one() -> None:
    """A sound reference takes no blame from a loss that divides by zero."""
    loop = Distillation("fp16", Network(), Network())
    with torch.no_grad():
        target = loop.reference(X)
    loop.accelerator.backward((loop.trained(X) - target).mean() / torch.zeros(()))
    loop.optimizer.step()
    assert [skip.cause for skip in loop.reported(EventKind.STEP_SKIPPED)] == [Cause.LOSS]


@for_each("precision", ["fp16", "bf16"])
@for_each("trained", [torch.float32, torch.float16])
def test_half_parameters_that_nobody_trains_are_left_alone(precision: str, trained: torch.dtype) -> None:
    """They are not made FP32: those of the trained model alone are, and in BF16, where they train, nothing is."""
    loop = Distillation(precision, Network().to(trained), Network().half())
    assert {p.dtype for p in loop.reference.parameters()} == {torch.float16}
    reported = loop.reported(EventKind.PARAMETERS_CONVERTED)
    assert len(reported) == (trained is torch.float16 and precision == "fp16")
    assert all(event.figures["parameters"] == 4 for event in reported)


def test_a_model_becomes_trained_with_its_optimizer() -> None:
    """As transformers prepares what it has distributed itself: settled, named and recorded like any other."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator)
    model = accelerator.prepare_model(Network(GAIN).half(), evaluation_mode=True)
    assert session.non_finite_parameters() == []
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    accelerator.backward(model(X).square().mean())
    optimizer.step()
    skips = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert [(skip.cause, skip.modules) for skip in skips] == [(Cause.ACTIVATION, ("first",))]
    batch = X.clone()
    kept = weakref.ref(batch)
    with torch.no_grad():
        model(batch)
    del batch
    assert kept() is None


def test_a_trainer_that_evaluates_first_trains_the_same_model(tmp_path: Path) -> None:
    """`evaluate()` before `train()` prepares the model in evaluation mode: what is told of it later has no prefix."""
    callback = MixedPrecisionCallback({"monitor_modules": True})
    trainer = regression_trainer(tmp_path, callback, fp16=True, max_steps=1, eval_dataset=numbers())
    trainer.evaluate()
    with torch.no_grad():
        trainer.model.output.weight.mul_(2.0**20)
    trainer.train()
    session = callback.session
    assert session is not None
    skips = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert [(skip.cause, skip.modules) for skip in skips] == [(Cause.ACTIVATION, ("output",))]
    assert "hidden" in session.module_metrics()["module_activation_amax"]


def test_few_batches_of_a_long_evaluation_are_kept() -> None:
    """And those of a model that is trained not at all: what generation passes along is large."""
    loop = Distillation("fp16", Network(), Network())
    kept = {}
    for name, model in (("reference", loop.reference), ("trained", loop.trained)):
        batches = [X.clone() for _ in range(3 * KEPT_EVALUATIONS)]
        kept[name] = [weakref.ref(batch) for batch in batches]
        with torch.no_grad():
            for batch in batches:
                model(batch)
        del batch, batches
    gc.collect()
    alive = {name: sum(reference() is not None for reference in kept[name]) for name in kept}
    assert alive == {"trained": 0, "reference": KEPT_EVALUATIONS}
    for _ in range(3):
        loop.accelerator.backward(loop.trained(X).mean())
        loop.optimizer.step()
    assert not any(reference() is not None for reference in kept["reference"])
