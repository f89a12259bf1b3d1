"""Thousands of steps in which NaN and inf turn up everywhere: the run goes on, stays finite, and tells each of them once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hf_amp
from hf_amp import Cause, EventKind, MixedPrecisionConfig
from hf_amp.report.reader import EventLogReader, find_log
from tests.faults.conftest import Tally

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")

RATE = 0.1
"""Share of the steps that something is done to."""
CAUSES = {
    "input": Cause.INPUT,
    "weight": Cause.WEIGHTS,
    "activation": Cause.MODEL,
    "activation beyond FP16": Cause.ACTIVATION,
    "gradient": Cause.SCALE,
    "loss": Cause.LOSS,
    "optimizer state": Cause.WEIGHTS,
}
"""Where the fault is → what hf_amp calls it. NaN in an activation is NaN in FP32 too: precision is not to blame.
A function of the loop's own, outside of the model, may be what the scale has made overflow."""
WITHOUT_SCALE = {**CAUSES, "gradient": Cause.DERIVATIVE}
BAD = (torch.nan, torch.inf, -torch.inf)


class TimesInBackward(torch.autograd.Function):
    """Identity whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class Factor(nn.Module):
    """Multiplies by 1, until its fault is switched on."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Network(nn.Module):
    """Two layers with nothing between them behind which a NaN or an infinity could hide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.factor, self.last = nn.Linear(8, 8), Factor(), nn.Linear(8, 4)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        large = self.first(x * self.gain).float() / self.gain
        return self.last(self.factor(nn.functional.silu(large)))


class Storm:
    """A run, and what is done to it.

    Attributes:
        injected: (step, place) of every fault.
        expected: (step, cause) of every skip that must be told, in order.
        harmless: steps whose fault did no harm, because the plan had put its module in FP32 before.
        finite_steps: steps after which parameters and optimizer state were finite, those apart that a fault has itself
            made otherwise.
    """

    def __init__(self, precision: str, seed: int, folder: Path, **options: Any) -> None:
        self.chance = random.Random(seed)
        torch.manual_seed(seed)
        self.accelerator = Accelerator(mixed_precision=precision, cpu=True)
        self.session = hf_amp.attach(
            self.accelerator,
            MixedPrecisionConfig(
                init_scale=1024.0, min_scale=4.0, max_scale=4096.0, growth_interval=2, recovery_steps=7, **options
            ),
        )
        self.session.log_to(folder)
        self.network = Network()
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.causes = CAUSES if precision == "fp16" else WITHOUT_SCALE
        self.places = [p for p in CAUSES if precision == "fp16" or p != "activation beyond FP16"]
        self.injected: list[tuple[int, str]] = []
        self.expected: list[tuple[int, Cause]] = []
        self.harmless: set[int] = set()
        self.finite_steps = 0

    def run(self, steps: int) -> None:
        number = 0
        while number < steps:
            number += 1
            place = self.chance.choice(self.places) if self.chance.random() < RATE and number > 1 else None
            if place is not None:
                self.injected.append((number, place))
            if place == "optimizer state":
                number = self.poison_state(number)
                continue
            weight = self.corrupted(self.network.parameters()) if place == "weight" else None
            skipped = self.step(place)
            if weight is not None:
                weight[0][weight[1]] = weight[2]
            if place is not None and skipped:
                self.expected.append((number, self.causes[place]))
            elif place == "activation beyond FP16":
                self.harmless.add(number)
            self.finite_steps += self.is_finite()

    def poison_state(self, number: int) -> int:
        """Nothing looks at the optimizer's state: its step writes NaN into a weight, and the next step is the one that
        tells. Then the last good values are restored, as from a checkpoint. Returns the number of that next step."""
        good = [x.clone() for x in self.tensors()]
        self.corrupted(state["exp_avg"] for state in self.optimizer.state.values())
        assert not self.step(None)
        assert not self.is_finite()
        assert self.step(None)
        assert "exp_avg of" in self.session.events[-2].message
        self.expected.append((number + 1, Cause.WEIGHTS))
        for tensor, value in zip(self.tensors(), good, strict=True):
            tensor.copy_(value)
        self.finite_steps += 2 * self.is_finite()
        return number + 1

    def step(self, place: str | None) -> bool:
        """One step; whether it was skipped."""
        x, labels = torch.randn(4, 8), torch.randint(4, (4,))
        bad = self.chance.choice(BAD)
        if place == "input":
            x[self.chance.randrange(4), self.chance.randrange(8)] = bad
        self.network.gain = 1e6 if place == "activation beyond FP16" else 1.0
        self.network.factor.factor = bad if place == "activation" else 1.0
        loss = nn.functional.cross_entropy(self.model(x), labels)
        if place == "gradient":
            loss = TimesInBackward.apply(loss, bad)
        self.accelerator.backward(loss * bad if place == "loss" else loss)
        self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return bool(self.accelerator.optimizer_step_was_skipped)

    def corrupted(self, tensors: Iterator[Tensor]) -> tuple[Tensor, int, float]:
        """Makes one element of one of them bad; returns the tensor, flat, the element's place, and its value before."""
        flat = self.chance.choice([x for x in tensors if x.dim() > 1]).detach().view(-1)
        place = self.chance.randrange(flat.numel())
        before = flat[place].item()
        flat[place] = self.chance.choice(BAD)
        return flat, place, before

    def tensors(self) -> Iterator[Tensor]:
        yield from (p.detach() for p in self.network.parameters())
        for state in self.optimizer.state.values():
            yield from state.values()

    def is_finite(self) -> bool:
        return bool(torch.cat([x.reshape(-1) for x in self.tensors()]).isfinite().all())


