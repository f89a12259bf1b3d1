"""RESULTS.md: what the JSON files of a folder say. `python -m tests.benchmarks.results_table DIR` writes it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.benchmark import Benchmark, Target
from tests.benchmarks.gpu_rows import gpu_rows, gpu_verdicts, stage_rows
from tests.benchmarks.measuring import Row
from tests.benchmarks.run_metadata import PACKAGES, RESULTS
from tests.benchmarks.suite import SUITES, folder_of
from tests.benchmarks.tables import DECIMALS, formatted, table

HEAD = """# Results

Made by `python -m tests.benchmarks --suite cpu` (and `gpu`) from the JSON files that it writes; do not edit. A median is
followed by its quartiles in parentheses. Ratios are of rounds that took turns in one process: below 1 is faster than the
baseline. On a CPU FP16 is emulated, for every contender alike, so no ratio is a speed-up of FP16 over FP32.
"""


def results_markdown(folder: Path) -> str:
    """The whole page."""
    parts = [HEAD, *summary(folder), ""]
    for suite, benchmarks in SUITES.items():
        parts.append(f"## {suite.upper()}\n")
        parts += [section(benchmark, folder / folder_of(suite)) for benchmark in benchmarks]
    return "\n".join(parts)


def summary(folder: Path) -> list[str]:
    """Every target and its verdict in a word, as a table."""
    lines = ["| suite | benchmark | target | |", "|---|---|---|---|"]
    for suite, benchmarks in SUITES.items():
        for benchmark in benchmarks:
            result = read(benchmark, folder / folder_of(suite))
            for line in verdicts(benchmark, result) or ["**not measured**"] * (result is None):
                words, word, _ = line.split("**")
                lines.append(f"| {suite} | {benchmark.name} | {words.removesuffix(': ')} | {word} |")
    return lines


def section(benchmark: Benchmark, folder: Path) -> str:
    """One benchmark: what, beside what, targets, table, and where it was run."""
    lines = [f"### {benchmark.name}\n", f"{benchmark.measures} Baseline: {benchmark.baseline}.\n"]
    result = read(benchmark, folder)
    lines += [f"- Target: {line}" for line in verdicts(benchmark, result)]
    lines += [""] * bool(len(lines) > 2)
    if result is None:
        return "\n".join([*lines, "Not measured.\n"])
    tables = [table(benchmark, rows_of(result))]
    tables += [table(replace(benchmark, pivot=None), result["details"])] if "details" in result else []
    return "\n".join([*lines, "\n\n".join(tables), "", origin(result["circumstances"]), ""])


def read(benchmark: Benchmark, folder: Path) -> dict[str, Any] | None:
    """What the benchmark has written; None where it was not run."""
    file = folder / f"{benchmark.name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows of a file, of whichever benchmark it is."""
    if "stages" in result:
        return stage_rows(result)
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
    missed = [row for row in rows if not _within(row, target)]
    if not missed:
        return "**reached**."
    reported = [f"{_name(row)} {formatted(row[target.column], target.column, quartiles=False)}" for row in missed]
    return f"**missed** by {len(missed)} of {len(rows)}: {'; '.join(reported)}."


def _within(row: Row, target: Target) -> bool:
    figure = row[target.column]
    value = figure["median"] if isinstance(figure, dict) else figure
    return value is not None and round(value, DECIMALS.get(target.column, 2)) <= target.at_most


def _name(row: Row) -> str:
    return ", ".join(str(value) for column, value in row.items() if isinstance(value, str) and column != "over")


# ---- where, and where to --------------------------------------------------------------------------------------


def origin(run_metadata: dict[str, Any]) -> str:
    """Machine, versions, commit and command in a line."""
    versions = [f"{name} {run_metadata[name]}" for name in (*PACKAGES, "hf_amp") if name in run_metadata]
    threads = run_metadata["threads"]
    return (
        f"{run_metadata['device']}, {threads} thread{'s' * (threads != 1)}; Python {run_metadata['python']}, "
        f"{', '.join(versions)}; commit {run_metadata.get('commit', 'not recorded')}; `{run_metadata['command']}`"
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
