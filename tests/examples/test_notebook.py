"""The notebook of `examples/`, cell by cell."""

from __future__ import annotations

import ast
import html
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def shown_by(source: str, names: dict[str, Any]) -> Any:
    """What a cell ends with, as a notebook shows it; None where it ends with a statement."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_the_notebook_shows_failure_cause_cure_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No step is applied; the cause is named with its layer; four modules in FP32 cure it; the report is a frame in a cell."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    shown = [shown_by("".join(cell["source"]), names) for cell in cells if cell["cell_type"] == "code"]
    printed = capsys.readouterr().out
    assert "Not training: all 12 steps were skipped" in printed
    assert "left the range of FP16" in printed
    assert "c_proj" in printed
    assert "Training, 4 modules in FP32 since step 1" in printed
    assert len(shown[2]) == 4
    frame = shown[3]._repr_html_()
    assert frame.startswith("<iframe sandbox srcdoc=")
    assert "Training, 4 modules in FP32 since step 1" in html.unescape(frame)
