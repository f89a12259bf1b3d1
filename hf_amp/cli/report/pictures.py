"""Pictures of a run over its optimizer steps: loss, scale, skips, headroom, underflow, norms, speed, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_amp.cli.report.theme import CAUSE_MARKERS, Theme
from hf_amp.monitoring.run_history import RunHistory
from hf_amp.monitoring.series import Series

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
    told = []
    for cause in causes:
        series = run.skips[cause]
        per_point = series.points / len(series)  # of a long series not every step is kept
        steps = [0, *series.steps, run.newest_step]
        counts = [0.0, *((i + 1) * per_point for i in range(len(series))), float(series.points)]
        axes.plot(steps, counts, drawstyle="steps-post", color=theme.cause(cause), label=cause)
        told.append(f"{series.points:,} {cause}")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylim(bottom=0)
    _legend(axes)
    return f"Skipped steps by cause: {', '.join(told)}."


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
    for transition in run.transitions[:MARKS_SHOWN]:
        axes.axvline(transition.step, color=theme.muted, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
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
