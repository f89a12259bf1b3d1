"""Half-precision parameters that stand still are named; healthy runs are left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_amp import AmpSession, EventKind
from tests.each import for_each

BF16 = torch.bfloat16


class Classifier(nn.Module):
    """An embedding, a hidden layer with a norm, and a head; rows of the embedding occur as often as words do."""

    def __init__(self, words: int = 64, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.hidden(self.embedding(tokens).mean(1))))
        return self.head(x)


def batches(steps: int, words: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rare = torch.rand(16, 6, generator=generator) ** 4 * words
        yield rare.long(), torch.randint(8, (16,), generator=generator)


Schedule = Callable[[int], float]


@dataclass
class Kind:
    """One kind of run.

    Attributes:
        prepare: changes the model before the run.
        at: step → what happens to the model before it.
    """

    dtype: torch.dtype = torch.float32
    optimizer: Callable[[Any], torch.optim.Optimizer] = field(default=lambda p: torch.optim.AdamW(p, lr=1e-3))
    schedule: Schedule | None = None
    by_hand: Schedule | None = None
    prepare: Callable[[nn.Module], Any] = field(default=lambda model: None)
    at: dict[int, Callable[[nn.Module], Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    steps: int = 60


def run(kind: Kind, seed: int = 0) -> AmpSession:
    model = Classifier().to(kind.dtype)
    torch.manual_seed(seed)
    kind.prepare(model)
    optimizer = kind.optimizer([p for p in model.parameters() if p.requires_grad])
    options = {"precision_mode": "BF16", **kind.options}
    session = AmpSession.for_model(model, optimizer, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, kind.schedule) if kind.schedule else None
    first = [group["lr"] for group in optimizer.param_groups]
    for step, (tokens, labels) in enumerate(batches(kind.steps)):
        if step in kind.at:
            kind.at[step](model)
        if kind.by_hand:
            for group, lr in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = lr * kind.by_hand(step)
        with session.autocast():
            loss = kind.loss(model(tokens).float(), labels)
        session.scaler.scale(loss).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return session


def frozen(session: AmpSession) -> list[Any]:
    return [event for event in session.events if event.kind is EventKind.FROZEN]


def adamw(lr: float, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda p: torch.optim.AdamW(p, lr=lr, **options)


# ---- what stands still ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [None, lambda step: 1 - step / 60])
def test_frozen_norm_weights_are_named(schedule: Schedule | None) -> None:
    """A norm in BF16 at lr 1e-5: one event within 20 steps, of the norm's weight, with the four remedies and their bytes."""
    session = run(Kind(BF16, adamw(1e-5), schedule))
    (event,) = frozen(session)
    assert event.step <= 20
    assert event.kind.needs_attention
    assert "norm.weight" in event.modules
    assert "norm.bias" not in event.modules  # it is 0 at first, and has room for any update
    elements = sum(p.numel() for p in Classifier().parameters())
    for remedy, added in (("stochastic_rounding", 0), ("kahan", 2), ("upcast", 8), ("master_weights", 10)):
        words = f"{added * elements / 1000:.3g} kB" if added else "nothing"
        assert f'"{remedy}" adds {words}' in event.message
    assert event.figures["parameters"] == len(event.modules)


def test_cast_in_place_during_the_run() -> None:
    """TRL's continuous batching casts the model that trains to BF16: named within 20 steps of it, whichever step that is."""
    for step in (31, 40):
        cast = {step: lambda model: model.to(BF16)}
        session = run(Kind(optimizer=lambda p: torch.optim.SGD(p, lr=1e-6), at=cast, steps=step + 22))
        (event,) = frozen(session)
        assert step < event.step <= step + 20
        assert {"norm.weight", "hidden.weight", "head.weight", "embedding.weight"} <= set(event.modules)


def test_the_worst_come_first_and_all_are_counted() -> None:
    """Modules are in order of what they lose; the sentence counts them among all half-precision ones."""
    session = run(Kind(BF16, adamw(1e-6), options={"monitor_modules": True}))
    (event,) = frozen(session)
    shares = session.module_metrics()["module_lost_update_fraction"]
    assert set(event.modules) <= set(shares)
    assert f"{len(event.modules)} of 7 BF16 parameters stand still" in event.message
    assert min(shares[name] for name in event.modules) > 0.97


