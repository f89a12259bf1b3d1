"""The command that runs the benchmarks, and the page that it makes of what they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import run_metadata
from tests.benchmarks.__main__ import main
from tests.benchmarks.benchmark import Benchmark, Target
from tests.benchmarks.results_table import page_of, read, results_markdown, rows_of, verdict
from tests.benchmarks.run_metadata import RESULTS
from tests.benchmarks.suite import CPU, GPU, folder_of
from tests.benchmarks.tables import pivoted, table
from tests.each import for_each
from tests.readme import command

PLAIN = Benchmark("made_up", "-", "-", "-")
BOUND = Target("one or less", "ratio", 1.0)


def result_of(*ratios: Any) -> dict[str, Any]:
    return {"rows": [{"what": f"way {i}", "ratio": ratio} for i, ratio in enumerate(ratios)]}


def spread(median: float) -> dict[str, float]:
    return {"median": median, "quartile_1": median - 0.1, "quartile_3": median + 0.1}


def test_committed_page_is_what_the_committed_files_say() -> None:
    """RESULTS.md is what `python -m tests.benchmarks.results_table` makes of the JSON files."""
    assert page_of(RESULTS).read_text(encoding="utf-8") == results_markdown(RESULTS)


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_every_committed_file_is_of_a_benchmark(suite: str) -> None:
    """No file is left behind by a benchmark that is gone, and each can be read as rows."""
    folder = RESULTS / folder_of(suite)
    named = {f"{benchmark.name}.json" for benchmark in (CPU if suite == "cpu" else GPU)}
    assert {file.name for file in folder.glob("*.json")} <= named
    for benchmark in CPU if suite == "cpu" else GPU:
        result = read(benchmark, folder)
        assert result is None or rows_of(result)


def test_every_benchmark_is_in_a_suite() -> None:
    """A new module that writes a result is run by the one command."""
    modules = {benchmark.module for benchmark in (*CPU, *GPU)}
    writers = [p for p in Path(__file__).parent.glob("test_*.py") if "\ndef main()" in p.read_text()]
    assert {f"tests.benchmarks.{path.stem}" for path in writers} <= modules


@for_each(
    ("result", "words"),
    [
        (None, "**not measured**."),
        (result_of("not installed"), "**not measured**."),
        (result_of(0.9, spread(1.004)), "**reached**."),
        (result_of(0.9, spread(1.2)), "**missed** by 1 of 2: way 1 1.20."),
        (result_of(None), "**missed** by 1 of 1: way 0 not finite."),
    ],
)
def test_targets_are_told_plainly(result: dict[str, Any] | None, words: str) -> None:
    """Reached, missed with the rows that did, or not measured."""
    assert verdict(BOUND, result) == words


def test_small_figures_are_not_rounded_away() -> None:
    """A bound of 0.0007 is missed by 0.0011."""
    bound = Target("little", "underflow_fraction", 0.0007)
    assert "missed" in verdict(bound, {"rows": [{"underflow_fraction": 0.0011}]})
    assert "reached" in verdict(bound, {"rows": [{"underflow_fraction": 0.0006}]})


def test_a_table_shows_medians_with_quartiles() -> None:
    """Numbers are shown as they are read: two decimals, thousands, bytes; columns that a row lacks are empty."""
    rows = [
        {"what": "a", "ratio": spread(0.84), "steps": 100000},
        {"what": "b", "peak_bytes": 366985216, "final_loss": 1.98749},
    ]
    assert table(PLAIN, rows).splitlines()[2:] == [
        "| a | 0.84 (0.74 to 0.94) | 100,000 |  |  |",
        "| b |  |  | 367 MB | 1.987 |",
    ]
    assert "0.84 |" in table(PLAIN, rows, quartiles=False)


def test_sizes_stand_side_by_side() -> None:
    """Rows that differ in the pivot alone become one, whatever else was measured with them."""
    rows = [{"size": size, "what": what, "ratio": 1, "ms": 3} for what in "ab" for size in ("S", "L")]
    rows += [{"size": size, "what": "c", "ratio": "not installed"} for size in ("S", "L")]
    expected = {"a": 1, "b": 1, "c": "not installed"}
    assert pivoted(rows, "size", "ratio") == [{"what": w, "S": r, "L": r} for w, r in expected.items()]


def test_the_gpu_page_tells_ways_and_expectations(tmp_path: Path) -> None:
    """`gpu_training.json` becomes a row for each way to train each model, and each expectation a verdict."""
    way = {"units_per_second": spread(1500.0), "speed over FP32": spread(2.0), "peak_bytes": 2 * 10**9}
    wish = {
        "name": "speed of FP16 over FP32",
        "wanted": "1.5 or more",
        "measured": {"GPT-2, 8 rows": 2.0},
        "reached": True,
    }
    result = {
        "circumstances": {"device": "H", "threads": 1, "python": "3", "command": "c"},
        "cases": {"GPT-2, 8 rows": {"ways": {"FP32": way}}},
        "expectations": [wish],
    }
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "gpu_training.json").write_text(json.dumps(result))
    page = results_markdown(tmp_path)
    assert "| gpu | gpu_training | speed of FP16 over FP32, 1.5 or more | reached |" in page
    assert "- Target: speed of FP16 over FP32, 1.5 or more: **reached**; GPT-2, 8 rows 2.00." in page
    assert "| GPT-2, 8 rows | FP32 | 1,500 | 2.00 (1.90 to 2.10) | 2,000 MB |" in page


def test_one_command_runs_a_benchmark_and_makes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """README's own: a benchmark in a process of its own writes its file with hardware, versions and command; the page
    shows it. Of the 200 faults of `causes`, which README's command has too, `test_causes.py` runs a few."""
    words = command("python -m tests.benchmarks")
    assert words[-2:] == ["host_reads", "causes"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path) if word == "results" else word for word in words[2:-1]])
    assert main() == 0
    written = json.loads((tmp_path / "host_reads.json").read_text())["circumstances"]
    assert {"device", "threads", "python", "torch", "hf_amp", "command"} <= written.keys()
    assert "tests.benchmarks.test_host_reads" in (tmp_path / "RESULTS.md").read_text()
    assert "host_reads: done" in capfd.readouterr().out


def test_an_unknown_benchmark_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the names that there are."""
    monkeypatch.setattr(sys, "argv", ["-", "--suite", "gpu", "--only", "seeing", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "no benchmark seeing in this suite, but gpu, scaler_cost, gpu_training" in capsys.readouterr().err


def test_commit_is_that_of_the_checkout_with_a_mark_where_it_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None outside of Git; a changed result is no change, because the benchmarks before this one have written theirs."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    results = tmp_path / "tests" / "benchmarks" / "results"
    monkeypatch.setattr(run_metadata, "ROOT", tmp_path)
    monkeypatch.setattr(run_metadata, "RESULTS", results)
    assert run_metadata._commit() is None
    results.mkdir(parents=True)
    files = [tmp_path / "code.py", results / "x.json"]
    git("init", "-q")
    for file in files:
        file.write_text("1")
    git("add", ".")
    git("commit", "-qm", "-")
    head = git("rev-parse", "--short=12", "HEAD")
    assert run_metadata._commit() == head
    files[1].write_text("2")
    assert run_metadata._commit() == head
    files[0].write_text("2")
    assert run_metadata._commit() == f"{head}-dirty"
