"""Any sequence of calls, in any order, against a slow reference: parameters move exactly where a step was applied."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalerError, ScalingStrategy
from tests.reference import OverflowInBackward

LOW, HIGH, LR, CLIP = 2.0**-10, 2.0**20, 0.5, 1.0
CALLS = (
    "backward",
    "inf",
    "nan",
    "unscale",
    "clip",
    "fold",
    "step",
    "step",
    "update",
    "update",
    "zero_grad",
    "save and load",
    "whole",
)
SEQUENCES = st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 1), st.integers(-6, 6)), max_size=30)


@dataclass
class Reference:
    """One optimizer's two numbers in FP64, and what plain SGD would make of them."""

    weights: Tensor
    scaled: Tensor | None = None
    """Sum of the scaled gradients since they were cleared; None where there are none."""
    norm_limit: float | None = None
    unscaled: bool = False
    """Or to be, by a clip that is folded into the step."""

    def clear(self) -> None:
        self.scaled, self.norm_limit, self.unscaled = None, None, False

    def gradient(self, scale: float) -> Tensor | None:
        """What the optimizer is to be given."""
        if self.scaled is None or self.norm_limit is None or not self.scaled.isfinite().all():
            return None if self.scaled is None else self.scaled / scale
        unscaled = self.scaled / scale
        return unscaled * min(1.0, self.norm_limit / (unscaled.norm().item() + 1e-6))

    def clip(self, scale: float) -> None:
        """What is there now is clipped; what is added later is not."""
        if self.scaled is not None and self.scaled.isfinite().all():
            self.scaled = self.scaled * min(1.0, CLIP / (self.scaled.norm().item() / scale + 1e-6))


class Machine:
    """A scaler, two optimizers, and a reference of each."""

    def __init__(self, strategy: ScalingStrategy, mode: str, fused: bool) -> None:
        self.config = MixedPrecisionConfig(
            scaling_strategy=strategy, precision_mode=mode, init_scale=1024.0, min_scale=LOW, max_scale=HIGH,
            growth_interval=2, monitoring_interval=3,
        )  # fmt: skip
        self.scaler = AdvancedGradScaler(self.config, "cpu")
        self.parameters = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
        self.optimizers = [torch.optim.SGD([p], lr=LR, fused=fused) for p in self.parameters]
        self.references = [Reference(p.detach().double()) for p in self.parameters]
        self.scale = 1.0
        self.decided = self.applied = 0

    def call(self, name: str, which: int, power: int) -> None:
        """One call, or nothing but a `ScalerError`, after which the step is given up."""
        try:
            {"save and load": self.save_and_load}.get(name, lambda: self.act(name, which, power))()
        except ScalerError:
            self.give_up()
        self.check()

    def give_up(self) -> None:
        self.scaler.abandon_step()
        for i in range(2):
            self.act("zero_grad", i, 0)

    def act(self, name: str, which: int, power: int) -> None:
        parameter, optimizer, reference = (self.parameters[which], self.optimizers[which], self.references[which])
        if name in ("backward", "inf", "nan"):
            self.backward(name, parameter, reference, 2.0**power)
        elif name == "unscale":
            self.scaler.unscale_(optimizer)
            reference.unscaled = True
        elif name == "clip":
            self.scaler.unscale_(optimizer)
            reference.unscaled = True
            torch.nn.utils.clip_grad_norm_([parameter], CLIP)
            reference.clip(self.scale)
        elif name == "fold":
            self.scaler.clip_grad_norm_(optimizer, CLIP)
            reference.norm_limit, reference.unscaled = CLIP, True
        elif name == "step":
            self.step(optimizer, reference)
        elif name == "update":
            self.scaler.update()
            if any(each.unscaled for each in self.references):
                self.give_up()  # nor may anybody add to what was divided for a step never taken
        elif name == "zero_grad":
            optimizer.zero_grad()
            reference.clear()
        else:
            for part in ("zero_grad", "backward", "backward", "step", "update"):
                self.act(part, which, power)

    def backward(self, kind: str, parameter: Tensor, reference: Reference, size: float) -> None:
        self.scale = self.scaler.get_scale()
        wanted = torch.tensor([size, -3 * size])
        loss = (parameter * wanted).sum()
        if kind != "backward":
            loss = OverflowInBackward.apply(loss) if kind == "inf" else loss * torch.nan
            wanted = wanted * torch.nan
        self.scaler.scale(loss).backward()
        before = 0 if reference.scaled is None else reference.scaled
        reference.scaled = before + self.scale * wanted.double()

    def step(self, optimizer: torch.optim.Optimizer, reference: Reference) -> None:
        self.scaler.step(optimizer)
        gradient = reference.gradient(self.scale)
        fine = gradient is None or bool(gradient.isfinite().all())
        self.decided += 1
        self.applied += fine
        if fine and gradient is not None:
            reference.weights = reference.weights - LR * gradient
        # What was divided or clipped in place stays so in `p.grad`; nobody may step on it again without a new backward.
        optimizer.zero_grad()
        reference.clear()

    def save_and_load(self) -> None:
        """Into another scaler where nothing is under way, and into the same one anywhere."""
        file = io.BytesIO()
        torch.save(self.scaler.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        if not self.scaler._pending and all(r.scaled is None for r in self.references):
            self.scaler = AdvancedGradScaler(self.config, "cpu")
        self.scaler.load_state_dict(state)
        assert self.scaler.state_dict() == state

    def check(self) -> None:
        scaler = self.scaler
        scaler.flush()
        assert LOW <= scaler.get_scale() <= HIGH
        assert (scaler.decided_steps, scaler.applied_steps) == (self.decided, self.applied)
        assert scaler.applied_steps + scaler.skipped_steps == self.decided
        for parameter, reference in zip(self.parameters, self.references, strict=True):
            assert parameter.isfinite().all()
            torch.testing.assert_close(parameter.double(), reference.weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", list(ScalingStrategy))
@given(mode=st.sampled_from(["MIXED", "BF16"]), fused=st.booleans(), calls=SEQUENCES)
def test_parameters_move_exactly_where_a_step_was_applied(
    strategy: ScalingStrategy, mode: str, fused: bool, calls: list[tuple[str, int, int]]
) -> None:
    """Whatever is called: weights are those of the reference, counters add up, the scale stays in its bounds."""
    machine = Machine(strategy, mode, fused)
    for call in calls:
        machine.call(*call)


MAGNITUDES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.integers(-149, 127).map(lambda bits: 2.0**bits),
    st.sampled_from([0.0, 2.0**-76, 2.0**-33]),
)


@pytest.mark.parametrize("strategy", list(ScalingStrategy))
@given(steps=st.lists(st.lists(MAGNITUDES, min_size=4, max_size=4), max_size=12), start=st.integers(-24, 127))
def test_gradients_of_any_size_keep_the_scale_in_its_bounds(
    strategy: ScalingStrategy, steps: list[list[Any]], start: int
) -> None:
    """Subnormal, huge and zero elements beside each other, from any scale: it stays finite, so do parameters."""
    scaler = AdvancedGradScaler(
        MixedPrecisionConfig(scaling_strategy=strategy, init_scale=2.0**start, monitoring_interval=1), "cpu"
    )
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=2.0**-20)
    for values in steps:
        scaler.scale(parameter.sum()).backward()
        parameter.grad.copy_(torch.tensor(values))
        scaler.step(optimizer)
        scaler.update()
        assert 2.0**-24 <= scaler.get_scale() <= 2.0**127
        assert parameter.isfinite().all() or max(map(abs, values)) > 1e30 * scaler.last_outcome.scale
