"""Pictures of a run over its optimizer steps: loss, scale, skips, precisions, headroom, underflow, norms, speed, memory."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_amp.events import printable
from hf_amp.precision import FP16_FORMAT
from hf_amp.report.reader import RunHistory, Series

CAUSE_MARKERS = {
    "SCALE": ("v", "#c98300", "#f0b23e"),
    "ACTIVATION": ("D", "#c2410c", "#f58a5b"),
    "INPUT": ("s", "#7a4fa3", "#b794e0"),
    "LOSS": ("^", "#b5527f", "#e28fb4"),
    "WEIGHTS": ("X", "#a3182a", "#f0707f"),
    "UNKNOWN": ("o", "#66717e", "#97a2ae"),
}
"""Cause → its mark, its colour on a light and on a dark ground, in the order of legends; others look like UNKNOWN."""

COLORS = {
    "ink": ("#1d2733", "#e6e9ed"),
    "muted": ("#66717e", "#97a2ae"),
    "grid": ("#e4e7ea", "#2c343d"),
    "surface": ("#ffffff", "#1a2027"),
    "accent": ("#2b6f8f", "#6fb7d6"),
    "second": ("#8a6d3b", "#d0b27a"),
    "half": ("#9cc5d8", "#2f667d"),
    "bf16": ("#a9c9a4", "#416b45"),
    "fp32": ("#e9c46a", "#8f6f1c"),
    **{f"cause-{cause.lower()}": colors for cause, (_, *colors) in CAUSE_MARKERS.items()},
}
"""Role → colour on a light and on a dark ground. Source of the colour-blind-safe hues: Okabe and Ito, "Color Universal
Design" (2008).
"""
Theme = Mapping[str, str]
LIGHT: Theme = {role: light for role, (light, _) in COLORS.items()}
DARK: Theme = {role: dark for role, (_, dark) in COLORS.items()}
IN_PAGE: Theme = {role: f"#0101{index:02x}" for index, role in enumerate(COLORS)}
"""Stand-ins: in a page the style sheet gives every role its colour."""


def pictures_for_page(runs: Sequence[RunHistory]) -> Iterator[list[tuple[Drawn, str]]]:
    """For every kind of picture that there is something for: its pictures, each with its SVG."""
    for picture in PICTURES:
        drawn = draw(picture, runs, IN_PAGE)
        if drawn:
            yield [(one, to_svg(one, runs[one.run].name)) for one in drawn]


def write_pngs(runs: Sequence[RunHistory], folder: Path) -> list[Path]:
    """Writes every picture as a PNG file of 200 dots per inch into `folder`, which is made where it is missing.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in PICTURES:
        for one in draw(picture, runs, LIGHT):
            number = f"_{one.run + 1}" if len(runs) > 1 else ""
            path = folder / f"{picture.name}{number}.png"
            with _style(LIGHT):
                one.figure.savefig(path, format="png", dpi=200, facecolor=LIGHT["surface"])
            written.append(path)
    return written


Drawing = Callable[[Axes, RunHistory, Theme], str | None]
"""Draws a run on axes and returns a sentence that says what is to be seen; None where there is nothing."""


@dataclass(frozen=True)
class Picture:
    """One kind of picture.

    Attributes:
        name: what its file is called.
        title: what people read above it.
        draw: draws it.
        rows: rows that it needs, for its height; 0 for the usual height.
        shared: whether the pictures of several runs have the same ranges.
    """

    name: str
    title: str
    draw: Drawing
    rows: Callable[[RunHistory], int] = lambda run: 0
    shared: bool = True


@dataclass(frozen=True)
class Drawn:
    """One picture of one run.

    Attributes:
        picture: its kind.
        run: index of the run.
        description: what is to be seen, in a sentence or two.
        figure: as matplotlib holds it.
    """

    picture: Picture
    run: int
    description: str
    figure: Figure


WIDTH_INCHES, HEIGHT_INCHES, ROW_INCHES = 5.2, 2.3, 0.17


def draw(picture: Picture, runs: Sequence[RunHistory], theme: Theme) -> list[Drawn]:
    """One kind of picture for every run that has something to show there."""
    drawn = []
    with _style(theme):
        for index, run in enumerate(runs):
            height = max(HEIGHT_INCHES, 0.65 + ROW_INCHES * picture.rows(run))
            figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot()
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
            axes.set_xlabel("optimizer step")
            axes.set_xlim(0, max(run.newest_step, 1) * 1.01)
            description = picture.draw(axes, run, theme)
            if description is not None:
                drawn.append(Drawn(picture, index, description, figure))
        if picture.shared:
            _share_ranges([axes for one in drawn for axes in one.figure.axes])
    return drawn


def _share_ranges(all_axes: Sequence[Axes]) -> None:
    ranges = [(axes.get_xlim(), axes.get_ylim()) for axes in all_axes]
    for axes in all_axes:
        axes.set_xlim(0, max(x[1] for x, _ in ranges))
        axes.set_ylim(min(y[0] for _, y in ranges), max(y[1] for _, y in ranges))


