"""A figure over time, in bounded memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

POINTS_KEPT = 8192
"""Points after which a series is thinned; several for every pixel of a picture."""


class Series:
    """(step, value) points in order of steps. Beyond `points_kept` it keeps the extremes of every four neighbours.

    Attributes:
        steps: optimizer steps, int64.
        values: the figure at each, float64.
        points: how many were added.
    """

    def __init__(self, points_kept: int = POINTS_KEPT) -> None:
        self._points_kept = points_kept
        self.steps = array("q")
        self.values = array("d")
        self.points = 0

    def add(self, step: int, value: float) -> None:
        """Appends one point; another one of the same step replaces it."""
        self.points += 1
        if self.steps and self.steps[-1] == step:
            self.values[-1] = value
            return
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) >= self._points_kept:
            self._thin()

    def _thin(self) -> None:
        kept: list[int] = []
        newest = len(self.values) - 1
        for start in range(0, newest, 4):
            four = range(start, min(start + 4, newest))
            kept += sorted({min(four, key=self.values.__getitem__), max(four, key=self.values.__getitem__)})
        kept.append(newest)
        self.steps = array("q", (self.steps[i] for i in kept))
        self.values = array("d", (self.values[i] for i in kept))

    def cut_after(self, step: int) -> None:
        """Forgets what is later than `step`, because a resumed run does it anew."""
        while self.steps and self.steps[-1] > step:
            self.steps.pop()
            self.values.pop()

    @property
    def newest(self) -> float | None:
        """The last value; None where there is none."""
        return self.values[-1] if self.values else None

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self.steps, self.values, strict=True))
