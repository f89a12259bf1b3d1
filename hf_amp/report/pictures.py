"""Pictures of a run over its optimizer steps: loss, scale, skips, headroom, underflow, norms, speed, memory."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
from hf_amp.monitoring.metrics import CATALOGUE
from hf_amp.precision import FP16_FORMAT
from hf_amp.report.reader import Incident, PrecisionChange, RunHistory, Series
from hf_amp.report.verdict import verdict_on

CAUSE_MARKERS = {"SCALE": "v", "ACTIVATION": "D", "INPUT": "s", "LOSS": "^", "WEIGHTS": "X", "UNKNOWN": "o"}
"""A shape beside the colour, for those who do not see colours; in the order of legends."""


@dataclass(frozen=True)
class Theme:
    """Colours by role, as `#rrggbb`.

    The colour-blind-safe hues of causes and precisions follow Okabe and Ito, "Color Universal Design" (2008).
    """

    ink: str
    muted: str
    grid: str
    surface: str
    accent: str
    second: str
    cause_scale: str
    cause_activation: str
    cause_input: str
    cause_loss: str
    cause_weights: str
    cause_unknown: str
    half: str
    brain: str
    single: str

    def cause(self, cause: str) -> str:
        """Colour of a cause; unknown ones look like UNKNOWN."""
        return str(getattr(self, f"cause_{cause.lower()}", self.cause_unknown))

    def precision(self, name: str) -> str:
        """Colour of a precision."""
        return {"FP32": self.single, "BF16": self.brain}.get(name, self.half)


LIGHT = Theme(
    ink="#1d2733", muted="#66717e", grid="#e4e7ea", surface="#ffffff", accent="#2b6f8f", second="#8a6d3b",
    cause_scale="#c98300", cause_activation="#c2410c", cause_input="#7a4fa3", cause_loss="#b5527f",
    cause_weights="#a3182a", cause_unknown="#66717e", half="#9cc5d8", brain="#a9c9a4", single="#e9c46a",
)  # fmt: skip
DARK = Theme(
    ink="#e6e9ed", muted="#97a2ae", grid="#2c343d", surface="#1a2027", accent="#6fb7d6", second="#d0b27a",
    cause_scale="#f0b23e", cause_activation="#f58a5b", cause_input="#b794e0", cause_loss="#e28fb4",
    cause_weights="#f0707f", cause_unknown="#97a2ae", half="#2f667d", brain="#416b45", single="#8f6f1c",
)  # fmt: skip

# A picture in a page is drawn in stand-in colours, which the page's style sheet then gives their meaning.
_ROLES = [role.name for role in fields(Theme)]
IN_PAGE = Theme(**{role: f"#0101{index:02x}" for index, role in enumerate(_ROLES, start=1)})


def css_variable(role: str) -> str:
    """Name of the style-sheet variable that holds the colour of a role."""
    return "--" + role.replace("_", "-")


def style_of(theme: Theme) -> Any:
    """matplotlib's settings for a theme: thin lines, no frame, text that stays text."""
    return {
        "svg.fonttype": "none",
        "font.size": 9.5,
        "font.family": "DejaVu Sans",
        "text.color": theme.ink,
        "text.parse_math": False,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.linewidth": 0.8,
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "ytick.major.size": 0,
        "lines.linewidth": 1.5,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.labelcolor": theme.muted,
        "figure.facecolor": "none",
    }


def to_svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an `<svg>` element: colours from the page, names of its parts made unique by `prefix`.

    Args:
        prefix: letters and digits, different for every picture of a page.
        label: text for screen readers, escaped already.
    """
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # the page's fonts, not matplotlib's, draw it
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    for role in _ROLES:
        svg = svg.replace(getattr(IN_PAGE, role), f"var({css_variable(role)})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    svg = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def to_png(figure: Figure, path: Path) -> None:
    """Writes the figure, 200 dots per inch, on a white ground."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, format="png", dpi=200, facecolor=LIGHT.surface)


def shortened(name: str, longest: int) -> str:
    """A name, its middle left out where it is longer than `longest`."""
    name = printable(name)
    if len(name) <= longest:
        return name
    tail = (longest - 1) * 2 // 3
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"


MARKS_SHOWN = 300
"""Skipped steps that are marked one by one; of more, evenly chosen ones."""


