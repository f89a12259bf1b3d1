"""How the plan follows a precision schedule: a pure step of the fallback's policy and state, equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.precision import PrecisionMode
from hf_amp.schedule import ScheduledPrecision

if TYPE_CHECKING:
    from hf_amp.fallback.controller import FallbackPolicy, FallbackState


class Followed(NamedTuple):
    """What has become of policy and state; `held`: modules that the schedule has in FP32; `changes`: a `PrecisionChange` each."""

    policy: FallbackPolicy
    state: FallbackState
    held: frozenset[str]
    changes: list[tuple[Any, ...]]


def follow(
    policy: FallbackPolicy,
    state: FallbackState,
    asked: ScheduledPrecision,
    scale: float,
    held_before: frozenset[str],
    names_like: Callable[[Sequence[str]], list[str]],
) -> Followed:
    """What a schedule asks for from the next forward pass on; no change where it holds already.

    What the fallback has put into a wider precision stays there, until its own way back.

    Args:
        scale: the loss scale now, to come back to.
        held_before: what the schedule had in FP32 so far.
        names_like: gives the names of the modules of some patterns, without those inside of others.
    """
    order, plan = policy.order, state.plan
    default = next((p for p in order if asked.default and p.number_format is asked.default.number_format), order[0])
    held: set[str] = set()
    for pattern, in_fp32 in asked.modules.items():
        held = held.union(names_like([pattern])) if in_fp32 else held.difference(names_like([pattern]))
    freed, was_level = held_before - held, policy.level
    level, now = order.index(default), order.index(plan.default)
    policy = replace(policy, level=level, by_choice=(policy.by_choice - freed) | held)
    steps: list[tuple[PrecisionPlan, tuple[str, ...]]] = []
    if now == was_level or now < level:  # else the fallback holds it
        steps.append((plan := plan.with_default(default), ()))
    if fresh := tuple(sorted(held - {*plan.modules})):
        steps.append((plan := plan.with_modules(fresh, PrecisionMode.FP32), fresh))
    if back := tuple(sorted(name for name in freed if name in plan.modules and name not in state.demotions)):
        steps.append((plan := plan.without_modules(back), back))
    if plan == state.plan:
        return Followed(policy, state, frozenset(held), [])
    at_rest = scale if now == 0 and plan.default is not order[0] else state.scale_at_rest
    why = "precision_schedule says so" if asked.default or asked.modules else "no precision_schedule asks for another"
    changes, before = list[tuple[Any, ...]](), state.plan
    for after, names in steps:
        if after != before:
            message = f"from now on {moved_in_words(before, after, names)}, because {why}."
            returned = at_rest if not names and after.default is order[0] else None
            changes.append((before, after, names, message, returned))
        before = after
    state = policy.changed(replace(state, scale_at_rest=at_rest), plan, [])
    return Followed(policy, state, frozenset(held), changes)


def moved_in_words(before: PrecisionPlan, after: PrecisionPlan, names: tuple[str, ...]) -> str:
    """What runs in another precision under another plan: the modules of these names, or the model."""
    who, runs = (f"these {len(names)} modules", "run") if len(names) > 1 else ("this module", "runs")
    old, new = (plan.precision_of(names).number_format.name if names else plan.describe() for plan in (before, after))
    return f"{who if names else 'the model'} {runs} in {new}, no longer in {old}"
