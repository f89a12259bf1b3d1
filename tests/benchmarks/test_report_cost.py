"""What a report of a very long run costs: seconds and peak memory of `hf-amp report` on a log of a million events.

`python -m tests.benchmarks.test_report_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_amp.events import LOG_FILE
from tests.benchmarks.measuring import Row, parser, write

EVENTS = 1_000_000
_PROGRAM = """
import resource, sys
from hf_amp.cli import app
try:
    app(["report", sys.argv[1], "-o", sys.argv[2]])
except SystemExit as end:
    assert not end.code
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""


def lines(events: int) -> Iterator[dict[str, Any]]:
    """A start, then metrics and skipped steps of changing causes, a third of them with a module."""
    head = {"timestamp": "2026-01-01T00:00:00.000000Z", "level": "info", "run_id": "abc", "rank": 0}
    plain = {"cause": None, "before": None, "after": None, "modules": [], "message": ""}
    yield {**head, "event": "training_started", "step": 0, **plain, "precision": "MIXED", "config": {}}
    for step in range(1, events):
        if step % 2:
            figures = {
                "loss": 3.0 + 1 / step, "scale": 2.0 ** (step % 16), "applied_steps": step // 2, "skipped_steps": step // 2,
                "skip_rate": 0.5, "grad_norm": 1.0 + step % 3, "grad_amax": 0.1, "headroom_bits": 3.0,
                "underflow_fraction": 0.01, "inf_elements": 3, "nan_elements": 0, "step_seconds": 0.1,
            }  # fmt: skip
            yield {**head, "event": "metrics", "step": step, **plain, **figures}
        else:
            cause = ("SCALE", "INPUT", "ACTIVATION")[step % 3]
            where = {"modules": [f"h.{step % 4096}.mlp"]} if cause == "ACTIVATION" else {}
            change = {"before": 2.0, "after": 1.0, "message": f"the gradients of step {step} overflow"}
            yield {**head, "event": "step_skipped", "step": step, **plain, "cause": cause, **change, **where}


def measure(events: int, folder: Path) -> Row:
    """One report in a process of its own, start of Python and imports included."""
    with (folder / LOG_FILE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines(events))
    page = folder / "report.html"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(folder), str(page)], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - start
    processor_seconds, peak_bytes = done.stdout.split()[-2:]
    return {
        "events": events,
        "log_bytes": (folder / LOG_FILE).stat().st_size,
        "page_bytes": page.stat().st_size,
        "seconds": round(seconds, 2),
        "processor_seconds": round(float(processor_seconds), 2),
        "peak_bytes": int(peak_bytes),
    }


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """Eight times as many events take at most 100 MB more: the log is read as a stream."""
    for name in ("short", "long"):
        (tmp_path / name).mkdir()
    short, long = measure(2_500, tmp_path / "short"), measure(20_000, tmp_path / "long")
    assert long["peak_bytes"] - short["peak_bytes"] < 100e6
    assert long["page_bytes"] < 2e6


def main() -> None:
    options = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(EVENTS, Path(folder))
    write("report_cost", {"rows": [row]}, options.out)


if __name__ == "__main__":
    main()
