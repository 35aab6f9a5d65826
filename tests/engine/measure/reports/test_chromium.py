"""The pages in a real browser: no complaint, no request, nothing that is too wide or lies over another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.measure.reports.browser import Browser, browser, find
from tests.engine.measure.reports.test_pages import PAGES

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium here: apt-get install chromium")

OVERLAPS = """(() => {
  const found = [];
  for (const chart of document.querySelectorAll('svg.chart')) {
    const texts = [...chart.querySelectorAll('text')].map((text) => [text.textContent, text.getBoundingClientRect()]);
    texts.forEach(([a, one], place) => texts.slice(place + 1).forEach(([b, other]) => {
      const wide = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const tall = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
      if (wide > 1 && tall > 0.3 * Math.min(one.height, other.height)) found.push([chart.ariaLabel, a, b]);
    }));
  }
  return found;
})()"""
SMALL = (
    "Math.min(...[...document.querySelectorAll('svg.chart text')].map((text) => text.getBoundingClientRect().height))"
)
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
GROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(find() or "", tmp_path_factory.mktemp("chromium") / "profile") as tab:
        yield tab


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name, write in PAGES.items():
        write(folder / f"{name}.html")
    return folder


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_a_page_shows_without_complaint_or_request(
    tab: Browser, folder: Path, name: str, width: int, dark: bool
) -> None:
    path = folder / f"{name}.html"
    tab.open(path, width=width, dark=dark)
    assert tab.ask("document.querySelectorAll('svg.chart').length") > 0
    assert tab.ask(GROUND) == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    assert tab.ask(WIDER) <= 0, "the page is wider than the screen"
    assert tab.ask(OVERLAPS) == []
    assert tab.ask(SMALL) >= 9, "the text of a chart is too small to read"
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:")] == [path.as_uri()]


def test_the_browser_hears_what_it_should_not(tab: Browser, tmp_path: Path) -> None:
    """The checks above can fail: a page that logs, throws, fetches and is too wide."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><link rel=icon href='data:,'><p style='width: 3000px'>wide</p><img src='http://example.org/x.png'>"
        "<script>console.error('no'); throw new Error('never')</script>"
    )
    tab.open(path, width=1280, dark=False)
    assert tab.ask(WIDER) > 1000
    assert {"Runtime.consoleAPICalled", "Runtime.exceptionThrown"} <= {one["method"] for one in tab.complaints()}
    assert "http://example.org/x.png" in tab.requests()


def test_a_script_that_got_into_the_page_does_not_run(tab: Browser, folder: Path, tmp_path: Path) -> None:
    """Were escaping to fail one day, the page's policy still stops what came with a prompt."""
    source = (folder / "load.html").read_text(encoding="utf-8")
    path = tmp_path / "injected.html"
    path.write_text(
        source.replace("<main>", "<main><script>window.taken = true</script><img src=x onerror='taken = 1'>")
    )
    tab.open(path, width=1280, dark=False)
    assert tab.ask("typeof window.taken") == "undefined"


def test_tables_sort_and_filter(tab: Browser, folder: Path) -> None:
    tab.open(folder / "profile.html", width=1280, dark=False)
    column = "[...document.querySelectorAll('#cells tbody tr')].map((row) => Number(row.cells[3].dataset.value))"
    click = "document.querySelectorAll('#cells th button')[3].click()"
    tab.ask(click)
    down = tab.ask(column)
    assert down == sorted(down, reverse=True)
    tab.ask(click)
    assert tab.ask(column) == down[::-1]
    tab.open(folder / "evaluation.html", width=1280, dark=False)
    tab.ask("(() => { const input = document.querySelector('#samples .filter'); input.value = 'PASSKEY dense';"
            " input.dispatchEvent(new Event('input')); })()")  # fmt: skip
    shown = tab.ask("[...document.querySelectorAll('#samples tbody tr')].filter((row) => !row.hidden)"
                    ".map((row) => row.textContent)")  # fmt: skip
    assert shown
    assert all("passkey" in row and "dense" in row for row in shown)


def test_a_folded_sample_unfolds(tab: Browser, folder: Path) -> None:
    tab.open(folder / "evaluation.html", width=360, dark=False)
    tab.ask("document.querySelectorAll('#samples details').forEach((one) => { one.open = true; })")
    assert tab.ask("document.querySelector('#samples dd pre').getBoundingClientRect().height") > 0
    assert tab.ask(WIDER) <= 0


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_on_paper(tab: Browser, folder: Path, name: str) -> None:
    """A4, landscape, its margins taken off; black on white whatever the screen prefers."""
    tab.open(folder / f"{name}.html", width=1030, dark=True)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    tab.call("Emulation.setEmulatedMedia", media="print", features=dark)
    try:
        assert tab.ask(WIDER) <= 0
        assert tab.ask(GROUND) == "rgb(255, 255, 255)"
    finally:
        tab.call("Emulation.setEmulatedMedia", media="")


def test_without_a_script_the_page_is_complete(tab: Browser, folder: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(folder / "profile.html", width=1280, dark=False)
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
    assert tab.ask("document.querySelectorAll('#cells th').length") > 10
    assert tab.ask("document.querySelectorAll('#cells th button').length") == 0
    assert tab.complaints() == []
