"""27 situations in which training goes wrong, each a small run whose fault, place and cure are known.

Taken from threads of users (Trainer, Accelerate, TRL, fairseq, timm, PyTorch's forum). Steps before `FAULT` are healthy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_amp import Cause
from tests.fallback import rescaled

STEPS, FAULT = 24, 3
"""Optimizer steps of a run, and the one at which the fault sets in."""
ROWS, WIDTH, CLASSES = 8, 16, 4


@dataclass
class Run:
    """One run.

    Attributes:
        model: the model, healthy.
        batch: (whether the fault is on) → a batch.
        loss: (what `prepare` made of the model, a batch) → the loss.
        break_it: puts a fault into the model that stays.
        stays: whether batches are bad from `FAULT` on, not in that step alone.
        optimizers: (the model) → its optimizers.
    """

    model: nn.Module
    batch: Callable[[bool], Any]
    loss: Callable[[nn.Module, Any], Tensor] = lambda model, batch: model(**batch)
    break_it: Callable[[], Any] = lambda: None
    stays: bool = False
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]] = lambda model: [
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    ]


@dataclass(frozen=True)
class Situation:
    """A run, and the truth about it.

    Attributes:
        name: in a few words.
        make: gives the run.
        cause: why steps are skipped, or would have to be.
        place: module, parameter, buffer or part of the batch; "" where the fault has none inside of the model.
        operator: the operator that gives the first value that is not finite, by PyTorch's name; "" where none does.
        line: part of its line of source.
        says: what the cause's name does not say, and the report has to.
        survivable: whether any remedy within a run lets it go on.
        init_scale: of every contender's scaler.
        report_at: the first report from this step on is judged.
    """

    name: str
    make: Callable[[], Run]
    cause: Cause
    place: str = ""
    operator: str = ""
    line: str = ""
    says: str = ""
    survivable: bool = True
    precision: str = "fp16"
    init_scale: float = 1024.0
    report_at: int = FAULT


# ---- what they are made of --------------------------------------------------------------------------------------


class Net(nn.Module):
    """A regression: first → tanh → block → head, with the loss inside where there are targets."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(8, WIDTH), block or nn.Identity(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        out = self.head(self.block(torch.tanh(self.first(x)), **options))
        return out if y is None else F.mse_loss(out, y)


def rows() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, 8), "y": torch.randn(ROWS, CLASSES)}


def equal_rows(bad: bool) -> dict[str, Tensor]:
    """A batch in which, if it is bad, every item is the same one."""
    batch = rows()
    return {**batch, "x": batch["x"][:1].expand(ROWS, -1).clone()} if bad else batch


def multiply(parameter: Tensor, factor: float) -> None:
    with torch.no_grad():
        parameter.mul_(factor)


class Wide(nn.Module):
    """A product beyond 65504 from small weights and inputs, brought back by the norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.big, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.big(h))

    def break_it(self) -> None:
        multiply(self.big.weight, 2e5)


# ---- forward leaves the range -----------------------------------------------------------------------------------


def text(bad: bool = False) -> dict[str, Tensor]:
    tokens = torch.randint(1, 256, (4, 24))
    return {"input_ids": tokens, "labels": tokens}


def gpt2() -> Run:
    model = rescaled.gpt2()
    return Run(model, text, _loss_of_output, lambda: multiply(model.transformer.h[1].mlp.c_proj.weight, 1e5))


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def llama_with_two_optimizers() -> Run:
    def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        return [torch.optim.AdamW(matrices, lr=1e-3), torch.optim.SGD(others, lr=1e-3)]

    model = rescaled.llama()
    down = model.model.layers[1].mlp.down_proj
    return Run(model, text, _loss_of_output, lambda: multiply(down.weight, 1e5), optimizers=optimizers)


def t5_with_gradient_checkpointing() -> Run:
    model = rescaled.t5()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    wo = model.encoder.block[1].layer[1].DenseReluDense.wo
    return Run(model, text, _loss_of_output, lambda: multiply(wo.weight, 65504 / 2 / float(wo.weight.abs().max())))


class Pointer(nn.Module):
    """Scores of places, those that are not there at -inf by design."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def forward(self, q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        scores = (q @ k.mT).squeeze(1) * self.temperature
        return scores.masked_fill(~valid, float("-inf"))


class PointerNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = Pointer()

    def forward(self, x: Tensor, valid: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.embed(x))
        logits = self.out(self.q(h.mean(1, keepdim=True)), self.k(h), valid)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def break_it(self) -> None:
        multiply(self.q.weight, 1e3)
        multiply(self.k.weight, 1e3)
        self.out.temperature = 1e-6


def overflow_beside_a_mask() -> Run:
    def batch(bad: bool) -> dict[str, Tensor]:
        valid = torch.arange(6) < torch.randint(3, 7, (ROWS, 1))
        return {"x": torch.randn(ROWS, 6, 4), "valid": valid, "labels": torch.randint(3, (ROWS,))}

    model = PointerNet()
    return Run(model, batch, lambda model, batch: model(**batch)["loss"], model.break_it)


class Attention(nn.Module):
    """Scores made and scaled down by the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = 1.0

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.q(h * self.gain) @ self.k(h * self.gain).mT
        scores = scores / (self.gain**2 * WIDTH**0.5)
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return torch.softmax(scores, -1) @ self.v(h)


def overflow_in_scores() -> Run:
    model = Net(Attention())
    return Run(model, lambda bad: rows(), break_it=lambda: setattr(model.block, "gain", 2e3))


class RandomGain(nn.Module):
    """Augmentation that draws from NumPy: now and then a gain with which the layer behind it overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.big, self.norm, self.most = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), 1.0

    def forward(self, h: Tensor) -> Tensor:
        gain = self.most if np.random.rand() < 0.5 else 1.0
        return self.norm(self.big(h.float() * gain))


def random_overflow() -> Run:
    model = Net(RandomGain())
    return Run(model, lambda bad: rows(), break_it=lambda: setattr(model.block, "most", 6e5))


class Potential(nn.Module):
    """Forces by differentiation inside of forward, as interatomic potentials have them, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 1)
        self.after, self.norm = nn.Linear(3, 3, bias=False), nn.LayerNorm(3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        e = self.last(torch.tanh(self.energy(x))).sum()
        (gradient,) = torch.autograd.grad(e, x, create_graph=True)
        return {"e": e, "f": self.norm(self.after(-gradient))}


def derivative_in_forward() -> Run:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(**batch)
        return out["e"].square() * 1e-3 + (out["f"] - 1).square().mean()

    model = Potential()

    def break_it() -> None:
        multiply(model.after.weight, 6e4 / float(model.after.weight.abs().max()))
        multiply(model.last.weight, 20.0)

    return Run(model, lambda bad: {"x": torch.randn(ROWS, 3)}, loss, break_it)


class Policy(Net):
    """Logits → a distribution, whose constructor refuses NaN."""

    def forward(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        chosen = torch.distributions.Categorical(logits=super().forward(x))
        return -chosen.log_prob(chosen.sample()).mean()


def forward_that_raises() -> Run:
    model = Policy(Wide())
    return Run(model, lambda bad: rows(), break_it=model.block.break_it)


# ---- backward ---------------------------------------------------------------------------------------------------


def too_large_a_scale() -> Run:
    factor = [1.0]
    return Run(
        Net(), lambda bad: rows(), lambda model, batch: model(**batch) * factor[0], lambda: factor.__setitem__(0, 3e4)
    )


def large_targets() -> Run:
    """A sum of squares over energies in meV; the scale has come down to 1 when the report that is judged is made."""

    def batch(bad: bool) -> dict[str, Tensor]:
        return {"x": torch.randn(ROWS, 8), "y": torch.full((ROWS, CLASSES), -1e5 if bad else 0.1)}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch["x"]), batch["y"], reduction="sum")

    return Run(Net(), batch, loss, stays=True)


def gradients_underflow() -> Run:
    factor = [1.0]
    return Run(
        Net(), lambda bad: rows(), lambda model, batch: model(**batch) * factor[0], lambda: factor.__setitem__(0, 1e-13)
    )


class Sharp(nn.Module):
    """Bounded, with a slope that FP32 holds and FP16 does not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.frequency = nn.Linear(WIDTH, WIDTH), 1.0

    def forward(self, h: Tensor) -> Tensor:
        return torch.sin(self.inner(h).float() * self.frequency)


