"""What cannot be made safe is refused in words, and nothing is changed in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_amp
from hf_amp import AttachError, BatchError, ConfigError
from hf_amp.rescale import RescaleReport, parameter_groups, rescale_for_fp16
from tests.each import for_each
from tests.rescale.families import FAMILIES

LARGE = 2.0**20


class Block(nn.Module):
    """Two linear layers of width 8 around any function; the first is blown up, the second undoes it where that is possible."""

    def __init__(self, between: Any, up: float = LARGE, down: float = 1 / LARGE) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between
        with torch.no_grad():
            self.first.weight.mul_(up)
            self.first.bias.mul_(up)
            self.second.weight.mul_(down)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def batch() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def assert_same(report: RescaleReport, model: nn.Module) -> None:
    """The outputs of the rescaled copy are those of the model, and finite in half precision."""
    assert report.safe, report.sentence
    x = torch.randn(16, 8)
    with torch.no_grad():
        assert torch.equal(model(x), report.model(x))
        assert copy.deepcopy(report.model).half()(x.half()).isfinite().all()


@for_each(
    "between",
    [
        F.relu, lambda x: x, torch.neg, lambda x: F.leaky_relu(x, 0.1), lambda x: x.abs(), lambda x: x.clamp(min=0),
        lambda x: torch.where(x > 0, x, 0.0), lambda x: x.masked_fill(x < 0, 0.0), lambda x: x * 0.3, lambda x: x / 7,
        lambda x: torch.cat([x[:, 4:], x[:, :4]], -1), lambda x: x - x.mean(-1, keepdim=True), lambda x: x.flip(0) + x,
        lambda x: torch.zeros_like(x).index_add_(0, torch.tensor([0, 1, 2, 3] * (len(x) // 4)), x[: len(x) // 4 * 4]),
        lambda x: torch.maximum(x, -x), lambda x: x.clone().relu_(), lambda x: x.t().contiguous().view(8, -1).t(),
    ],
)  # fmt: skip
def test_what_a_factor_passes_through_is_rescaled(between: Any) -> None:
    """Layouts, masks, sums and maxima of what has one factor, writes in place: the same to the last bit."""
    model = Block(between)
    assert_same(rescale_for_fp16(model, batch()), model)


@for_each(
    ("between", "words"),
    [
        (F.gelu, "gelu"), (F.silu, "silu"), (torch.tanh, "tanh"), (lambda x: x + 1, "add"), (torch.exp, "exp"),
        (lambda x: x.softmax(-1), "_softmax"), (lambda x: x.clamp(max=3.0), "clamp"), (lambda x: x.masked_fill(x < 0, 1.0), "masked_fill"),
        (lambda x: torch.where(x > 1.0, x, 0.0), "gt"), (lambda x: x.sin(), "sin"), (lambda x: x.round(), "round"),
        (lambda x: x.clone().add_(2.0), "add_"), (lambda x: x.clamp(min=1e-6), "clamp"),
        (lambda x: x.scatter(1, torch.zeros(len(x), 1, dtype=torch.int64), 1), "scatter"), (lambda x: x.sign() * x.ceil(), "ceil"),
    ],
)  # fmt: skip
def test_what_no_factor_passes_through_is_refused_by_its_name(between: Any, words: str) -> None:
    """Too large an input of such a function stays too large; nothing is handed out."""
    model = Block(between, up=LARGE, down=1.0)
    try:
        report = rescale_for_fp16(model, batch())
    except BatchError:  # exp of it is infinite in FP32 too
        assert words == "exp"
        return
    assert not report.safe
    assert report.model is None
    assert any("first" in each and words in each for each in report.refused), report.refused
    assert report.sentence.startswith("Not safe in FP16: ")


def test_rescaled_as_far_as_possible_where_that_is_asked_for() -> None:
    """One layer can be cured, the other cannot: the function stays, and what is left is named."""
    model = nn.Sequential(Block(F.relu), Block(torch.sigmoid, down=1.0))
    report = rescale_for_fp16(model, batch(), partial=True)
    assert not report.safe
    assert any(name.startswith("0.") for name in report.exponents)
    assert all("1." in each for each in report.refused)
    x = torch.randn(16, 8)
    assert torch.equal(model(x), report.model(x))


def test_outputs_that_leave_the_range_are_refused() -> None:
    """Logits beyond 65504 are what the model returns: no factor may touch them."""
    report = rescale_for_fp16(Block(F.relu, up=LARGE, down=1.0), batch())
    assert not report.safe
    assert any("the model's output" in each for each in report.refused), report.refused


def test_a_model_that_fits_is_left_alone() -> None:
    """Nothing overflows: nothing moves."""
    report = rescale_for_fp16(Block(F.gelu, up=1.0, down=1.0), batch())
    assert report.safe
    assert not report.exponents
    assert report.sentence.startswith("Nothing to do")


class Gated(nn.Module):
    """Experts in a list, of which a token meets one; the last is never met by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block(F.relu) for _ in range(3))

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (which == i).nonzero().flatten()
            if len(rows):
                out.index_add_(0, rows, expert(x[rows]))
        return out


