"""The tables in Markdown that are made from the code, which `python -m tests.readme` writes into their files; README's commands."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from hf_amp.config import MixedPrecisionConfig, allowed_values, shown_default
from hf_amp.monitoring.metrics import BY_MODULE, CATALOGUE, LOG_PREFIX

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def command(beginning: str) -> list[str]:
    """The words of README's command that begins so."""
    (line,) = (line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(beginning))
    return shlex.split(line)


def metrics_table() -> str:
    """The catalogue of metrics."""
    lines = ["| metric | unit | meaning | taken | when it is bad |", "|---|---|---|---|---|"]
    named = [(LOG_PREFIX + m.name, m) for m in CATALOGUE] + [(m.name, m) for m in BY_MODULE]
    lines += [f"| `{name}` | {m.unit} | {m.meaning} | {m.read} | {m.remedy} |" for name, m in named]
    return "\n".join(lines)


def options_table() -> str:
    """The options of `MixedPrecisionConfig`; what each is for stands in the table alone."""
    lines = ["| option | default | allowed | what it does |", "|---|---|---|---|"]
    for field in dataclasses.fields(MixedPrecisionConfig):
        allowed, text = allowed_values(MixedPrecisionConfig)[field.name], field.metadata["help"]
        lines.append(f"| `{field.name}` | `{shown_default(field)}` | {allowed} | {text} |")
    return "\n".join(lines)


TABLES = {
    ROOT / "hf_amp/monitoring/README.md": ("<!-- metrics: made from metrics.py -->", metrics_table),
    ROOT / "hf_amp/OPTIONS.md": ("<!-- options: made from config.py -->", options_table),
}
"""File → the line that its table stands after, and what makes the table."""
END = "<!-- end of table -->"


def with_current_table(file: Path) -> str:
    """What `file` holds, with its table made anew."""
    start, table = TABLES[file]
    before, rest = file.read_text(encoding="utf-8").split(start)
    return f"{before}{start}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for each in TABLES:
        each.write_text(with_current_table(each), encoding="utf-8")
