"""What is said of a benchmark: what it measures, beside what, and what was wanted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmarks.measuring import Row


@dataclass(frozen=True)
class Target:
    """A bound on one column. A median is judged as it is shown, to as many decimal places.

    Attributes:
        words: what is wanted.
        of: which rows it is wanted of.
    """

    words: str
    column: str
    at_most: float
    of: Callable[[Row], bool] = lambda row: True


@dataclass(frozen=True)
class Benchmark:
    """One module that writes one JSON file.

    Attributes:
        name: of the file.
        module: is run with `python -m`, `--out` and `options`.
        pivot: a column whose values are put side by side, and the column that is shown under each.
        threads: OMP_NUM_THREADS; None for those of the machine.
    """

    name: str
    module: str
    measures: str
    baseline: str
    targets: tuple[Target, ...] = ()
    pivot: tuple[str, str] | None = None
    options: tuple[str, ...] = ()
    threads: int | None = None
