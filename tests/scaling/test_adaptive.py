"""ADAPTIVE finds the scale that the gradients want, and keeps overflows within its budget."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalingStrategy
from hf_amp.scaling.policies import policy_of
from tests.each import for_each
from tests.scaling.observations import observed, scales_under, simulate

WIDE = 30.0
"""Spread, in bits, of elements that fill FP16's normal numbers: underflow wants all the scale that overflow leaves."""


def gaussian(steps: int, mean: float = -1.0, sigma: float = 0.3, seed: int = 0) -> list[float]:
    dice = random.Random(seed)
    return [dice.gauss(mean, sigma) for _ in range(steps)]


def with_outliers(x: list[float]) -> list[float]:
    """Gradients 64 times as large every 100 steps."""
    return [value + (6.0 if step % 100 == 99 else 0.0) for step, value in enumerate(x)]


def test_hidden_growth_is_reached_in_twenty_steps() -> None:
    """Best scale, at which neither end of the gradients leaves FP16, 2^30, from 2^16: within 2 bits after 20 steps."""
    skipped, bits = simulate([-14.0] * 21, spread_bits=WIDE)
    assert skipped == []
    assert 28 <= bits[20] <= 30


def test_small_scale_is_reached_in_three_skips() -> None:
    """Best scale 2^5 from 2^16: at most 3 skipped steps until it stays (the stock rule needs 11)."""
    for kind in ({"log_amax": [10.9] * 3000}, {"log_amax": [-5.0] * 3000, "gap_bits": 16.0}):
        skipped, bits = simulate(**kind, spread_bits=WIDE)
        assert len([step for step in skipped if step < 1000]) <= 3
        assert 3 <= bits[999] <= 5


@for_each(
    ("gap_bits", "heavy", "spread_bits"), [(0.0, False, 20.0), (2.0, False, WIDE), (0.0, True, WIDE), (2.0, True, 20.0)]
)
def test_overflows_stay_within_the_budget(gap_bits: float, heavy: bool, spread_bits: float) -> None:
    """Over 4,000 steps, Gaussian or with outliers of up to 8 bits in 1%: at most 1e-3 skipped after the first 100."""
    dice = random.Random(1)
    x = gaussian(4_000, sigma=0.5)
    if heavy:
        x = [value + (8 * dice.random() if dice.random() < 0.01 else 0.0) for value in x]
    skipped, _ = simulate(x, gap_bits=gap_bits, spread_bits=spread_bits)
    assert len([step for step in skipped if step >= 100]) <= 4
    assert len(skipped) <= 7


def test_outliers_cost_no_step_where_underflow_leaves_room() -> None:
    """Gradients 64 times as large every 100 steps: none is skipped, and no element that matters underflows."""
    skipped, bits = simulate(with_outliers(gaussian(1000)), spread_bits=20.0)
    assert skipped == []
    assert min(bits) >= 20 - 14 + 1


def test_returning_outliers_cost_few_steps_where_it_does_not() -> None:
    """The same where underflow wants all that overflow leaves: at most 3 are skipped, before their size is known."""
    skipped, bits = simulate(with_outliers(gaussian(1000)), spread_bits=WIDE)
    assert len(skipped) <= 3
    assert max(skipped) <= 299
    assert bits[-1] >= 9  # 2^10 is the largest scale that the outliers bear


def test_room_for_outliers_is_an_option() -> None:
    """Gradients 64 times as large every 100 steps: without room the scale is larger in between, and they overflow."""
    runs = {
        room: simulate(with_outliers(gaussian(1000)), spread_bits=20.0, overflow_budget=0.1, outlier_headroom=room)
        for room in (64.0, 1.0)
    }
    (kept, cautious), (overflows, bold) = runs[64.0], runs[1.0]
    assert kept == []
    assert 9 <= len(overflows) <= 20
    assert bold[95] - cautious[95] >= 4


def test_budget_is_an_option() -> None:
    """A larger budget keeps a larger scale."""
    careful, bold = (
        simulate(gaussian(300, sigma=1.0), overflow_budget=budget, spread_bits=WIDE)[1][-1] for budget in (1e-4, 0.2)
    )
    assert bold > careful


def test_scale_follows_shrinking_gradients() -> None:
    """Gradients that shrink by 20 bits over 5,000 steps are followed up to within 12 bits, within the budget."""
    x = [value - step / 250 for step, value in enumerate(gaussian(5_000))]
    skipped, bits = simulate(x, spread_bits=WIDE)
    assert len(skipped) <= 5
    assert 15.99 - x[-1] - bits[-1] < 12


def test_overflow_never_enters_the_moments() -> None:
    """Mean and variance are the same before and after overflows, whose amax is inf."""
    policy = policy_of(ScalingStrategy.ADAPTIVE, MixedPrecisionConfig())
    state = policy.init_state(torch.device("cpu"))
    for amax in (0.5, 0.25, 2.0):
        state = policy.next_state(state, observed(amax=amax))
    after = state
    for _ in range(20):
        after = policy.next_state(after, observed(overflow=True))
    for name in ("mean", "variance", "rate", "wanted"):
        assert torch.equal(getattr(state, name), getattr(after, name))


@for_each("overflows", [1, 20, 1_000])
def test_what_overflows_taught_is_forgotten(overflows: int) -> None:
    """However many there were, two windows of clean steps after the last one the scale is what it was before."""
    policy = policy_of(ScalingStrategy.ADAPTIVE, MixedPrecisionConfig(overflow_budget=0.01))
    state = policy.init_state(torch.device("cpu"))
    for step in range(300 + overflows):
        clean = step < 50 or step >= 50 + overflows
        state = policy.next_state(state, observed(not clean, amax=0.5, wanted=2.0**14 if clean else None))
        if step == 49:
            before = state.scale.item()
    assert state.scale.item() == before == 2.0**14


