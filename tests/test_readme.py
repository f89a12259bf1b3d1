"""What the Markdown files say of the code is true: tables, files, links, names."""

from __future__ import annotations

import re
from pathlib import Path

import hf_amp
from tests.benchmarks.suite import SUITES
from tests.each import for_each
from tests.newcomer import unanswered
from tests.readme import README, ROOT, TABLES, with_current_table

MAP = ROOT / "hf_amp/README.md"
PAGES = [README, MAP, *TABLES, *(ROOT / folder / "README.md" for folder in ("accelerate_configs", "examples"))]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def source_of(named: str) -> str:
    """What stands in a file that the map names, or in all files of a folder."""
    place = next(root / named for root in (MAP.parent, ROOT) if (root / named).exists())
    return "".join(text_of(file) for file in ([place] if place.is_file() else place.rglob("*.py")))


@for_each("file", TABLES)
def test_a_table_is_what_the_code_says(file: Path) -> None:
    """Otherwise `python -m tests.readme` makes it anew."""
    assert text_of(file) == with_current_table(file)


def test_the_readme_is_short() -> None:
    """At most 10,000 bytes; what is longer stands beside the code."""
    assert len(README.read_bytes()) <= 10_000


def test_what_people_ask_first_is_found_in_the_readme() -> None:
    """By a search for its words; `python -m tests.newcomer` installs it, too, and takes the steps that the demo prints."""
    assert unanswered() == []


@for_each("page", PAGES)
def test_links_lead_to_files(page: Path) -> None:
    """Every link without a scheme, seen from the page's own folder."""
    links = re.findall(r"\]\(([^)#:]+)\)", text_of(page))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_map_names_files_that_exist_and_what_is_in_them() -> None:
    """Every file and folder in backticks, and every class and function that stands beside one in its row."""
    named = re.findall(r"`([\w/]+(?:\.py|/))`", text_of(MAP))
    assert len(set(named)) > 30
    assert all(source_of(name) for name in named)
    pairs = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", text_of(MAP))
    assert len(pairs) > 15
    for file, name in pairs:
        for part in name.split("."):
            assert re.search(rf"(class|def) {part}\b", source_of(file)), (file, name)


@for_each("page", [ROOT / "accelerate_configs/README.md", ROOT / "examples/README.md"])
def test_every_file_of_a_folder_has_a_row(page: Path) -> None:
    """And every row its file."""
    files = {file.name for pattern in ("*.py", "*.yaml", "*.ipynb") for file in page.parent.glob(pattern)}
    assert set(re.findall(r"^\| `([\w.]+)` \|", text_of(page), flags=re.MULTILINE)) == files


def test_names_and_causes_in_the_readme_exist() -> None:
    """Classes of ours, the causes with a row each, the strategies, and benchmarks."""
    readme = text_of(README)
    classes = re.findall(r"\b[A-Z]\w+(?:Error|Session|Scaler|Callback|Manager|Config|Monitor)\b", readme)
    assert {name for name in classes if not hasattr(hf_amp, name)} == {"GradScaler"}
    rows = re.findall(r"^\| `([A-Z_]+)`", readme, flags=re.MULTILINE)
    assert set(rows) == {*hf_amp.Cause.__members__, *hf_amp.ScalingStrategy.__members__}
    benchmarks = {benchmark.name for suite in SUITES.values() for benchmark in suite}
    assert set(re.findall(r"\(`(\w+)`\)", readme)) <= benchmarks
