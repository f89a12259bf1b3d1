"""The fallback: from what became of the steps to the precision plan.

`FallbackPolicy` decides, as a pure state machine, equal on all ranks that are fed the same. `PrecisionAutotuner` times the
precisions of a DYNAMIC run. `FallbackController` holds the state of both, and makes the models follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from hf_amp.config import KEEPS_UPDATES, MixedPrecisionConfig
from hf_amp.device import Hardware, products_use_tf32, room_on
from hf_amp.errors import StateError
from hf_amp.events import Cause
from hf_amp.fallback.diagnosis import Diagnoser, Diagnosis, SkippedStep
from hf_amp.fallback.module_precision import PlanRunner, PrecisionEntry, has_compiled
from hf_amp.fallback.plan import PrecisionPlan, precision_order
from hf_amp.fallback.recorder import LARGE_GRADIENTS, CountsSteps, ForwardRecorder
from hf_amp.fallback.scheduled import follow, moved_in_words
from hf_amp.patch_log import PatchLog, takes_hooks
from hf_amp.precision import FP16_FORMAT, PrecisionMode
from hf_amp.schedule import ScheduledPrecision
from hf_amp.serialization import NotNegative, Positive, parse
from hf_amp.statistics import all_reduce_max_to_host, is_distributed

WARMUP_STEPS = 3
"""Steps of a candidate that are not timed: kernels are chosen, caches filled, code compiled."""
TIMED_STEPS = 8
"""Steps of a candidate whose median counts, which a slow batch or an evaluation in between does not move."""
_TRIAL_STEPS = WARMUP_STEPS + TIMED_STEPS


class PrecisionAutotuner:
    """Times the candidates one after the other, in steps of the run itself.

    Args:
        candidates: precisions, from the narrowest to the widest; none that the run may not use.
    """

    def __init__(self, candidates: Sequence[PrecisionMode]) -> None:
        self._seconds: dict[PrecisionMode, list[float]] = {mode: [] for mode in candidates}
        self._unstable: set[PrecisionMode] = set()

    @property
    def running(self) -> PrecisionMode | None:
        """The candidate that is being timed; None when the trial is over."""
        stable = (mode for mode in self._seconds if mode not in self._unstable)
        return next((mode for mode in stable if len(self._seconds[mode]) < _TRIAL_STEPS), None)

    def note(self, step_seconds: float) -> None:
        """One applied step of the running candidate, as seconds of wall-clock time."""
        if self.running is not None:
            self._seconds[self.running].append(step_seconds)

    def reject(self) -> None:
        """Drops the running candidate, which was not stable."""
        if self.running is not None:
            self._unstable.add(self.running)

    def step_seconds(self) -> dict[PrecisionMode, float]:
        """Candidate → median seconds a step, of those that were stable and are through."""
        return {
            mode: median(seconds[WARMUP_STEPS:])
            for mode, seconds in self._seconds.items()
            if mode not in self._unstable and len(seconds) >= _TRIAL_STEPS
        }

    def fastest(self) -> PrecisionMode:
        """The stable candidate with the shortest step; the widest where none was stable."""
        timed = self.step_seconds()
        return min(timed, key=lambda mode: timed[mode]) if timed else list(self._seconds)[-1]

    def choices(self) -> tuple[PrecisionMode, ...]:
        """The precision order of the run: every candidate while they are timed, then the fastest one and those that are wider."""
        order = list(self._seconds)
        return tuple(order if self.running is not None else order[order.index(self.fastest()) :])

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and mappings of them."""
        return {
            "seconds": {mode.value: list(seconds) for mode, seconds in self._seconds.items()},
            "unstable": sorted(mode.value for mode in self._unstable),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`; candidates that this run does not have are left out.

        Raises:
            StateError: it is no such state; nothing has changed then.
        """
        saved: _Saved = parse(_Saved, state_dict, "speed trial")
        self._seconds = {mode: saved.seconds.get(mode.value, []) for mode in self._seconds}
        self._unstable = {mode for mode in self._seconds if mode.value in saved.unstable}


@dataclass
class _Saved:
    seconds: dict[str, list[NotNegative]]
    unstable: list[str]


WHOLE_MODEL = ""
"""Stands for the plan's default among the names that demotions are counted under."""
_LARGEST_DOUBLING = 31  # of a number of steps in int32
UNKNOWN_IS_A_PATTERN = 2
"""Overflows without a known cause, within the window, from which precision is suspected; a single one only skips."""


@dataclass(frozen=True)
class StepFacts:
    """What the fallback needs to know of one optimizer step.

    Attributes:
        cause: why it was skipped; None where it was applied.
        modules: qualified names of the modules to blame; empty where they are not known.
        non_finite_fraction: share of its gradient elements that were not finite.
        scale: the loss scale that its backward used.
    """

    cause: Cause | None = None
    modules: tuple[str, ...] = ()
    non_finite_fraction: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class FallbackState:
    """Memory of `FallbackPolicy`.

    Attributes:
        plan: the plan in force.
        step: optimizer steps seen.
        clean_steps: applied steps since the newest change of plan or overflow that the scale does not cure.
        demotions: module name, or `WHOLE_MODEL` → how often it had to leave its precision.
        uncured: (step, share of non-finite gradient elements) of the overflows in the window that the scale does not
            cure.
        unknown_steps: steps in the window that overflowed without a known cause.
        no_room_until: step before which no precision is widened, because memory did not suffice.
        scale_at_rest: the loss scale when the whole model left the precision that the run asked for; None while it is there.
            What the scale has grown to meanwhile says nothing about FP16.
        was_skipped: in a saved state, as of the controller.
        scheduled: in a saved state, what a schedule had the whole model run in; None for what the run asked for.
    """

    plan: PrecisionPlan
    step: int = 0
    clean_steps: int = 0
    demotions: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    unresolved: tuple[tuple[int, float], ...] = ()
    unknown_steps: tuple[int, ...] = ()
    no_room_until: int = 0
    scale_at_rest: Positive | None = None
    was_skipped: bool = False
    scheduled: PrecisionMode | None = None

    def to_plain(self) -> dict[str, Any]:
        """Numbers, strings, lists and mappings of them."""
        plain = {option.name: getattr(self, option.name) for option in fields(self)}
        return plain | {
            "plan": self.plan.to_plain(),
            "demotions": dict(self.demotions),
            "unresolved": [list(entry) for entry in self.unresolved],
            "unknown_steps": list(self.unknown_steps),
            "scheduled": self.scheduled and self.scheduled.value,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> FallbackState:
        """The state that `to_plain` gave `plain` for.

        Raises:
            StateError: it is none.
        """
        state: FallbackState = parse(cls, plain, "fallback")
        return state


@dataclass(frozen=True)
class FallbackPolicy:
    """The cheapest remedy that works, and the way back.

    An overflow that no scale cures puts the modules to blame in FP32; where they are not known, or are in FP32
    already, the whole model takes the next level of `order`. Where precision is not to blame (`INPUT`, `WEIGHTS`,
    `LOSS`) nothing changes. After `recovery_steps` clean steps the plan goes back one step, the whole model before
    the modules; what has to leave again waits twice as long the next time, so that N steps see O(log N) changes.

    Attributes:
        order: precisions of the whole model, from the one that the run asked for to the widest.
        threshold: share of non-finite gradient elements over the window, among uncured overflows, that is tolerated.
        recovery_steps: clean steps before the first way back.
        by_choice: modules that are to be in FP32, and stay there.
        level: place in `order` of what a schedule asks for: the way back ends there.
    """

    order: tuple[PrecisionMode, ...]
    threshold: float
    recovery_steps: int
    window: int = 128
    by_choice: frozenset[str] = frozenset()
    level: int = 0

    def init_state(self) -> FallbackState:
        """The state before the first step: everything in the precision that the run asked for."""
        return FallbackState(PrecisionPlan(self.order[0]))

    def next_state(self, state: FallbackState, facts: StepFacts) -> FallbackState:
        """The state after one step; a new plan in it takes effect with the next."""
        state = replace(state, step=state.step + 1, clean_steps=state.clean_steps + (facts.cause is None))
        if facts.cause is None:
            return self._after_clean_step(state)
        return self._after_unresolved_overflow(state, facts) if facts.cause.facts.moves_precision else state

    def _after_unresolved_overflow(self, state: FallbackState, facts: StepFacts) -> FallbackState:
        oldest = state.step - self.window
        unresolved = (*state.unresolved, (state.step, facts.non_finite_fraction))
        unknown_steps = (*state.unknown_steps, state.step) if facts.cause is Cause.UNKNOWN else state.unknown_steps
        state = replace(
            state,
            clean_steps=0,
            unresolved=tuple(entry for entry in unresolved if entry[0] > oldest),
            unknown_steps=tuple(step for step in unknown_steps if step > oldest),
        )
        share = sum(entry[1] for entry in state.unresolved) / min(state.step, self.window)
        if share <= self.threshold or state.step < state.no_room_until:
            return state
        fresh = [name for name in facts.modules if name and not state.plan.holds(name)]
        if fresh and state.plan.default is not PrecisionMode.FP32:
            return self.changed(state, state.plan.with_modules(fresh, PrecisionMode.FP32), fresh)
        if facts.cause is Cause.UNKNOWN and len(state.unknown_steps) < UNKNOWN_IS_A_PATTERN:
            return state
        level = self.order.index(state.plan.default)
        if level + 1 == len(self.order):
            return state
        if state.scale_at_rest is None:
            state = replace(state, scale_at_rest=facts.scale)
        wider = self.order[-1 if facts.cause is Cause.ROUNDING else level + 1]  # BF16 rounds more
        return self.changed(state, state.plan.with_default(wider), [WHOLE_MODEL])

    def _after_clean_step(self, state: FallbackState) -> FallbackState:
        plan = state.plan
        if level := self.order.index(plan.default):
            is_due = level > self.level and state.clean_steps >= self.patience(state, WHOLE_MODEL)
            return self.changed(state, plan.with_default(self.order[level - 1]), []) if is_due else state
        by_themselves = (name for name in plan.modules if name not in self.by_choice)
        due = [name for name in by_themselves if state.clean_steps >= self.patience(state, name)]
        return self.changed(state, plan.without_modules(due), []) if due else state

    def patience(self, state: FallbackState, name: str) -> int:
        """Clean steps before `name` is tried in its former precision again: doubled by every relapse."""
        return self.recovery_steps << min(state.demotions.get(name, 1) - 1, _LARGEST_DOUBLING)

    def changed(self, state: FallbackState, plan: PrecisionPlan, demoted: list[str]) -> FallbackState:
        """`state` under another plan; the modules of the names `demoted`, or `WHOLE_MODEL`, had to leave their precision."""
        counts = {name: state.demotions.get(name, 0) + 1 for name in demoted}
        return replace(
            state,
            plan=plan,
            clean_steps=0,
            unresolved=(),
            unknown_steps=(),
            demotions=MappingProxyType({**state.demotions, **counts}),
            scale_at_rest=None if plan.default is self.order[0] else state.scale_at_rest,
        )

    def withdrawn(self, state: FallbackState, plan: PrecisionPlan) -> FallbackState:
        """`state` back under `plan`, because there was no memory for the change that led away from it.

        Nothing is widened again for `recovery_steps` steps: until then such overflows only skip.
        """
        return replace(
            state,
            plan=plan,
            clean_steps=0,
            no_room_until=state.step + self.recovery_steps,
            scale_at_rest=None if plan.default is self.order[0] else state.scale_at_rest,
        )

    def restored(self, state: FallbackState) -> FallbackState:
        """`state` of a former run, for this one: where that ran with another order, its plan's default is left behind.

        Raises:
            StateError: a module is in another precision than the one that modules leave theirs for.
        """
        for name, mode in state.plan.modules.items():
            if mode is not PrecisionMode.FP32:
                raise StateError(
                    f"the saved plan has module {name!r} in {mode.value}, where modules only go to FP32: the state is damaged; "
                    "load another one."
                )
        state = replace(state, plan=state.plan.with_modules(self.by_choice, PrecisionMode.FP32))
        if state.plan.default in self.order:
            return state
        return replace(state, plan=state.plan.with_default(self.order[0]))


class PrecisionChange(NamedTuple):
    """One change of plan.

    Attributes:
        before: the plan until now.
        after: the plan from the next forward pass on.
        modules: qualified names of the modules that change; empty for the whole model.
        message: one sentence for people.
        scale_at_rest: the scale to go on with, at most, because the model is back in the precision that the run asked for;
            None where it is not.
    """

    before: PrecisionPlan
    after: PrecisionPlan
    modules: tuple[str, ...]
    message: str
    scale_at_rest: float | None = None


def describe_change(
    former: FallbackState, state: FallbackState, facts: StepFacts, policy: FallbackPolicy
) -> PrecisionChange:
    """What the step with these `facts` has changed, in words."""
    before, after = former.plan, state.plan
    names: tuple[str, ...] = ()
    if before.default is after.default:
        order = [*before.modules, *after.modules]
        names = tuple(sorted(set(before.modules) ^ set(after.modules), key=order.index))
    moved = f"{moved_in_words(before, after, names)}."
    if facts.cause is None:
        message = f"after {former.clean_steps + 1} clean steps {moved}"
    else:
        patience = policy.patience(state, names[0] if names else WHOLE_MODEL)
        message = f"from now on {moved} hf_amp tries the way back after {patience} clean steps."
    returned = former.scale_at_rest if state.scale_at_rest is None else None
    return PrecisionChange(before, after, names, message, returned)


TF32_WOULD_DO = (
    " FP32 products are slow on this device, and TF32 has FP32's range with FP16's precision: "
    'torch.set_float32_matmul_precision("high") lets them run in it.'
)


class FallbackController:
    """Finds out why steps were skipped, decides what to do about it, and makes the models follow.

    Args:
        config: the options of the fallback.
        mode: the precision that the run asked for.
        hardware: what the device can run.
        steps: counts the optimizer steps decided.

    Attributes:
        runner: the models, and the plan that they follow.
        recorder: what they were called with.
        diagnoser: finds the causes.
        was_skipped: whether the newest step was.
        on_trial: called when a wider plan is tried out, with the log of changes that its first forward pass takes back.
        on_withdrawn: called with the way back from a plan whose first forward pass raised.
    """

    def __init__(
        self, config: MixedPrecisionConfig, mode: PrecisionMode, hardware: Hardware, steps: CountsSteps
    ) -> None:
        emulate = config.emulate and hardware.device == "cpu" and mode in (PrecisionMode.MIXED, PrecisionMode.FP16)
        self.runner = PlanRunner(PrecisionEntry(hardware.device, emulate), mode)
        self.recorder = ForwardRecorder(steps, self.runner)
        self.diagnoser = Diagnoser(self.runner, self.recorder)
        half = mode is PrecisionMode.FP16 or config.half_parameters in KEEPS_UPDATES
        # The CPU has no kernels that mix FP32 with half-precision parameters, as autocast makes of others.
        halves_on_cpu = half and hardware.device == "cpu" and not emulate
        self._acts = config.automatic_fallback and not halves_on_cpu
        order, schedule = precision_order(mode, hardware, emulate), config.precision_schedule
        if schedule is not None and config.enabled:
            if schedule.names_bf16() and order[0].number_format is FP16_FORMAT:
                order = (mode, PrecisionMode.BF16, PrecisionMode.FP32)
            schedule.check(order, mode, may_change=not halves_on_cpu)
        self._policy = FallbackPolicy(order, config.fallback_threshold, config.recovery_steps)
        self._by_schedule: frozenset[str] = frozenset()
        self._state = self._policy.init_state()
        dynamic = config.precision_mode is PrecisionMode.DYNAMIC
        self._autotuner = PrecisionAutotuner(self._policy.order) if dynamic else None
        self.newest_change: PrecisionChange | None = None
        self._trial, self._hardware = PatchLog(), hardware
        self.on_withdrawn: Callable[[PrecisionChange], None] = lambda change: None
        self.on_trial: Callable[[PatchLog], None] = lambda log: None
        self.was_skipped = False

    @property
    def plan(self) -> PrecisionPlan:
        """Which precision runs where."""
        return self._state.plan

    def keep_in_fp32(self, patterns: Sequence[str]) -> PrecisionChange | None:
        """Puts every module in FP32 that one of `patterns` is the name, a glob or a class of, for good."""
        names = self._outermost(patterns)
        before, fresh = self.plan, [name for name in names if name not in self.plan.modules]
        self._policy = replace(self._policy, by_choice=self._policy.by_choice | set(names))
        if not fresh or self._policy.order[0] is PrecisionMode.FP32:
            return None
        self._state = replace(self._state, plan=before.with_modules(fresh, PrecisionMode.FP32))
        self._apply_plan()
        several = f"these {len(fresh)} modules run" if len(fresh) > 1 else "this module runs"
        return PrecisionChange(before, self.plan, tuple(fresh), f"{several} in FP32, because fp32_modules says so.")

    def _outermost(self, patterns: Sequence[str]) -> list[str]:
        """Names of the modules that one of `patterns` is the name, a glob or a class of, without those inside of others."""
        names: list[str] = []
        for pattern in patterns:
            for name in self.runner.names_like(pattern):
                if not any(name == held or name.startswith(f"{held}.") for held in names):
                    names.append(name)
        return names

    def follow_schedule(self, asked: ScheduledPrecision, scale: float) -> list[PrecisionChange]:
        """Puts the plan where a schedule has it, as `follow` says; the changes that it makes."""
        self._policy, self._state, self._by_schedule, changes = follow(
            self._policy, self._state, asked, scale, self._by_schedule, self._outermost
        )
        if changes:
            self.newest_change = None
            self._apply_plan()
        return [PrecisionChange(*change) for change in changes]

    def diagnose(self, skip: SkippedStep, agree: bool) -> Diagnosis:
        """Why a step was skipped. `agree`: exchange what was found with the other ranks, which all call this."""
        return self.diagnoser.explain(skip, agree)

    def after_applied(
        self, step_seconds: float | None = None, agree: bool = False, ran_in: PrecisionMode | None = None
    ) -> PrecisionChange | None:
        """One applied step; what it lets the plan go back to, or, while precisions are timed, on to.

        Args:
            step_seconds: wall-clock time since the step before; None where that is not known.
            agree: while precisions are timed, count the slowest rank's time. One all-reduce and one sync a timed step.
            ran_in: the plan's default when the step was queued; None for the present one. A step of another candidate is not timed.
        """
        self.newest_change = None
        self.was_skipped = False
        self.recorder.gradient_bytes = min(self.recorder.gradient_bytes, LARGE_GRADIENTS)
        tuner = self._autotuner
        if tuner is None or tuner.running is None:
            return self._decide(StepFacts())
        if agree and is_distributed():
            local = torch.tensor([step_seconds or 0.0, float(step_seconds is None)], device=self.runner.device)
            longest, is_unknown = all_reduce_max_to_host(local)  # where one rank does not know its own
            step_seconds = None if is_unknown else longest
        if step_seconds is not None and ran_in in (None, tuner.running):
            tuner.note(step_seconds)
        return self._continue_tuning(tuner)

    def after_skipped(self, diagnosis: Diagnosis, non_finite_fraction: float, scale: float) -> PrecisionChange | None:
        """One skipped step; what is done about it. Nothing, where the plan has fixed it already, or none can."""
        self.was_skipped = True
        if diagnosis.already_fixed:
            return None
        facts = StepFacts(diagnosis.cause, diagnosis.modules, non_finite_fraction, scale)
        if self._autotuner is not None and self._autotuner.running is not None:
            next_state = self._policy.next_state(self._state, facts)
            if next_state.plan.default is not self.plan.default:
                self._autotuner.reject()
                return self._continue_tuning(self._autotuner)
        return self._decide(facts)

    def _decide(self, facts: StepFacts) -> PrecisionChange | None:
        if not self._acts or self.runner.limits:
            return None
        former = self._state
        self._state = state = self._policy.next_state(former, facts)
        if self.plan == former.plan:
            return None
        # Before what is compiled is forgotten; a compiled model that was not called yet has left no other sign.
        compiled = has_compiled() or self.recorder.compiled
        tries_out = not (is_distributed() or compiled or self.recorder.one_graph)
        self._apply_plan()
        change = describe_change(former, state, facts, self._policy)
        if facts.cause is not None and self.plan.default is not former.plan.default:
            change = change._replace(message=change.message + self._lack_of_room())
        widened = PrecisionMode.FP32 in (self.plan.default, *self.plan.modules.values()) and not former.plan.modules
        if facts.cause is Cause.ACTIVATION and widened and self._hardware.tf32 == "native" and not products_use_tf32():
            change = change._replace(message=change.message + TF32_WOULD_DO)
        self.newest_change = change if facts.cause is not None else None
        if self.newest_change and tries_out:
            self._try_out()
        return change

    def _continue_tuning(self, tuner: PrecisionAutotuner) -> PrecisionChange | None:
        """Enters the next candidate, or the fastest when all are through."""
        before, running = self.plan, tuner.running
        chosen = running or tuner.fastest()
        if running is None:
            self._policy = replace(self._policy, order=tuner.choices())
        if chosen is before.default and running is not None:
            return None
        self._state = replace(self._state, plan=before.with_default(chosen), clean_steps=0)
        self._apply_plan()
        if running is not None:
            message = f"measuring the step time in {chosen.value}."
        else:
            times = ", ".join(f"{s * 1000:.1f} ms in {mode.value}" for mode, s in tuner.step_seconds().items())
            emulated = " FP16 was emulated: its time says nothing of a GPU." if self.runner.entry.emulate else ""
            message = f"{chosen.value} is the fastest stable precision here: {times} a step.{emulated}"
        return PrecisionChange(before, self.plan, (), message)

    def recover_from(self, error: BaseException) -> PrecisionChange | None:
        """Goes back to the plan before the newest change, if `error` is an out-of-memory that the change has caused.

        None where it is something else, or where a step was applied since: then the change was not to blame.
        """
        return self._withdraw(error) if isinstance(error, torch.OutOfMemoryError) else None

    def _withdraw(self, error: BaseException) -> PrecisionChange | None:
        if self.newest_change is None:
            return None
        failed, self.newest_change = self.newest_change, None
        former, self._state = self._state, self._policy.withdrawn(self._state, failed.before)
        self._apply_plan()
        after, before = failed.after.describe(), failed.before.describe()
        message = (
            f"the first forward pass with {after} raised {type(error).__name__} ({str(error)[:300]}): back to {before}."
        )
        if isinstance(error, torch.OutOfMemoryError):
            message = (
                f"there was not enough memory for {after}: back to {before}. Lower the batch size, or turn gradient "
                "checkpointing on, so that the fallback has room."
            )
        scale = former.scale_at_rest if self._state.scale_at_rest is None else None
        return PrecisionChange(failed.after, failed.before, failed.modules, message, scale)

    def _lack_of_room(self) -> str:
        """A sentence where the whole model is widened and memory may not suffice: FP32 stores up to twice of what FP16 does."""
        rooms = [room for device in self.runner.devices() if (room := room_on(device)) is not None]
        short = next(((free, step) for free, step in rooms if 2 * step > free), None)
        if short is None:
            return ""
        free, step = (amount / 2**30 for amount in short)
        return (
            f" Memory may not suffice: a step has taken {step:.1f} GiB so far, a wider one takes up to twice as much, and "
            f"{free:.1f} GiB are free."
        )

    def _apply_plan(self) -> None:
        self._trial.undo()
        self.runner.apply(self.plan)

    def _try_out(self) -> None:
        """Has the next forward pass run again under the former plan where it raises under the new one: for want of memory, or of
        kernels for FP32, as in FlashAttention.

        Not with several processes, which would part, nor where anything is compiled, which would be traced with it.
        """

        def tried(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._trial.undo()
            failed = self.newest_change
            try:
                return forward(*args, **kwargs)
            except Exception as error:
                if (withdrawn := self._withdraw(error)) is None:
                    raise
            try:  # outside of the handler, whose traceback keeps alive what has filled the memory
                with self.runner.current():
                    output = forward(*args, **kwargs)
            except Exception:
                self.newest_change = failed  # for `recover`
                raise
            self.on_withdrawn(withdrawn)
            return output

        for model in self.runner.models():
            if takes_hooks(model):
                # With `__wrapped__`, by which accelerate finds what it has wrapped itself.
                once = functools.wraps(model.forward)(functools.partial(tried, model.forward))
                self._trial.set_attribute(model, "forward", once)
        self.on_trial(self._trial)

    def remove(self) -> None:
        """Takes every context back and lets go of the batches."""
        self._trial.undo()
        self.runner.remove()
        self.runner.current.is_over = True
        self.recorder.forget()

    def state_dict(self) -> dict[str, Any]:
        """The controller's state: numbers, strings, lists and mappings of them."""
        tuner = self._autotuner
        level = self._policy.level
        scheduled = self._policy.order[level] if level else None
        state = replace(self._state, was_skipped=self.was_skipped, scheduled=scheduled)
        return {**state.to_plain(), "autotuner": None if tuner is None else tuner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`, plan included. A default that this run cannot have is left behind.

        Raises:
            StateError: it is no such state; nothing has changed then.
        """
        state = FallbackState.from_plain(state_dict)
        saved = parse(dict[str, Any] | None, state_dict.get("autotuner"), "fallback['autotuner']")
        self._policy.restored(state)
        if self._autotuner is not None and saved is not None:
            self._autotuner.load_state_dict(saved)
            self._policy = replace(self._policy, order=self._autotuner.choices())
        self._state = self._policy.restored(state)
        order = self._policy.order
        self._policy = replace(self._policy, level=order.index(state.scheduled) if state.scheduled in order else 0)
        self.was_skipped = state.was_skipped
        self._apply_plan()
