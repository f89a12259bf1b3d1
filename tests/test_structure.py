"""The package is one house: few files, each a concept, and a step that reads in one place."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import hf_amp
from tests.step_trace import traced_step

PACKAGE = Path(hf_amp.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
APART = {
    "schedule.py",
    "fallback/scheduled.py",
    "choose.py",
    "cli/choose.py",
    "rescale.py",
    "rescale_rules.py",
    "cli/rescale.py",
    "capture.py",
    "comparison.py",
    "cli/compare.py",
    "scaling/desync.py",
    "scaling/left_out.py",
    "scaling/stochastic_rounding.py",
    "monitoring/frozen.py",
    "monitoring/energy.py",
    "fallback/inference.py",
    "fallback/one_block.py",
    "fallback/one_module.py",
    "fallback/sharded.py",
    "monitoring/rewind.py",
    "integrations/rewind.py",
    "report/overlay.py",
}
"""What can be left out without the rest noticing, and is counted by itself."""


def test_a_healthy_trainer_step_reads_in_few_files() -> None:
    """At most 18 files and 40 changes of file, from the beginning of the step to its end; `tests/step_trace.py` prints them."""
    visits = traced_step()
    assert len({file for file, _ in visits}) <= 18
    assert len(visits) - 1 <= 40


def test_there_are_few_files() -> None:
    """At most 95 files, and 16,700 lines without the capabilities that have files of their own."""
    assert len(FILES) <= 95
    sizes = {file.relative_to(PACKAGE).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert sum(size for name, size in sizes.items() if name not in APART) <= 16_700


def test_few_modules_serve_a_single_other() -> None:
    """At most 15 modules are imported by one module alone, but for those apart: such a one may be a piece of its neighbour."""
    importers: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        importer = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_amp"):
                importers[str(node.module)].add(importer)
                for name in node.names:
                    importers[f"{node.module}.{name.name}"].add(importer)
    modules = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in FILES
        if file.relative_to(PACKAGE).as_posix() not in APART
    }
    single = sorted(name for name in modules if len(importers[name]) == 1)
    assert len(single) <= 15, single
