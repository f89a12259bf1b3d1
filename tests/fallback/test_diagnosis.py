"""Every cause, produced for real in a loop under `attach`, is told right, with a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import hf_amp
from hf_amp import AmpEvent, AmpSession, Cause, EventKind, MixedPrecisionConfig, PrecisionMode
from tests.each import for_each, forget_accelerators
from tests.reference import OverflowInBackward

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
PRECISIONS = ["fp16", "bf16", "no"]
EVERY_PRECISION = for_each("precision", PRECISIONS)
X = torch.linspace(-1, 1, 24).reshape(3, 8) + 0.01


class Loop:
    """A raw Accelerate loop around one model, whose loss is what the model returns unless `loss_of` makes one."""

    def __init__(self, model: nn.Module, precision: str, fused: bool = False, **options: Any) -> None:
        self.accelerator = Accelerator(mixed_precision=precision, cpu=True)
        self.session = hf_amp.attach(self.accelerator, MixedPrecisionConfig(**options))
        self.plain = model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def step(self, *micro_batches: dict[str, Any], loss_of: Callable[[Any], Tensor] | None = None) -> None:
        for batch in micro_batches:
            output = self.model(**batch)
            first = output if isinstance(output, Tensor) else output[0]
            loss = first if loss_of is None else loss_of(output)
            self.accelerator.backward(loss / len(micro_batches))
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def skips(self) -> list[AmpEvent]:
        return [event for event in self.session.events if event.kind is EventKind.STEP_SKIPPED]


class Regression(nn.Module):
    """Two layers and a mean squared error, unless another loss or another thing in between is asked for."""

    def __init__(
        self,
        loss_of: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss,
        between: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.loss_of, self.between = loss_of, between

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.last(self.between(self.first(x)))
        if labels is None:
            return logits
        return self.loss_of(logits, labels), logits


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


TOKENS = torch.arange(16).reshape(2, 8)
SOUND = {"x": X, "labels": torch.zeros(3, 8)}


def masked_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over those whose label is not ignored, written as people do."""
    kept = labels >= 0
    return (logits[..., 0].square() * kept).sum() / kept.sum()


@EVERY_PRECISION
def test_all_labels_ignored_in_one_micro_batch(precision: str) -> None:
    """LOSS, with the labels and -100 named, where the mean over none made the gradients NaN."""
    loop = Loop(Regression(masked_mean), precision)
    sound = {"x": X, "labels": torch.tensor([0, 1, -100])}
    loop.step(sound, {"x": X, "labels": torch.full((3,), -100)}, sound)
    assert loop.skips[0].cause is Cause.LOSS
    assert "every label of the batch is ignored (-100)" in loop.skips[0].message


@EVERY_PRECISION
def test_all_labels_ignored_by_cross_entropy(precision: str) -> None:
    """LOSS as well where the gradients are not NaN but exactly zero, as PyTorch's own loss makes them: nothing is skipped."""
    loop = Loop(tiny_gpt2(), precision)
    loop.step({"input_ids": TOKENS, "labels": torch.full_like(TOKENS, -100)})
    reported = [event for event in loop.session.events if event.kind is EventKind.ZERO_GRADIENTS]
    assert [event.cause for event in reported] == [Cause.LOSS]
    assert "every label of the batch is ignored (-100)" in reported[0].message
    assert not loop.skips


@EVERY_PRECISION
@for_each(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "inf"), (-torch.inf, "inf")])
@for_each("name", ["x", "labels"])
def test_bad_batch(precision: str, value: float, word: str, name: str) -> None:
    """INPUT, for a single element of one micro-batch of three; which tensor, and inf told apart from NaN."""
    loop = Loop(Regression(), precision)
    bad = {key: tensor.clone() for key, tensor in SOUND.items()}
    bad[name][1, 2] = value
    loop.step(SOUND, bad, SOUND)
    assert loop.skips[0].cause is Cause.INPUT
    assert f"holds {word} in {name}" in loop.skips[0].message
    assert loop.session.plan.default.value != "FP32" or precision == "no"


@EVERY_PRECISION
@for_each("value", [torch.nan, torch.inf])
def test_bad_weight(precision: str, value: float) -> None:
    """WEIGHTS, with the parameter's name, and where to go back to."""
    loop = Loop(Regression(), precision)
    with torch.no_grad():
        loop.plain.last.weight[0, 0] = value
    loop.step(SOUND)
    assert loop.skips[0].cause is Cause.WEIGHTS
    assert "inf or NaN was in 1 parameter (last.weight) before this step" in loop.skips[0].message
    assert "last good checkpoint" in loop.skips[0].message