@contextmanager
def _style(theme: Theme, **options: str) -> Iterator[None]:
    """matplotlib's settings for a theme: thin lines, no frame, text that stays text, no warning of glyphs that it lacks."""
    ink, muted, grid = theme["ink"], theme["muted"], theme["grid"]
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
        **options,
    }  # fmt: skip
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a page has the reader's fonts
        yield


def to_svg(drawn: Drawn, run_name: str) -> str:
    """The picture as an `<svg>` element: colours from the page, and ids that no other picture of the page has."""
    prefix = f"{drawn.picture.name.replace('_', '')}{drawn.run}"
    label = html.escape(printable(f"{drawn.picture.title}, {run_name}. {drawn.description}"))
    buffer = io.StringIO()
    with _style(IN_PAGE, **{"svg.hashsalt": prefix}):
        drawn.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    for role, color in IN_PAGE.items():
        svg = svg.replace(color, f"var(--{role})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    svg = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def draw_loss(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """The training loss as logged, with a mark at the bottom for every skipped step."""
    if not len(run.figures.get("loss", ())):
        return None
    _plot(axes, run.figures["loss"], theme["accent"])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    for cause in _causes(run):
        steps = [step for step, _ in _spread(run.skips[cause])]
        _scatter(
            axes, steps, [0.0] * len(steps), cause, theme, transform=axes.get_xaxis_transform(), clip_on=False
        )
    _mark_changes(axes, run, theme)
    _legend(axes)
    marked = "Marks at the bottom are skipped steps." if run.skipped_by_cause else "No step was skipped."
    finite = _finite(run, "loss")
    if not finite:
        return f"No loss that was logged is finite. {marked}"
    return f"Loss from {finite[0]:.4g} to {finite[-1]:.4g}. {marked}"


def draw_scale(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """The loss scale on a scale of doublings, with a mark for every skipped step at the scale that overflowed."""
    points = _scale_points(run)
    if not points or all(scale == 1.0 for _, scale in points):
        return None
    steps, scales = zip(*points, strict=True)
    axes.plot(steps, scales, drawstyle="steps-post", color=theme["accent"])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(_power_of_two))
    low, high = min(scales), max(scales)
    axes.set_ylim(low / 4, high * 4)
    for cause in _causes(run):
        shown = [point for point in _spread(run.skips[cause]) if math.isfinite(point[1])]
        _scatter(axes, [step for step, _ in shown], [scale for _, scale in shown], cause, theme)
    _mark_changes(axes, run, theme)
    _legend(axes)
    return f"Loss scale from {scales[0]:,.6g} to {scales[-1]:,.6g}; lowest {low:,.6g}, highest {high:,.6g}."


def _scale_points(run: RunHistory) -> list[tuple[int, float]]:
    """What every logging step and every skip says of the scale, in order of steps."""
    skipped = [point for series in run.skips.values() for point in series if math.isfinite(point[1])]
    return sorted({**dict(skipped), **dict(run.figures.get("scale", ()))}.items())


def _power_of_two(value: float, _: object = None) -> str:
    """As "2^16": raised digits would be too small to read on a phone."""
    if value <= 0:
        return ""
    exponent = math.log2(value)
    return f"2^{exponent:.0f}" if exponent == round(exponent) else f"{value:g}"


def draw_skips(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """Skipped steps added up over the run, one line for every cause."""
    causes = _causes(run)
    if not causes:
        return None
    for cause in causes:
        series = run.skips[cause]
        steps, counts = [0, *series.steps, run.newest_step], [0, *series.counts, series.points]
        axes.plot(steps, counts, drawstyle="steps-post", color=_color(theme, cause), label=cause)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylim(bottom=0)
    _legend(axes)
    return f"Skipped steps by cause: {', '.join(f'{run.skips[cause].points:,} {cause}' for cause in causes)}."


def _figure_picture(
    name: str,
    title: str,
    figure: str,
    shown: Callable[[float], str],
    *,
    color: str = "accent",
    log: bool = False,
    unit: float = 1.0,
    near_overflow: float | None = None,
) -> Picture:
    """A picture of one figure as a line.

    Args:
        figure: its name in the log.
        shown: what people read for so many units of it.
        unit: that the picture counts in, in that of the log.
        log: whether the axis is logarithmic where the figure is positive throughout and varies much.
        near_overflow: value below which the picture is shaded.
    """

    def draw_figure(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
        values = _finite(run, figure, unit)
        if not values:
            return None
        low, high = min(values), max(values)
        _plot(axes, run.figures[figure], theme[color], unit)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if log and high > 20 * low > 0:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, low))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
        sentence = f"{title} between {shown(low)} and {shown(high)}, {shown(values[-1])} at the end."
        if near_overflow is None:
            return sentence
        axes.axhspan(min(0.0, low), near_overflow, color=_color(theme, "ACTIVATION"), alpha=0.12, linewidth=0)
        return f"{sentence} In the shaded band an overflow is near."

    return Picture(name, title, draw_figure)


def _finite(run: RunHistory, figure: str, unit: float = 1.0) -> list[float]:
    return [value / unit for _, value in run.figures.get(figure, ()) if math.isfinite(value / unit)]


def _plot(axes: Axes, series: Series, color: str, unit: float = 1.0) -> None:
    values = [value / unit if math.isfinite(value / unit) else math.nan for value in series.values]
    axes.plot(series.steps, values, color=color, marker="o" if len(values) == 1 else None, markersize=3)


MARKS_SHOWN = 300
"""Skipped steps that are marked one by one; of more, evenly chosen ones."""


def _spread(series: Series) -> list[tuple[int, float]]:
    """At most 300 points of a series, evenly chosen, the first and the newest among them."""
    points = list(series)
    if len(points) <= MARKS_SHOWN:
        return points
    stride = (len(points) - 1) / (MARKS_SHOWN - 1)
    return [points[round(i * stride)] for i in range(MARKS_SHOWN)]


def _causes(run: RunHistory) -> list[str]:
    known = run.skipped_by_cause
    return [cause for cause in CAUSE_MARKERS if cause in known] + sorted(set(known) - set(CAUSE_MARKERS))


def _color(theme: Theme, cause: str) -> str:
    return theme.get(f"cause-{cause.lower()}", theme["cause-unknown"])


def _scatter(
    axes: Axes, steps: list[int], values: list[float], cause: str, theme: Theme, **options: Any
) -> None:
    marker, *_ = CAUSE_MARKERS.get(cause, CAUSE_MARKERS["UNKNOWN"])
    axes.scatter(
        steps, values, s=20, marker=marker, color=_color(theme, cause), label=f"skipped: {cause}", zorder=3, linewidths=0,
        **options,
    )  # fmt: skip


def _mark_changes(axes: Axes, run: RunHistory, theme: Theme) -> None:
    for change in run.precision_changes[:MARKS_SHOWN]:
        axes.axvline(change.step, color=theme["muted"], linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    for step in run.resumed_at[:MARKS_SHOWN]:
        axes.axvline(step, color=theme["grid"], linewidth=1.2, zorder=0)


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


def draw_timeline(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """What every module that ever left the default precision ran in, as bars over the steps."""
    bars = precision_bars(run)
    if not bars:
        return None
    shown = list(bars)[:ROWS_SHOWN]
    for row, name in enumerate(shown):
        for start, end, precision in bars[name]:
            color = theme.get(precision.lower(), theme["half"])
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


def _heatmap(
    name: str,
    title: str,
    worst: Callable[[Series], float],
    limits: tuple[float, float],
    unit: str,
    *,
    colors: LinearSegmentedColormap = _ALARM_TO_CALM,
    shown_as: Callable[[float], float] = float,
) -> Picture:
    """A picture of one figure by module and step.

    Args:
        name: of the figure in the log.
        worst: how near a module came to trouble; lower is nearer.
        limits: values at the two ends of the colours.
        unit: what people read at the colours.
        shown_as: what is shown of a value.
    """

    def draw_modules(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
        modules = {module: series for module, series in run.modules.get(name, {}).items() if len(series)}
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
        part = (
            f" The {len(shown)} nearest to trouble of {len(modules)} modules."
            if len(shown) < len(modules)
            else ""
        )
        return f"Nearest to trouble: {shortened(by_trouble[0], 60)}.{part}"

    return Picture(
        name, title, draw_modules, lambda run: min(ROWS_SHOWN, len(run.modules.get(name, ()))), False
    )


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


PICTURES = (
    Picture("loss", "Loss", draw_loss),
    Picture("scale", "Loss scale", draw_scale),
    Picture("skips", "Skipped steps, added up", draw_skips),
    Picture(
        "timeline", "Which precision ran where", draw_timeline, lambda run: min(ROWS_SHOWN, len(precision_bars(run))), False
    ),
    _figure_picture("headroom", "Headroom", "headroom_bits", lambda bits: f"{bits:.3g} bits", near_overflow=1.0),
    _figure_picture("underflow", "Underflow", "underflow_fraction", lambda x: f"{x:.3g}%", color="second", unit=0.01),
    _figure_picture("norm", "Gradient norm before clipping", "grad_norm", lambda norm: f"{norm:.3g}", log=True),
    _figure_picture("speed", "Step time", "step_seconds", lambda ms: f"{ms:,.4g} ms", unit=1e-3),
    _figure_picture("memory", "Memory", "memory_bytes", lambda x: f"{x:.3g} GiB", color="second", unit=2**30),
    _heatmap("module_headroom_bits", "Headroom by module", lambda s: min(s.values), (0, 16), "bits"),
    _heatmap(
        "module_underflow_fraction", "Underflow by module", lambda s: -max(s.values), (0, 0.5), "share",
        colors=_ALARM_TO_CALM.reversed(),
    ),
    _heatmap(
        "module_activation_amax", "Largest activations by module", lambda s: -max(s.values), (0, 16), "bits below 65504",
        shown_as=_bits_below_largest,
    ),
)  # fmt: skip
