"""What a replay says of operators: which, on which line, from what to what; for faults that users have had."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_amp import Cause, EventKind, MixedPrecisionConfig, PrecisionMode, StandardMixedPrecisionTrainer
from tests.each import for_each
from tests.fallback.test_diagnosis import EVERY_PRECISION, SOUND, Loop, Regression, X

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


def square(logits: Tensor) -> Tensor:
    return logits.square().mean()


class Angles(nn.Module):
    """The angle between equal unit vectors, whose cosine rounding makes larger than 1."""

    def __init__(self) -> None:
        super().__init__()
        self.frame, self.angle, self.out = nn.Linear(3, 3, bias=False), ArcCosine(), nn.Linear(1, 1)
        nn.init.eye_(self.frame.weight)

    def forward(self, u: Tensor) -> Tensor:
        return self.out(self.angle(self.frame(u)))


class ArcCosine(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        cosine = u.float().square().sum(-1, keepdim=True) * (1 - 1e-6)
        return torch.acos(cosine)


@for_each("precision", ["fp16", "bf16"])
def test_rounding_is_told_from_overflow(precision: str) -> None:
    """ROUNDING with the operator, the module and its line, no value being large; FP32, not BF16, cures it at once."""
    torch.manual_seed(0)
    loop = Loop(Angles(), precision)
    u = nn.functional.normalize(torch.randn(64, 3), dim=-1)
    for _ in range(3):
        loop.step({"u": u}, loss_of=square)
    (skip,) = loop.skips
    assert (skip.cause, skip.before) == (Cause.ROUNDING, skip.after)
    assert "in angle" in skip.message
    assert "acos at test_operators.py:" in skip.message
    assert "`return torch.acos(cosine)`" in skip.message
    assert loop.session.plan.default is PrecisionMode.FP32


def test_an_overflow_gives_operator_line_and_ranges() -> None:
    """The inputs, the parameters and the output of the linear layer that leaves FP16, as a slow reference computes them."""
    model = Regression(between=lambda x: x * 1e-6)
    with torch.no_grad():
        model.first.weight.mul_(4e5)
        inputs, parameters, output = (
            "range from {:.4g} to {:.4g}",
            "range from {:.4g} to {:.4g}",
            "from {:.4g} to {:.4g}",
        )
        held = torch.cat([model.first.weight.flatten(), model.first.bias])
        expected = [
            text.format(x.min(), x.max()) for text, x in ((inputs, X), (parameters, held), (output, model.first(X)))
        ]
    loop = Loop(model, "fp16")
    loop.step(SOUND)
    (skip,) = loop.skips
    assert (skip.cause, skip.modules) == (Cause.ACTIVATION, ("first",))
    assert "linear at test_diagnosis.py:" in skip.message
    assert (
        f"whose inputs {expected[0]} and parameters {expected[1]}; its output is {expected[2]} in FP32" in skip.message
    )


class Masked(nn.Module):
    """Attention scores of which a whole row is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        scores = self.layer(x) @ x.mT + torch.zeros(3, 3).masked_fill(~keep, -torch.inf)
        return scores.softmax(-1) @ x


@EVERY_PRECISION
def test_a_fully_masked_row_is_named(precision: str) -> None:
    """MODEL, which no precision cures: the mask by design elsewhere is not to blame."""
    loop = Loop(Masked(), precision)
    keep = torch.ones(3, 3, dtype=torch.bool).tril()
    loop.step({"x": X, "keep": keep}, loss_of=square)
    assert not [skip for skip in loop.skips if skip.cause is not Cause.SCALE]
    keep[1] = False
    for _ in range(3):
        loop.step({"x": X, "keep": keep}, loss_of=square)
    assert [skip.cause for skip in loop.skips[-3:]] == [Cause.MODEL] * 3
    assert "a row is fully masked (softmax over nothing but -inf)" in loop.skips[-1].message
    assert loop.session.metrics()["precision_changes"] == 0


