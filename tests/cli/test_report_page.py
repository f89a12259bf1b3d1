"""The report in a real browser: rendered, silent, self-contained, readable wide, narrow and dark; and hostile names inert."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from hf_amp.report.page import page
from hf_amp.report.reader import RunHistory
from hf_amp.report.verdict import verdict_on
from tests.cli.chromium import Visit, needs_chromium, printed, screenshot, visit
from tests.report.test_run_history import changed, history, line, skipped, started

HOSTILE = "<script>alert(1)</script>"


def full_run() -> RunHistory:
    """A run that has something for every picture, with a name and modules that would like to be markup."""
    lines = [started()]
    for step in range(1, 41):
        if step in (1, 2, 20):
            lines.append(skipped(step, "SCALE" if step < 20 else "$\\frac$"))
        if step == 10:
            lines.append(skipped(step, "ACTIVATION", modules=["h.1", HOSTILE], message=f"{HOSTILE} \x1b[2J $x^$"))
            lines.append(changed(step, "MIXED", "FP32", "h.1", HOSTILE))
        lines.append(
            line(
                "metrics", step, loss=5 - step / 20, scale=2.0 ** (16 - step // 20), applied_steps=step - 4, skipped_steps=4,
                grad_norm=1.0 / step, headroom_bits=step / 5, underflow_fraction=0.001 * step, step_seconds=0.1,
                memory_bytes=1e9, module_headroom_bits={"h.1": 3.0, HOSTILE: 2.0, "$\\frac$": 1.0, "名前": 4.0},
                module_underflow_fraction={"h.1": 0.1, HOSTILE: 0.2}, module_activation_amax={"h.1": 7e4, HOSTILE: 1.0},
                lost_update_fraction=0.9, module_lost_update_fraction={"h.1.weight": 1.0, HOSTILE: 0.5},
            )
        )  # fmt: skip
    run = history(*lines, line("training_ended", 40, applied_steps=36, skipped_steps=4))
    run.name = f"run{HOSTILE}"
    return run


class Parts(HTMLParser):
    """Tags, addresses and ids of a document, and its text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data") and value:
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id" and value:
                self.ids.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def runs() -> list[RunHistory]:
    return [full_run(), full_run()]


@pytest.fixture(scope="module")
def document(runs: list[RunHistory]) -> str:
    return page(runs[:1], "0")


@pytest.fixture(scope="module")
def page_of_both(runs: list[RunHistory]) -> str:
    return page(runs, "0")


def test_the_page_has_nothing_that_acts_or_loads(document: str) -> None:
    """No script, frame, form or handler; every address is a part of the page or a picture inside of it."""
    parts = Parts(document)
    assert {"script", "iframe", "object", "embed", "form", "link", "base"} & set(parts.tags) == set()
    assert parts.handlers == []
    assert [address[:40] for address in parts.addresses if not address.startswith(("#", "data:image/png"))] == []
    assert "default-src 'none'" in document


def test_everything_from_the_run_is_text(document: str, runs: list[RunHistory]) -> None:
    """The hostile name is there to be read, in tables and pictures; control characters are visible."""
    assert HOSTILE not in document
    assert Parts(document).text.count(HOSTILE) >= 5
    assert "\x1b" not in document
    assert r"\x1b[2J" in document
    assert "名前" in document


def test_parts_have_names_of_their_own(page_of_both: str) -> None:
    """Several pictures of several runs do not use each other's clip paths."""
    ids = Parts(page_of_both).ids
    assert len(ids) == len(set(ids))


def test_every_picture_has_words(document: str) -> None:
    """For a screen reader every picture is an image with a label, and every figure has a caption."""
    assert document.count("<svg ") == document.count('role="img" aria-label="') == document.count("<figcaption>") == 14


def test_several_runs_stand_beside_each_other(page_of_both: str) -> None:
    """Every kind of picture is there for each, in its column, after those that show both."""
    assert page_of_both.count("<svg ") == 28 + 3
    assert page_of_both.count("--column: 1") == page_of_both.count("--column: 2") == 14