@for_each("remedy", ["stochastic_rounding", "kahan", "upcast", "master_weights"])
def test_every_remedy_ends_it(remedy: str) -> None:
    """With what the sentence advises nothing stands still, and no share is told."""
    session = run(Kind(BF16, adamw(1e-5), options={"half_parameters": remedy}))
    assert frozen(session) == []
    assert "lost_update_fraction" not in session.metrics()


def test_once_in_a_resumed_run_too() -> None:
    """What was reported before a checkpoint is not reported again after it."""
    first = run(Kind(BF16, adamw(1e-5)))
    model = Classifier().to(BF16)
    second = AmpSession.for_model(model, torch.optim.AdamW(model.parameters()), precision_mode="BF16")
    second.load_state_dict(first.state_dict())
    assert second._frozen.reported
    assert not second.scaler.looks_closely


# ---- what is healthy --------------------------------------------------------------------------------------------


def freeze_body(model: nn.Module) -> None:
    for part in (model.embedding, model.norm, model.hidden):
        part.requires_grad_(False)


def half_body(model: nn.Module) -> None:
    """A frozen BF16 body under an FP32 head, as in LoRA."""
    freeze_body(model)
    model.embedding.to(BF16)
    model.norm.to(BF16)
    model.hidden.to(BF16)
    model.head.register_forward_pre_hook(lambda _, args: (args[0].float(),))


def low_rank(model: nn.Module) -> None:
    """LoRA on the hidden layer, whose B is 0: A has no gradient in the first step."""
    freeze_body(model)
    hidden, dtype = model.hidden, model.hidden.weight.dtype
    model.a = nn.Parameter((torch.rand(4, 32) - 0.5).to(dtype) / 3)
    model.b = nn.Parameter(torch.zeros(32, 4, dtype=dtype))
    hidden.register_forward_hook(lambda _, args, out: out + args[0].to(dtype) @ model.a.T @ model.b.T)


def without_norm_weight(model: nn.Module) -> None:
    """A weight of 1 stands still in BF16 at any usual rate: models that train well in BF16 have none, or it is not trained."""
    model.norm.weight.requires_grad_(False)


def warm_up(steps: int) -> Schedule:
    return lambda step: min(1.0, step / steps)


def cosine(steps: int) -> Schedule:
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def cosine_after_warm_up(step: int) -> float:
    return warm_up(10)(step) * cosine(60)(step)


def unused_head(logits: Tensor, labels: Tensor) -> Tensor:
    """Half of the classes never get a gradient."""
    return nn.functional.cross_entropy(logits[:, :4], labels % 4)


SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "warm-up from 0": {"schedule": warm_up(30)},
    "long warm-up": {"schedule": warm_up(1000)},
    "warm-up by hand": {"by_hand": lambda step: (step + 1) / 1000},
    "cosine to 0": {"schedule": cosine(60)},
    "cosine to 0 by hand": {"by_hand": cosine(60)},
    "warm-up and cosine": {"schedule": cosine_after_warm_up},
    "linear to 0": {"schedule": lambda step: max(0.0, 1 - step / 50)},
    "rate 0": {"schedule": lambda step: 0.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "FP32": {},
    "BF16 at a high rate": {"dtype": BF16, "optimizer": adamw(2e-2), "prepare": without_norm_weight},
    "BF16, SGD": {"dtype": BF16, "optimizer": lambda p: torch.optim.SGD(p, lr=5.0), "prepare": without_norm_weight},
    "LoRA, zero B, BF16": {"dtype": BF16, "optimizer": adamw(2e-3), "prepare": low_rank},
    "frozen BF16 body": {"prepare": half_body},
    "unused classes, BF16": {
        "dtype": BF16, "optimizer": adamw(2e-2), "prepare": without_norm_weight, "loss": unused_head,
    },
}  # fmt: skip
HEALTHY = {
    f"{model}, {schedule}": Kind(**{**facts, **rates})
    for model, facts in MODELS.items()
    for schedule, rates in SCHEDULES.items()
}


def test_healthy_runs_are_left_alone(full_size: bool) -> None:
    """54 kinds of runs without a false alarm; a third of them by default."""
    chosen = list(HEALTHY) if full_size else list(HEALTHY)[::3]
    assert [name for name in chosen if frozen(run(HEALTHY[name]))] == []


def test_they_could_be_found_frozen() -> None:
    """The same model at a rate at which rounding loses its updates is no healthy run."""
    assert frozen(run(Kind(BF16, adamw(1e-5), prepare=without_norm_weight)))