def test_largest_gradients_outside_of_fp16_raise_the_limit() -> None:
    """Clean steps with amax * scale above FP16's largest value (embeddings) prove it sound; an overflow ends that."""
    policy = policy_of(ScalingStrategy.ADAPTIVE, MixedPrecisionConfig(init_scale=2.0**20))
    state = policy.next_state(policy.init_state(torch.device("cpu")), observed(amax=1.0, wanted=2.0**24))
    assert state.scale.item() == 2.0**20
    state = policy.next_state(state, observed(overflow=True))
    for _ in range(10):
        state = policy.next_state(state, observed(amax=1.0))
    assert state.scale.item() == 2.0**15


@for_each("clean_before", [1, 2, 4, 8])
def test_a_jump_in_the_first_steps_does_not_end_at_the_smallest_scale(clean_before: int) -> None:
    """Gradients outside of FP16 (embeddings) that are 2^44 times as large from now on: all others keep a scale in FP16's range."""
    policy = policy_of(ScalingStrategy.ADAPTIVE, MixedPrecisionConfig(init_scale=64.0))
    state = policy.init_state(torch.device("cpu"))
    for step in range(clean_before + 100):
        state = policy.next_state(state, observed(amax=0.4 if step < clean_before else 2.0**42.5, wanted=512.0))
        assert state.scale.item() >= 2.0**-2


def test_non_finite_loss_leaves_the_scale_alone() -> None:
    """A NaN batch is not the scale's fault: 100 of them change nothing."""
    policy = policy_of(ScalingStrategy.ADAPTIVE, MixedPrecisionConfig())
    assert set(scales_under(policy, [True] * 100, loss_finite=False)) == {65536.0}


def test_underflow_pulls_the_scale_up_as_far_as_it_needs() -> None:
    """Without underflow the scale leaves room for an outlier; with it, it is what underflow wants, up to the ceiling."""
    ends = {spread: simulate([-1.0] * 300, spread_bits=spread)[1][-1] for spread in (20.0, 26.0, 60.0)}
    assert ends == {20.0: 10.0, 26.0: 13.0, 60.0: 16.0}


@for_each("fused", [False, True])
@for_each("strategy", ["ADAPTIVE", "PERFORMANCE_OPTIMIZED"])
def test_scale_of_real_gradients_is_what_their_smallest_elements_want(strategy: str, fused: bool) -> None:
    """Gradients from 2^-28 to 2^-2: at 2^14 the smallest are FP16's smallest normal number, and there the scale stays."""
    gradient = torch.full((1024,), 2.0**-28)
    gradient[0] = 2.0**-2
    weight = nn.Parameter(torch.zeros(1024))
    optimizer = torch.optim.SGD([weight], lr=0.0, fused=fused)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(scaling_strategy=strategy, monitoring_interval=2), "cpu")
    late = fused and ScalingStrategy(strategy).defers
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (2.0**16 if late and step == 0 else 2.0**14)


def test_a_noisy_sample_moves_the_scale_by_little_and_a_new_regime_at_once() -> None:
    """Samples 3 bits off now and then leave the scale within a bit; one 8 bits off is believed."""
    policy = policy_of(ScalingStrategy.ADAPTIVE, MixedPrecisionConfig())
    state = policy.init_state(torch.device("cpu"))
    dice = random.Random(0)
    for _ in range(200):
        state = policy.next_state(state, observed(amax=2.0**-6, wanted=2.0 ** (18 + dice.choice([0, 0, 0, 3]))))
    assert 2.0**18 <= state.scale.item() <= 2.0**19
    for _ in range(5):
        state = policy.next_state(state, observed(amax=2.0**-12, wanted=2.0**27))
    assert state.wanted.item() == pytest.approx(27, abs=0.5)


def test_no_gradients_hold_the_scale() -> None:
    """Steps whose gradients are all zero say nothing about the scale, once others were seen."""
    policy = policy_of(ScalingStrategy.ADAPTIVE, MixedPrecisionConfig())
    state = policy.next_state(policy.init_state(torch.device("cpu")), observed(amax=1.0))
    scale = state.scale.item()
    for _ in range(10):
        state = policy.next_state(state, observed(amax=0.0))
    assert state.scale.item() == scale


def test_before_any_gradient_zeros_may_be_underflow() -> None:
    """The scale rises by 2 bits a step, below one that has overflowed; not for a loss that is not finite."""
    policy = policy_of(ScalingStrategy.ADAPTIVE, MixedPrecisionConfig())
    state = policy.init_state(torch.device("cpu"))
    for bits in (18, 20, 22):
        state = policy.next_state(state, observed(amax=0.0))
        assert state.scale.item() == 2.0**bits
    assert policy.next_state(state, observed(amax=0.0, loss_finite=False)).scale.item() == 2.0**22
    state = policy.next_state(state, observed(overflow=True))
    assert state.scale.item() == 2.0**14
    for _ in range(9):
        state = policy.next_state(state, observed(amax=0.0))
    assert state.scale.item() == 2.0**20
    state = policy.init_state(torch.device("cpu"))
    for _ in range(99):
        state = policy.next_state(state, observed(amax=0.0))
    assert state.scale.item() == 2.0**40
