"""What looks fine and is not is said: optimizers that make NaN, gradients that underflow, losses that are lost, set-ups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

import hf_amp
from hf_amp import AmpSession, Cause, EventKind, MixedPrecisionCallback
from hf_amp.events import AmpEvent
from hf_amp.integrations.transformers import _report_evaluation
from tests.conftest import forget_accelerators
from tests.integrations.trainers import regression_trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


class NormScaled(torch.optim.Optimizer):
    """A trust ratio without a floor: a gradient of 0 is divided by its norm."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(parameter.grad / parameter.grad.norm(), alpha=-1e-3)


class WithDeadBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.dead = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a(x) + torch.relu(self.dead(x) - 50)).square().mean()


def steps(model: nn.Module, optimizer: Any, losses: int, factor: float = 1.0, **options: Any) -> AmpSession:
    """A run of `losses` steps on the model's own output."""
    accelerator = Accelerator(mixed_precision=options.pop("precision", "fp16"), cpu=True)
    session = hf_amp.attach(accelerator, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(losses):
        accelerator.backward(model(torch.ones(2, 4)).mean() * factor)
        optimizer.step()
        optimizer.zero_grad()
    return session


def of_kind(session: AmpSession, kind: EventKind) -> list[AmpEvent]:
    return [event for event in session.events if event.kind is kind]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_an_optimizer_that_makes_nan_of_finite_gradients(precision: str) -> None:
    """The step that did it is named, and the optimizer."""
    model = WithDeadBranch()
    session = steps(model, NormScaled(model.parameters()), 2, precision=precision, init_scale=256.0)
    (skip,) = of_kind(session, EventKind.STEP_SKIPPED)
    assert skip.cause is Cause.WEIGHTS
    assert (
        "Step 1 was applied with finite gradients, so NormScaled, the optimizer, made them non-finite" in skip.message
    )


def test_weights_that_were_bad_before_are_nobodys_doing() -> None:
    """A damaged checkpoint: no step was applied before."""
    model = WithDeadBranch()
    nn.init.constant_(model.a.bias, torch.nan)
    session = steps(model, NormScaled(model.parameters()), 1)
    assert "was applied" not in of_kind(session, EventKind.STEP_SKIPPED)[0].message


class Tiny(nn.Module):
    """Returns a loss so small that no FP16 gradient is left of it at the default scale."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.weight = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean() * self.weight


def test_gradients_that_all_underflow_are_the_scales_fault() -> None:
    """Not the labels': said at the first step, and where the run is called stalled."""
    model = Tiny(1e-13)
    session = steps(model, torch.optim.SGD(model.parameters(), 1.0), 4, patience=3)
    for kind in (EventKind.ZERO_GRADIENTS, EventKind.STALLED):
        (event,) = of_kind(session, kind)
        assert event.cause is Cause.SCALE
        assert "Raise init_scale" in event.message
        assert "label" not in event.message


def test_gradients_that_are_zero_in_fp32_too_are_not() -> None:
    """A loss that depends on no parameter in value."""
    model = Tiny(0.0)
    session = steps(model, torch.optim.SGD(model.parameters(), 1.0), 2)
    assert of_kind(session, EventKind.ZERO_GRADIENTS)[0].cause is Cause.LOSS


@pytest.mark.parametrize("strategy", ["ADAPTIVE", "PERFORMANCE_OPTIMIZED"])
def test_adaptive_grows_out_of_underflow(strategy: str) -> None:
    """Before it has seen any gradient; within a few steps all of them are there."""
    model = Tiny(1e-13)
    session = steps(model, torch.optim.SGD(model.parameters(), 1.0), 20, scaling_strategy=strategy)
    assert session.scaler.get_scale() > 2.0**30
    assert session.monitor.grad_norm > 0
    assert session.scaler.skipped_steps <= 1


def test_a_loss_that_is_lost_while_gradients_are_finite() -> None:
    """A term that reaches no parameter: said once for all in a row, and the step is applied."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=256.0)
    model = WithDeadBranch()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-3))
    for term in (0.0, torch.nan, torch.nan, 0.0, torch.nan):
        accelerator.backward(model(torch.ones(2, 4)) + term)
        optimizer.step()
        optimizer.zero_grad()
    assert [event.step for event in of_kind(session, EventKind.LOSS_LOST)] == [2, 5]
    assert session.scaler.skipped_steps == 0


def test_a_loss_that_is_lost_with_its_gradients_is_explained_by_a_replay() -> None:
    """Gradients of exactly 0 beside a loss of 0 times infinity: its operator and line, and nothing about labels."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=256.0)

    class Lost(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sum() * 0 + torch.log(x.sum() * 0) * 0

    plain = Lost(4, 1)
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 1e-3))
    accelerator.backward(model(torch.ones(2, 4)))
    optimizer.step()
    (event,) = of_kind(session, EventKind.ZERO_GRADIENTS)
    assert event.cause is Cause.LOSS
    assert "First seen in log at test_said.py" in event.message
    assert "-100" not in event.message