def test_labels_that_are_longer_than_inputs() -> None:
    """LOSS, from CTC, with inf named and the reason."""

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 5)

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            logits = self.layer(x).log_softmax(-1)
            lengths = [torch.full((1,), each.shape[0]) for each in (x, labels)]
            return nn.functional.ctc_loss(logits[:, None], labels[None], *lengths), logits

    loop = Loop(Speech(), "bf16")
    loop.step({"x": X, "labels": torch.tensor([1, 2, 3, 4, 1])})
    (skip,) = loop.skips
    assert skip.cause is Cause.LOSS
    assert "labels are longer than inputs" in skip.message
    assert "its output is inf" in skip.message


class Root(nn.Module):
    """A distance that is zero, inside of a branch that a mask hides."""

    def forward(self, x: Tensor) -> Tensor:
        distance = (x - x.detach()).square().sum(-1).sqrt()
        return torch.where(distance > 0, distance, torch.zeros_like(distance))


@EVERY_PRECISION
def test_a_derivative_gives_its_operator_and_line(precision: str) -> None:
    """SqrtBackward0 at the line of the forward pass, as autograd's anomaly mode says it, and its input's range."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.root = nn.Linear(8, 8), Root()

        def forward(self, x: Tensor) -> Any:
            return self.layer(x).mean() + self.root(self.layer(x)).mean()

    loop = Loop(Pair(), precision)
    loop.step({"x": X}, loss_of=lambda loss: loss)
    (skip,) = loop.skips
    assert (skip.cause, skip.modules) == (Cause.DERIVATIVE, ("root",))
    assert "SqrtBackward0, the derivative of sqrt at test_operators.py:" in skip.message
    assert "whose inputs range from 0 to 0" in skip.message


class Graph:
    """A batch of graphs, as libraries for them make it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._store = {"x": x, "y": y}

    def __getattr__(self, name: str) -> Tensor:
        return self.__dict__["_store"][name]


@for_each("name", ["x", "y"])
def test_a_tensor_inside_of_a_batch_object_is_named(name: str) -> None:
    """INPUT with `data.x`, where the model takes an object that only knows how to give attributes."""

    class OnGraphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, data: Graph) -> Tensor:
            return (self.layer(data.x) - data.y).square().mean()

    loop = Loop(OnGraphs(), "bf16")
    held = {"x": X.clone(), "y": torch.zeros(3, 8)}
    held[name][0, 0] = torch.nan
    loop.step({"data": Graph(**held)}, loss_of=lambda loss: loss)
    assert loop.skips[0].cause is Cause.INPUT
    assert f"holds NaN in data.{name}" in loop.skips[0].message


class Augmented(nn.Module):
    """A gain drawn outside of torch, now and then so large that FP16 overflows; and what a forward pass changes in it."""

    def __init__(self, draws: str) -> None:
        super().__init__()
        self.layer, self.draws = nn.Linear(8, 8), draws
        self.calls, self.seen, self.newest = 0, [0], torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.newest += 1
        self.last_shape = x.shape
        drawn = np.random.rand() if self.draws == "numpy" else random.random()
        return self.layer(x * (1e6 if drawn < 0.3 else 1.0)).tanh()


@for_each("draws", ["numpy", "python"])
def test_a_replay_draws_the_same_from_numpy_and_python_and_leaves_no_trace(draws: str) -> None:
    """Every overflow is ACTIVATION in the layer. The model has counted its calls, not those of the replays."""
    random.seed(0)
    np.random.seed(0)
    model = Augmented(draws)
    loop = Loop(model, "fp16", automatic_fallback=False, init_scale=64.0)
    drawn = np.random.RandomState(0).rand(12) if draws == "numpy" else [random.Random(0).random() for _ in range(12)]
    generator = random.Random(0)
    drawn = drawn if draws == "numpy" else [generator.random() for _ in range(12)]
    for _ in range(12):
        loop.step({"x": X}, loss_of=square)
    assert [(skip.step, skip.cause, skip.modules) for skip in loop.skips] == [
        (step, Cause.ACTIVATION, ("layer",)) for step, each in enumerate(drawn, 1) if each < 0.3
    ]
    assert (model.calls, model.seen, float(model.newest)) == (12, list(range(13)), 12.0)


