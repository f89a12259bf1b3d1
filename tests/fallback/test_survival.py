"""Everything that goes wrong, for hundreds of steps: the run finishes, stays finite, and has told each incident once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hf_amp
from hf_amp import Cause, EventKind, MixedPrecisionConfig, PrecisionMode
from tests.reference import OverflowInBackward

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
CAUSE_OF = {
    "NaN batch": Cause.INPUT,
    "inf gradient": Cause.SCALE,
    "poisoned labels": Cause.LOSS,
    "activation": Cause.ACTIVATION,
}


class Network(nn.Module):
    """Two layers; the first can be made to leave FP16's range, and to have no room in FP32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.gain, self.is_full = 1.0, False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        large = self.first(x * self.gain).float()
        return self.last(torch.tanh(large / self.gain))


@dataclass
class Run:
    """The loop, what was done to it and what it told."""

    seed: int
    precision: str
    incidents: list[tuple[str, int]] = field(default_factory=list)
    applied: int = 0
    finite: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accelerator = Accelerator(mixed_precision=self.precision, cpu=True)
        self.session = hf_amp.attach(
            self.accelerator,
            MixedPrecisionConfig(init_scale=1024.0, max_scale=4096.0, growth_interval=2, recovery_steps=7),
        )
        plain = Network()
        self.network = plain
        self.model, self.optimizer = self.accelerator.prepare(
            plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
        )
        self.chance = random.Random(self.seed)

    def loss(self, fault: str | None) -> Tensor:
        x, labels = torch.randn(4, 8), torch.randint(4, (4,))
        self.network.gain = 1e6 if fault == "activation" else 1.0
        if fault == "NaN batch":
            x[self.chance.randrange(4), self.chance.randrange(8)] = torch.nan
        logits = self.model(x)
        if fault == "poisoned labels":
            return nn.functional.cross_entropy(logits, labels) * torch.tensor(torch.inf)
        loss = nn.functional.cross_entropy(logits, labels)
        return OverflowInBackward.apply(loss) if fault == "inf gradient" else loss

    def step(self, number: int, fault: str | None) -> None:
        """One step; tried again where the session has made room for it."""
        upcast = self.network_is_wider()
        try:
            self.accelerator.backward(self.loss(fault))
        except torch.OutOfMemoryError as error:
            if not self.session.recover(error):
                raise
            self.network.is_full = False
            self.incidents.append(("withdrawn", number - 1))
            return self.step(number, fault)
        self.optimizer.step()
        skipped = self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()
        if fault is not None and not (fault == "activation" and not skipped):
            self.incidents.append((fault, number))
        self.applied += not skipped
        self.finite.append(all(x.isfinite().all() for x in self.tensors()))
        if self.network_is_wider() and not upcast:
            self.incidents.append(("widened", number))
            self.network.is_full = self.chance.random() < 0.5
        elif upcast and not self.network_is_wider():
            self.incidents.append(("back", number))
        return None

    def network_is_wider(self) -> bool:
        plan = self.session.plan
        return bool(plan.modules) or plan.default is not self.session.requested_mode

    def tensors(self) -> Iterator[Tensor]:
        yield from self.network.parameters()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def reported(self) -> list[tuple[str, int]]:
        """The session's events, in the words of `incidents`."""
        # Of several in a row, which a smaller scale does not cure.
        names: dict[Any, str] = {cause: name for name, cause in CAUSE_OF.items()} | {Cause.DERIVATIVE: "inf gradient"}
        words = []
        for event in self.session.events:
            if event.kind is EventKind.STEP_SKIPPED:
                words.append((names[event.cause], event.step))
            elif event.kind is EventKind.PRECISION_CHANGED:
                to_wider = event.after == PrecisionMode.FP32.value
                back = "withdrawn" if "not enough memory" in event.message else "back"
                words.append(("widened" if to_wider else back, event.step))
        return words


