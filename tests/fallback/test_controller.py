"""The fallback as a pure state machine: the cheapest remedy first, a way back, no flapping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from hf_amp import Cause, PrecisionMode
from hf_amp.fallback.controller import FallbackPolicy, FallbackState, StepFacts

MIXED, BF16, FP32 = PrecisionMode.MIXED, PrecisionMode.BF16, PrecisionMode.FP32
CLEAN = StepFacts()


def fallback(**options: object) -> FallbackPolicy:
    """With BF16 in between, a recovery after 4 clean steps, and a threshold that one bad step exceeds."""
    defaults = {"order": (MIXED, BF16, FP32), "threshold": 1e-6, "window": 16, "recovery_steps": 4}
    return FallbackPolicy(**{**defaults, **options})


def activation(*modules: str, share: float = 1.0) -> StepFacts:
    return StepFacts(Cause.ACTIVATION, modules, share)


def after(rule: FallbackPolicy, *facts: StepFacts) -> FallbackState:
    state = rule.init_state()
    for fact in facts:
        state = rule.next_state(state, fact)
    return state


def test_modules_to_blame_go_to_fp32_and_the_rest_stays() -> None:
    """The cheapest remedy first: two modules, not the model."""
    plan = after(fallback(), activation("a.b", "c")).plan
    assert (plan.default, dict(plan.modules)) == (MIXED, {"a.b": FP32, "c": FP32})


def test_more_modules_join_those_already_there() -> None:
    """A second overflow elsewhere adds its module; what is inside of a named one counts as named."""
    plan = after(fallback(), activation("a"), activation("a.b", "c")).plan
    assert dict(plan.modules) == {"a": FP32, "c": FP32}


def test_where_modules_do_not_help_the_whole_model_climbs_the_ladder() -> None:
    """Modules already in FP32, and modules nobody can name, leave BF16, then FP32; then there is nothing left."""
    rule = fallback()
    states = [
        after(rule, activation("a"), *[overflow] * n) for overflow in (activation("a"), activation()) for n in (1, 2, 3)
    ]
    assert [state.plan.default for state in states] == [BF16, FP32, FP32] * 2
    assert after(fallback(order=(MIXED, FP32)), activation()).plan.default is FP32


def test_where_the_whole_model_is_in_fp32_no_module_is_moved_there() -> None:
    """Another module to blame changes nothing: there is nothing wider."""
    state = after(fallback(order=(MIXED, FP32)), activation(), activation("a"))
    assert (state.plan.default, dict(state.plan.modules)) == (FP32, {})


def test_causes_that_precision_cannot_cure_change_nothing() -> None:
    """SCALE, INPUT, WEIGHTS and LOSS leave plan and patience alone, however often they come."""
    rule = fallback()
    for cause in (Cause.SCALE, Cause.INPUT, Cause.WEIGHTS, Cause.LOSS):
        state = after(rule, *[StepFacts(cause)] * 50)
        assert (state.plan, state.demotions) == (rule.init_state().plan, {})


def test_a_single_unknown_overflow_only_skips() -> None:
    """The second one within the window is a pattern; one that comes after the window is a first one again."""
    unknown = StepFacts(Cause.UNKNOWN)
    assert after(fallback(), unknown).plan.default is MIXED
    assert after(fallback(), unknown, CLEAN, unknown).plan.default is BF16
    assert after(fallback(), unknown, *[CLEAN] * 16, unknown).plan.default is MIXED


def test_threshold_is_the_tolerated_share_of_non_finite_elements_over_the_window() -> None:
    """Shares add up over the steps of the window; up to the threshold an overflow only skips."""
    rule = fallback(threshold=0.25, window=8)
    half = activation("a", share=0.5)
    quiet = [CLEAN] * 7
    assert not after(rule, *quiet, *[half] * 4).plan.modules  # 4 * 0.5 / 8 is the threshold itself
    assert after(rule, *quiet, *[half] * 5).plan.modules
    assert not after(rule, *quiet, half, half, half, half, *[CLEAN] * 4, half).plan.modules  # one has left the window


def test_modules_return_after_quiet_steps_and_wait_twice_as_long_after_each_relapse() -> None:
    """Back after 4 applied steps, then 8, then 16; a skip that the scale cures does not count as quiet."""
    rule = fallback()
    state = rule.init_state()
    waits = []
    for _ in range(3):
        state = rule.next_state(state, activation("a"))
        wait = 0
        while state.plan.modules:
            state = rule.next_state(state, StepFacts(Cause.SCALE))
            state = rule.next_state(state, CLEAN)
            wait += 1
        waits.append(wait)
    assert waits == [4, 8, 16]


def test_the_whole_model_returns_one_rung_at_a_time_and_before_the_modules() -> None:
    """FP32 → BF16 → MIXED with its modules → MIXED, each after the clean steps."""
    rule = fallback()
    state = after(rule, activation("a"), activation("a"), activation("a"))
    seen = []
    for _ in range(40):
        former, state = state, rule.next_state(state, CLEAN)
        if state.plan != former.plan:
            seen.append((state.plan.default, len(state.plan.modules)))
    assert seen == [(BF16, 1), (MIXED, 1), (MIXED, 0)]


def test_no_room_means_no_widening_for_a_while() -> None:
    """After a withdrawal the same overflow only skips until `recovery_steps` later, then it is tried again."""
    rule = fallback()
    state = rule.next_state(rule.init_state(), activation("a"))
    state = rule.withdrawn(state, rule.init_state().plan)
    plans = []
    for _ in range(5):
        state = rule.next_state(state, activation("a"))
        plans.append(len(state.plan.modules))
    assert plans == [0, 0, 0, 1, 1]


def changes(rule: FallbackPolicy, adversary: Callable[[FallbackState], StepFacts], steps: int) -> int:
    state, count = rule.init_state(), 0
    for _ in range(steps):
        former, state = state, rule.next_state(state, adversary(state))
        count += state.plan != former.plan
    return count


def test_an_adversary_gets_logarithmically_many_changes() -> None:
    """Overflowing whenever promoted, over N steps: at most 2 (log2(N / recovery_steps) + 1) changes, named or not."""
    for modules in (("a", "b", "c"), ()):

        def overflow_when_promoted(state: FallbackState, modules: tuple[str, ...] = modules) -> StepFacts:
            safe = all(map(state.plan.holds, modules)) if modules else state.plan.default is FP32
            return CLEAN if safe else activation(*modules)

        rule = fallback(order=(MIXED, FP32), recovery_steps=10)
        for steps in (1_000, 10_000):
            bound = 2 * (math.log2(steps / 10) + 1)
            assert 2 <= changes(rule, overflow_when_promoted, steps) <= bound


FACTS = st.builds(
    StepFacts,
    cause=st.sampled_from([None, None, None, *Cause]),
    modules=st.lists(st.sampled_from(["", "a", "a.b", "c", "c.d.e"]), max_size=3, unique=True).map(tuple),
    non_finite_fraction=st.floats(0, 1),
)


@given(facts=st.lists(FACTS, max_size=60), resume_at=st.integers(0, 60), recovery=st.integers(1, 6))
def test_whatever_happens_the_plan_stays_in_its_lattice_and_survives_a_checkpoint(
    facts: list[StepFacts], resume_at: int, recovery: int
) -> None:
    """The default is on the ladder, modules are in FP32 and none inside another; a copy through JSON goes on alike."""
    rule = fallback(recovery_steps=recovery)
    state, twin = rule.init_state(), rule.init_state()
    for index, fact in enumerate(facts):
        if index == resume_at:
            twin = FallbackState.from_plain(json.loads(json.dumps(twin.to_plain())))
        former, state, twin = state, rule.next_state(state, fact), rule.next_state(twin, fact)
        assert state == twin
        assert state.plan.default in rule.order
        assert set(state.plan.modules.values()) <= {FP32}
        assert "" not in state.plan.modules
        rungs = [rule.order.index(each.plan.default) for each in (former, state)]
        assert abs(rungs[1] - rungs[0]) <= 1 or (fact.cause is Cause.ROUNDING and state.plan.default is rule.order[-1])
        assert state.clean_steps < recovery << 60


def test_a_default_that_this_run_does_not_have_is_left_behind() -> None:
    """A plan that had fallen back to BF16, resumed in FP32: the default is FP32, the modules stay named."""
    state = after(fallback(), activation("a"), activation("a"))
    resumed = fallback(order=(FP32,)).restored(state)
    assert (state.plan.default, resumed.plan.default) == (BF16, FP32)
    assert dict(resumed.plan.modules) == {"a": FP32}
