"""The contract that every scaling policy keeps, and the rules that DYNAMIC takes over from others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalingStrategy
from hf_amp.scaling.policies import Observation, ScalePolicy
from hf_amp.scaling.policies import policy_of as policy_of_config
from hf_amp.scaling.state import restored
from hf_amp.statistics import to_host
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.scaling.observations import observed, scales_under

MAGNITUDES = st.floats(min_value=0, max_value=2.0**127, width=32)
WANTED = st.one_of(st.none(), st.just(0.0), st.floats(min_value=2.0**-126, max_value=2.0**127, width=32))
STEPS = st.lists(st.builds(observed, st.booleans(), st.booleans(), MAGNITUDES, WANTED), min_size=1, max_size=60)
STRATEGIES = pytest.mark.parametrize("strategy", list(ScalingStrategy))


def policy_of(strategy: ScalingStrategy, **options: object) -> ScalePolicy:
    return policy_of_config(strategy, MixedPrecisionConfig(scaling_strategy=strategy, **options))


def run(policy: ScalePolicy, steps: list[Observation]) -> list[object]:
    states = [policy.init_state(torch.device("cpu"))]
    for observation in steps:
        states.append(policy.next_state(states[-1], observation))
    return states


@STRATEGIES
@given(steps=STEPS, hysteresis=st.integers(1, 3))
def test_scale_is_positive_finite_and_in_bounds(
    strategy: ScalingStrategy, steps: list[Observation], hysteresis: int
) -> None:
    """Whatever is observed: the scale stays in [min_scale, max_scale], and no field changes dtype, shape or device."""
    policy = policy_of(
        strategy, min_scale=2.0**-6, max_scale=2.0**20, growth_interval=2,
        hysteresis=hysteresis,
    )  # fmt: skip
    states = run(policy, steps)
    for state in states:
        assert 2.0**-6 <= state.scale.item() <= 2.0**20
        for field, first in zip(state, states[0], strict=True):
            assert (field.dtype, field.shape, field.device) == (first.dtype, (), first.device)


@STRATEGIES
@given(steps=STEPS)
def test_state_round_trips_and_ranks_agree(strategy: ScalingStrategy, steps: list[Observation]) -> None:
    """A state written as numbers and read back continues alike; so do two ranks that observe the same."""
    policy = policy_of(strategy, growth_interval=3)
    whole = run(policy, steps + steps)[-1]
    middle = run(policy, steps)[-1]
    resumed = restored(policy.init_state(torch.device("cpu")), to_host(middle._asdict()))
    for observation in steps:
        resumed = policy.next_state(resumed, observation)
    for a, b, c in zip(whole, resumed, run(policy, steps + steps)[-1], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@given(steps=STEPS)
def test_what_the_host_knows_changes_nothing(steps: list[Observation]) -> None:
    """ADAPTIVE comes to the same bits whether or not it is told that a clean step is clean."""
    reported = [step._replace(known_clean=bool(step.found_inf == 0) and step.grad_amax.item() > 0) for step in steps]
    policy = policy_of(ScalingStrategy.ADAPTIVE)
    assert torch.stack(run(policy, steps)[-1]).equal(torch.stack(run(policy, reported)[-1]))


@STRATEGIES
def test_next_state_reads_no_host(strategy: ScalingStrategy) -> None:
    """A scale update never waits for the device."""
    policy = policy_of(strategy, hysteresis=2)
    steps = [observed(True), observed(), observed(wanted=2.0**20)]
    with count_host_reads() as reads:
        run(policy, steps)
    assert reads.count == 0


def test_constant_stays() -> None:
    """CONSTANT keeps its scale through overflows and clean steps."""
    policy = policy_of(ScalingStrategy.CONSTANT, init_scale=512.0)
    assert scales_under(policy, [True, False] * 5) == [512.0] * 10


def test_dynamic_halves_grows_and_stops_at_its_bounds() -> None:
    """One halving an overflow down to the floor; one doubling an interval up to the ceiling."""
    policy = policy_of(ScalingStrategy.DYNAMIC, init_scale=8.0, min_scale=2.0, max_scale=16.0, growth_interval=2)
    assert scales_under(policy, [True] * 4) == [4.0, 2.0, 2.0, 2.0]
    assert scales_under(policy, [False] * 6) == [8.0, 16.0, 16.0, 16.0, 16.0, 16.0]
    assert scales_under(policy, [False, True, False, False]) == [8.0, 4.0, 4.0, 8.0]


class DeepSpeedReference:
    """DeepSpeed's rule, slow and obvious. Source: its documentation of `loss_scale_window`, `hysteresis`."""

    def __init__(self, scale: float, window: int, hysteresis: int, floor: float) -> None:
        self.scale, self.window, self.hysteresis, self.floor = scale, window, hysteresis, floor
        self.left, self.clean = hysteresis, 0

    def update(self, overflow: bool) -> float:
        if overflow:
            self.clean = 0
            if self.left == 1:
                self.scale = max(self.scale / 2, self.floor)
            else:
                self.left -= 1
        else:
            self.clean += 1
            if self.clean == self.window:
                self.scale *= 2
                self.left = self.hysteresis
                self.clean = 0
        return self.scale


