"""The report as one page of HTML: no script, nothing loaded from anywhere, everything from a run escaped."""

from __future__ import annotations

import html
import io
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_amp.config import MixedPrecisionConfig
from hf_amp.events import Cause, printable
from hf_amp.monitoring.metrics import CATALOGUE
from hf_amp.precision import FP16_FORMAT
from hf_amp.report.overlay import circumstances, compared_steps, overlays_of
from hf_amp.report.reader import RunHistory, Series
from hf_amp.report.verdict import formatted, verdict_on

ROLES = ("ink", "muted", "grid", "surface", "accent", "second", "half", "bf16", "fp32")
_COLOR = {
    role: f"#0101{index:02x}"
    for index, role in enumerate([*ROLES, *(f"cause-{cause.value.lower()}" for cause in Cause)])
}
"""Role → stand-in that pictures are drawn in: the style sheet of the page gives every role its colour."""


def pictures_of(runs: Sequence[RunHistory]) -> Iterator[tuple[int, str, str, str]]:
    """Every picture that there is something for, those of one kind after each other.

    Yields:
        Index of the run, what people read above the picture, what is to be seen, and the picture as an `<svg>` element, whose
        ids no other picture of the page has.
    """
    for kind, picture in enumerate(PICTURES):
        with _style():
            figures = [_drawn(picture, run) for run in runs]
            if picture.rows is None:
                _share_ranges([axes for figure, what in figures if what is not None for axes in figure.axes])
            for index, (figure, description) in enumerate(figures):
                if description is not None:
                    label = html.escape(printable(f"{picture.title}, {runs[index].name}. {description}"))
                    yield index, picture.title, description, _to_svg(figure, f"picture{kind}-{index}", label)


@dataclass(frozen=True)
class Picture:
    """One kind of picture.

    Attributes:
        title: what people read above it.
        draw: draws a run on axes and returns a sentence that says what is to be seen; None where there is nothing.
        rows: rows that it needs, for its height, where it has a row for each module; None where it has the usual height, and
            the pictures of several runs have the same ranges.
    """

    title: str
    draw: Callable[[Axes, RunHistory], str | None]
    rows: Callable[[RunHistory], int] | None = None


WIDTH_INCHES, HEIGHT_INCHES, ROW_INCHES = 5.2, 2.3, 0.17


def overlaid(runs: Sequence[RunHistory]) -> Iterator[tuple[str, str, str]]:
    """Pictures that show several runs together: what people read above them, what is to be seen, and an `<svg>` element."""
    for number, overlay in enumerate(overlays_of(runs)):
        with _style():
            figure, axes = _empty(HEIGHT_INCHES, max(run.newest_step for run in runs))
            description = overlay.draw(axes, [_COLOR[role] for role in ("accent", "second", "bf16", "fp32")])
            if axes.get_yscale() == "log":
                axes.yaxis.set_major_formatter(FuncFormatter(_power_of_two))
            _legend(axes)
            label = html.escape(printable(f"{overlay.title} of {', '.join(overlay.names)}. {description}"))
            yield overlay.title, description, _to_svg(figure, f"overlay{number}", label)


def _drawn(picture: Picture, run: RunHistory) -> tuple[Figure, str | None]:
    height = max(HEIGHT_INCHES, 0.65 + ROW_INCHES * (picture.rows(run) if picture.rows else 0))
    figure, axes = _empty(height, run.newest_step)
    return figure, picture.draw(axes, run)


def _empty(height: float, newest_step: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(newest_step, 1) * 1.01)
    return figure, axes


def _share_ranges(all_axes: Sequence[Axes]) -> None:
    ranges = [(axes.get_xlim(), axes.get_ylim()) for axes in all_axes]
    for axes in all_axes:
        axes.set_xlim(0, max(x[1] for x, _ in ranges))
        axes.set_ylim(min(y[0] for _, y in ranges), max(y[1] for _, y in ranges))


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's settings: thin lines, no frame, text that stays text, no warning of glyphs that it lacks."""
    ink, muted, grid = _COLOR["ink"], _COLOR["muted"], _COLOR["grid"]
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "font.size": 9.5, "font.family": "DejaVu Sans",
        "text.color": ink, "text.parse_math": False,
        "axes.edgecolor": grid, "axes.labelcolor": muted, "axes.facecolor": "none", "axes.linewidth": 0.8,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": grid, "grid.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.formatter.use_mathtext": False, "axes.unicode_minus": True,
        "xtick.color": grid, "ytick.color": grid, "xtick.labelcolor": muted, "ytick.labelcolor": muted,
        "ytick.major.size": 0, "lines.linewidth": 1.5, "lines.solid_capstyle": "round",
        "legend.frameon": False, "legend.fontsize": 8.5, "legend.labelcolor": muted, "figure.facecolor": "none",
    }  # fmt: skip
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a page has the reader's fonts
        yield


