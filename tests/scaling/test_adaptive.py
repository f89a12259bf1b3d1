"""ADAPTIVE finds the scale that the gradients want, and keeps overflows within its budget."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hf_amp import MixedPrecisionConfig
from hf_amp.scaling.adaptive import AdaptiveScale
from tests.scaling.observations import observed, scales_under, simulate


def gaussian(steps: int, mean: float = -1.0, sigma: float = 0.3, seed: int = 0) -> list[float]:
    dice = random.Random(seed)
    return [dice.gauss(mean, sigma) for _ in range(steps)]


def test_hidden_growth_is_reached_in_twenty_steps() -> None:
    """Best scale 2^30 from 2^16: within 2 bits after 20 steps, without a skip (the stock rule needs 28,000)."""
    skipped, bits = simulate([-14.0] * 21)
    assert skipped == []
    assert 28 <= bits[20] <= 30


def test_small_scale_is_reached_in_three_skips() -> None:
    """Best scale 2^5 from 2^16: at most 3 skipped steps until it stays (the stock rule needs 11)."""
    for kind in ({"log_amax": [10.9] * 3000}, {"log_amax": [-5.0] * 3000, "gap_bits": 16.0}):
        skipped, bits = simulate(**kind)
        assert len([step for step in skipped if step < 1000]) <= 3
        assert 3 <= bits[999] <= 5


@pytest.mark.parametrize("gap_bits", [0.0, 2.0])
@pytest.mark.parametrize("heavy", [False, True])
def test_overflows_stay_within_the_budget(gap_bits: float, heavy: bool) -> None:
    """Over 4,000 steps, Gaussian or with outliers of up to 8 bits in 1%: at most 1e-3 skipped after the first 10."""
    dice = random.Random(1)
    x = gaussian(4_000, sigma=0.5)
    if heavy:
        x = [value + (8 * dice.random() if dice.random() < 0.01 else 0.0) for value in x]
    skipped, _ = simulate(x, gap_bits=gap_bits)
    assert len([step for step in skipped if step >= 10]) <= 4


def test_returning_outlier_costs_one_skip() -> None:
    """Gradients 64 times as large every 100 steps: the first is skipped, the others are not."""
    x = [value + (6.0 if step % 100 == 99 else 0.0) for step, value in enumerate(gaussian(1000))]
    skipped, bits = simulate(x)
    assert skipped == [99]
    assert bits[-1] >= 9  # 2^10 is the largest scale that the outliers bear


def test_budget_is_an_option() -> None:
    """A larger budget keeps a larger scale."""
    careful, bold = (
        simulate(gaussian(300, sigma=1.0), overflow_budget=budget)[1][-1] for budget in (1e-4, 0.2)
    )
    assert bold > careful


def test_scale_follows_shrinking_gradients() -> None:
    """Gradients that shrink by 20 bits over 5,000 steps are followed up to within 12 bits, within the budget."""
    x = [value - step / 250 for step, value in enumerate(gaussian(5_000))]
    skipped, bits = simulate(x)
    assert len(skipped) <= 5
    assert 15.99 - x[-1] - bits[-1] < 12


def test_overflow_never_enters_the_moments() -> None:
    """Mean, square and peak are the same before and after overflows, whose amax is inf."""
    policy = AdaptiveScale.from_config(MixedPrecisionConfig())
    state = policy.init_state(torch.device("cpu"))
    for _ in range(5):
        state = policy.next_state(state, observed(amax=0.5))
    after = state
    for _ in range(20):
        after = policy.next_state(after, observed(overflow=True))
    for name in ("weight", "mean", "square", "peak", "former_peak"):
        assert torch.equal(getattr(state, name), getattr(after, name))


def test_non_finite_loss_leaves_the_scale_alone() -> None:
    """A NaN batch is not the scale's fault: 100 of them change nothing."""
    policy = AdaptiveScale.from_config(MixedPrecisionConfig())
    assert set(scales_under(policy, [True] * 100, loss_finite=False)) == {65536.0}


def test_underflow_pulls_the_scale_up() -> None:
    """What an overflow has taught fades faster while more underflows than need be."""
    policy = AdaptiveScale.from_config(MixedPrecisionConfig())
    scales = {}
    for underflow in (0.0, 0.5):
        state = policy.init_state(torch.device("cpu"))
        for _ in range(50):
            state = policy.next_state(state, observed(amax=0.5, underflow=0.0))
        state = policy.next_state(state, observed(overflow=True))
        for _ in range(400):
            state = policy.next_state(state, observed(amax=0.01, underflow=underflow))
        scales[underflow] = math.log2(state.scale.item())
    assert scales[0.5] >= scales[0.0] + 2


def test_no_gradients_hold_the_scale() -> None:
    """Steps whose gradients are all zero say nothing about the scale."""
    policy = AdaptiveScale.from_config(MixedPrecisionConfig())
    state = policy.init_state(torch.device("cpu"))
    for _ in range(10):
        state = policy.next_state(state, observed(amax=0.0))
    assert state.scale.item() == 65536.0