@pytest.fixture(scope="module")
def file(document: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(document, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def visited(file: Path) -> Visit:
    return visit(file, file.parent)


@needs_chromium
def test_chromium_renders_it_without_complaint_or_request(visited: Visit, runs: list[RunHistory]) -> None:
    """The verdict is in the document; the console is silent; no request leaves the page; nothing became a script."""
    parts = Parts(visited.dom)
    assert verdict_on(runs[0]).sentence in parts.text
    assert (visited.complaints, visited.requests) == ([], [])
    assert "script" not in parts.tags
    assert html.escape(HOSTILE, quote=False) in visited.dom


@needs_chromium
def test_the_browser_would_have_told(tmp_path: Path) -> None:
    """The check can fail: a page that logs, loads and runs is found out."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<p>x</p><img src="http://127.0.0.1:9/x.png"><script>console.error("hello"); document.title = 1</script>'
    )
    seen = visit(bad, tmp_path)
    assert any("hello" in complaint for complaint in seen.complaints)
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert "script" in Parts(seen.dom).tags


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs that differ, one of which has a hostile name."""
    one, other = full_run(), full_run()
    other.figures["loss"].add(41, 9.0)
    other.facts = {"device": "cpu: another", "versions": {"torch": "9.9"}}
    path = tmp_path_factory.mktemp("compared") / "report.html"
    path.write_text(page([one, other], "0"), encoding="utf-8")
    return path


@needs_chromium
def test_chromium_shows_two_runs_in_one_picture(compared: Path) -> None:
    """Their lines, a table whose rows say what differs, nothing asked for, no complaint, and nothing cut off on a phone."""
    seen = visit(compared, compared.parent)
    parts = Parts(seen.dom)
    assert (seen.complaints, seen.requests) == ([], [])
    assert "The runs compared" in parts.text
    assert "The same at all 40 steps that both have logged." in parts.text
    assert seen.dom.count("<small>differs</small>") == 2
    assert "script" not in parts.tags
    assert "width 360 of 360" in width_on_a_phone(compared)


def width_on_a_phone(file: Path) -> str:
    """What a frame of 360 pixels has to scroll sideways."""
    frame = file.parent / "phone.html"
    frame.write_text(
        f'<body><iframe id="f" src="{file.name}" style="width:360px;height:800px;border:0"></iframe><p id="p"></p>'
        "<script>onload = () => { const d = document.getElementById('f').contentDocument.documentElement;"
        "document.getElementById('p').textContent = `width ${d.scrollWidth} of ${d.clientWidth}`; }</script>"
    )
    return Parts(visit(frame, frame.parent, "--allow-file-access-from-files").dom).text


def brightness(picture: Path) -> float:
    """Median brightness of a picture, from 0 to 1."""
    return float(np.median(imread(picture)[..., :3].mean(axis=-1)))


@needs_chromium
def test_it_is_light_or_dark_as_the_reader_likes_it(file: Path) -> None:
    """The ground follows the reader's setting, and there is something on it in both."""
    light = screenshot(file, file.parent, "light", 1200, 1600)
    dark = screenshot(file, file.parent, "dark", 1200, 1600, dark=True)
    assert brightness(light) > 0.9
    assert brightness(dark) < 0.2
    for picture in (light, dark):
        assert imread(picture)[..., :3].std() > 0.03


@needs_chromium
def test_it_can_be_printed(file: Path) -> None:
    """On several sheets, with the browser's own means."""
    paper = printed(file, file.parent)
    assert paper.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type */Page\b", paper)) > 1


@needs_chromium
def test_nothing_is_cut_off_on_a_phone(file: Path) -> None:
    """In 360 pixels nothing reaches beyond the right edge: a frame of that width has nothing to scroll sideways."""
    assert "width 360 of 360" in width_on_a_phone(file)


def test_a_whole_model_is_named() -> None:
    """A model that is one module has the name "" in the log, and is called by what it is."""
    run = history(started(), skipped(1, "ACTIVATION", modules=[""]))
    assert "<code>the model</code>" in page([run], "0")