class Potential(nn.Module):
    """A force field: forces are a derivative that forward itself takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.after, self.norm = nn.Linear(3, 16), nn.Linear(16, 1), nn.Linear(3, 3), nn.LayerNorm(3)
        with torch.no_grad():
            self.after.weight.mul_(1e7)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.c(torch.tanh(self.a(x))).sum(), x, create_graph=True)
        return self.norm(self.after(-force))


def test_a_model_that_differentiates_in_forward_is_examined() -> None:
    """ACTIVATION in the layer after the derivative; the model stays in FP16 otherwise."""
    torch.manual_seed(0)
    loop = Loop(Potential(), "fp16", init_scale=1.0)
    for _ in range(3):
        loop.step({"x": torch.randn(8, 3)}, loss_of=square)
    assert [(skip.cause, skip.modules) for skip in loop.skips] == [(Cause.ACTIVATION, ("after",))]
    assert list(loop.session.plan.modules) == ["after"]


class AngularForces(nn.Module):
    """The force of an angle between unit vectors, which is not defined at 0, as rounding makes it; or of a steep energy."""

    def __init__(self, is_steep: bool) -> None:
        super().__init__()
        self.frame, self.out = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.is_steep = is_steep
        with torch.no_grad():
            nn.init.eye_(self.frame.weight).mul_(3e3 if is_steep else 1.0)

    def forward(self, u: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        energy = self.frame(u * 1e-3) * 1e3 if self.is_steep else torch.acos(self.frame(u).float())
        (force,) = torch.autograd.grad(energy.sum(), u, None if self.is_steep else torch.tensor(2.0), create_graph=True)
        return self.out(force)


@for_each(
    ("is_steep", "cause", "derivative"),
    [
        (False, Cause.ROUNDING, "AcosBackward0, the derivative of acos"),
        (True, Cause.ACTIVATION, "the derivative of linear"),
    ],
)
def test_a_derivative_that_forward_takes_gives_its_operator(is_steep: bool, cause: Cause, derivative: str) -> None:
    """Rounding is told from overflow there too, although no output of a module shows either."""
    loop = Loop(AngularForces(is_steep), "fp16", init_scale=1.0)
    for _ in range(3):
        loop.step({"u": torch.eye(3) * (1 - 1e-5)}, loss_of=square)
    assert [skip.cause for skip in loop.skips] == [cause]
    assert f"{derivative} at test_operators.py:" in loop.skips[0].message
    assert loop.session.plan.default is PrecisionMode.FP32


class Draws(nn.Module):
    """A policy: torch checks the probabilities that it draws from, and raises."""

    def __init__(self) -> None:
        super().__init__()
        self.big, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.big.weight.mul_(4e5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.big(x) * 1e-6))
        return -torch.distributions.Categorical(logits=logits, validate_args=True).log_prob(labels).mean()


LABELS = torch.tensor([0, 1, 2])


def test_a_forward_that_raises_because_of_an_overflow_is_examined_first() -> None:
    """The event names the module, the exception goes on, and the next try runs under the new plan."""
    loop = Loop(Draws(), "fp16", init_scale=64.0)
    with pytest.raises(ValueError, match="Categorical"):
        loop.step({"x": X, "labels": LABELS})
    (raised,) = [event for event in loop.session.events if event.kind is EventKind.FORWARD_RAISED]
    assert (raised.step, raised.cause, raised.modules) == (1, Cause.ACTIVATION, ("big",))
    assert "ValueError was raised: a forward value left the range of FP16" in raised.message
    loop.optimizer.zero_grad()
    loop.step({"x": X, "labels": LABELS})
    assert loop.session.metrics()["applied_steps"] == 1


UNCAUGHT = """
import sys, torch
from tests.fallback.test_operators import LABELS, X, Loop, Draws

class Loss(Draws):
    def forward(self, x, labels):
        return self.head(torch.tanh(self.big(x) * 1e-6))

def shown(*of_error):
    print("traceback follows", of_error[0].__name__, file=sys.stderr)