@dataclass(frozen=True)
class Picture:
    """One kind of picture.

    Attributes:
        name: what its file is called.
        title: what people read above it.
        draw: draws a run on axes and returns a sentence that says what is to be seen; None where there is nothing.
        rows: rows that it needs, for its height; 0 for the usual height.
    """

    name: str
    title: str
    draw: Callable[[Axes, RunHistory, Theme], str | None]
    rows: Callable[[RunHistory], int] = lambda run: 0


def draw_loss(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """The training loss as logged, with a mark at the bottom for every skipped step."""
    series = _known(run, "loss")
    if series is None:
        return None
    finite = [(step, value) for step, value in series if math.isfinite(value)]
    _line(axes, series, theme.accent)
    marked = _mark_skips(axes, run, theme)
    if not finite:
        return f"No loss that was logged is finite. {marked}"
    return f"Loss from {finite[0][1]:.4g} to {finite[-1][1]:.4g}. {marked}"


def draw_scale(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """The loss scale on a scale of doublings, with a mark for every skipped step at the scale that overflowed."""
    points = _scale_points(run)
    if not points or all(scale == 1.0 for _, scale in points):
        return None
    steps, scales = zip(*points, strict=True)
    axes.plot(steps, scales, drawstyle="steps-post", color=theme.accent)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(_power_of_two))
    low, high = min(scales), max(scales)
    axes.set_ylim(low / 4, high * 4)
    for cause in _causes(run):
        shown = [point for point in _spread(run.skips[cause]) if math.isfinite(point[1])]
        if shown:
            axes.scatter(
                [s for s, _ in shown], [v for _, v in shown], s=22, zorder=3, label=cause,
                marker=CAUSE_MARKERS.get(cause, "o"), color=theme.cause(cause), linewidths=0,
            )  # fmt: skip
    _mark_transitions(axes, run, theme)
    _legend(axes)
    return f"Loss scale from {scales[0]:,.6g} to {scales[-1]:,.6g}; lowest {low:,.6g}, highest {high:,.6g}."


def draw_skips(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """Skipped steps added up over the run, one line for every cause."""
    causes = _causes(run)
    if not causes:
        return None
    reported = []
    for cause in causes:
        series = run.skips[cause]
        per_point = series.points / len(series)  # of a long series not every step is kept
        steps = [0, *series.steps, run.newest_step]
        counts = [0.0, *((i + 1) * per_point for i in range(len(series))), float(series.points)]
        axes.plot(steps, counts, drawstyle="steps-post", color=theme.cause(cause), label=cause)
        reported.append(f"{series.points:,} {cause}")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylim(bottom=0)
    _legend(axes)
    return f"Skipped steps by cause: {', '.join(reported)}."


def draw_headroom(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """Doublings of the scale that are left before the largest gradient overflows."""
    series = _known(run, "headroom_bits")
    if series is None:
        return None
    _line(axes, series, theme.accent)
    axes.axhspan(min(0.0, min(series.values)), 1.0, color=theme.cause_activation, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=min(0.0, min(series.values)))
    return (
        f"Headroom between {min(series.values):.1f} and {max(series.values):.1f} bits, {series.values[-1]:.1f} at the end; "
        "in the shaded band below 1 bit an overflow is near."
    )


def draw_underflow(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """Share of the gradient that FP16 loses to zero or holds with less precision."""
    series = _known(run, "underflow_fraction")
    if series is None:
        return None
    _line(axes, series, theme.second)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axes.set_ylim(bottom=0)
    return f"Underflow fraction between {min(series.values):.2%} and {max(series.values):.2%}, {series.values[-1]:.2%} at the end."


def draw_norm(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """Gradient norm before clipping; a skipped step has none."""
    series = _known(run, "grad_norm")
    positive = [value for value in series.values if value > 0] if series else []
    if series is None or not positive:
        return None
    _line(axes, series, theme.accent)
    if max(positive) > 20 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return f"Gradient norm between {min(positive):.3g} and {max(positive):.3g}, {series.values[-1]:.3g} at the end."


def draw_speed(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """Wall-clock time of an optimizer step."""
    series = _known(run, "step_seconds")
    if series is None:
        return None
    _line(axes, series, theme.accent)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1000 * value:,.4g} ms"))
    axes.set_ylim(bottom=0)
    median = sorted(series.values)[len(series) // 2]
    return f"Step time: median {1000 * median:,.3g} ms."


def draw_memory(axes: Axes, run: RunHistory, theme: Theme) -> str | None:
    """Memory that the run holds on its device."""
    series = _known(run, "memory_bytes")
    if series is None:
        return None
    axes.plot(series.steps, [value / 2**30 for value in series.values], color=theme.second)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g} GiB"))
    axes.set_ylim(0, max(series.values) / 2**30 * 1.15)
    return f"Memory: {max(series.values) / 2**30:.3g} GiB at most."


OVER_TIME = (
    Picture("loss", "Loss", draw_loss),
    Picture("scale", "Loss scale", draw_scale),
    Picture("skips", "Skipped steps, added up", draw_skips),
    Picture("headroom", "Headroom (bits)", draw_headroom),
    Picture("underflow", "Underflow", draw_underflow),
    Picture("norm", "Gradient norm before clipping", draw_norm),
    Picture("speed", "Step time", draw_speed),
    Picture("memory", "Memory", draw_memory),
)


def _known(run: RunHistory, name: str) -> Series | None:
    return run.figures[name] if name in run.figures and len(run.figures[name]) else None


def _line(axes: Axes, series: Series, color: str) -> None:
    values = [value if math.isfinite(value) else math.nan for value in series.values]
    axes.plot(series.steps, values, color=color, marker="o" if len(values) == 1 else None, markersize=3)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _causes(run: RunHistory) -> list[str]:
    known = run.skipped_by_cause
    return [cause for cause in CAUSE_MARKERS if cause in known] + sorted(set(known) - set(CAUSE_MARKERS))


def _spread(series: Series) -> list[tuple[int, float]]:
    """At most 300 points of a series, evenly chosen, the first and the newest among them."""
    points = list(series)
    if len(points) <= MARKS_SHOWN:
        return points
    stride = (len(points) - 1) / (MARKS_SHOWN - 1)
    return [points[round(i * stride)] for i in range(MARKS_SHOWN)]


def _scale_points(run: RunHistory) -> list[tuple[int, float]]:
    """What every logging step and every skip says of the scale, in order of steps."""
    skipped = [point for series in run.skips.values() for point in series if math.isfinite(point[1])]
    logged = list(run.figures["scale"]) if "scale" in run.figures else []
    return sorted({**dict(skipped), **dict(logged)}.items())


def _mark_skips(axes: Axes, run: RunHistory, theme: Theme) -> str:
    """A mark at the bottom for every skipped step."""
    for cause in _causes(run):
        steps = [step for step, _ in _spread(run.skips[cause])]
        axes.scatter(
            steps, [0.0] * len(steps), s=20, marker=CAUSE_MARKERS.get(cause, "o"), color=theme.cause(cause),
            transform=axes.get_xaxis_transform(), clip_on=False, zorder=3, label=f"skipped: {cause}", linewidths=0,
        )  # fmt: skip
    _mark_transitions(axes, run, theme)
    _legend(axes)
    return "Marks at the bottom are skipped steps." if run.skipped_by_cause else "No step was skipped."


def _mark_transitions(axes: Axes, run: RunHistory, theme: Theme) -> None:
    for change in run.precision_changes[:MARKS_SHOWN]:
        axes.axvline(change.step, color=theme.muted, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    for step in run.resumed_at[:MARKS_SHOWN]:
        axes.axvline(step, color=theme.grid, linewidth=1.2, zorder=0)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1,
                    columnspacing=1.0, handletextpad=0.3)  # fmt: skip


def _power_of_two(value: float, _: object = None) -> str:
    """As "2^16": raised digits would be too small to read on a phone."""
    if value <= 0:
        return ""
    exponent = math.log2(value)
    return f"2^{exponent:.0f}" if exponent == round(exponent) else f"{value:g}"


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
    changes = (
        f"{len(run.precision_changes)} change{'' if len(run.precision_changes) == 1 else 's'} of precision"
    )
    more = f" The first {len(shown)} of {len(bars)} modules." if len(shown) < len(bars) else ""
    return f"{changes}.{more}"


def precision_bars(run: RunHistory) -> Mapping[str, list[tuple[int, int, str]]]:
    """Row → (from step, to step, precision), in the order in which rows first left the default; "the model" is one."""
    newest: dict[str, tuple[int, str]] = {}
    bars: dict[str, list[tuple[int, int, str]]] = {}
    for change in run.precision_changes:
        for name in change.modules or ("the model",):
            start, before = newest.get(name, (0, change.before))
            bars.setdefault(name, []).append((start, change.step, before))
            newest[name] = (change.step, change.after)
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


_UNITS = {metric.name: metric.unit for metric in CATALOGUE}


def figures_of(run: RunHistory) -> dict[str, Any]:
    """Plain data, fit for JSON: the verdict, the newest figures, skips by cause, incidents and changes of precision."""
    verdict = verdict_on(run)
    return {
        "name": run.name,
        "log": str(run.path),
        "run_id": run.run_id,
        "verdict": {"level": verdict.level.value, "sentence": verdict.sentence},
        "state": state_of(run),
        "started": run.started,
        "newest": run.newest,
        "newest_step": run.newest_step,
        "what_ran": run.what_ran,
        "resumed_at": run.resumed_at,
        "former_runs": run.former_runs,
        "lines": run.lines,
        "torn_lines": run.torn_lines,
        "figures": {
            name: {"value": value if math.isfinite(value) else str(value), "unit": _UNITS.get(name, "")}
            for name, value in run.latest.items()
        },
        "skipped_by_cause": dict(run.skipped_by_cause),
        "incidents": [_fields_of(incident) for incident in run.incidents],
        "precision_changes": [_fields_of(change) for change in run.precision_changes],
    }


def _fields_of(reported: Incident | PrecisionChange) -> dict[str, Any]:
    return {**asdict(reported), "cause": reported.cause or None}


def state_of(run: RunHistory) -> str:
    """`empty`, `finished`, or `unfinished`: still running or killed, which a log alone cannot tell."""
    if run.lines == 0:
        return "empty"
    return "finished" if run.ended else "unfinished"


def formatted(value: float) -> str:
    """A figure for people: whole numbers with separators, others with four digits."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 2**53:
        return f"{int(value):,}"
    return f"{value:.4g}"


PICTURES = (*OVER_TIME[:3], TIMELINE, *OVER_TIME[3:], *BY_MODULE)
WIDTH_INCHES, HEIGHT_INCHES = 5.2, 2.3
ROW_INCHES = 0.17
"""Height of a module's row."""


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

    def svg(self, runs: Sequence[RunHistory]) -> str:
        """The picture as an element of a page."""
        label = html.escape(printable(f"{self.picture.title}, {runs[self.run].name}. {self.description}"))
        return to_svg(self.figure, f"{self.picture.name.replace('_', '')}{self.run}", label)


def draw(picture: Picture, runs: Sequence[RunHistory], theme: Theme) -> list[Drawn]:
    """One kind of picture for every run that has something to show there, over the same ranges."""
    drawn = []
    with rc_context(style_of(theme)):
        for index, run in enumerate(runs):
            rows = picture.rows(run)
            height = max(HEIGHT_INCHES, 0.65 + ROW_INCHES * rows)
            figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot()
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
            axes.set_xlabel("optimizer step")
            description = picture.draw(axes, run, theme)
            if picture not in BY_MODULE:
                axes.set_xlim(0, max(run.newest_step, 1) * 1.01)
            if description is not None:
                drawn.append(Drawn(picture, index, description, figure))
        if picture in OVER_TIME:
            _share_ranges([one.figure for one in drawn])
    return drawn


def _share_ranges(figures: Sequence[Figure]) -> None:
    ranges = [(axes.get_xlim(), axes.get_ylim()) for figure in figures for axes in figure.axes]
    for figure in figures:
        for axes in figure.axes:
            axes.set_xlim(min(x[0] for x, _ in ranges), max(x[1] for x, _ in ranges))
            axes.set_ylim(min(y[0] for _, y in ranges), max(y[1] for _, y in ranges))


def pictures_for_page(runs: Sequence[RunHistory]) -> Iterator[list[tuple[Drawn, str]]]:
    """For every kind of picture that there is something for: its pictures, each with its SVG."""
    for picture in PICTURES:
        drawn = draw(picture, runs, IN_PAGE)
        if drawn:
            with rc_context(style_of(IN_PAGE)):
                yield [(one, one.svg(runs)) for one in drawn]


def write_pngs(runs: Sequence[RunHistory], folder: Path) -> list[Path]:
    """Writes every picture as a PNG file into `folder`, which is made where it is missing; returns the files.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in PICTURES:
        for one in draw(picture, runs, LIGHT):
            number = f"_{one.run + 1}" if len(runs) > 1 else ""
            path = folder / f"{picture.name}{number}.png"
            with rc_context(style_of(LIGHT)):
                to_png(one.figure, path)
            written.append(path)
    return written