def gradient_leaves_the_format() -> Run:
    model = Net(Sharp())
    return Run(model, lambda bad: rows(), break_it=lambda: setattr(model.block, "frequency", 1e18))


class Distances(nn.Module):
    """Each item, with its distance from its neighbour: the root of zero where both are one."""

    def forward(self, h: Tensor) -> Tensor:
        squared = (h - h.roll(1, 0)).square().sum(-1, keepdim=True)
        return h + squared.sqrt()


def root_at_zero() -> Run:
    return Run(Net(Distances()), equal_rows)


def root_at_zero_outside() -> Run:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch["x"])
        between = (out - out.roll(1, 0)).square().sum(-1).sqrt()
        return F.mse_loss(out, batch["y"]) + 0.1 * between.mean()

    return Run(Net(), equal_rows, loss)


class MeanOfPairs(nn.Module):
    """A mean over what is there, with a `where` for those that have nothing: too late for its derivative."""

    def forward(self, h: Tensor, pairs: Tensor) -> Tensor:
        total = (h * pairs).sum(-1, keepdim=True)
        n = pairs.sum(-1, keepdim=True)
        return h + torch.where(n > 0, total / n, 0.0)


def masked_branch() -> Run:
    def batch(bad: bool) -> dict[str, Tensor]:
        pairs = torch.ones(ROWS, WIDTH)
        pairs[0] = 0.0 if bad else 1.0
        return {**rows(), "pairs": pairs}

    return Run(Net(MeanOfPairs()), batch)


# ---- no precision cures it, or more bits do ---------------------------------------------------------------------


class Angles(nn.Module):
    """Angles between unit vectors: 16 numbers, of which FP16 keeps 11 bits each."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.eye_(self.frame.weight).requires_grad_(False)

    def forward(self, h: Tensor, partner: Tensor) -> Tensor:
        u = self.frame(F.normalize(h, dim=-1)).float()
        cosine = (u * u[partner]).sum(-1, keepdim=True) * (1 - 1e-6)
        return h + torch.acos(cosine)


def rounding() -> Run:
    def batch(bad: bool) -> dict[str, Tensor]:
        partner = torch.arange(ROWS)
        return {**rows(), "partner": partner if bad else partner.roll(1)}

    return Run(Net(Angles()), batch, stays=True)


def fully_masked_row() -> Run:
    def batch(bad: bool) -> dict[str, Tensor]:
        mask = torch.eye(ROWS, dtype=torch.bool)
        mask[0] |= bad
        return {**rows(), "mask": mask}

    return Run(Net(Attention()), batch)


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor, labels: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.encoder(x)))
        frames = torch.full((x.shape[0],), x.shape[1])
        log_probs = F.log_softmax(logits.float(), -1).transpose(0, 1)
        return {"loss": F.ctc_loss(log_probs, labels, frames, lengths), "logits": logits}


def labels_too_long() -> Run:
    def batch(bad: bool) -> dict[str, Tensor]:
        lengths = torch.full((ROWS,), 5)
        lengths[0] = 20 if bad else 5
        return {"x": torch.randn(ROWS, 12, 8), "labels": torch.randint(1, 12, (ROWS, 20)), "lengths": lengths}

    return Run(Speech(), batch, lambda model, batch: model(**batch)["loss"])


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def labels_ignored() -> Run:
    def batch(bad: bool) -> dict[str, Tensor]:
        labels = torch.randint(CLASSES, (ROWS,))
        return {"x": torch.randn(ROWS, 8), "labels": torch.full_like(labels, -100) if bad else labels}

    return Run(Tagger(), batch, lambda model, batch: model(**batch)["loss"])


class Mixture(nn.Module):
    """A likelihood written by hand, with the log of a probability that can be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        p = torch.softmax(self.body(x), -1)
        loss = -(y * torch.log(p)).sum(-1).mean()
        return {"loss": loss, "p": p}


