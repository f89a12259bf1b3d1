"""Runs a suite of benchmarks, each in a process of its own, and makes RESULTS.md of what they write.

`python -m tests.benchmarks --suite cpu --out tests/benchmarks/results`
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.benchmark import Benchmark
from tests.benchmarks.results_table import write_page
from tests.benchmarks.run_metadata import RESULTS, ROOT
from tests.benchmarks.suite import SUITES, folder_of


def run(benchmark: Benchmark, suite: str, out: Path) -> int:
    """The exit code of one benchmark, which writes its JSON into `out`."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if suite == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if benchmark.threads is not None:
        environment["OMP_NUM_THREADS"] = str(benchmark.threads)
    inside = out.is_relative_to(ROOT)  # the command is written down, and should not name folders of this machine
    folder = out.relative_to(ROOT) if inside else out
    command = [sys.executable, "-m", benchmark.module, "--out", str(folder), *benchmark.options]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    """Runs what is asked for; the exit code is 1 where a benchmark failed."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--suite", choices=list(SUITES), required=True)
    command.add_argument("--out", type=Path, default=RESULTS)
    command.add_argument("--only", nargs="+", metavar="NAME", help="names of single benchmarks")
    options = command.parse_args()
    suite = {benchmark.name: benchmark for benchmark in SUITES[options.suite]}
    unknown = set(options.only or ()) - suite.keys()
    if unknown:
        command.error(f"no benchmark {', '.join(sorted(unknown))} in this suite, but {', '.join(suite)}")
    if options.suite == "gpu" and not torch.cuda.is_available():
        command.error("--suite gpu: there is no CUDA device on this machine; --suite cpu needs none")
    failed = []
    for name in options.only or suite:
        started = time.monotonic()
        print(f"{name}: {suite[name].measures}", flush=True)
        code = run(suite[name], options.suite, (options.out / folder_of(options.suite)).resolve())
        failed += [name] * bool(code)
        print(f"{name}: {f'failed ({code})' if code else 'done'}, {time.monotonic() - started:.0f} s", flush=True)
    print(write_page(options.out))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