def log_of_zero(logits: Tensor, _: Any = None) -> Tensor:
    return torch.log((logits - logits).abs().sum()) + logits.mean()


@EVERY_PRECISION
@for_each("inside", [False, True])
def test_log_of_zero_in_a_custom_loss(precision: str, inside: bool) -> None:
    """LOSS, and that the logarithm is to be looked at."""
    loop = Loop(Regression(log_of_zero), precision)
    loop.step(SOUND if inside else {"x": X}, loss_of=None if inside else log_of_zero)
    assert loop.skips[0].cause is Cause.LOSS
    assert "log or division by zero" in loop.skips[0].message


@EVERY_PRECISION
def test_nan_in_labels_that_the_model_does_not_see(precision: str) -> None:
    """LOSS: the model's outputs are finite, and this step's labels are to be looked at."""
    loop = Loop(Regression(), precision)
    labels = torch.full((3, 8), torch.nan)
    loop.step({"x": X}, loss_of=lambda logits: nn.functional.mse_loss(logits, labels))
    assert loop.skips[0].cause is Cause.LOSS
    assert "this step's labels" in loop.skips[0].message


@EVERY_PRECISION
def test_activation_beyond_65504(precision: str) -> None:
    """ACTIVATION with the layer's name, once, in FP16; no fault at all in the formats that have the range."""
    model = Regression(between=lambda x: x.float() * 1e-6)
    with torch.no_grad():
        model.first.weight.mul_(1e5)
        model.first.weight.clamp_(-6e4, 6e4)
        model.first.weight[0] = 6e4
    loop = Loop(model, precision, init_scale=16.0)
    for _ in range(3):
        loop.step({"x": X.abs() + 1, "labels": SOUND["labels"]})
    assert [(s.cause, s.modules) for s in loop.skips] == (
        [(Cause.ACTIVATION, ("first",))] if precision == "fp16" else []
    )


def test_scale_too_high() -> None:
    """SCALE until the scale has come down, and nothing to do."""
    loop = Loop(Regression(), "fp16", init_scale=2.0**22)
    for _ in range(6):
        loop.step(SOUND)
    assert {s.cause for s in loop.skips} == {Cause.SCALE}
    assert "nothing to do" in loop.skips[0].message
    assert len(loop.skips) < 6


def hill(x: Tensor) -> Tensor:
    """1 / (1 + x²): 0 at inf, where the derivative is computed as 0 times inf."""
    return 1 / (1 + x.square())


def test_an_infinity_hidden_behind_a_finite_loss() -> None:
    """ACTIVATION with the layer's name at the first skip, although the loss is finite, and the next step applies."""
    model = Regression(between=lambda x: hill(x.float()))
    with torch.no_grad():
        model.first.weight.fill_(6e4)
    loop = Loop(model, "fp16")
    for _ in range(8):
        loop.step({"x": X.abs() + 1, "labels": SOUND["labels"]})
    causes = [s.cause for s in loop.skips]
    assert causes[0] is Cause.ACTIVATION
    assert loop.skips[0].modules == ("first",)
    assert set(causes[1:]) <= {Cause.SCALE}
    assert loop.session.metrics()["applied_steps"] >= 1


@EVERY_PRECISION
def test_a_root_at_zero_has_an_infinite_derivative(precision: str) -> None:
    """DERIVATIVE with the layer in front of the root at every skip; scale and plan stay."""
    loop = Loop(Regression(between=lambda x: torch.sqrt((x - x.detach()).float())), precision)
    before = loop.session.plan
    for _ in range(4):
        loop.step(SOUND)
    assert [(s.cause, s.modules) for s in loop.skips] == [(Cause.DERIVATIVE, ("first",))] * 4
    assert all(s.before == s.after for s in loop.skips)
    assert loop.session.plan == before