def log_of_zero() -> Run:
    def batch(bad: bool) -> dict[str, Tensor]:
        return {"x": torch.randn(ROWS, 8) * (1e4 if bad else 1.0), "y": torch.rand(ROWS, CLASSES).softmax(-1)}

    return Run(Mixture(), batch, lambda model, batch: model(**batch)["loss"])


class Standardised(nn.Module):
    """Divides by a standard deviation, which is zero where all items are one."""

    def forward(self, h: Tensor) -> Tensor:
        centred = h - h.mean(0)
        return centred / centred.square().mean(0)


def division() -> Run:
    def batch(bad: bool) -> dict[str, Tensor]:
        return {**rows(), "x": torch.zeros(ROWS, 8)} if bad else rows()

    return Run(Net(Standardised()), batch)


# ---- something was not finite before ----------------------------------------------------------------------------


def nan_in_batch() -> Run:
    def batch(bad: bool) -> dict[str, Tensor]:
        made = rows()
        made["x"][2, 3] = torch.nan if bad else 0.0
        return made

    return Run(Net(), batch)


class Graph:
    """A batch that is an object, as graph libraries have them."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class GraphNet(Net):
    def forward(self, data: Graph) -> Tensor:  # type: ignore[override]
        return super().forward(data.x, data.y)


def inf_in_batch_object() -> Run:
    def batch(bad: bool) -> Graph:
        made = Graph(**rows())
        made.x[2, 3] = torch.inf if bad else 0.0
        return made

    return Run(GraphNet(nn.LayerNorm(WIDTH)), batch, lambda model, batch: model(batch))


def nan_weight() -> Run:
    model = Net()
    return Run(model, lambda bad: rows(), break_it=lambda: model.head.weight.data.view(-1)[5].fill_(torch.nan))


class Quantiser(nn.Module):
    """A codebook that follows what it is given, in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.randn(4, WIDTH))
        self.codebook: Tensor

    def forward(self, h: Tensor) -> Tensor:
        nearest = torch.cdist(h.detach().float(), self.codebook).argmin(1)
        if self.training:
            chosen = F.one_hot(nearest, 4).to(h.dtype)
            with torch.no_grad():
                means = chosen.T @ h / chosen.sum(0).clamp(min=1)[:, None]
                self.codebook.lerp_(means, 0.01)
        return h + (self.codebook[nearest] - h).detach()


def nan_codebook() -> Run:
    model = Net(Quantiser())
    return Run(model, lambda bad: rows(), break_it=lambda: model.block.codebook.fill_(torch.nan))


class TrustRatio(torch.optim.Optimizer):
    """A step as long as its parameter: 0/0 where a gradient is exactly zero."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad / p.grad.norm() * p.norm(), alpha=-1e-3)


class Dead(nn.Module):
    """A branch that is switched off by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.threshold = nn.Linear(WIDTH, WIDTH), 0.0

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.relu(self.inner(h) - self.threshold)


