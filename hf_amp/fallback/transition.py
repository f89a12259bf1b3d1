"""One change of plan, and the words for it."""

from __future__ import annotations

from typing import NamedTuple

from hf_amp.events import mentioned
from hf_amp.fallback.controller import WHOLE_MODEL, Fallback, FallbackState, StepFacts
from hf_amp.fallback.plan import PrecisionPlan


class Transition(NamedTuple):
    """One change of plan.

    Attributes:
        before: the plan until now.
        after: the plan from the next forward pass on.
        modules: qualified names of the modules that change; empty for the whole model.
        message: one sentence for people.
    """

    before: PrecisionPlan
    after: PrecisionPlan
    modules: tuple[str, ...]
    message: str


def transition_between(
    former: FallbackState, state: FallbackState, facts: StepFacts, fallback: Fallback
) -> Transition:
    """What the step with these `facts` has changed, told."""
    before, after = former.plan, state.plan
    names: tuple[str, ...] = ()
    who, leaves, goes = "the model", "leaves its", "goes"
    if before.default is after.default:
        order = [*before.modules, *after.modules]
        names = tuple(sorted(set(before.modules) ^ set(after.modules), key=order.index))
        who = f"{len(names)} module{'s' if len(names) > 1 else ''} ({mentioned(names)})"
        leaves, goes = ("leaves its", "goes") if len(names) == 1 else ("leave their", "go")
    change = f"{before.describe()} → {after.describe()}"
    if facts.cause is None:
        return Transition(
            before, after, names, f"after {former.quiet_steps + 1} quiet steps {who} {goes} back: {change}."
        )
    patience = fallback.patience(state, names[0] if names else WHOLE_MODEL)
    return Transition(
        before, after, names, f"{who} {leaves} precision: {change}; tried again after {patience} quiet steps."
    )
