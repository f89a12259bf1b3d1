"""RESULTS.md: what the JSON files of a folder say. `python -m tests.benchmarks.results_table DIR` writes it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.circumstances import PACKAGES, RESULTS
from tests.benchmarks.gpu_rows import gpu_rows, gpu_verdicts
from tests.benchmarks.measuring import Row
from tests.benchmarks.suite import SUITES, Benchmark, Target, folder_of

HEAD = """# Results

Made by `python -m tests.benchmarks --suite cpu` (and `gpu`) from the JSON files that it writes; do not edit. A median is
followed by its quartiles in parentheses. Ratios are of rounds that took turns in one process: below 1 is faster than the
baseline. On a CPU FP16 is emulated, for every contender alike, so no ratio is a speed-up of FP16 over FP32.
"""

DECIMALS = {"final_loss": 3, "final_loss_over_FP32": 3, "underflow_fraction": 4}
"""Column → decimal places that are shown, where it is not two."""


def results_markdown(folder: Path) -> str:
    """The whole page."""
    parts = [HEAD]
    for suite, benchmarks in SUITES.items():
        parts.append(f"## {suite.upper()}\n")
        parts += [section(benchmark, folder / folder_of(suite)) for benchmark in benchmarks]
    return "\n".join(parts)


def section(benchmark: Benchmark, folder: Path) -> str:
    """One benchmark: what, beside what, targets, table, and where it was run."""
    lines = [f"### {benchmark.name}\n", f"{benchmark.measures} Baseline: {benchmark.baseline}.\n"]
    result = read(benchmark, folder)
    lines += [f"- Target: {line}" for line in verdicts(benchmark, result)]
    lines += [""] * bool(len(lines) > 2)
    if result is None:
        return "\n".join([*lines, "Not measured.\n"])
    return "\n".join([*lines, table(benchmark, rows_of(result)), "", origin(result["circumstances"]), ""])


def read(benchmark: Benchmark, folder: Path) -> dict[str, Any] | None:
    """What the benchmark has written; None where it was not run."""
    file = folder / f"{benchmark.name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows of a file, of whichever benchmark it is."""
    return gpu_rows(result) if "cases" in result else result.get("faults") or result["rows"]


# ---- targets --------------------------------------------------------------------------------------------------


def verdicts(benchmark: Benchmark, result: dict[str, Any] | None) -> list[str]:
    """Each target, and whether it was reached, missed, or not measured."""
    if result is not None and "expectations" in result:
        return gpu_verdicts(result)
    return [f"{target.words}: {verdict(target, result)}" for target in benchmark.targets]


def verdict(target: Target, result: dict[str, Any] | None) -> str:
    """In bold, and where it was missed, the rows that did."""
    rows = [row for row in rows_of(result) if target.of(row)] if result else []
    rows = [row for row in rows if row[target.column] != "not installed"]
    if not rows:
        return "**not measured**."
    missed = [row for row in rows if not _within(row[target.column], target.at_most)]
    if not missed:
        return "**reached**."
    told = [f"{_name(row)} {shown(row[target.column], target.column, quartiles=False)}" for row in missed]
    return f"**missed** by {len(missed)} of {len(rows)}: {'; '.join(told)}."


def _within(figure: Any, bound: float) -> bool:
    value = figure["median"] if isinstance(figure, dict) else figure
    return value is not None and round(value, 2) <= bound


def _name(row: Row) -> str:
    return ", ".join(
        str(value) for column, value in row.items() if isinstance(value, str) and column != "over"
    )


# ---- tables ---------------------------------------------------------------------------------------------------


def table(benchmark: Benchmark, rows: Sequence[Row], quartiles: bool = True) -> str:
    """The rows as Markdown.

    Args:
        quartiles: show them beside medians.
    """
    if benchmark.pivot is not None:
        rows = pivoted(rows, *benchmark.pivot)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    lines += ["| " + " | ".join(shown(row.get(c, ""), c, quartiles) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def pivoted(rows: Sequence[Row], across: str, value: str) -> list[Row]:
    """Rows that differ in `across` alone become one, with `value` under each of its values; other figures are left out."""
    merged: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        labels = {c: v for c, v in row.items() if c not in (across, value) and isinstance(v, str)}
        merged.setdefault(tuple(labels.items()), labels)[row[across]] = row[value]
    return list(merged.values())


def shown(figure: Any, column: str, quartiles: bool = True) -> str:
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


def origin(circumstances: dict[str, Any]) -> str:
    """Machine, versions, commit and command in a line."""
    versions = [f"{name} {circumstances[name]}" for name in PACKAGES if name in circumstances]
    threads = circumstances["threads"]
    return (
        f"{circumstances['device']}, {threads} thread{'s' * (threads != 1)}; Python {circumstances['python']}, "
        f"{', '.join(versions)}; commit {circumstances.get('commit', 'not recorded')}; `{circumstances['command']}`"
    )


def page_of(folder: Path) -> Path:
    """Where the page of a folder's results is: beside the folder of the repository, in any other folder."""
    return RESULTS.with_name("RESULTS.md") if folder.resolve() == RESULTS.resolve() else folder / "RESULTS.md"


def write_page(folder: Path) -> Path:
    """Writes the page and returns where."""
    page = page_of(folder)
    page.write_text(results_markdown(folder), encoding="utf-8")
    return page


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    print(write_page(command.parse_args().folder))
