"""The page of `python -m perf report` in a browser, on a desktop and on a phone."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from perf.__main__ import main
from perf.recording.environment import REPOSITORY
from tests.browser import chromium
from tests.nights import at_night

WINDOWS = {"desktop": (1280, 900), "phone": (390, 844)}
LAYOUT = Path(__file__).with_name("layout.js").read_text()
#: A page with one of everything, in order.
GOOD = """<!DOCTYPE html><title>t</title><a href="#here">link</a><p id="here">text</p>
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEAAAAALAAAAAABAAEAAAICRAEAOw==">
<svg width="200" height="100" viewBox="0 0 200 100"><path d="M0 0L9 9"/><text x="20" y="50">axis
</text></svg><table style="display: block; overflow-x: auto"><tr><td>cell</td></tr></table>"""
WIDE_CELL = '<td style="min-width: 2000px">wide</td>'


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    executable = chromium.find()
    if executable is None:
        pytest.skip(f"no browser on the PATH: {', '.join(chromium.NAMES)}")
    with chromium.browser(executable, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def findings(tab: chromium.Tab, page: Path, window: str = "phone") -> list[str]:
    """All that is wrong with a page."""
    return [*tab.load(page, *WINDOWS[window]), *tab.evaluate(LAYOUT)]


# The report


#: Files that are drawn, which takes most of a minute for all published results, and a number: the
#: memory of more layers is shown.
PLACES = [("tests/data perf/results/phases.csv", 5), at_night(("tests/data perf/results", 10))]


@pytest.fixture(scope="module", params=PLACES, ids=["some", "all"])
def place(request) -> tuple[str, int]:
    return request.param


@pytest.fixture(scope="module")
def report(place, tab, tmp_path_factory) -> Path:
    """The page of the published results and of rows measured on four GPUs before; nobody draws it
    where there is no browser.
    """
    page = tmp_path_factory.mktemp("report") / "report.html"
    places = [str(REPOSITORY / file) for file in place[0].split()]
    assert main(["report", *places, "-o", str(page)]) == 0
    return page


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS)
def test_nothing_is_wrong(window, tab, report):
    assert findings(tab, report, window) == []


@pytest.mark.slow
def test_every_section_is_there(tab, place, report):
    assert tab.load(report, *WINDOWS["desktop"]) == []
    sections = {
        section["id"]: section
        for section in tab.evaluate(
            """[...document.querySelectorAll("section")].map((section) => ({
                id: section.id, text: section.textContent,
                tables: section.querySelectorAll("table").length,
                pictures: section.querySelectorAll("svg").length,
                titles: [...section.querySelectorAll("svg")].map((svg) => svg.textContent)}))"""
        )
    }
    for name in ("pro-e384", "flash-e256", "v3-e256"):
        layer = sections[f"nvidia-h200-{name}-ep4-4gpu-balanced"]
        assert layer["pictures"] == 6 and layer["tables"] == 1  # three panels, three legends
        for title, shown in zip(
            ("Time of a layer", "Useful work", "Speed-up", "roofline", "torch", "DeepGEMM"),
            layer["titles"], strict=True,
        ):  # fmt: skip
            assert title in shown
    with open(REPOSITORY / "perf" / "results" / "phases.csv") as phases:
        traced = {row["model"] for row in csv.DictReader(phases)}
    assert "FC1 products" in sections["phases"]["text"]
    assert sections["phases"]["pictures"] == len(traced)
    memory = sections["memory"]
    assert "combine_output" in memory["text"] and memory["pictures"] == memory["tables"] > place[1]
    assert sections["environment"]["tables"] == 1


# The checks themselves


def test_a_good_page_passes(tab, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(GOOD)
    for window in WINDOWS:
        assert findings(tab, page, window) == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("<script>console.error('oh', 'no')</script>", "console error: oh no"),
        ("<script>throw new Error('oh')</script>", "exception: Error: oh"),
        ("<script>Promise.reject(new Error('late'))</script>", "exception: Error: late"),
        ('<img src="missing.png">', "failed request: net::ERR_FILE_NOT_FOUND"),
        ('<img src="missing.png">', "no picture: <img>"),
        ('<img src="data:image/png;base64,AAAA">', "no picture: <img>"),
        ('<link rel="stylesheet" href="http://localhost:9/a.css">', "request: http://localhost:9"),
        (f"<table><tr>{WIDE_CELL}</tr></table>", "outside the window: <table>"),
        (f"<table><tr>{WIDE_CELL}</tr></table>", "the page is 20"),
        (
            f'<table style="display: block; overflow-x: auto"><tr>{WIDE_CELL}</tr></table>',
            "cut or scrolled: <table>",
        ),
        (
            '<details><summary>more</summary><div style="overflow: hidden; width: 50px">'
            "unbreakable_word</div></details>",
            "cut or scrolled: <div>",
        ),
        ('<p style="position: relative; left: -50px">left</p>', "outside the window: <p>"),
        ('<svg width="0" height="9"><path/><text>t</text></svg>', "nothing drawn: <svg>"),
        ('<svg width="9" height="9"></svg>', "nothing drawn: <svg>"),
        (
            '<svg width="90" height="50"><path/><text x="60" y="30">too long</text></svg>',
            'text leaves its picture: <text> "too long"',
        ),
        (
            '<svg width="90" height="50" viewBox="0 0 180 100"><path/>'
            '<text x="9" y="50" font-size="12">small</text></svg>',
            'text under 10 px: <text> "small"',
        ),
        ('<a href="#nowhere">link</a>', "leads nowhere: <a>"),
    ],
)
def test_a_broken_page_is_found(broken, message, tab, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(GOOD + broken)
    found = findings(tab, page)
    assert any(line.startswith(message) for line in found), found
