"""Rows as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.benchmarks.benchmark import Benchmark
from tests.benchmarks.measuring import Row

DECIMALS = {"final_loss": 3, "final_loss_in_FP32": 3, "final_loss_over_FP32": 3, "underflow_fraction": 5}
"""Column → decimal places that are shown, where it is not two."""


def table(benchmark: Benchmark, rows: Sequence[Row], quartiles: bool = True) -> str:
    """The rows as Markdown.

    Args:
        quartiles: show them beside medians.
    """
    if benchmark.pivot is not None:
        rows = pivoted(rows, *benchmark.pivot)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        "| " + " | ".join(column.replace("_", " ").replace("hf amp", "hf_amp") for column in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    lines += ["| " + " | ".join(formatted(row.get(c, ""), c, quartiles) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def pivoted(rows: Sequence[Row], across: str, value: str) -> list[Row]:
    """Rows that differ in `across` alone become one, with `value` under each of its values; other figures are left out."""
    merged: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        labels = {c: v for c, v in row.items() if c not in (across, value) and isinstance(v, str)}
        merged.setdefault(tuple(labels.items()), labels)[row[across]] = row[value]
    return list(merged.values())


def formatted(figure: Any, column: str, quartiles: bool = True) -> str:
    """A cell: a median with its quartiles, a number, or text."""
    if figure is None:
        return "not finite"
    if isinstance(figure, str):
        return figure
    values = [figure]
    if isinstance(figure, dict):
        values = [figure[name] for name in ("median", "quartile_1", "quartile_3")]
    middle, *others = _numbers(values, column)
    return f"{middle} ({' to '.join(others)})" if quartiles and set(others) - {middle} else middle


def _numbers(values: list[float], column: str) -> list[str]:
    """Figures of one column in one unit, with equally many decimal places."""
    if "bytes" in column:
        unit, name = (1e6, "MB") if min(values) >= 1e6 else (1e3, "kB")
        return [f"{value / unit:,.{0 if unit == 1e6 else 1}f} {name}" for value in values]
    whole = all(value == int(value) or abs(value) >= 1000 for value in values)
    return [f"{value:,.{0 if whole else DECIMALS.get(column, 2)}f}" for value in values]