@EVERY_PRECISION
def test_a_bare_parameter_is_named_where_no_module_owns_it(precision: str) -> None:
    """DERIVATIVE with the parameter's own name where it belongs to the model itself."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(self.gain - self.gain.detach()).sum() + (x * self.gain).mean()

    loop = Loop(Bare(), precision)
    for _ in range(4):
        loop.step({"x": X})
    assert loop.skips[-1].cause is Cause.DERIVATIVE
    assert "that of gain" in loop.skips[-1].message


@EVERY_PRECISION
def test_a_division_in_a_module_is_no_matter_of_precision(precision: str) -> None:
    """MODEL with the module that divides zero by zero, in FP32 as well, the operator, and its line."""
    model = nn.Sequential(nn.Linear(8, 8), _Normalizes(), nn.Linear(8, 8))
    loop = Loop(model, precision)
    loop.step({"input": torch.zeros(3, 8)}, loss_of=lambda logits: logits.square().mean())
    assert (loop.skips[0].cause, loop.skips[0].modules) == (Cause.MODEL, ("1",))
    assert "the module makes inf or NaN from finite values in FP32 too" in loop.skips[0].message
    assert "First seen in div at test_diagnosis.py:" in loop.skips[0].message
    assert "`return (x - x) / (x - x).norm()`" in loop.skips[0].message
    loop.step({"input": torch.zeros(3, 8)}, loss_of=lambda logits: logits.square().mean())
    assert len(loop.skips) == 2
    assert loop.session.metrics()["precision_changes"] == 0  # twice is no pattern of what FP32 does not cure


def test_values_that_have_grown_beyond_fp32_are_told_to_come_from_the_learning_rate_too() -> None:
    """After a step that was far too long products leave FP32: the message names that reason beside zeros."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    loop = Loop(model, "no")
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1e25)
    loop.step({"input": torch.ones(3, 8)}, loss_of=lambda logits: logits.square().mean())
    assert loop.skips[0].cause is Cause.MODEL
    assert "the module makes inf or NaN from finite values" in loop.skips[0].message
    assert "too high a learning rate" in loop.skips[0].message


class _Normalizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x) / (x - x).norm()


@EVERY_PRECISION
def test_gradients_made_infinite_in_backward_alone(precision: str) -> None:
    """By an operator in Python, outside of the model: in FP16 it may be the scale, as far as can be seen, until that is 1;
    without one it is a derivative."""
    loop = Loop(Regression(), precision, init_scale=4.0)
    for _ in range(4):
        loop.step({"x": X}, loss_of=lambda logits: OverflowInBackward.apply(logits.square().mean()))
    suspected = [Cause.SCALE if precision == "fp16" else Cause.DERIVATIVE] * 2
    assert [skip.cause for skip in loop.skips] == [*suspected, Cause.DERIVATIVE, Cause.DERIVATIVE]
    assert "Look at the code outside of the model" in loop.skips[2].message


def test_a_gradient_that_no_scale_brings_into_the_format() -> None:
    """A slope of 1e18: a scale small enough for it is too small for the gradients behind it. FP32 in that layer cures it."""
    loop = Loop(Regression(between=lambda h: torch.sin(h.float() * 1e18)), "fp16", init_scale=64.0)
    for _ in range(3):
        loop.step(SOUND)
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.ACTIVATION, ("first",))]
    assert "in backward a gradient leaves the range of FP16" in loop.skips[0].message
    assert "derivative of float at test_diagnosis.py" in loop.skips[0].message


@EVERY_PRECISION
def test_the_operator_that_made_minus_inf_is_named(precision: str) -> None:
    """log(0) is -inf, which might be a mask; the product with it that makes NaN is not where to look."""
    loop = Loop(Regression(lambda logits, y: -(torch.log((logits * 1e4).softmax(-1)) * y).mean()), precision)
    loop.step(SOUND)
    assert loop.skips[0].cause is Cause.LOSS
    assert "First seen in log at test_diagnosis.py" in loop.skips[0].message


class _LogOfZero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(-torch.ones_like(x) * x.sign().abs())


@EVERY_PRECISION
def test_minus_inf_of_a_module_is_not_the_loss_functions_fault(precision: str) -> None:
    """It might have been a mask, until a layer makes NaN of it: MODEL there, although only the loss is seen to be NaN."""
    loop = Loop(Regression(between=_LogOfZero()), precision)
    loop.step({"x": X, "labels": torch.zeros(3, 8)})
    assert (loop.skips[0].cause, loop.skips[0].modules) == (Cause.MODEL, ("between",))
    assert "First seen in log1p at test_diagnosis.py" in loop.skips[0].message


