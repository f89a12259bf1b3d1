"""Random small models with one random fault each, in a real loop: what was wrong, and what was told."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import hf_amp
from hf_amp import AmpEvent, Cause, EventKind, MixedPrecisionConfig

WIDTH, CLASSES = 8, 5
TRIALS = 200
Batch = dict[str, Tensor]
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Softplus)


class Attention(nn.Module):
    """One head, with its products in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT / WIDTH**0.5).softmax(-1) @ v)


class Residual(nn.Module):
    """A block around which values flow, normalised before it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.block = nn.LayerNorm(WIDTH), block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self.norm(x))


class Poison(nn.Module):
    """Passes values on, until its fault is switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.fault is None else self.fault(x)


class Classifier(nn.Module):
    """A random stack of blocks, with its loss inside."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for _ in range(chance.randint(1, 3)):
            kind = chance.choice(["mlp", "plain", "attention"])
            mlp = [nn.Linear(WIDTH, WIDTH), chance.choice(ACTIVATIONS)(), nn.Linear(WIDTH, WIDTH)]
            if kind == "plain":
                blocks += mlp[:2]
            else:
                blocks.append(Residual(Attention() if kind == "attention" else nn.Sequential(*mlp)))
        blocks.insert(chance.randint(0, len(blocks)), nn.Dropout(chance.choice([0.0, 0.1])))
        self.source = Poison()
        blocks.insert(chance.randint(1, len(blocks)), self.source)
        self.first, self.blocks, self.head = (
            nn.Linear(WIDTH, WIDTH),
            nn.Sequential(*blocks),
            nn.Linear(WIDTH, CLASSES),
        )
        self.loss_fault: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, labels: Tensor | None = None, weights: Tensor | None = None) -> Any:
        logits = self.head(self.blocks(self.first(x))).float()
        if labels is None:
            return (logits,)
        kept = labels >= 0
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
        if weights is not None:
            losses = losses * weights
        loss = (losses * kept).sum() / kept.sum()
        return (loss if self.loss_fault is None else self.loss_fault(loss)), logits


@dataclass
class Trial:
    """One run with one fault.

    Attributes:
        precision: of the accelerator.
        config: options of hf_amp.
        chance: where every random choice comes from.
        model: the model; its parameters are those of the run.
        faulty: number of the step at which the fault sets in.
        micro_batches: of every step.
        where: name of the module to blame, where it is a module.
    """

    precision: str
    config: MixedPrecisionConfig
    chance: random.Random
    model: Classifier
    faulty: int
    micro_batches: int
    where: str | None = None
    loss_outside: Callable[[Tensor], Tensor] | None = None

    def batch(self) -> Batch:
        shape = (2, 4)
        return {"x": torch.randn(*shape, WIDTH), "labels": torch.randint(CLASSES, shape), "weights": torch.ones(shape)}


def corrupt(trial: Trial, tensor: Tensor) -> None:
    """One random element becomes NaN or inf."""
    flat = tensor.data.view(-1)
    flat[trial.chance.randrange(flat.numel())] = trial.chance.choice([torch.nan, torch.inf, -torch.inf])


def bad_input(trial: Trial, batch: Batch) -> None:
    corrupt(trial, batch[trial.chance.choice(["x", "weights"])])


def bad_weight(trial: Trial, batch: Batch) -> None:
    corrupt(trial, trial.chance.choice([p for p in trial.model.parameters() if p.dim() > 1]))


def large_activation(trial: Trial, batch: Batch) -> None:
    """The output of a random layer that leaves FP16's range and not FP32's; what follows brings it back where it can."""
    layers = {name: m for name, m in trial.model.named_modules() if isinstance(m, nn.Linear)}
    trial.where, layer = trial.chance.choice(list(layers.items()))
    layer.bias.data.fill_(trial.chance.choice([1e5, 3e6, 1e8]))


def large_product(trial: Trial, batch: Batch) -> None:
    """A product of activations that leaves FP16's range outside of any layer."""
    trial.where = poison_of(trial)
    trial.model.source.fault = lambda x: x + (x * 1e3) @ (x * 1e3).mT @ x * 1e-9


def ignored_labels(trial: Trial, batch: Batch) -> None:
    batch["labels"].fill_(-100)


def log_of_zero(trial: Trial, batch: Batch) -> None:
    def fault(loss: Tensor) -> Tensor:
        return torch.log((loss - loss).abs()) + loss

    where = trial.chance.choice(["inside", "outside", "from the logits"])
    if where == "inside":
        trial.model.loss_fault = fault
    else:
        trial.loss_outside = fault
        if where == "from the logits":
            del batch["labels"]