def test_hundreds_of_steps_of_faults(full_size: bool) -> None:
    """NaN batches, inf gradients, poisoned labels, overflowing activations, and out-of-memory right after a widening:
    parameters and optimizer state are finite after every step, and the events are the incidents, once each, in order."""
    steps = 1000 if full_size else 400
    run = Run(seed=0, precision="fp16")
    torch.manual_seed(0)
    for number in range(1, steps + 1):
        fault = run.chance.choice(list(CAUSE_OF)) if run.chance.random() < 0.2 else None
        run.step(number, fault)
    assert all(run.finite)
    assert len(run.finite) == steps
    assert run.reported() == run.incidents
    kinds = {kind for kind, _ in run.incidents}
    assert kinds == {*CAUSE_OF, "widened", "withdrawn", "back"}
    figures = run.session.metrics()
    skips = sum(kind in CAUSE_OF for kind, _ in run.incidents)
    assert (figures["applied_steps"], figures["skipped_steps"]) == (run.applied, skips) == (steps - skips, skips)
    assert run.session.scaler.get_scale() >= 1


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_three_hundred_steps_of_faults_without_a_scale(precision: str) -> None:
    """The guard of BF16 and FP32 runs survives and reports the same; what may be SCALE with a scale is DERIVATIVE."""
    run = Run(seed=1, precision=precision)
    torch.manual_seed(0)
    for number in range(1, 301):
        faults = [fault for fault in CAUSE_OF if fault != "activation"]
        run.step(number, run.chance.choice(faults) if run.chance.random() < 0.2 else None)
    assert all(run.finite)
    reported = [(e.step, e.cause) for e in run.session.events if e.kind is EventKind.STEP_SKIPPED]
    derivative = {"inf gradient": Cause.DERIVATIVE}
    expected = [(step, {**CAUSE_OF, **derivative}[kind]) for kind, step in run.incidents if kind in CAUSE_OF]
    assert reported == expected


def test_only_out_of_memory_right_after_a_widening_is_recovered() -> None:
    """Any other error, and memory that ran out for another reason, is the user's: `recover` says False and changes nothing."""
    run = Run(seed=0, precision="fp16")
    assert not run.session.recover(torch.OutOfMemoryError("CUDA out of memory"))
    run.step(1, "activation")
    assert dict(run.session.plan.modules) == {"first": PrecisionMode.FP32}
    run.network.is_full = False
    assert not run.session.recover(ValueError("bad batch"))
    run.step(2, None)
    assert not run.session.recover(torch.OutOfMemoryError("CUDA out of memory"))
    assert dict(run.session.plan.modules) == {"first": PrecisionMode.FP32}


def test_a_step_that_ran_out_of_memory_is_taken_anew() -> None:
    """What its earlier micro-batches had left, gradients and a loss that was not finite, has no part in the step after
    `recover`."""
    run = Run(seed=0, precision="fp16")
    run.step(1, "activation")
    run.accelerator.backward(run.loss("poisoned labels"))
    assert run.network.last.weight.grad is not None
    run.network.is_full = True
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run.loss(None)
    assert run.session.recover(caught.value)
    run.network.is_full = False
    run.step(2, None)
    run.step(3, "inf gradient")
    reported = [(e.step, e.cause) for e in run.session.events if e.kind is EventKind.STEP_SKIPPED]
    assert reported == [(1, Cause.ACTIVATION), (3, Cause.SCALE)]
    assert run.session.metrics()["applied_steps"] == 1


def test_a_loss_of_an_abandoned_step_is_forgotten() -> None:
    """A bad loss before the memory ran out is not held against the step that is taken instead."""
    run = Run(seed=0, precision="fp16")
    run.step(1, "activation")
    run.accelerator.backward(run.loss("poisoned labels"))
    assert run.session.recover(torch.OutOfMemoryError("CUDA out of memory"))
    run.step(2, "inf gradient")
    assert run.session.events[-1].cause is Cause.SCALE
