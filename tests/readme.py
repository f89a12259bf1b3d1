"""The parts of README.md that are made from the code and from what was measured. `python -m tests.readme` writes them.

Measured tables stand between `<!-- measured: NAME -->` and `<!-- end of measured -->`, for any NAME of a benchmark of
the CPU suite; `gpu/NAME` for one of the GPU suite.
"""

from __future__ import annotations

import re
from pathlib import Path

from hf_amp.monitoring.metrics import BY_MODULE, CATALOGUE, LOG_PREFIX
from tests.benchmarks.results_table import read, rows_of
from tests.benchmarks.run_metadata import RESULTS
from tests.benchmarks.suite import SUITES, folder_of
from tests.benchmarks.tables import table

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- metrics: made from hf_amp/monitoring/metrics.py -->", "<!-- end of metrics -->"
MEASURED = re.compile(r"(<!-- measured: (?:(gpu)/)?(\w+) -->\n).*?(<!-- end of measured -->)", re.DOTALL)


def metrics_table() -> str:
    """The catalogue as a Markdown table."""
    lines = ["| metric | unit | meaning | taken | when it is bad |", "|---|---|---|---|---|"]
    named = [(LOG_PREFIX + m.name, m) for m in CATALOGUE] + [(m.name, m) for m in BY_MODULE]
    lines += [f"| `{name}` | {m.unit} | {m.meaning} | {m.read} | {m.remedy} |" for name, m in named]
    return "\n".join(lines)


def measured_table(suite: str, name: str) -> str:
    """The medians of a benchmark as a Markdown table; quartiles and circumstances are in RESULTS.md."""
    (benchmark,) = [benchmark for benchmark in SUITES[suite] if benchmark.name == name]
    result = read(benchmark, RESULTS / folder_of(suite))
    return "Not measured." if result is None else table(benchmark, rows_of(result), quartiles=False)


def with_current_tables(readme: str) -> str:
    """`readme` with its tables made anew."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    readme = f"{before}{START}\n{metrics_table()}\n{END}{after}"
    return MEASURED.sub(lambda m: f"{m[1]}{measured_table(m[2] or 'cpu', m[3])}\n{m[4]}", readme)


if __name__ == "__main__":
    README.write_text(with_current_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
