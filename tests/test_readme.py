"""README.md says what the code does."""

from __future__ import annotations

import re

from tests.readme import README, with_current_tables


def test_tables_are_the_catalogue_and_the_results() -> None:
    """The generated tables in README.md are what `python -m tests.readme` makes of the code and the committed results."""
    readme = README.read_text(encoding="utf-8")
    assert with_current_tables(readme) == readme


def test_measured_tables_are_made_between_their_markers() -> None:
    """A table that is no longer what the results say is replaced, and nothing around it."""
    readme = README.read_text(encoding="utf-8")
    stale = "\n<!-- measured: scaler_cost -->\n| old |\n<!-- end of measured -->\nafter"
    made = with_current_tables(readme + stale).removeprefix(readme)
    assert made.startswith("\n<!-- measured: scaler_cost -->\n| optimizer |")
    assert made.endswith("|\n<!-- end of measured -->\nafter")
    assert "old" not in made
    assert " to " not in made  # quartiles are in RESULTS.md


def test_reading_order_names_files_that_exist() -> None:
    """Every file or folder that the reading order names is there."""
    section = README.read_text(encoding="utf-8").split("## Reading the code")[1].split("\n## ")[0]
    named = re.findall(r"`([\w/]+(?:\.py|/))`", section)
    assert len(named) >= 8
    package = README.parent / "hf_amp"
    assert [
        name
        for name in named
        if not (package / name).exists() and not (README.parent / name).exists()
        and not list(package.rglob(name))
    ] == []  # fmt: skip