class _Scheduled(nn.Module):
    """Overflows in its second call alone."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x * 1e39) * torch.inf if self.calls == 2 else x


def test_what_a_count_of_calls_has_done_is_not_put_down_to_the_loss() -> None:
    """A replay is another call: it shows nothing, and UNKNOWN says why."""
    loop = Loop(Regression(between=_Scheduled()), "fp16", init_scale=64.0)
    for _ in range(3):
        loop.step({"x": X, "labels": torch.zeros(3, 8)})
    assert [(skip.step, skip.cause) for skip in loop.skips] == [(2, Cause.UNKNOWN)]
    assert "the model counts its calls" in loop.skips[0].message


class Recurrent(nn.Module):
    """Gives its state beside its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = nn.Linear(8, 8)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.step(x) + h)
        return h.square().mean(), h


def test_state_that_the_loop_carries_on_is_not_only_bad_data() -> None:
    """NaN in an input from an overflow on: it may be state, and the message says so, with the step."""
    loop, h = Loop(Recurrent(), "fp16", init_scale=64.0), torch.zeros(3, 8)
    for factor in (1.0, 1e7, 1.0, 1.0):
        output = loop.model(X * factor, h)
        loop.accelerator.backward(output[0])
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        h = output[1].detach()
    assert [skip.cause for skip in loop.skips] == [Cause.ACTIVATION, Cause.INPUT, Cause.INPUT]
    assert ["It follows step 2, which was" in skip.message for skip in loop.skips] == [False, True, True]


@for_each("bad", ["x", "labels"])
@for_each("at", [1, 2, 4])
def test_a_verdict_that_is_one_step_late_looks_at_its_own_batch(bad: str, at: int) -> None:
    """PERFORMANCE_OPTIMIZED with fused AdamW: the bad step is told by its number, from its batch, not the newer one's."""
    loop = Loop(Regression(), "fp16", fused=True, scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=64.0)
    for step in range(1, 7):
        batch = {name: tensor.clone() for name, tensor in SOUND.items()}
        if step == at:
            batch[bad][0, 0] = torch.nan
        loop.step(batch)
    loop.session.scaler.flush()
    assert [(s.step, s.cause) for s in loop.skips] == [(at, Cause.INPUT)]
    assert f"NaN in {bad}" in loop.skips[0].message


def test_a_late_verdict_about_a_batch_that_was_overwritten_is_unknown() -> None:
    """Where the loader has reused the batch's memory for the next one, UNKNOWN says so instead of a wrong cause."""
    loop = Loop(Regression(), "fp16", fused=True, scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=64.0)
    x, labels = X.clone(), torch.zeros(3, 8)
    for step in range(1, 5):
        x.copy_(X * torch.nan if step == 2 else X)
        loop.step({"x": x, "labels": labels})
    loop.session.scaler.flush()
    assert [(s.step, s.cause) for s in loop.skips] == [(2, Cause.UNKNOWN)]
    assert "written into" in loop.skips[0].message


def test_a_late_verdict_about_a_step_that_ran_before_the_plan_changed() -> None:
    """ACTIVATION too, not a fault of the loss, which is sound once its batch runs under the new plan; nothing more is done."""
    model = Regression(between=lambda large: large / 1e6)
    with torch.no_grad():
        model.first.weight.mul_(1e6)
    loop = Loop(model, "fp16", fused=True, scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=64.0)
    for _ in range(6):
        loop.step(SOUND)
    loop.session.scaler.flush()
    reported = [(skip.step, skip.cause, skip.modules) for skip in loop.skips]
    assert reported == [(1, Cause.ACTIVATION, ("first",)), (2, Cause.ACTIVATION, ())]
    assert "before the newest change of precision" in loop.skips[1].message
    assert loop.session.plan.default is PrecisionMode.MIXED
    assert list(loop.session.plan.modules) == ["first"]


class Large(nn.Module):
    """The output of its head leaves FP16's range, and is brought back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.constant_(self.head.bias, 1e6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.body(x)).float() / 1e6).square().mean()


def without_calling_the_head(self: Large, x: Tensor) -> Tensor:
    """The same, as libraries that fuse a head with its loss put it in the place of a model's own forward."""
    large = nn.functional.linear(self.body(x), self.head.weight, self.head.bias)
    return (large.float() / 1e6).square().mean()


@pytest.mark.parametrize("emulate", [True, False])
def test_an_overflow_in_a_forward_that_was_put_on_the_instance(emulate: bool) -> None:
    """ACTIVATION in the model's own forward, and the model leaves FP16: in FP32 that very function is finite."""
    model = Large()
    model.forward = MethodType(without_calling_the_head, model)
    loop = Loop(model, "fp16", init_scale=64.0, emulate=emulate)
    for _ in range(3):
        loop.step({"x": X})
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.ACTIVATION, ("",))]
    assert "the model's own forward" in loop.skips[0].message
    assert loop.session.metrics()["applied_steps"] == 2


