"""What `import hf_amp` adds to `import torch`, and `import accelerate` beside it, each in fresh processes.

`python -m tests.benchmarks.test_startup_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.benchmarks.measuring import Row, parser, spread, write
from tests.benchmarks.run_metadata import ROOT

IMPORTS = dict.fromkeys(["hf_amp", "hf_amp.session", "hf_amp.cli", "accelerate"], "torch") | {"torch": "sys"}
"""What is imported → what was before."""
_PROGRAM = """
import importlib, sys, time
importlib.import_module(sys.argv[2])
start = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - start)
"""


def seconds_of(module: str) -> float:
    """Seconds of one import in an interpreter of its own, which keeps bytecode, as that of an installed package is kept."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, module, IMPORTS[module]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def measure(processes: int, modules: list[str]) -> list[Row]:
    """Milliseconds of each import, all of them in turn, after one process that compiles the bytecode."""
    rounds = [{module: seconds_of(module) for module in modules} for _ in range(processes + 1)]
    return [
        {
            "what": f"import {module}",
            "after": "nothing" if IMPORTS[module] == "sys" else f"import {IMPORTS[module]}",
            "milliseconds": spread([taken[module] * 1000 for taken in rounds[1:]], 1),
        }
        for module in modules
    ]


def main() -> None:
    command = parser()
    command.add_argument("--processes", type=int, default=10)
    options = command.parse_args()
    rows = measure(options.processes, list(IMPORTS))
    write("startup_cost", {"processes": options.processes, "rows": rows}, options.out)


def test_it_measures() -> None:
    """The benchmark itself is sound: an import takes time, and what was imported before is not in it."""
    (row,) = measure(2, ["hf_amp"])
    assert 0 < row["milliseconds"]["median"] < 60_000
    assert row["after"] == "import torch"


if __name__ == "__main__":
    main()
