"""The parts of README.md that are made from the code. `python -m tests.readme` writes them."""

from __future__ import annotations

from pathlib import Path

from hf_amp.monitoring.metrics import BY_MODULE, CATALOGUE, LOG_PREFIX

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- metrics: made from hf_amp/monitoring/metrics.py -->", "<!-- end of metrics -->"


def metrics_table() -> str:
    """The catalogue as a Markdown table."""
    lines = ["| metric | unit | meaning | taken | when it is bad |", "|---|---|---|---|---|"]
    named = [(LOG_PREFIX + m.name, m) for m in CATALOGUE] + [(m.name, m) for m in BY_MODULE]
    lines += [f"| `{name}` | {m.unit} | {m.meaning} | {m.read} | {m.remedy} |" for name, m in named]
    return "\n".join(lines)


def with_current_table(readme: str) -> str:
    """`readme` with its metrics table made anew."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{metrics_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_current_table(README.read_text(encoding="utf-8")), encoding="utf-8")