def _to_svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as SVG with the colours and fonts of the page.

    Args:
        prefix: letters and digits, different for every picture of a page.
        label: text for screen readers, escaped already.
    """
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    for role, color in _COLOR.items():
        svg = svg.replace(color, f"var(--{role})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    svg = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def draw_loss(axes: Axes, run: RunHistory) -> str | None:
    """The training loss as logged, with a mark at the bottom for every skipped step."""
    if not len(run.figures.get("loss", ())):
        return None
    _plot(axes, run.figures["loss"], _COLOR["accent"])
    if evaluated := _finite(run, "eval_loss"):
        axes.plot(
            *zip(*run.figures["eval_loss"], strict=True),
            color=_COLOR["second"],
            marker="o",
            markersize=3,
            label="evaluation",
        )
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _mark_steps(axes, run, at_bottom=True)
    marked = "Marks at the bottom are skipped steps." if run.skipped_by_cause else "No step was skipped."
    finite = _finite(run, "loss")
    if not finite:
        return f"No loss that was logged is finite. {marked}"
    in_evaluation = f", in evaluation {evaluated[-1]:.4g}" if evaluated else ""
    return f"Loss from {finite[0]:.4g} to {finite[-1]:.4g}{in_evaluation}. {marked}"


def draw_scale(axes: Axes, run: RunHistory) -> str | None:
    """The loss scale on a scale of doublings, with a mark for every skipped step at the scale that overflowed."""
    skipped = [point for series in run.skips.values() for point in series if math.isfinite(point[1])]
    points = sorted({**dict(skipped), **dict(run.figures.get("scale", ()))}.items())
    if not points or all(scale == 1.0 for _, scale in points):
        return None
    steps, scales = zip(*points, strict=True)
    axes.plot(steps, scales, drawstyle="steps-post", color=_COLOR["accent"])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(_power_of_two))
    low, high = min(scales), max(scales)
    axes.set_ylim(low / 4, high * 4)
    _mark_steps(axes, run)
    return f"Loss scale from {scales[0]:,.6g} to {scales[-1]:,.6g}; lowest {low:,.6g}, highest {high:,.6g}."


def _power_of_two(value: float, _: object = None) -> str:
    """As "2^16": raised digits would be too small to read on a phone."""
    if value <= 0:
        return ""
    exponent = math.log2(value)
    return f"2^{exponent:.0f}" if exponent == round(exponent) else f"{value:g}"


def draw_skips(axes: Axes, run: RunHistory) -> str | None:
    """Skipped steps added up over the run, one line for every cause."""
    causes = _causes(run)
    if not causes:
        return None
    for cause in causes:
        series = run.skips[cause]
        steps, counts = [0, *series.steps, run.newest_step], [0, *series.counts, series.points]
        axes.plot(steps, counts, drawstyle="steps-post", color=_color(cause), label=cause)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylim(bottom=0)
    _legend(axes)
    return f"Skipped steps by cause: {', '.join(f'{run.skips[cause].points:,} {cause}' for cause in causes)}."


def draw_figure(
    axes: Axes,
    run: RunHistory,
    *,
    figure: str,
    title: str,
    shown: Callable[[float], str],
    unit: float = 1.0,
    color: str = "accent",
    log: bool = False,
    near_overflow: float | None = None,
) -> str | None:
    """One figure as a line.

    Args:
        figure: its name in the log.
        shown: what people read for so many units of it.
        unit: that the picture counts in, in that of the log.
        log: whether the axis is logarithmic where the figure is positive throughout and varies much.
        near_overflow: value below which the picture is shaded.
    """
    values = _finite(run, figure, unit)
    if not values:
        return None
    low, high = min(values), max(values)
    _plot(axes, run.figures[figure], _COLOR[color], unit)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if log and high > 20 * low > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, low))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    sentence = f"{title} between {shown(low)} and {shown(high)}, {shown(values[-1])} at the end."
    if near_overflow is None:
        return sentence
    axes.axhspan(min(0.0, low), near_overflow, color=_color("ACTIVATION"), alpha=0.12, linewidth=0)
    return f"{sentence} In the shaded band an overflow is near."


def _finite(run: RunHistory, figure: str, unit: float = 1.0) -> list[float]:
    return [value / unit for _, value in run.figures.get(figure, ()) if math.isfinite(value / unit)]


def _plot(axes: Axes, series: Series, color: str, unit: float = 1.0) -> None:
    values = [value / unit if math.isfinite(value / unit) else math.nan for value in series.values]
    padded = [math.nan, *values, math.nan]
    alone = [i for i in range(len(values)) if math.isnan(padded[i]) and math.isnan(padded[i + 2])]  # no line goes there
    axes.plot(series.steps, values, color=color, marker="o", markersize=3, markevery=alone)


MARKS_SHOWN = 300
"""Skipped steps that are marked one by one; of more, evenly chosen ones."""


def _spread(series: Series) -> list[tuple[int, float]]:
    """At most 300 points of a series, evenly chosen, the first and the newest among them."""
    points = list(series)
    if len(points) <= MARKS_SHOWN:
        return points
    return [points[round(i * (len(points) - 1) / (MARKS_SHOWN - 1))] for i in range(MARKS_SHOWN)]


def _causes(run: RunHistory) -> list[str]:
    known = run.skipped_by_cause
    return [cause.value for cause in Cause if cause in known] + sorted(set(known) - set(Cause.__members__))


def _color(cause: str) -> str:
    return _COLOR.get(f"cause-{cause.lower()}", _COLOR["cause-unknown"])


def _mark_steps(axes: Axes, run: RunHistory, at_bottom: bool = False) -> None:
    """A mark for every skipped step, at its scale or at the bottom; a line where precision changed or the run was resumed."""
    options: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False} if at_bottom else {}
    for cause in _causes(run):
        steps, scales = zip(*_spread(run.skips[cause]), strict=True)
        axes.scatter(
            steps, [0.0] * len(steps) if at_bottom else scales, s=20, zorder=3, linewidths=0, color=_color(cause),
            marker=Cause.__members__.get(cause, Cause.UNKNOWN).facts.marker, label=f"skipped: {cause}", **options,
        )  # fmt: skip
    for change in run.precision_changes[:MARKS_SHOWN]:
        axes.axvline(change.step, color=_COLOR["muted"], linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    for step in run.resumed_at[:MARKS_SHOWN]:
        axes.axvline(step, color=_COLOR["grid"], linewidth=1.2, zorder=0)
    _legend(axes)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1,
                    columnspacing=1.0, handletextpad=0.3)  # fmt: skip


ROWS_SHOWN = 24
"""Modules that a picture has room for: those that are nearest to trouble."""
COLUMNS_SHOWN = 80
LONGEST_LABEL = 26
LABEL_POINTS = 7.5
_ALARM_TO_CALM = LinearSegmentedColormap.from_list(
    "alarm_to_calm", ["#b5382a", "#e9b872", "#c9d8d5", "#5b9aa8", "#2b5d77"]
)


def draw_timeline(axes: Axes, run: RunHistory) -> str | None:
    """What every module that ever left the default precision ran in, as bars over the steps."""
    bars = precision_bars(run)
    if not bars:
        return None
    shown = list(bars)[:ROWS_SHOWN]
    for row, name in enumerate(shown):
        for start, end, precision in bars[name]:
            color = _COLOR.get(precision.lower(), _COLOR["half"])
            axes.barh(row, max(end - start, 1e-9), left=start, height=0.62, color=color, linewidth=0)
            if end - start > 0.12 * max(run.newest_step, 1):
                axes.text(start + 0.01 * run.newest_step, row, precision, va="center", fontsize=LABEL_POINTS)
    _name_rows(axes, shown)
    axes.set_ylim(max(len(shown), 6) - 0.4, -0.6)
    more = f" The first {len(shown)} of {len(bars)} modules." if len(shown) < len(bars) else ""
    return f"{len(run.precision_changes)} change{'' if len(run.precision_changes) == 1 else 's'} of precision.{more}"


def precision_bars(run: RunHistory) -> Mapping[str, list[tuple[int, int, str]]]:
    """Row → (from step, to step, precision), in the order in which rows first left the default; "the model" is one."""
    newest: dict[str, tuple[int, str]] = {}
    bars: dict[str, list[tuple[int, int, str]]] = {}
    for change in run.precision_changes:
        for name in change.modules or ("the model",):
            start, before = newest.get(name, (0, str(change.before)))
            bars.setdefault(name, []).append((start, change.step, before))
            newest[name] = (change.step, str(change.after))
    for name, (start, precision) in newest.items():
        bars[name].append((start, max(run.newest_step, start), precision))
    return bars


def draw_modules(
    axes: Axes,
    run: RunHistory,
    *,
    figure: str,
    worst: Callable[[Series], float],
    limits: tuple[float, float],
    unit: str,
    colors: LinearSegmentedColormap = _ALARM_TO_CALM,
    shown_as: Callable[[float], float] = float,
) -> str | None:
    """One figure by module and step, as colours.

    Args:
        figure: its name in the log.
        worst: how near a module came to trouble; lower is nearer.
        limits: values at the two ends of the colours.
        unit: what people read at the colours.
        shown_as: what is shown of a value.
    """
    modules = {module: series for module, series in run.modules.get(figure, {}).items() if len(series)}
    if not modules:
        return None
    by_trouble = sorted(modules, key=lambda module: worst(modules[module]))
    shown = sorted(by_trouble[:ROWS_SHOWN], key=list(modules).index)
    cells, first, last = _cells([modules[module] for module in shown], shown_as)
    image = axes.imshow(
        cells, aspect="auto", interpolation="nearest", vmin=limits[0], vmax=limits[1], cmap=colors,
        extent=(first, last, len(shown) - 0.5, -0.5),
    )  # fmt: skip
    _name_rows(axes, shown)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.035)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=LABEL_POINTS)
    bar.set_label(unit, fontsize=LABEL_POINTS)
    few = f" The {len(shown)} nearest to trouble of {len(modules)} modules." if len(shown) < len(modules) else ""
    return f"Nearest to trouble: {shortened(by_trouble[0], 60)}.{few}"


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    labels = [shortened(name, LONGEST_LABEL) for name in names]
    axes.set_yticks(range(len(labels)), labels, fontsize=LABEL_POINTS, parse_math=False)
    axes.grid(False)


def shortened(name: str, longest: int) -> str:
    """A name, its middle left out where it is longer than `longest`."""
    name = printable(name)
    if len(name) <= longest:
        return name
    tail = (longest - 1) * 2 // 3
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"


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


def _bits_below_largest(amax: float) -> float:
    """How many doublings a value is away from FP16's largest; 0 for what is beyond it."""
    if not 0 < amax < math.inf:
        return math.nan if amax == 0 else 0.0
    return max(0.0, math.log2(FP16_FORMAT.largest) - math.log2(amax))


