"""Makes the pictures of README.md from a real run: `hf-amp demo`, its report in Chromium, and `hf-amp watch`.

    python examples/make_pictures.py [--steps 120]

Needs Chromium (Debian: `apt-get install chromium`). Writes into examples/pictures.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from hf_amp.cli.report import panel
from hf_amp.report.reader import read_run

PICTURES = Path(__file__).parent / "pictures"
OPTIONS = "monitor_modules: true\nmonitoring_interval: 5\n"
REPORT_WIDTH, REPORT_HEIGHT = 1200, 1080


def hf_amp(*arguments: object) -> None:
    """Runs the command line, as a user does."""
    program = "from hf_amp.cli import app; app()"
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=True)


def photograph(page: Path, picture: Path) -> None:
    """The top of a page, as Chromium shows it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is needed for the picture of the report: apt-get install chromium")
    subprocess.run(
        [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--window-size={REPORT_WIDTH},{REPORT_HEIGHT}", f"--screenshot={picture}", page.resolve().as_uri(),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip


def draw_terminal(run: Path, picture: Path) -> None:
    """What `hf-amp watch` shows at the end of the run, as SVG that loads no font from anywhere."""
    console = Console(record=True, width=104, file=io.StringIO())
    console.print(panel(read_run(run)))
    svg = console.export_svg(title=f"hf-amp watch {run.name}")
    picture.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    """One run, two pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run, options = Path(folder) / "demo", Path(folder) / "amp.yaml"
        options.write_text(OPTIONS)
        hf_amp("demo", "--steps", steps, "--output-dir", run, "--config", options)
        hf_amp("report", run, "-o", run / "report.html")
        photograph(run / "report.html", PICTURES / "report.png")
        draw_terminal(run, PICTURES / "watch.svg")


if __name__ == "__main__":
    main()