sys.excepthook = shown
loop = Loop(Loss(), "fp16", init_scale=64.0)
loop.session.begin_run()
loop.session.end_run()
assert sys.excepthook is shown
loop.session.begin_run()
torch.distributions.Categorical(logits=loop.model(x=X, labels=LABELS).float(), validate_args=True)
"""


def test_what_nobody_catches_is_explained_before_python_shows_it() -> None:
    """The loop's own code raises: modules, and what to begin with the next time; Python's hook is the user's again after a run."""
    ran = subprocess.run([sys.executable, "-c", UNCAUGHT], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    before, traceback, _ = ran.stderr.partition("traceback follows ValueError")
    assert traceback, before
    assert "forward_raised (ACTIVATION) in big" in before
    assert "Start again with fp32_modules=['big']." in before


def test_an_exception_of_another_kind_is_left_alone() -> None:
    """Nothing is said, and nothing changes, where forward raises from finite values."""
    loop = Loop(Regression(), "fp16")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        loop.step({"x": X[:, :3], "labels": SOUND["labels"]})
    assert not [event for event in loop.session.events if event.kind is EventKind.FORWARD_RAISED]
    assert loop.session.metrics()["precision_changes"] == 0


def cross_entropy_in_fp32(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Raises where a probability is out of its range; autocast refuses it."""
    with torch.autocast("cpu", enabled=False):
        return nn.functional.binary_cross_entropy(probabilities.float(), labels)


@for_each("is_outside", [False, True])
def test_a_loop_of_ours_tries_the_step_again(is_outside: bool) -> None:
    """The trainer repeats the step under the new plan, also where the loss function is what raises."""
    model: nn.Module = Draws()
    config = MixedPrecisionConfig(precision_mode="MIXED", init_scale=64.0)
    trainer = StandardMixedPrecisionTrainer(config)
    batch: Any = {"x": X, "labels": LABELS}
    loss_fn = None
    if is_outside:
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Sigmoid())
        with torch.no_grad():
            model[0].weight.mul_(4e6)
        batch, loss_fn = (X, torch.rand(3, 4)), cross_entropy_in_fp32
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        trainer.train_step(batch, model, optimizer, loss_fn)
    assert trainer.session.metrics()["applied_steps"] == 2
    assert list(trainer.session.plan.modules) == (["0"] if is_outside else ["big"])


def test_a_replay_is_no_forward_pass_of_the_next_step() -> None:
    """After skips whose backward was repeated, a step still has only its own batch to be examined."""
    loop = Loop(Regression(), "fp16", init_scale=2.0**40)
    for _ in range(4):
        loop.step(SOUND)
        assert len(loop.session._fallback.recorder.forwards_of(loop.session.scaler.decided_steps)) == 1
    assert len(loop.skips) == 4


def test_what_could_not_be_tried_in_fp32_is_not_claimed() -> None:
    """UNKNOWN, not DERIVATIVE "in FP32 either", where the pass in FP32 raises, as for want of memory."""
    passes = []

    def root(x: Tensor) -> Tensor:
        passes.append(x)
        if len(passes) >= 3:  # the step's own, its backward again, and then FP32
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.sqrt((x - x.detach()).float())

    loop = Loop(Regression(between=root), "fp16")
    loop.step(SOUND)
    assert len(passes) >= 3
    assert loop.skips[0].cause is Cause.UNKNOWN
    assert "could not be repeated in FP32" in loop.skips[0].message


class Speaks(nn.Module):
    """Is given its batch in a tuple that cannot be held weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, packed: Any) -> Tensor:
        return self.layer(packed.data)

    @torch.no_grad()
    def generate(self, packed: Any) -> Tensor:
        return self(packed)


def test_generation_from_packed_sequences_is_as_without_hf_amp() -> None:
    """What a call is given is noted there, whatever it is."""
    model, packed = Speaks(), nn.utils.rnn.pack_sequence([torch.ones(3, 8)])
    expected = model.generate(packed)
    loop = Loop(model, "no")
    assert torch.equal(loop.plain.generate(packed), expected)