def _of_figure(figure: str, title: str, **options: Any) -> Picture:
    return Picture(title, partial(draw_figure, figure=figure, title=title, **options))


def _of_modules(figure: str, title: str, **options: Any) -> Picture:
    draw_it = partial(draw_modules, figure=figure, **options)
    return Picture(title, draw_it, lambda run: min(ROWS_SHOWN, len(run.modules.get(figure, ()))))


PICTURES = (
    Picture("Loss", draw_loss),
    _of_figure("learning_rate", "Learning rate", shown=lambda rate: f"{rate:.3g}", color="second"),
    Picture("Loss scale", draw_scale),
    Picture("Skipped steps, added up", draw_skips),
    Picture("Which precision ran where", draw_timeline, lambda run: min(ROWS_SHOWN, len(precision_bars(run)))),
    _of_figure("headroom_bits", "Headroom", shown=lambda bits: f"{bits:.3g} bits", near_overflow=1.0),
    _of_figure("underflow_fraction", "Underflow", shown=lambda x: f"{x:.3g}%", unit=0.01, color="second"),
    _of_figure("lost_update_fraction", "Updates lost to rounding", shown=lambda x: f"{x:.3g}%", unit=0.01, color="second"),
    _of_figure("grad_norm", "Gradient norm before clipping", shown=lambda norm: f"{norm:.3g}", log=True),
    _of_figure("step_seconds", "Step time", shown=lambda ms: f"{ms:,.4g} ms", unit=1e-3),
    _of_figure("joules_per_step", "Energy an applied step", shown=lambda joules: f"{joules:,.4g} J"),
    _of_figure("memory_bytes", "Memory", shown=lambda x: f"{x:.3g} GiB", unit=2**30, color="second"),
    _of_modules(
        "module_headroom_bits", "Headroom by module", worst=lambda s: min(s.values), limits=(0, 16), unit="bits"
    ),
    _of_modules(
        "module_underflow_fraction", "Underflow by module", worst=lambda s: -max(s.values), limits=(0, 0.5), unit="share",
        colors=_ALARM_TO_CALM.reversed(),
    ),
    _of_modules(
        "module_lost_update_fraction", "Updates lost to rounding, by parameter", worst=lambda s: -max(s.values), limits=(0, 1),
        unit="share", colors=_ALARM_TO_CALM.reversed(),
    ),
    _of_modules(
        "module_activation_amax", "Largest activations by module", worst=lambda s: -max(s.values), limits=(0, 16),
        unit="bits below 65504", shown_as=_bits_below_largest,
    ),
)  # fmt: skip