def optimizer_makes_nan() -> Run:
    model = Net(Dead())
    return Run(
        model,
        lambda bad: rows(),
        break_it=lambda: setattr(model.block, "threshold", 50.0),
        optimizers=lambda model: [TrustRatio(model.parameters())],
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        for t in range(x.shape[1]):
            h = torch.relu(self.first(x[:, t]) + self.again(h))
        return self.out(h), h


def carried_state() -> Run:
    """Truncated back-propagation through time: the state of one step is the next one's input."""
    state = [torch.zeros(ROWS, 8)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out, h = model(batch, state[0])
        state[0] = h.detach()
        return out.square().mean()

    return Run(Recurrent(), lambda bad: torch.randn(ROWS, 5, 4) * (1e6 if bad else 1.0), loss)


A, L, M = Cause.ACTIVATION, Cause.LOSS, Cause.MODEL

SITUATIONS = (
    Situation("GPT-2: a linear layer overflows", gpt2, A, "transformer.h.1.mlp.c_proj", "addmm", "self.c_proj(hidden_states)"),
    Situation(
        "Llama, two optimizers: a linear layer overflows",
        llama_with_two_optimizers, A, "model.layers.1.mlp.down_proj", "linear", "self.down_proj(",
    ),
    Situation(
        "T5, gradient checkpointing: a linear layer overflows",
        t5_with_gradient_checkpointing, A, "encoder.block.1.layer.1.DenseReluDense.wo", "linear", "self.wo(hidden_states)",
    ),
    Situation("overflow beside a mask of -inf", overflow_beside_a_mask, A, "out", "matmul", "(q @ k.mT).squeeze(1)"),
    Situation("overflow in attention scores", overflow_in_scores, A, "block", "matmul", "scores = self.q("),
    Situation("overflow in some of NumPy's draws", random_overflow, A, "block.big", "linear", "self.big(h.float() * gain)"),
    Situation("overflow behind autograd.grad in forward", derivative_in_forward, A, "after", "linear", "self.after(-gradient)"),
    Situation("forward raises because of an overflow", forward_that_raises, A, "block.big", "linear", "self.big(h)"),
    Situation("the scale is too large", too_large_a_scale, Cause.SCALE),
    Situation(
        "large targets need a scale below 1",
        large_targets, Cause.SCALE, says="the loss is large", init_scale=64.0, report_at=FAULT + 6,
    ),
    Situation("all gradients underflow", gradients_underflow, Cause.SCALE, survivable=False, says="init_scale"),
    Situation("a gradient leaves the format, in backward alone", gradient_leaves_the_format, A, "block.inner", "float", "self.inner(h).float()"),
    Situation("root at zero inside of the model", root_at_zero, Cause.DERIVATIVE, "block", "sqrt", "squared.sqrt()"),
    Situation("root at zero outside of the model", root_at_zero_outside, Cause.DERIVATIVE),
    Situation(
        "BF16, clipping: 0/0 in a branch that `where` hides",
        masked_branch, Cause.DERIVATIVE, "block", "div", "total / n", precision="bf16",
    ),
    Situation("rounding: acos of a cosine above 1", rounding, Cause.ROUNDING, "block", "acos", "torch.acos("),
    Situation("a row is fully masked", fully_masked_row, M, "block", "softmax", "torch.softmax(scores", says="masked"),
    Situation("division by zero in a module", division, M, "block", "div", "centred / centred"),
    Situation("log of zero in the loss", log_of_zero, L, "", "log", "torch.log(p)"),
    Situation("CTC: labels longer than inputs", labels_too_long, L, "", "ctc_loss", "F.ctc_loss(", says="longer than inputs"),
    Situation("every label is ignored", labels_ignored, L, "", "cross_entropy", "F.cross_entropy(", says="ignored"),
    Situation("NaN in the batch", nan_in_batch, Cause.INPUT, "x"),
    Situation("inf in a batch that is an object", inf_in_batch_object, Cause.INPUT, "data.x"),
    Situation(
        "state carried on from a step that overflowed",
        carried_state, Cause.INPUT, "h", says="a state which the model returned", report_at=FAULT + 1, survivable=False,
    ),
    Situation("NaN in a weight", nan_weight, Cause.WEIGHTS, "head.weight", survivable=False),
    Situation("NaN in a codebook", nan_codebook, Cause.BUFFER, "block.codebook", survivable=False),
    Situation(
        "the optimizer makes NaN of finite gradients",
        optimizer_makes_nan, Cause.WEIGHTS, "block.inner.weight", says="optimizer", report_at=FAULT + 1, survivable=False,
    ),
)  # fmt: skip