@for_each("hysteresis", [1, 2, 3])
def test_hysteresis_is_deepspeeds(hysteresis: int) -> None:
    """Over every pattern of 10 steps, which only a growth refills: DeepSpeed's scales."""
    options = {"init_scale": 256.0, "min_scale": 8.0, "growth_interval": 3, "hysteresis": hysteresis}
    policy = policy_of(ScalingStrategy.DYNAMIC, **options)
    for pattern in itertools.product([False, True], repeat=7):
        reference = DeepSpeedReference(256.0, 3, hysteresis, 8.0)
        assert scales_under(policy, pattern) == [reference.update(overflow) for overflow in pattern]


class SquareState(NamedTuple):
    """State of `Square`."""

    scale: torch.Tensor


@dataclass(frozen=True)
class Square:
    """A rule of nobody's: an overflow takes the square root of the scale, a clean step changes nothing."""

    needs_amax: ClassVar[bool] = False
    needs_underflow: ClassVar[bool] = False
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def init_state(self, device: torch.device) -> SquareState:
        return SquareState(torch.tensor(65536.0, device=device))

    def next_state(self, state: SquareState, observation: Observation) -> SquareState:
        return SquareState(torch.where(observation.found_inf > 0, state.scale.sqrt(), state.scale))


@dataclass(frozen=True)
class HalvesForLosses(Square):
    """A rule of nobody's: a loss that is not finite halves the scale, whatever the gradients are."""

    def next_state(self, state: SquareState, observation: Observation) -> SquareState:
        return SquareState(torch.where(observation.loss_non_finite > 0, state.scale / 2, state.scale))


def test_a_policy_sees_a_loss_that_is_not_finite_in_an_applied_step() -> None:
    """A NaN loss, of whose two parts one alone is not finite and gets no gradient, halves the scale of such a policy."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler, scales = AdvancedGradScaler(device="cpu", policy=HalvesForLosses()), []
    for addend in (0.0, torch.nan, 0.0):
        scaler.scale(parameter.sum() + addend).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scaler.applied_steps == 3
    assert scales == [65536.0, 32768.0, 32768.0]


def test_a_scaler_takes_anyones_policy() -> None:
    """Two overflows: 65536, 256, 16; the scale is in its state, and a copy that was loaded goes on from there."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler, scales = AdvancedGradScaler(device="cpu", policy=Square()), []
    for factor in (1.0, torch.inf, 1.0, torch.inf):
        scaler.scale(parameter.sum()).backward()
        parameter.grad.mul_(factor)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales == [65536.0, 256.0, 256.0, 16.0]
    again = AdvancedGradScaler(device="cpu", policy=Square())
    again.load_state_dict(scaler.state_dict())
    assert again.get_scale() == 16.0