def division(trial: Trial, batch: Batch) -> None:
    """Zero by zero in a module, whatever the precision."""
    trial.where = poison_of(trial)
    trial.model.source.fault = lambda x: x * ((x - x) / (x - x))


def infinite_derivative(trial: Trial, batch: Batch) -> None:
    """The root of zero in a module: a finite value with an infinite derivative."""
    trial.model.source.fault = lambda x: x + (x - x.detach()).float().abs().sqrt()


def poison_of(trial: Trial) -> str:
    return next(name for name, m in trial.model.named_modules() if m is trial.model.source)


def too_large_a_scale(trial: Trial, batch: Batch) -> None:
    """Set before the first step; see `run`."""


FAULTS: dict[Callable[[Trial, Batch], None], Cause] = {
    bad_input: Cause.INPUT,
    bad_weight: Cause.WEIGHTS,
    large_activation: Cause.ACTIVATION,
    large_product: Cause.ACTIVATION,
    ignored_labels: Cause.LOSS,
    log_of_zero: Cause.LOSS,
    division: Cause.MODEL,
    infinite_derivative: Cause.DERIVATIVE,
    too_large_a_scale: Cause.SCALE,
}
ONLY_FP16 = (large_activation, large_product, too_large_a_scale)


def run(seed: int) -> tuple[str, Cause, str] | None:
    """(name of the fault, its cause, the cause told) of one trial.

    None where the fault did no harm, as an infinity in front of a function that saturates. Where a module is to blame
    and another one is named, what is told is "elsewhere".
    """
    chance = random.Random(seed)
    torch.manual_seed(seed)
    fault = chance.choice(list(FAULTS))
    precision = "fp16" if fault in ONLY_FP16 else chance.choice(["fp16", "fp16", "bf16", "no"])
    late = chance.random() < 0.25
    too_large = fault is too_large_a_scale
    config = MixedPrecisionConfig(
        scaling_strategy="PERFORMANCE_OPTIMIZED" if late else chance.choice(["DYNAMIC", "ADAPTIVE"]),
        init_scale=2.0 ** chance.randint(24, 40) if too_large else 2.0 ** chance.randint(0, 6),
    )
    trial = Trial(precision, config, chance, Classifier(chance), chance.randint(1, 3), chance.choice([1, 1, 2, 3]))
    events = _train(trial, fault, fused=late or chance.random() < 0.5)
    skips = [e for e in events if e.kind is EventKind.STEP_SKIPPED]
    if not skips:
        return None
    judged = skips[0]
    reported = judged.cause.value
    if trial.where is not None and trial.where not in " ".join((*judged.modules, judged.message)):
        reported = "elsewhere"
    return fault.__name__, FAULTS[fault], reported


@dataclass
class Told:
    """What was told of a number of faults: how often each verdict on each fault, and the sums."""

    pairs: Counter[tuple[str, str]]
    right: int = 0
    unknown: int = 0

    @property
    def wrong(self) -> int:
        return self.pairs.total() - self.right - self.unknown


def told_of(trials: int) -> Told:
    """The verdicts on `trials` random faults, always the same ones."""
    reported = Told(Counter())
    for name, truth, verdict in islice(filter(None, map(run, count())), trials):
        reported.pairs[name, verdict] += 1
        reported.right += verdict == truth.value
        reported.unknown += verdict == Cause.UNKNOWN.value != truth.value
    return reported


def _train(trial: Trial, fault: Callable[[Trial, Batch], None], fused: bool) -> list[AmpEvent]:
    """Steps until one after the fault; its events."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=trial.precision, cpu=True)
    session = hf_amp.attach(accelerator, trial.config)
    optimizer = torch.optim.AdamW(trial.model.parameters(), lr=1e-3, fused=fused)
    model, optimizer = accelerator.prepare(trial.model, optimizer)
    for step in range(1, trial.faulty + trial.chance.randint(2, 3)):
        hit = trial.chance.randrange(trial.micro_batches) if step == trial.faulty else None
        for index in range(trial.micro_batches):
            batch = trial.batch()
            if index == hit:
                fault(trial, batch)
            loss = model(**batch)[0].square().mean()
            if trial.loss_outside is not None:
                loss = trial.loss_outside(loss)
            accelerator.backward(loss / trial.micro_batches)
        optimizer.step()
        optimizer.zero_grad()
    session.scaler.flush()
    session.detach()
    return list(session.events)
