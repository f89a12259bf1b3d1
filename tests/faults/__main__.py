"""Runs the faults and what is fuzzed at full size and writes their table: `python -m tests.faults --out DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.measuring import write


class FullSize:
    """A pytest plugin that runs what has a size, and gathers what it has told."""

    def __init__(self) -> None:
        self.faults: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            rows = [row for name, row in report.user_properties if name == "fault"]
            self.faults += [{**row, "seconds_of_its_test": round(report.duration, 1)} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for faults.json")
    arguments, plugin = parser.parse_args(), FullSize()
    tests = Path(__file__).parents[1]
    status = pytest.main([str(tests / "faults"), str(tests / "fuzz"), "--full-size", "-q"], plugins=[plugin])
    write("faults", {"faults": plugin.faults}, arguments.out)
    for row in plugin.faults:
        print(*(f"{value:>8}" for name, value in row.items() if name != "fault"), row["fault"])
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