def test_experts_that_the_batch_does_not_meet_are_not_passed_over_in_silence() -> None:
    """Their like would be rescaled, and they would not: a larger batch is asked for, which then is enough."""
    model, x = Gated(), batch()
    report = rescale_for_fp16(model, {"x": x, "which": torch.tensor([0, 1, 0, 1])})
    assert not report.safe
    assert any("experts.2.first.weight" in each and "larger batch" in each for each in report.refused), report.refused
    assert rescale_for_fp16(model, {"x": x, "which": torch.tensor([0, 1, 2, 1])}).safe


class Normed(nn.Module):
    """A linear layer, blown up, before a norm whose epsilon went along, or stands in the code."""

    def __init__(self, epsilon: float, fixed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.eps, self.fixed = nn.Linear(8, 8), epsilon, fixed
        self.weight = nn.Parameter(torch.ones(8))
        with torch.no_grad():
            self.first.weight.mul_(LARGE)
            self.first.bias.mul_(LARGE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return (
            self.weight
            * x
            * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + (1e-3 * LARGE**2 if self.fixed else self.eps)).to(
                x.dtype
            )
        )


def test_epsilons_move_where_they_can_and_are_not_changed_where_they_cannot() -> None:
    """An attribute moves along, one that is nothing beside the variance may stay, a number in the code is refused."""
    moved = Normed(1e-3 * LARGE**2)
    report = rescale_for_fp16(moved, batch())
    assert_same(report, moved)
    assert report.epsilons == {"eps": report.model.eps}
    assert report.model.eps < moved.eps
    stays = Normed(1e-6)
    report = rescale_for_fp16(stays, batch())
    assert_same(report, stays)
    assert not report.epsilons
    report = rescale_for_fp16(Normed(0.5, fixed=True), batch())
    assert not report.safe
    assert any("add" in each for each in report.refused), report.refused


class Tied(nn.Module):
    """One matrix embeds and reads out; a projection before the head can take its factor away."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(16, 8), nn.LayerNorm(8, eps=1e-12), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.mul_(LARGE)
            self.norm.weight.div_(LARGE)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))


def test_tied_weights_move_together_and_stay_tied() -> None:
    """What reads out with the same matrix is made up for in the norm between."""
    model, ids = Tied(), torch.arange(16)[None]
    report = rescale_for_fp16(model, ids)
    assert report.safe, report.sentence
    assert report.model.head.weight is report.model.embed.weight
    assert torch.equal(model(ids), report.model(ids))


def test_running_statistics_move_with_what_they_are_of() -> None:
    """Persistent buffers of a batch norm: the mean by the factor, the variance by its square."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, eps=1e-5 * LARGE**2), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.mul_(LARGE)
        model[0].bias.mul_(LARGE)
    model.train()
    for _ in range(50):
        model(torch.randn(64, 8))
    report = rescale_for_fp16(model.eval(), batch())
    assert_same(report, model)
    assert {"1.running_mean", "1.running_var"} <= set(report.exponents)


def test_models_that_cannot_be_rescaled_are_refused_before_anything_runs() -> None:
    """Quantised, sharded, offloaded and scripted models, each in a sentence that says what to do."""
    plain = Block(F.relu)
    quantised = copy.deepcopy(plain)
    quantised.first.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    offloaded = copy.deepcopy(plain)
    offloaded.first.to("meta")
    scripted = torch.jit.trace(nn.Linear(8, 8), batch())
    for model, words in (
        (quantised, "quantised"),
        (offloaded, "offloaded"),
        (scripted, "TorchScript"),
        (nn.ReLU(), "no parameters"),
    ):
        with pytest.raises(AttachError, match=words):
            hf_amp.rescale_for_fp16(model, batch())
    with pytest.raises(BatchError, match="cannot be run on this batch"):
        rescale_for_fp16(plain, torch.zeros(4, 3))
    with pytest.raises(BatchError, match="NaN or inf"):
        rescale_for_fp16(plain, torch.full((4, 8), torch.nan))


def test_adam_takes_a_rescaled_model_where_the_original_would_go() -> None:
    """Twenty AdamW steps with weight decay: the parameters stay apart by their factors alone."""
    family = next(f for f in FAMILIES if f.name == "LlamaForCausalLM")
    inputs = family.inputs()
    report = rescale_for_fp16(family.blown_up({"stream": 20, "mlp": 9}), inputs)
    original, rescaled = family.blown_up({"stream": 20, "mlp": 9}), report.model
    labels = inputs["input_ids"]
    for model, groups in (
        (original, [{"params": list(original.parameters()), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}]),
        (rescaled, parameter_groups(rescaled, report.exponents, 1e-3, weight_decay=0.1)),
    ):
        optimizer = torch.optim.AdamW(groups)
        for _ in range(20):
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = dict(original.named_parameters())
    for name, parameter in rescaled.named_parameters():
        torch.testing.assert_close(parameter, moved[name] * 2.0 ** report.exponents.get(name, 0), rtol=1e-4, atol=1e-7)


def test_slices_of_one_parameter_have_no_learning_rate_in_common() -> None:
    """Fused queries, keys and values that were multiplied by different powers: said, not approximated."""
    model = nn.Linear(2, 4)
    with pytest.raises(ConfigError, match="2 powers of two"):
        parameter_groups(model, {"weight": (0, 0, 3, 3)}, 1e-3)
    groups = parameter_groups(model, {"weight": (3, 3, 3, 3)}, 1e-3)
    assert [g["lr"] for g in groups] == [1e-3, 8e-3]
