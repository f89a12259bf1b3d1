"""`PrecisionSchedule`: which precision the run, and modules of it, take after how many steps, or fractions of the run.

Here is the schedule as data; `fallback/scheduled.py` makes the plan follow it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hf_amp.errors import ConfigError
from hf_amp.precision import PrecisionMode

WORDS = (
    "a mapping of fractions of the run (0.0 up to, not with, 1.0) or numbers of optimizer steps (0, 500) to a precision (FP16, "
    'MIXED, BF16, FP32) or to a mapping of modules ("" is the whole model) to precisions'
)
_NAMES = {mode.value: mode for mode in PrecisionMode if mode is not PrecisionMode.DYNAMIC}


class ScheduledChange(NamedTuple):
    """One entry of a schedule.

    Attributes:
        at: completed optimizer steps (int), or a fraction of the run's (float), after which it holds.
        modules: name, glob or class of modules → what they run in from then on; "" stands for the whole model.
    """

    at: int | float
    modules: dict[str, PrecisionMode]

    def step(self, total_steps: int | None) -> int | None:
        """Completed steps after which it holds; None where it is a fraction of a number that is not known."""
        if isinstance(self.at, int) or self.at == 0:
            return int(self.at)
        return None if total_steps is None else round(self.at * total_steps)


class ScheduledPrecision(NamedTuple):
    """What a schedule asks for at one time.

    Attributes:
        default: of the whole model; None for what the run was started in.
        modules: name, glob or class of modules → whether they are in FP32, in the order in which it was said.
        until: completed steps from which something else holds; None for never, as far as is known.
    """

    default: PrecisionMode | None
    modules: dict[str, bool]
    until: int | None


class PrecisionSchedule:
    """The option `precision_schedule`, checked. Immutable, equal to one with the same entries.

    Args:
        given: a mapping, or JSON text of one (as a command line gives it); keys may be text too, as JSON has them.

    Attributes:
        changes: its entries: steps by number, then fractions by size.

    Raises:
        ConfigError: it is something else; what is allowed is said.
    """

    def __init__(self, given: Any) -> None:
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise _wrong(given, f"it is text, and no JSON ({error})") from error
        if not isinstance(given, Mapping) or not given:
            raise _wrong(given, "it is empty, or no mapping")
        changes = [ScheduledChange(_time(key, given), _modules(value, given)) for key, value in given.items()]
        self.changes: tuple[ScheduledChange, ...] = tuple(
            sorted(changes, key=lambda change: (isinstance(change.at, float), change.at))
        )

    def precision_at(self, completed: int, total_steps: int | None) -> ScheduledPrecision:
        """What holds after `completed` steps; fractions are left out where `total_steps` is not known.

        Raises:
            ConfigError: two entries are of one step.
        """
        default, modules, until = None, dict[str, bool](), None
        for step, change in self.in_order(total_steps):
            if step > completed:
                until = step
                break
            for name, precision in change.modules.items():
                if not name:
                    default = precision
                else:
                    modules.pop(name, None)
                    modules[name] = precision is PrecisionMode.FP32
        return ScheduledPrecision(default, modules, until)

    def in_order(self, total_steps: int | None) -> list[tuple[int, ScheduledChange]]:
        """(completed steps, entry), of those whose step is known.

        Raises:
            ConfigError: two entries are of one step.
        """
        known = [(change.step(total_steps), change) for change in self.changes]
        ordered = sorted(((step, change) for step, change in known if step is not None), key=lambda pair: pair[0])
        for (step, one), (other, two) in itertools.pairwise(ordered):
            if step == other:
                of = "" if total_steps is None else f" of {total_steps:,}"
                raise _refused(self, f"{one.at!r} and {two.at!r} are both step {step:,}{of}: make them one entry")
        return ordered

    def check_options(self, mode: PrecisionMode | None, total_steps: int | None) -> None:
        """Raises `ConfigError` where the options `precision_mode` and `total_steps` contradict it."""
        if mode is PrecisionMode.DYNAMIC:
            raise _refused(
                self, "precision_mode=DYNAMIC and a schedule both choose the precision: leave one of them out"
            )
        self.in_order(total_steps)

    def check(self, order: tuple[PrecisionMode, ...], run: PrecisionMode, may_change: bool) -> None:
        """Whether a run can follow it.

        Args:
            order: the precisions that it may take, from the one that it was started in.
            run: that one.
            may_change: False where nothing but that runs, because parameters are half precision on a CPU.

        Raises:
            ConfigError: it cannot.
        """
        names, start = " or ".join(mode.number_format.name for mode in order), run.number_format.name
        for name, precision in self._entries():
            if self.of_run(precision, run) not in order:
                hint = "start the run with fp16=True or bf16=True (Trainer) or mixed_precision (Accelerator) for"
                raise _refused(
                    self, f"a run that starts in {start} can run in {names}, not in {precision.value}; {hint} another"
                )
            if name and precision is not PrecisionMode.FP32 and self.of_run(precision, run) is not run:
                raise _refused(
                    self, f"{name!r} can run in FP32, or again in the run's {start}, not in {precision.value}"
                )
        if not may_change:
            raise _refused(
                self,
                "a CPU's half kernels mix half parameters with nothing else: set emulate=True, or keep FP32 parameters",
            )

    def of_run(self, precision: PrecisionMode, run: PrecisionMode) -> PrecisionMode:
        """`precision` as the run calls it: "FP16" is MIXED where parameters are FP32, and the other way round."""
        return run if precision.number_format is run.number_format else precision

    def names_bf16(self) -> bool:
        """Whether any entry is BF16."""
        return any(precision is PrecisionMode.BF16 for _, precision in self._entries())

    def patterns(self) -> list[str]:
        """Names, globs and classes of modules in it."""
        return [name for name, _ in self._entries() if name]

    def check_run(
        self, total_steps: int | None, sharded: bool, names_like: Callable[[str], list[str]], kept: tuple[str, ...]
    ) -> None:
        """Whether a run, of which all is known by now, can follow it.

        Args:
            total_steps: of the run; None where nobody has said.
            sharded: whether this process holds shards of the model.
            names_like: gives the names of the modules of a pattern.
            kept: patterns of `fp32_modules`, which stay in FP32 for good.

        Raises:
            ConfigError: it cannot.
        """
        if sharded:
            raise _refused(self, "the model's parameters are sharded, and run as its own mixed-precision policy says")
        if any(change.step(total_steps) is None for change in self.changes):
            raise _refused(self, "only a Trainer knows how many steps a fraction is: set total_steps, or give steps")
        held = {name for pattern in kept for name in names_like(pattern)}
        for pattern, precision in self._entries():
            if pattern and precision is not PrecisionMode.FP32 and (both := held & {*names_like(pattern)}):
                raise _refused(self, f"fp32_modules keeps {min(both)!r} in FP32 for good: leave it out there, or here")

    def passed_over(self, total_steps: int | None) -> Iterator[str]:
        """A sentence about each entry that never holds, because the run ends before."""
        for change in self.changes:
            step = change.step(total_steps)
            if total_steps and step is not None and step >= total_steps:
                yield (
                    f"precision_schedule's entry {change.at!r} never holds: the run ends after {total_steps:,} steps. Give a fraction "
                    "of the run, such as 0.9, or an earlier step."
                )

    def _entries(self) -> Iterator[tuple[str, PrecisionMode]]:
        for change in self.changes:
            yield from change.modules.items()

    def to_plain(self) -> dict[str, Any]:
        """Text and mappings of it, fit for JSON and YAML, from which the same is made again."""
        return {
            repr(change.at): change.modules[""].value
            if [*change.modules] == [""]
            else {name: precision.value for name, precision in change.modules.items()}
            for change in self.changes
        }

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{at}: {value!r}" for at, value in self.to_plain().items()) + "}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrecisionSchedule) and self.changes == other.changes

    def __hash__(self) -> int:
        return hash(repr(self))


def _refused(schedule: Any, why: str) -> ConfigError:
    return ConfigError(f"MixedPrecisionConfig(precision_schedule={schedule!r}): {why}.")


def _wrong(given: Any, why: str) -> ConfigError:
    try:
        shown = repr(given)
    except Exception:  # whatever a class of the user's raises
        shown = f"<{type(given).__name__} that cannot be shown>"
    return ConfigError(
        f"MixedPrecisionConfig(precision_schedule={shown[:200]}): {why}; precision_schedule must be None or {WORDS}; leave it "
        "out for the default (None)."
    )


def _time(key: Any, given: Any) -> int | float:
    at = key
    if isinstance(key, str):
        try:
            at = int(key) if key.isdecimal() else float(key)
        except ValueError:
            raise _wrong(given, f"the key {key!r} is no number") from None
    if isinstance(at, bool) or not isinstance(at, (int, float)):
        raise _wrong(given, f"the key {key!r} is no number")
    if isinstance(at, float) and at == 1:
        raise _wrong(given, "after 1.0, the whole run, nothing follows; after the first step is 1")
    if not 0 <= at <= 2**31 - 1 or (isinstance(at, float) and at > 1):
        raise _wrong(given, f"the key {key!r} is out of range")
    return at


def _modules(value: Any, given: Any) -> dict[str, PrecisionMode]:
    chosen = value if isinstance(value, Mapping) else {"": value}
    modules: dict[str, PrecisionMode] = {}
    for name, precision in chosen.items():
        text = precision.value if isinstance(precision, PrecisionMode) else precision
        if not isinstance(name, str) or not isinstance(text, str) or text.upper() not in _NAMES:
            raise _wrong(given, f"{precision!r} for {name or 'the whole model'!r} is no precision of a module")
        modules[name] = _NAMES[text.upper()]
    if not modules:
        raise _wrong(given, "an entry names no module")
    return modules
