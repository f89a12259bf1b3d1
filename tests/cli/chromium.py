"""A real headless Chromium for pages: what it makes of them, what it complains of, and what they ask the network for."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium (Debian: apt-get install chromium)")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
    "--disable-component-update", "--enable-logging=stderr", "--force-device-scale-factor=1",
)  # fmt: skip
_OF_THE_BROWSER_ITSELF = "not an origin"


@dataclass(frozen=True)
class Visit:
    """A page as Chromium has it.

    Attributes:
        dom: the document after loading, as HTML.
        complaints: lines of its console.
        requests: addresses that the page itself asked for, except its own file.
    """

    dom: str
    complaints: list[str]
    requests: list[str]


def visit(page: Path, folder: Path, *flags: str) -> Visit:
    """Loads `page`; files that Chromium writes go into `folder`."""
    log = folder / "net.json"
    done = _run(page, folder, "--dump-dom", f"--log-net-log={log}", *flags)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(done.stdout, complaints, [url for url in _requests(log) if url != page.as_uri()])


def screenshot(page: Path, folder: Path, name: str, width: int, height: int, *, dark: bool = False) -> Path:
    """A picture of the page in a window of that size, as a PNG file in `folder`."""
    path = folder / f"{name}.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _run(page, folder, f"--screenshot={path}", f"--window-size={width},{height}", *scheme)
    return path


def printed(page: Path, folder: Path) -> bytes:
    """The page on paper, as a PDF file."""
    path = folder / "printed.pdf"
    _run(page, folder, f"--print-to-pdf={path}")
    return path.read_bytes()


def _run(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert EXECUTABLE is not None
    profile = f"--user-data-dir={folder / 'profile'}"
    return subprocess.run(
        [EXECUTABLE, *_FLAGS, profile, *flags, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )


def _requests(log: Path) -> list[str]:
    recorded = json.loads(log.read_text(encoding="utf-8"))
    kinds = {number: name for name, number in recorded["constants"]["logEventTypes"].items()}
    started = [event["params"] for event in recorded["events"] if kinds[event["type"]] == "URL_REQUEST_START_JOB"]
    return [
        request["url"]
        for request in started
        if request.get("initiator") != _OF_THE_BROWSER_ITSELF
        and "url" in request
        and not request["url"].startswith(("data:", "chrome:"))
    ]
