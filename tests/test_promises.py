"""The tests that `tests/README.md` names for hf_amp's promises exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.each import for_each

ROOT = Path(__file__).parents[1]
README = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)))
PROMISES = 11


def functions_of(file: str) -> set[str]:
    """Names of the test functions of a file, which is not run."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@for_each(("file", "test"), NAMED)
def test_a_test_that_is_named_exists(file: str, test: str) -> None:
    """By file and function."""
    assert test in functions_of(file)


@for_each("number", range(1, PROMISES + 1))
def test_every_promise_has_tests_and_mutations(number: int) -> None:
    """Each row of the table names at least one test, and a file of hf_amp whose change turns it red."""
    rows = re.findall(rf"^\| {number} \|.*$", README, re.MULTILINE)
    assert rows
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", row)
        files = re.findall(r"`(hf_amp/[\w/]+\.py)`", row)
        assert files
        assert [file for file in files if not (ROOT / file).is_file()] == []
