"""README.md says what the code does."""

from __future__ import annotations

import re

from tests.readme import README, with_current_table


def test_metrics_table_is_the_catalogue() -> None:
    """The table in README.md is what `python -m tests.readme` makes of the catalogue."""
    readme = README.read_text(encoding="utf-8")
    assert with_current_table(readme) == readme


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