def test_weights_whose_nan_backward_does_not_see() -> None:
    """A rectifier passes the gradient of NaN on: steps are applied, and the parameter is named."""
    model = nn.Linear(4, 1)
    nn.init.constant_(model.bias, torch.nan)
    session = steps(
        nn.Sequential(model, nn.ReLU(), nn.Flatten(0)), torch.optim.SGD([model.weight], 1e-3), 2, init_scale=256.0
    )
    (event,) = of_kind(session, EventKind.LOSS_LOST)
    assert event.cause is Cause.WEIGHTS
    assert "Inf or NaN is in 1 parameter (0.bias)" in event.message


def set_ups(session: AmpSession) -> list[str]:
    return [event.message for event in of_kind(session, EventKind.SETUP)]


@pytest.mark.parametrize("other_is_prepared", [False, True])
def test_an_optimizer_that_was_never_prepared(other_is_prepared: bool) -> None:
    """Alone, or beside one that was: it moves its parameters by gradients times the scale, and that is said, once."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=256.0)
    model = WithDeadBranch()
    optimizers = [torch.optim.SGD(layer.parameters(), 1e-9) for layer in (model.a, model.dead)]
    model = accelerator.prepare(model)
    if other_is_prepared:
        optimizers[1] = accelerator.prepare(optimizers[1])
    for _ in range(4):
        accelerator.backward(model(torch.ones(2, 4)).square())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    (told,) = set_ups(session)
    assert told.startswith(
        f"no optimizer that hf_amp knows holds {2 if other_is_prepared else 4} parameters (a.weight, a.bias"
    )


def test_parameters_that_nobody_moves_are_fine() -> None:
    """A head is trained, the body was not frozen: nothing to say; nor in accumulation, in which nothing moves."""
    model = WithDeadBranch()
    session = steps(model, torch.optim.SGD(model.a.parameters(), 1e-3), 4)
    assert not set_ups(session)


def test_a_model_that_hf_amp_does_not_know() -> None:
    """One of two was not prepared, and its optimizer was."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=256.0)
    known, unknown = WithDeadBranch(), nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*known.parameters(), *unknown.parameters()], 1e-3)
    known, optimizer = accelerator.prepare(known, optimizer)
    accelerator.backward(known(unknown(torch.ones(2, 4))))
    optimizer.step()
    (told,) = set_ups(session)
    assert told.startswith("2 of 6 parameters that optimizers hold belong to no model that hf_amp knows")


def test_options_of_scaling_where_nothing_is_scaled() -> None:
    """`fp16` was forgotten; not so in FP16, in BF16, or without such options."""
    for precision, options in (("no", True), ("no", False), ("bf16", True), ("fp16", True)):
        forget_accelerators()
        session = hf_amp.attach(
            Accelerator(mixed_precision=precision, cpu=True), **({"init_scale": 8.0} if options else {})
        )
        told = set_ups(session)
        assert bool(told) is (precision == "no" and options)
    assert all("init_scale: nothing is scaled in FP32" in each for each in told)


class AddsLate(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.trainer.add_callback(MixedPrecisionCallback())


def test_a_callback_that_is_added_during_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says once that it does nothing yet; in the next `train()` it works."""
    adds = AddsLate()
    trainer = regression_trainer(tmp_path, adds, fp16=False, max_steps=4)
    adds.trainer = trainer
    trainer.train()
    assert [r.message for r in caplog.records if r.name == "hf_amp"].count(caplog.messages[-1]) == 1
    assert "added while training runs" in caplog.text
    trainer.remove_callback(adds)
    trainer.args.max_steps = 6
    trainer.train()
    callback = trainer.callback_handler.callbacks[-1]
    assert callback.session.scaler.decided_steps > 0


@pytest.mark.parametrize("loss", [0.5, torch.nan])
def test_eval_loss_is_called_the_mean_of_the_others_only_where_it_is(loss: float) -> None:
    """transformers leaves out losses that are not finite from 5.23 on; before, the mean is not finite either."""
    session = hf_amp.attach(Accelerator(mixed_precision="no", cpu=True))
    _report_evaluation(session, "eval", 1, 4, loss)
    message = session.events[-1].message
    assert ("eval_loss is the mean of the others" in message) is (loss == 0.5)
    assert ("eval_loss is nan for that" in message) is (loss != 0.5)


def test_data_parallel_of_a_trainer_is_said_not_to_be_covered(tmp_path: Path) -> None:
    """On several GPUs without a launcher a Trainer wraps its model and prepares the optimizer alone; it trains all the same."""
    callback = MixedPrecisionCallback(init_scale=8.0)
    trainer = regression_trainer(tmp_path, callback, max_steps=3)
    trainer.args._n_gpu = 2  # as the Trainer finds it on two GPUs; DataParallel without devices calls its model
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.DataParallel)
    (said,) = [event.message for event in callback.session.events if "DataParallel" in event.message]
    assert "repeats no forward pass" in said
    assert callback.session.metrics()["applied_steps"] > 0