@EVERY_PRECISION
@for_each("dropout", [0.0, 0.5])
def test_a_loss_made_from_the_models_own_loss(precision: str, dropout: float) -> None:
    """LOSS where the repeated pass was the same and finite; UNKNOWN with dropout, which another kernel may draw otherwise."""
    loop = Loop(Regression(between=nn.Dropout(dropout)), precision)
    loop.step(SOUND, loss_of=lambda output: log_of_zero(output[0]))
    assert loop.skips[0].cause is (Cause.UNKNOWN if dropout else Cause.LOSS)
    assert "loss function" in loop.skips[0].message


class Pair:
    """Two models with an optimizer each, of which the second is given what the first has made, as in a GAN."""

    def __init__(self, by: float) -> None:
        torch.manual_seed(0)
        first, second = (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))
        with torch.no_grad():
            for factor, layer in ((by, first[0]), (1 / by, first[2])):
                layer.weight.mul_(factor)
                layer.bias.mul_(factor if layer is first[0] else 1)
        self.accelerator = Accelerator(mixed_precision="fp16", cpu=True)
        self.session = hf_amp.attach(self.accelerator)
        optimizers = [torch.optim.SGD(model.parameters(), lr=1e-9) for model in (first, second)]
        self.models = self.accelerator.prepare(first, second)
        self.optimizers = self.accelerator.prepare(*optimizers)

    def step(self, x: Tensor, real: Tensor, detached: bool) -> None:
        first, second = self.models
        made = first(x)
        loss = second(real).square().mean() + second(made.detach() if detached else made).square().mean()
        self.accelerator.backward(loss)
        optimizer = self.optimizers[int(detached)]
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("detached", [False, True])
def test_what_one_model_makes_for_another_is_not_taken_for_data(detached: bool) -> None:
    """The layers of the first that overflow are named and widened, and the next step is applied."""
    pair = Pair(by=2.0**21)
    for _ in range(2):
        pair.step(X, X, detached)
    (skip,) = [event for event in pair.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert (skip.cause, skip.modules) == (Cause.ACTIVATION, ("0", "2"))


def test_bad_data_for_the_second_of_two_models_is_bad_data() -> None:
    """INPUT, although the first has run before, and soundly."""
    pair = Pair(by=1.0)
    pair.step(X, X * torch.nan, detached=True)
    (skip,) = [event for event in pair.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert skip.cause is Cause.INPUT
    assert "the batch holds NaN in input" in skip.message


def test_values_from_outside_of_the_models_are_not_taken_for_data() -> None:
    """UNKNOWN says that the step had computed them: by a layer that is not prepared, under the accelerator's autocast."""
    loop = Loop(Regression(), "fp16", init_scale=1.0)
    outside = nn.Linear(8, 8)
    with torch.no_grad():
        outside.weight.mul_(1e7)
    for _ in range(3):
        with loop.accelerator.autocast():
            x = outside(X)
        loop.step({"x": x * 1e-9}, loss_of=lambda logits: logits.square().mean())
    assert [skip.cause for skip in loop.skips] == [Cause.UNKNOWN, Cause.UNKNOWN]
    assert "in x, which this step had computed before" in loop.skips[0].message
    assert loop.session.plan.default is PrecisionMode.FP32


def test_what_comes_in_fp16_may_come_from_a_frozen_model() -> None:
    """INPUT does not say that no precision helps, where a VAE or text encoder in FP16 may have made the values."""
    loop = Loop(Regression(), "fp16")
    frozen = nn.Linear(8, 8).half().requires_grad_(False)
    frozen.weight.fill_(60000)
    loop.step({"x": frozen(X.half() + 1)}, loss_of=lambda logits: logits.square().mean())
    assert loop.skips[0].cause is Cause.INPUT
    assert "holds inf in x, in FP16. Where a frozen model computes that in FP16, run it in" in loop.skips[0].message


@EVERY_PRECISION
def test_a_bad_parameter_of_a_loss_is_told_by_its_place(precision: str) -> None:
    """WEIGHTS, where the loss is a module with parameters of its own, which no prepared model has."""
    loop = Loop(Regression(), precision)
    weight = nn.Parameter(torch.full((8,), torch.nan))
    loop.optimizer.add_param_group({"params": [weight]})
    loop.step({"x": X}, loss_of=lambda logits: (logits * weight).sum())
    assert loop.skips[0].cause is Cause.WEIGHTS
    assert "(parameter 4 of the optimizer)" in loop.skips[0].message


def test_an_overflow_in_a_forward_pass_that_is_no_longer_kept() -> None:
    """UNKNOWN, not a fault of the loss, where a window has more forward passes than are kept; a second one is a pattern."""
    loop = Loop(Regression(), "fp16", init_scale=1.0)
    for _ in range(3):
        loop.step({"x": X * 1e5}, *[{"x": X}] * 64, loss_of=lambda logits: logits.square().mean())
    assert [skip.cause for skip in loop.skips] == [Cause.UNKNOWN, Cause.UNKNOWN]
    assert "the newest forward passes of the step are finite" in loop.skips[0].message
    assert loop.session.plan.default is PrecisionMode.FP32


class Thinned(nn.Module):
    """Sums what dropout leaves, which is beyond 65504 about every other time."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.total = nn.Dropout(0.5), nn.Linear(64, 1, bias=False)
        nn.init.ones_(self.total.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.total(self.dropout(x)) / 65504).square().mean()


def test_an_overflow_that_hangs_on_dropout_is_found() -> None:
    """The repeated pass drops what the first one dropped."""
    loop = Loop(Thinned(), "fp16", init_scale=1.0, automatic_fallback=False)
    torch.manual_seed(0)
    for _ in range(20):
        loop.step({"x": torch.full((1, 64), 65504 / 64)})
    assert 4 <= len(loop.skips) <= 16
    assert {(skip.cause, skip.modules) for skip in loop.skips} == {(Cause.ACTIVATION, ("total",))}


class Pointer(nn.Module):
    """Scores with a mask of -inf by design, as pointer networks and action masks have; `gain` makes q·k leave FP16's range."""

    def __init__(self, gain: float, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.score = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), _Scores(gain)
        self.factor = factor
        with torch.no_grad():
            self.q.weight.mul_(gain)
            self.k.weight.mul_(gain)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.score(self.q(x), self.k(x))
        return nn.functional.cross_entropy(logits.float(), labels) * self.factor, logits


class _Scores(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        future = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
        return ((q @ k.T) / self.gain**2).masked_fill(future, -torch.inf)


@for_each(
    ("gain", "factor", "cause", "modules"), [(1000.0, 1.0, Cause.ACTIVATION, ("score",)), (1.0, 1e9, Cause.SCALE, ())]
)
def test_a_mask_of_minus_infinity_hides_nothing(
    gain: float, factor: float, cause: Cause, modules: tuple[str, ...]
) -> None:
    """What overflows beside a mask is named, and a loss that is too large with masked outputs is the scale's matter."""
    loop = Loop(Pointer(gain, factor), "fp16")
    loop.step({"x": X, "labels": torch.zeros(len(X), dtype=torch.long)})
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(cause, modules)]


@for_each("strategy", ["DYNAMIC", "ADAPTIVE"])
def test_a_loss_that_needs_a_scale_below_one_gets_it(strategy: str) -> None:
    """A regression to -1e5, summed: every skip is SCALE, nothing leaves FP16, the scale that fits is named, and it trains."""
    loop = Loop(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)), "fp16", scaling_strategy=strategy)
    for _ in range(40):
        loop.step({"input": X}, loss_of=lambda output: (output + 1e5).square().sum())
    assert {skip.cause for skip in loop.skips} == {Cause.SCALE}
    assert "mean in place of a sum" in loop.skips[-1].message
    assert (loop.session.plan.default, dict(loop.session.plan.modules)) == (PrecisionMode.MIXED, {})
    assert loop.session.metrics()["applied_steps"] >= 15


