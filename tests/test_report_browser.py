"""The report in a real browser: nothing in the console, nothing off the page, every word to be read."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find
from finished_run import make_run

from perturbcore.report import write
from perturbcore.report.words import SECTIONS

SECONDS = 30
WIDTHS = (390, 1280)
CONTRAST = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const back = parts(getComputedStyle(e).backgroundColor);
      if (back.length < 4 || back[3] === 1) return back;
    }
    return [255, 255, 255];
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let words = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("title") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ink = parts(element.closest("svg") ? style.fill : style.color);
    const [low, high] = [luminance(ink), luminance(behind(element))].sort((a, b) => a - b);
    words += 1;
    if ((high + 0.05) / (low + 0.05) < 4.5) faint.push(node.data.trim());
  }
  return {words, faint};
})()
"""
CUT_OFF = """
[...document.querySelectorAll("main *")]
  .filter(e => e.checkVisibility() && !e.closest(".scroll, .hidden, svg"))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(make_run(tmp_path_factory.mktemp("run"), trained=("adapert", "ptrag", "aligned")))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find()
    if executable is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    with Browser(executable, tmp_path_factory.mktemp("profile"), SECONDS) as found:
        yield found


def test_the_console_stays_empty_and_nothing_is_fetched(browser: Browser, page: Path) -> None:
    browser.problems.clear()
    browser.open(page, width=1280)
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.evaluate("document.body.offsetHeight")
    assert browser.problems == []
    assert browser.evaluate("document.compatMode") == "CSS1Compat"


def test_every_section_is_drawn_and_every_link_leads_to_one(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    drawn = browser.evaluate(
        "[...document.querySelectorAll('section')]"
        ".filter(s => s.getBoundingClientRect().height > 80 && s.querySelector('h2')).map(s => s.id)"
    )
    assert drawn == [name for name, _ in SECTIONS]
    assert browser.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))") == drawn
    for kind in ("scatter", "bars", "volcano", "network", "grid", "curve"):
        size = browser.evaluate(
            f"(r => [r.width, r.height])(document.querySelector('svg.{kind}').getBoundingClientRect())"
        )
        assert min(size) > 40, kind


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.removeAttribute('name'); d.open = true; })")
    assert browser.evaluate("document.documentElement.clientWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(CUT_OFF) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_word_can_be_read(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, width=1280, dark=dark)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 100) == dark
    found = browser.evaluate(CONTRAST)
    assert found["words"] > 500
    assert found["faint"] == []


def test_perturbations_open_one_at_a_time_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    opened = "[...document.querySelectorAll('#perturbations details')].map(d => d.open)"
    assert browser.evaluate(opened) == [True, False, False, False]
    browser.evaluate("document.querySelectorAll('#perturbations summary')[2].focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
        )
    assert browser.evaluate(opened) == [False, False, True, False]
    unreachable = "[...document.querySelectorAll('.scroll')].filter(e => e.tabIndex !== 0 || !e.ariaLabel).length"
    assert browser.evaluate(unreachable) == 0