def first_of_each_row(skips: list[tuple[int, Cause]]) -> list[int]:
    """Of the steps that met poisoned weights, the first of those with no applied step between them."""
    firsts: list[int] = []
    stalled, before = False, 0
    for step, cause in skips:
        stalled = stalled and step == before + 1
        if cause is Cause.WEIGHTS and not stalled:
            firsts.append(step)
            stalled = True
        before = step
    return firsts


@pytest.mark.parametrize(
    ("precision", "share", "options"),
    [("fp16", 0.5, {"automatic_fallback": False}), ("fp16", 0.25, {}), ("bf16", 0.25, {})],
    ids=["fp16", "fp16 with fallback", "bf16"],
)
def test_nan_and_inf_everywhere(
    tmp_path: Path,
    precision: str,
    share: float,
    options: dict[str, Any],
    full_size: bool,
    tally: Tally,
    request: pytest.FixtureRequest,
) -> None:
    """One step in ten meets NaN or inf in a random place: parameters and optimizer state stay finite, the log holds each
    incident exactly once and under its cause, and the counters agree."""
    steps = int((20_000 if full_size else 1_000) * share)
    storm = Storm(precision, seed=7, folder=tmp_path, **options)
    storm.run(steps)
    figures, kind = storm.session.metrics(), request.node.callspec.id
    storm.session.detach()
    log = list(EventLogReader(find_log(tmp_path)).read())
    reported = [(e["step"], Cause(e["cause"])) for e in log if e["event"] == EventKind.STEP_SKIPPED.value]
    assert reported == storm.expected
    stalled = [e["step"] for e in log if e["event"] == EventKind.STALLED.value]
    assert stalled == first_of_each_row(reported)
    decided = storm.finite_steps
    assert decided in (steps, steps + 1)  # one more where the last fault takes two
    assert figures["applied_steps"] + figures["skipped_steps"] == decided
    by_cause = Counter(cause for _, cause in reported)
    assert {c: figures.get(f"skipped_steps_{c.value.lower()}", 0) for c in by_cause} == by_cause
    assert figures["skipped_steps"] == len(reported)
    once = Counter(reported)
    for place in storm.places:
        steps_of = [step for step, where in storm.injected if where == place]
        late = place == "optimizer state"
        survived = [s for s in steps_of if s in storm.harmless or once[s + late, storm.causes[place]] == 1]
        tally(f"NaN or inf in {place}: {kind}, {decided} steps", len(steps_of), len(survived))


def test_an_infinite_second_moment_is_not_told(tmp_path: Path) -> None:
    """What hf_amp does not see: Adam divides by it, its element of the weight stands still, and all weights stay finite."""
    storm = Storm("fp16", seed=0, folder=tmp_path)
    storm.step(None)
    weight = storm.network.first.weight
    storm.optimizer.state[weight]["exp_avg_sq"][0, 0] = torch.inf
    before = weight.detach().clone()
    assert not storm.step(None)
    moved = weight.detach() != before * (1 - 1e-3 * 1e-2)  # but for weight decay
    assert not moved[0, 0]
    assert weight.isfinite().all()
    assert not [e for e in storm.session.events if e.kind is not EventKind.ATTACHED and e.kind.needs_attention]