class HardlyCounts(nn.Module):
    """A layer, and one whose gradient is 1e-14 of its, as rounding noise is in the gate of a mixture that chooses one expert."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.layer = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + self.gate(x) * 1e-7 * 1e-7).float()


@for_each("factor", [1e6, 1e7, 1e8, 1e9])
def test_noise_that_a_small_scale_loses_does_not_count(factor: float) -> None:
    """Zero in FP16 at the scale that a large loss needs, and at any other: SCALE, as without that layer, and no plan changes."""
    loop = Loop(HardlyCounts(), "fp16", init_scale=4.0)
    for _ in range(3):
        loop.step({"x": X}, loss_of=lambda output: output.square().sum() * factor)
    assert [skip.cause for skip in loop.skips] == [Cause.SCALE] * 3
    assert all("They fit at a scale of" in skip.message for skip in loop.skips)
    assert dict(loop.session.plan.modules) == {}


class Faint(nn.Module):
    """Gradients that FP16 only holds with a large scale: its middle layer's derivative has a slope, and a branch counts little."""

    def __init__(self, slope: float, branch: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.slope, self.branch = slope, branch
        self.first, self.middle, self.last, self.side = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        middle = self.middle(torch.tanh(self.first(x)))
        middle = middle + (middle - middle.detach()) * self.slope
        return self.last(middle * 1e-4).float().square().mean() * 1e-3 + self.branch * self.side(x).float().mean()


@for_each(
    ("slope", "branch", "scale", "cause"),
    [
        (1e16, 1e-3, 2.0**8, Cause.ACTIVATION),
        (1e14, 1e-3, 2.0**12, Cause.ACTIVATION),
        (1e10, 1e-3, 2.0**20, Cause.SCALE),  # 2^8 serves
        (1.0, 1e-3, 2.0**40, Cause.SCALE),
        (1.0, 1e5, 2.0**8, Cause.SCALE),  # the branch overflows, and all else is zero at any scale below
        (1e10, 1e5, 2.0**8, Cause.SCALE),
    ],
)
@for_each("strategy", ["DYNAMIC", "PERFORMANCE_OPTIMIZED"])
def test_a_scale_that_loses_the_gradient_is_no_cure(
    strategy: str, slope: float, branch: float, scale: float, cause: Cause
) -> None:
    """Gradients that are finite at scale 1 because they are zero there: SCALE where one between serves, or where they are small."""
    options = {"init_scale": scale, "automatic_fallback": False, "scaling_strategy": strategy}
    loop = Loop(Faint(slope, branch), "fp16", fused=True, **options)
    for _ in range(2):
        loop.step({"x": X})
    loop.session.scaler.flush()
    assert loop.skips[0].cause is cause
    if cause is Cause.ACTIVATION:
        assert loop.skips[0].modules[:1] == ("middle",)
        assert "derivative of mul at test_diagnosis.py" in loop.skips[0].message


class Writing(nn.Module):
    """Three blocks, of which the second, or the first, writes into what it is given, as `how` says, and then has a fault."""

    def __init__(self, fault: Callable[[Tensor], Tensor], how: str, write: Callable[[Tensor], Tensor], at: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fault, self.how, self.write = fault, how, write
        self.blocks = nn.ModuleList([_WritingBlock(self if number == at else None) for number in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


class _WritingBlock(nn.Module):
    def __init__(self, model: Writing | None) -> None:
        super().__init__()
        self.layer, self.of = nn.Linear(8, 8), (model,)  # not as a module of its own

    def forward(self, x: Tensor) -> Tensor:
        (model,) = self.of
        if model is None:
            return self.layer(x)
        if model.how == "into a copy":
            x = x + (model.write(x.detach().clone()) - x).detach()
        elif model.how == "in place":
            model.write(x)
        else:
            model.write(x.data)
        return model.fault(self.layer(x))


WRITES = {
    "grows": lambda x: x.mul_(3e3),
    "is NaN the second time": lambda x: x.fill_(1.0 if bool((x != 1).any()) else torch.nan),
    "moves": lambda x: x.add_(1.0),
}
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda y: y + ((y * 0 + 1e4) @ (y.new_ones(8, 8) * 1e4)) * 1e-9,
    "rounding": lambda y: y + 0 * (y * 0 + 1.0002 - 1.0001).log(),
    "division": lambda y: y + (y - y) / (y - y),
    "root": lambda y: y + (y - y.detach()).abs().sqrt(),
    "slope": lambda y: y + (y - y.detach()) * 1e16,
}


@for_each("write", list(WRITES))
@for_each("fault", list(FAULTS))
def test_a_block_that_writes_into_its_input_is_repeated_on_what_it_was_given(write: str, fault: str) -> None:
    """In place, and through `.data`, which no version counts: told as of a block that does the same with a copy."""

    def told(how: str) -> tuple[Any, ...]:
        forget_accelerators()
        loop = Loop(Writing(FAULTS[fault], how, WRITES[write], at=1), "fp16", init_scale=64.0, automatic_fallback=False)
        loop.step({"x": X.clone()})
        (skip,) = loop.skips
        return skip.cause, skip.modules

    assert told("in place") == told("through .data") == told("into a copy")


@for_each("fault", ["product", "division", "root"])
def test_a_batch_that_the_model_writes_into_through_data_is_not_repeated(fault: str) -> None:
    """What it was before nobody knows: nothing is confirmed, the reason is said, and replays leave it as the step has."""
    loop = Loop(Writing(FAULTS[fault], "through .data", WRITES["moves"], at=0), "fp16", automatic_fallback=False)
    loop.step({"x": (x := X.clone())})
    (skip,) = loop.skips
    assert skip.modules == ()
    assert skip.cause is (Cause.SCALE if fault == "root" else Cause.UNKNOWN)
    assert "written into" in skip.message
    assert torch.equal(x, X + 1)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.usefixtures("fresh_accelerator_state")
def test_the_text_of_an_exception_is_cut_in_a_message() -> None:
    """torch's on a nested tensor lists every backend, in thousands of characters: the message stays a paragraph."""

    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, batch: Tensor) -> Tensor:
            return torch.stack([self.layer(row).mean() for row in batch.unbind()]).mean()

    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    session = hf_amp.attach(accelerator)
    model = Ragged()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    rows = [torch.full((3, 4), torch.nan), torch.ones(5, 4)]
    accelerator.backward(model(torch.nested.nested_tensor(rows)))
    optimizer.step()
    (skip,) = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert "NotImplementedError" in skip.message
    assert len(skip.message) < 400
    assert "\n" not in skip.message


class Counting(nn.Linear):
    """A model that counts its calls in a plain number, as schedules inside of a forward pass do."""

    def __init__(self) -> None:
        super().__init__(8, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x).square().mean() * 1e9


def test_a_replay_leaves_no_trace_in_plain_attributes() -> None:
    """Three skips for the scale, of which each is looked at closer: the model has counted three calls."""
    loop = Loop(Counting(), "fp16")
    for _ in range(3):
        loop.step({"x": X})
    assert [skip.cause for skip in loop.skips] == [Cause.SCALE] * 3
    assert loop.plain.calls == 3


@pytest.mark.parametrize("how", ["accelerator.autocast", "session.autocast", "outside"])
@pytest.mark.usefixtures("fresh_accelerator_state")
def test_a_loss_made_in_half_precision_outside_of_the_model(how: str) -> None:
    """Logits of finite embeddings leave FP16 under autocast: said, with the remedy, which cures it."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, init_scale=1.0)
    model = nn.Linear(4, 64)
    nn.init.constant_(model.weight, 20.0)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    contexts = {"accelerator.autocast": accelerator.autocast, "session.autocast": session.autocast}
    with contexts.get(how, nullcontext)():
        embeddings = model(torch.ones(8, 4))
        loss = nn.functional.cross_entropy(embeddings @ embeddings.T, torch.arange(8))
    accelerator.backward(loss)
    optimizer.step()
    skips = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert len(skips) == (how != "outside")
    for skip in skips:
        assert skip.cause is Cause.LOSS
        assert "make the loss in FP32" in skip.message


@for_each("dtype", [torch.float16, torch.float32])
def test_a_loss_that_the_loop_makes_in_fp16_is_said_to_be(dtype: torch.dtype) -> None:
    """By hand, without autocast: operators are named that gave FP16; in FP32, where a label makes the NaN, nothing is said of it."""
    loop = Loop(Regression(), "fp16", init_scale=1.0)
    factor = 1e6 if dtype == torch.float16 else torch.nan
    loop.step({"x": X}, loss_of=lambda logits: (logits.to(dtype) * factor).mean())
    (skip,) = loop.skips
    assert skip.cause is Cause.LOSS
    assert ("The loop makes it in FP16 (" in skip.message) is (dtype == torch.float16)
    assert ("MulBackward0" in skip.message) is (dtype == torch.float16)


@for_each(
    "taken",
    [
        lambda logits: logits.float(),
        lambda logits: logits[:, :-1].contiguous().view(-1, 7).float(),
        lambda logits: logits[torch.tensor([0, 2])].float(),
    ],
)
def test_logits_that_the_loop_makes_fp32_are_not_said_to_make_the_loss_fp16(taken: Callable[[Tensor], Tensor]) -> None:
    """Half-precision logits of a session without accelerate, of which a part is taken, and made FP32 before all else."""
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = AmpSession.for_model(model, optimizer, precision_mode="FP16")
    logits = model(X)
    assert logits.dtype == torch.float16
    session.scaler.scale((taken(logits) * torch.nan).mean()).backward()
    session.scaler.step(optimizer)
    session.scaler.update()
    (skip,) = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert skip.cause is Cause.LOSS
    assert "FP16" not in skip.message
