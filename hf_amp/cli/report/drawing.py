"""Draws the pictures of one run or of several, so that pictures of one kind can be compared."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_amp.cli.report.module_pictures import BY_MODULE, TIMELINE
from hf_amp.cli.report.pictures import OVER_TIME, Picture
from hf_amp.cli.report.theme import IN_PAGE, LIGHT, Theme, style_of, to_png, to_svg
from hf_amp.monitoring.run_history import RunHistory
from hf_amp.monitoring.visible import visible

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
        label = html.escape(visible(f"{self.picture.title}, {runs[self.run].name}. {self.description}"))
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
