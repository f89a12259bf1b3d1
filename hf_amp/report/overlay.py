"""Several runs in one picture, and how they were set up, side by side with what differs marked: where they part, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from hf_amp.comparison import compare
from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import HfAmpError
from hf_amp.events import printable
from hf_amp.report.reader import RunHistory, Series
from hf_amp.report.verdict import formatted

Points = dict[int, float]
"""Optimizer step → value."""
SKIPPED = "skipped steps"
_TITLES = {"loss": "Loss", "scale": "Loss scale", SKIPPED: "Skipped steps, added up", "learning_rate": "Learning rate"}
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1, 1, 1)))
"""So that lines are told apart without colours."""


@dataclass(frozen=True)
class Overlay:
    """One figure of several runs.

    Attributes:
        title: what people read above the picture.
        curves: of each run; empty where it has none.
        names: of the runs.
    """

    title: str
    curves: list[Points]
    names: list[str]

    def draw(self, axes: Axes, colors: Sequence[str]) -> str:
        """A line for each run; returns a sentence that says where the first two part."""
        for number, (name, curve) in enumerate(zip(self.names, self.curves, strict=True)):
            style: dict[str, Any] = {"linestyle": _DASHES[number % len(_DASHES)], "color": colors[number % len(colors)]}
            if self.title in (_TITLES["scale"], _TITLES[SKIPPED]):
                style["drawstyle"] = "steps-post"
            if len(curve) < 3:
                style |= {"marker": "o", "markersize": 3}
            finite = [value if math.isfinite(value) else math.nan for value in curve.values()]
            axes.plot(list(curve), finite, label=printable(name), **style)
        if self.title == _TITLES["scale"] and all(value > 0 for curve in self.curves for value in curve.values()):
            axes.set_yscale("log", base=2)
        return self.parting()

    def parting(self) -> str:
        """Where the first two that have this figure part."""
        one, other = [curve for curve in self.curves if curve][:2]
        common = sorted(one.keys() & other.keys())
        apart = next((step for step in common if not _same(one[step], other[step])), None)
        if not common:
            return "They were logged at different steps."
        if apart is None:
            return f"The same at all {len(common):,} steps that both have logged."
        before = [step for step in common if step < apart]
        until = f"The same until step {before[-1]:,}; " if before else "They differ from the beginning: "
        return f"{until}{formatted(one[apart])} and {formatted(other[apart])} at step {apart:,}."


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def overlays_of(runs: Sequence[RunHistory]) -> Iterator[Overlay]:
    """Loss, loss scale, skipped steps, learning rate and evaluation metrics, as far as two of the runs have them."""
    logged = {name for run in runs for name in run.figures if name.startswith("eval_")}
    evaluated = sorted(name for name in logged if not name.endswith(("_runtime", "_per_second", "_non_finite_batches")))
    for name in [*_TITLES, *evaluated]:
        curves = [_skipped(run) if name == SKIPPED else dict(run.figures.get(name, ())) for run in runs]
        if name == "scale" and all(value == 1 for curve in curves for value in curve.values()):
            continue
        if sum(map(bool, curves)) > 1:
            yield Overlay(_TITLES.get(name, name.replace("_", " ")), curves, [run.name for run in runs])


def _skipped(run: RunHistory) -> Points:
    """Skipped steps of any cause so far; of a run without one nothing but a flat line."""
    points, total = {0: 0.0}, 0
    for step, more in sorted(pair for series in run.skips.values() for pair in _added(series)):
        total += more
        points[step] = float(total)
    return {**points, max(run.newest_step, *points): float(total)}


def _added(series: Series) -> Iterator[tuple[int, int]]:
    """(step, how many) of a series, of which a point may stand for several where it was thinned."""
    former = 0
    for step, count in zip(series.steps, series.counts, strict=True):
        yield step, count - former
        former = count


@dataclass(frozen=True)
class ComparedStep:
    """A step that the first two runs have captured, by `session.capture`: what `compare` says of it, in words and as rows.

    Attributes:
        rows: of what differs the most: module, tensor, kind, difference over its norm, times what rounding explains.
    """

    title: str
    sentence: str
    rows: list[list[str]]


def compared_steps(runs: Sequence[RunHistory]) -> Iterator[ComparedStep]:
    """Of each capture file that has the same name in the folders of the first two runs."""
    one, other = (run.path.parent for run in runs[:2])
    names = {path.name for path in one.glob("capture_step_*.safetensors")}
    for name in sorted(names & {path.name for path in other.glob("capture_step_*.safetensors")}):
        title = name.removesuffix(".safetensors").replace("_", " ").removeprefix("capture ").capitalize()
        try:
            found = compare(one / name, other / name)
        except HfAmpError as error:  # such as a file that was cut off
            yield ComparedStep(title, str(error), [])
            continue
        rows = [
            [each.module or "the model itself", each.tensor, each.kind, formatted(each.relative), formatted(each.times_bound)]
            for each in found.worst
        ]  # fmt: skip
        yield ComparedStep(title, found.sentence(), rows)


@dataclass(frozen=True)
class Circumstance:
    """One thing that runs were set up with, of each of them; `differs`: whether not all have the same."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def circumstances(runs: Sequence[RunHistory]) -> list[Circumstance]:
    """How the runs were set up, what differs first; options at their defaults in all of them are left out."""
    usual = MixedPrecisionConfig().to_dict()
    tables = []
    for run in runs:
        facts = {"ran": run.what_ran, "precision": run.precision}
        facts |= {name: run.facts.get(name, "") for name in ("model", "device")}
        facts |= {str(name): value for name, value in dict(run.facts.get("settings") or {}).items()}
        facts |= {f"{name} (version)": value for name, value in dict(run.facts.get("versions") or {}).items()}
        facts |= {f"option {name}": value for name, value in run.config.items()}
        tables.append({name: formatted(value) for name, value in facts.items() if value not in ("", None)})
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [Circumstance(name, [table.get(name, "") for table in tables]) for name in names]
    shown = [
        row for row in rows if row.differs or not row.name.startswith("option ")
        or row.values[0] != formatted(usual.get(row.name.removeprefix("option "), row.values[0]))
    ]  # fmt: skip
    return sorted(shown, key=lambda row: not row.differs)
