"""From what became of the steps to the plan: a pure state machine, equal on all ranks that are fed the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from hf_amp.events import Cause
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.precision import PrecisionMode
from hf_amp.saved import check

WHOLE_MODEL = ""
"""Stands for the plan's default among the names that demotions are counted under."""
UNKNOWN_IS_A_PATTERN = 2
"""Overflows without a known cause, within the window, from which precision is suspected; a single one only skips."""


@dataclass(frozen=True)
class StepFacts:
    """What the fallback needs to know of one optimizer step.

    Attributes:
        cause: why it was skipped; None where it was applied.
        modules: qualified names of the modules to blame; empty where they are not known.
        non_finite_fraction: share of its gradient elements that were not finite.
    """

    cause: Cause | None = None
    modules: tuple[str, ...] = ()
    non_finite_fraction: float = 1.0


@dataclass(frozen=True)
class FallbackState:
    """Memory of `Fallback`.

    Attributes:
        plan: the plan in force.
        step: optimizer steps seen.
        quiet_steps: applied steps since the newest change of plan or overflow that the scale does not cure.
        demotions: module name, or `WHOLE_MODEL` → how often it had to leave its precision.
        uncured: (step, share of non-finite gradient elements) of the overflows in the window that the scale does not
            cure.
        suspects: steps in the window that overflowed without a known cause.
        no_room_until: step before which no precision is widened, because memory did not suffice.
    """

    plan: PrecisionPlan
    step: int = 0
    quiet_steps: int = 0
    demotions: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    uncured: tuple[tuple[int, float], ...] = ()
    suspects: tuple[int, ...] = ()
    no_room_until: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Numbers, strings, lists and mappings of them."""
        plain = {option.name: getattr(self, option.name) for option in fields(self)}
        return plain | {
            "plan": self.plan.to_plain(),
            "demotions": dict(self.demotions),
            "uncured": [list(entry) for entry in self.uncured],
            "suspects": list(self.suspects),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> FallbackState:
        """The state that `to_plain` gave `plain` for.

        Raises:
            StateError: a field has a type that it cannot have.
        """
        check(cls, plain)
        known = {option.name: plain[option.name] for option in fields(cls) if option.name in plain}
        return cls(
            **known
            | {
                "plan": PrecisionPlan.from_plain(plain["plan"]),
                "demotions": MappingProxyType(dict(plain["demotions"])),
                "uncured": tuple((int(step), float(share)) for step, share in plain["uncured"]),
                "suspects": tuple(plain["suspects"]),
            }
        )


@dataclass(frozen=True)
class Fallback:
    """The cheapest remedy that works, and the way back.

    An overflow that no scale cures puts the modules to blame in FP32; where they are not known, or are in FP32
    already, the whole model takes the next rung of `ladder`. Where precision is not to blame (`INPUT`, `WEIGHTS`,
    `LOSS`) nothing changes. After `recovery_steps` quiet steps the plan goes back one step, the whole model before
    the modules; what has to leave again waits twice as long the next time, so that N steps see O(log N) changes.

    Attributes:
        ladder: precisions of the whole model, from the one that the run asked for to the widest.
        threshold: share of non-finite gradient elements over the window, among uncured overflows, that is tolerated.
        window: optimizer steps that `threshold` is judged over.
        recovery_steps: quiet steps before the first way back.
    """

    ladder: tuple[PrecisionMode, ...]
    threshold: float
    window: int
    recovery_steps: int

    def init_state(self) -> FallbackState:
        """The state before the first step: everything in the precision that the run asked for."""
        return FallbackState(PrecisionPlan(self.ladder[0]))

    def next_state(self, state: FallbackState, facts: StepFacts) -> FallbackState:
        """The state after one step; a new plan in it takes effect with the next."""
        state = replace(state, step=state.step + 1)
        if facts.cause is None:
            return self._after_quiet_step(replace(state, quiet_steps=state.quiet_steps + 1))
        if facts.cause in (Cause.SCALE, Cause.INPUT, Cause.WEIGHTS, Cause.LOSS):
            return state
        return self._after_uncured_overflow(state, facts)

    def _after_uncured_overflow(self, state: FallbackState, facts: StepFacts) -> FallbackState:
        oldest = state.step - self.window
        uncured = (*state.uncured, (state.step, facts.non_finite_fraction))
        suspects = (*state.suspects, state.step) if facts.cause is Cause.UNKNOWN else state.suspects
        state = replace(
            state,
            quiet_steps=0,
            uncured=tuple(entry for entry in uncured if entry[0] > oldest),
            suspects=tuple(step for step in suspects if step > oldest),
        )
        share = sum(entry[1] for entry in state.uncured) / min(state.step, self.window)
        if share <= self.threshold or state.step < state.no_room_until:
            return state
        fresh = [name for name in facts.modules if name and not state.plan.holds(name)]
        if fresh and state.plan.default is not PrecisionMode.FP32:
            return self._changed(state, state.plan.with_modules(fresh, PrecisionMode.FP32), fresh)
        if facts.cause is Cause.UNKNOWN and len(state.suspects) < UNKNOWN_IS_A_PATTERN:
            return state
        rung = self.ladder.index(state.plan.default)
        if rung + 1 == len(self.ladder):
            return state
        return self._changed(state, state.plan.with_default(self.ladder[rung + 1]), [WHOLE_MODEL])

    def _after_quiet_step(self, state: FallbackState) -> FallbackState:
        plan = state.plan
        rung = self.ladder.index(plan.default)
        if rung > 0:
            if state.quiet_steps >= self.patience(state, WHOLE_MODEL):
                return self._changed(state, plan.with_default(self.ladder[rung - 1]), [])
            return state
        due = [name for name in plan.modules if state.quiet_steps >= self.patience(state, name)]
        return self._changed(state, plan.without_modules(due), []) if due else state

    def patience(self, state: FallbackState, name: str) -> int:
        """Quiet steps before `name` is tried in its former precision again: doubled by every relapse."""
        return self.recovery_steps << (state.demotions.get(name, 1) - 1)

    def _changed(self, state: FallbackState, plan: PrecisionPlan, demoted: list[str]) -> FallbackState:
        counts = {name: state.demotions.get(name, 0) + 1 for name in demoted}
        return replace(
            state,
            plan=plan,
            quiet_steps=0,
            uncured=(),
            suspects=(),
            demotions=MappingProxyType({**state.demotions, **counts}),
        )

    def withdrawn(self, state: FallbackState, plan: PrecisionPlan) -> FallbackState:
        """`state` back under `plan`, because there was no memory for the change that led away from it.

        Nothing is widened again for `recovery_steps` steps: until then such overflows only skip.
        """
        return replace(state, plan=plan, quiet_steps=0, no_room_until=state.step + self.recovery_steps)

    def restored(self, state: FallbackState) -> FallbackState:
        """`state` of a former run, for this one: where that ran on another ladder, its plan's default is left behind."""
        if state.plan.default in self.ladder:
            return state
        return replace(state, plan=state.plan.with_default(self.ladder[0]))
