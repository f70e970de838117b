"""The page in a real browser: no complaints, nothing loaded from elsewhere, works by keyboard, fits a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser
from report_runs import make_network, make_run
from rnas.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

# Every pair of texts in one drawing whose boxes overlap by more than a pixel.
OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  return texts.flatMap(([a, p], i) => texts.slice(0, i).filter(([b, q]) =>
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
    Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 0.3 * Math.min(p.height, q.height)
  ).map(([b]) => [svg.getAttribute('aria-label').slice(0, 40), a, b]));
})"""
FIRST_COLUMN = "[...document.querySelector('#results tbody').rows].map(r => r.cells[0].firstChild.textContent)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder / "demo", classes=[f"class <i>{k}</i> with a long name" for k in range(10)])
    other = make_network(folder / "RNAS-L", arch="RNAS-L", dataset="cifar10", eps=8 / 255)
    write_report([run, other], folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_page_is_quiet_and_fits(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark)
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OVERLAPS) == []
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert (red < 60) == dark


def test_theme_button_cycles(browser: Browser, page: Path) -> None:
    browser.open(page)
    seen = []
    for _ in range(3):
        browser.run("document.getElementById('theme').click()")
        seen.append(browser.run("document.documentElement.dataset.theme ?? 'auto'"))
    assert seen == ["light", "dark", "auto"]
    browser.run("document.getElementById('theme').click(), document.getElementById('theme').click()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    browser.run("document.getElementById('theme').click()")
    assert browser.problems == []


def test_tables_sort_by_click(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run(FIRST_COLUMN) == ["demo/train", "demo/train-standard", "RNAS-L"]
    # under PGD-20 the standard network is the worst; numbers start with the largest
    browser.run("document.querySelectorAll('#results thead th button')[3].click()")
    assert browser.run(FIRST_COLUMN)[-1] == "demo/train-standard"
    assert browser.run("document.querySelectorAll('#results thead th')[3].getAttribute('aria-sort')") == "descending"
    browser.run("document.querySelectorAll('#results thead th button')[3].click()")
    assert browser.run(FIRST_COLUMN)[0] == "demo/train-standard"


def test_tables_sort_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    for _ in range(60):
        browser.press("Tab")
        if browser.run("document.activeElement.closest('th')?.cellIndex === 0"):
            break
    else:
        pytest.fail("the Tab key never reached a table's heading")
    browser.press("Enter", "\r")
    names = browser.run(FIRST_COLUMN)
    assert names == sorted(names, key=str.casefold)


def test_charts_read_out_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('#search svg[data-chart]').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    text = browser.run("document.querySelector('#search .readout').textContent")
    assert text.startswith("epoch 3")
    assert "F " in text
    assert browser.problems == []


def test_markup_in_names_stays_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.querySelectorAll('i:not(.readout i)').length") == 0
    assert "class <i>0</i> with a long name" in browser.run("document.getElementById('examples').textContent")
