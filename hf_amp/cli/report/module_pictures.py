"""Pictures with a row for every module: headroom, underflow and activations over steps, and precision as a timeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from hf_amp.cli.report.pictures import Picture
from hf_amp.cli.report.theme import Theme, shortened
from hf_amp.monitoring.run_history import RunHistory
from hf_amp.monitoring.series import Series
from hf_amp.precision import FP16_FORMAT

ROWS_SHOWN = 24
"""Modules that a picture has room for: those that are nearest to trouble."""
COLUMNS_SHOWN = 80
LONGEST_LABEL = 26
LABEL_POINTS = 7.5
_ALARM_TO_CALM = LinearSegmentedColormap.from_list(
    "alarm_to_calm", ["#b5382a", "#e9b872", "#c9d8d5", "#5b9aa8", "#2b5d77"]
)


def _heatmap(
    figure: str,
    worst: Callable[[Series], float],
    limits: tuple[float, float],
    unit: str,
    *,
    high_is_bad: bool = False,
    shown_as: Callable[[float], float] = float,
) -> Callable[[Axes, RunHistory, Theme], str | None]:
    """A drawer of one figure by module and step.

    Args:
        figure: its name in the log.
        worst: how near a module came to trouble; lower is nearer.
        limits: values at the two ends of the colours.
        unit: what people read at the colours.
        high_is_bad: which end is the alarming one.
        shown_as: what is shown of a value.
    """

    def draw(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
        modules = {name: series for name, series in run.modules.get(figure, {}).items() if len(series)}
        if not modules:
            return None
        shown = sorted(
            sorted(modules, key=lambda name: worst(modules[name]))[:ROWS_SHOWN], key=list(modules).index
        )
        cells, first, last = _cells([modules[name] for name in shown], shown_as)
        image = axes.imshow(
            cells, aspect="auto", interpolation="nearest", vmin=limits[0], vmax=limits[1],
            cmap=_ALARM_TO_CALM.reversed() if high_is_bad else _ALARM_TO_CALM,
            extent=(first, last, len(shown) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_yticks(
            range(len(shown)),
            [shortened(name, LONGEST_LABEL) for name in shown],
            fontsize=LABEL_POINTS,
            parse_math=False,
        )
        axes.grid(False)
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.035)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=LABEL_POINTS)
        bar.set_label(unit, fontsize=LABEL_POINTS)
        nearest = min(modules, key=lambda name: worst(modules[name]))
        part = (
            ""
            if len(shown) == len(modules)
            else f" The {len(shown)} nearest to trouble of {len(modules)} modules."
        )
        return f"Nearest to trouble: {shortened(nearest, 60)}.{part}"

    return draw


def _bits_below_largest(amax: float) -> float:
    """How many doublings a value is away from FP16's largest; 0 for what is beyond it."""
    if not 0 < amax < math.inf:
        return math.nan if amax == 0 else 0.0
    return max(0.0, math.log2(FP16_FORMAT.largest) - math.log2(amax))


def _cells(rows: list[Series], shown_as: Callable[[float], float]) -> tuple[np.ndarray, float, float]:
    """Values in at most 80 columns of steps; the newest of a column wins, and what is missing is NaN."""
    steps = sorted({step for series in rows for step in series.steps})
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    columns = min(COLUMNS_SHOWN, len(steps))
    cells = np.full((len(rows), columns), math.nan)
    for row, series in enumerate(rows):
        for step, value in series:
            cells[row, min(columns - 1, int((step - first) / (last - first) * columns))] = shown_as(value)
    return cells, float(first), float(last)


def draw_timeline(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """What every module that ever left the default precision ran in, as bars over the steps."""
    bars = precision_bars(run)
    if not bars:
        return None
    shown = list(bars)[:ROWS_SHOWN]
    for row, name in enumerate(shown):
        for start, end, precision in bars[name]:
            axes.barh(
                row,
                max(end - start, 1e-9),
                left=start,
                height=0.62,
                color=theme.precision(precision),
                linewidth=0,
            )
            if end - start > 0.12 * max(run.newest_step, 1):
                axes.text(start + 0.01 * run.newest_step, row, precision, va="center", fontsize=LABEL_POINTS)
    axes.set_yticks(
        range(len(shown)),
        [shortened(name, LONGEST_LABEL) for name in shown],
        fontsize=LABEL_POINTS,
        parse_math=False,
    )
    axes.set_ylim(max(len(shown), 6) - 0.4, -0.6)
    axes.grid(False)
    changes = f"{len(run.transitions)} change{'' if len(run.transitions) == 1 else 's'} of precision"
    more = f" The first {len(shown)} of {len(bars)} modules." if len(shown) < len(bars) else ""
    return f"{changes}.{more}"


def precision_bars(run: RunHistory) -> Mapping[str, list[tuple[int, int, str]]]:
    """Row → (from step, to step, precision), in the order in which rows first left the default; "the model" is one."""
    newest: dict[str, tuple[int, str]] = {}
    bars: dict[str, list[tuple[int, int, str]]] = {}
    for transition in run.transitions:
        for name in transition.modules or ("the model",):
            start, before = newest.get(name, (0, transition.before))
            bars.setdefault(name, []).append((start, transition.step, before))
            newest[name] = (transition.step, transition.after)
    for name, (start, precision) in newest.items():
        bars[name].append((start, max(run.newest_step, start), precision))
    return bars


def _rows_of(figure: str) -> Callable[[RunHistory], int]:
    return lambda run: min(ROWS_SHOWN, len(run.modules.get(figure, {})))


TIMELINE = Picture(
    "timeline",
    "What ran in which precision",
    draw_timeline,
    lambda run: min(ROWS_SHOWN, len(precision_bars(run))),
)
BY_MODULE = (
    Picture(
        "module_headroom",
        "Headroom by module",
        _heatmap("module_headroom_bits", lambda s: min(s.values), (0.0, 16.0), "bits"),
        _rows_of("module_headroom_bits"),
    ),
    Picture(
        "module_underflow",
        "Underflow by module",
        _heatmap(
            "module_underflow_fraction", lambda s: -max(s.values), (0.0, 0.5), "share", high_is_bad=True
        ),
        _rows_of("module_underflow_fraction"),
    ),
    Picture(
        "module_activations",
        "Largest activations by module",
        _heatmap(
            "module_activation_amax",
            lambda s: -max(s.values),
            (0.0, 16.0),
            "bits below 65504",
            shown_as=_bits_below_largest,
        ),
        _rows_of("module_activation_amax"),
    ),
)