def page(runs: Sequence[RunHistory], made_by: str) -> str:
    """The whole page for one run or several, by the template `page.html`.

    Args:
        made_by: version of hf_amp, for the last line.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),  # control characters shown
        trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"shown": formatted, "time": _time, "remarks": _remarks, "options": _options}
    metrics, latest = {metric.name: metric for metric in CATALOGUE}, [run.latest for run in runs]
    names = {name for figures in latest for name in figures}
    in_order = [*filter(names.__contains__, metrics), *sorted(names - metrics.keys())]
    return environment.get_template("page.html").render(
        runs=runs,
        version=made_by,
        verdict_on=verdict_on,
        causes=Cause,
        overlays=list(overlaid(runs)) if len(runs) > 1 else [],
        circumstances=circumstances(runs) if len(runs) > 1 else [],
        compared_steps=list(compared_steps(runs)) if len(runs) > 1 else [],
        pictures=_common_first(list(pictures_of(runs)), len(runs)),
        metrics=metrics,
        figures=[(name, [figures.get(name) for figures in latest]) for name in in_order],
    )


class InlinePage:
    """The page of one run, in a frame of its own, for notebooks."""

    def __init__(self, run: RunHistory) -> None:
        self.page = page([run], str(sys.modules["hf_amp"].__version__))

    def _repr_html_(self) -> str:
        return f'<iframe sandbox srcdoc="{html.escape(self.page)}" style="width:100%;height:60rem;border:0"></iframe>'


def _common_first(pictures: list[tuple[int, str, str, str]], runs: int) -> list[tuple[bool, int, str, str, str]]:
    """Those first of which every run has one, side by side; those of single runs follow each other. Told apart by the flag."""
    having = Counter(title for _, title, _, _ in pictures)
    return sorted(((having[each[1]] == runs, *each) for each in pictures), key=lambda each: not each[0])


def _time(timestamp: str | None) -> str:
    return timestamp[:19].replace("T", " ") + " UTC" if timestamp else ""


def _options(run: RunHistory) -> str:
    """The options that are not at their defaults."""
    usual = MixedPrecisionConfig().to_dict()
    return ", ".join(f"{name}={value}" for name, value in run.config.items() if value != usual.get(name, value))


def _remarks(run: RunHistory) -> str:
    torn = f"{run.torn_lines:,} line{'s were' if run.torn_lines > 1 else ' was'} cut off by a kill"
    former = f"{run.former_runs:,} earlier run{'s' if run.former_runs > 1 else ''} in the same file left out"
    return "; ".join([torn] * bool(run.torn_lines) + [former] * bool(run.former_runs))
