"""The page in a real browser: nothing overflows, is clipped, overlaps, runs a script or asks the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_lightning.report.pages import to_html
from tests.report.browser import Browser, find_chromium
from tests.report.demonstration import document

CHROMIUM = find_chromium()

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on PATH; its path can be given in the environment variable CHROMIUM"
)

WIDTHS = (360, 390, 704, 896, 1400, 1600)

MEASURE = """
(() => {
  const shown = box => box.width > 0 && box.height > 0;
  const words = node => node.textContent.trim().slice(0, 40);
  const outside = [], overlapping = [], cut = [], tooWide = [];
  let texts = 0;
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect();
    if (!shown(frame)) continue;
    const place = svg.parentElement.getBoundingClientRect();
    if (svg.classList.contains('strip') && (Math.abs(frame.top - place.top) > 1 || frame.width != place.width))
      outside.push('a strip beside its row');
    for (const text of svg.querySelectorAll('text')) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - .5 || box.right > frame.right + .5 || box.top < frame.top - .5 ||
          box.bottom > frame.bottom + .5) outside.push(words(text));
      texts += 1;
    }
  }
  for (const block of document.querySelectorAll('figure, .verdicts, article')) {
    const boxes = [];
    const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode;
      if (!node.textContent.trim() || node.parentElement.closest('title, desc')) continue;
      if (node.parentElement.tagName == 'text') {
        const box = node.parentElement.getBoundingClientRect();
        if (shown(box)) boxes.push([words(node), box]);
        continue;
      }
      const range = document.createRange();
      range.selectNodeContents(node);
      const own = [...range.getClientRects()].filter(shown);
      if (own.length > 60) continue;
      own.forEach(box => boxes.push([words(node), box, node]));
    }
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
      const [a, p, m] = boxes[i], [b, q, n] = boxes[j];
      if (m && m === n) continue;
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 1 && high > 3) overlapping.push(a + ' / ' + b);
    }
  }
  for (const node of document.querySelectorAll('body *:not(svg *)')) {
    const box = node.getBoundingClientRect();
    if (!shown(box) || node.closest('.scroll')) continue;
    if (box.right > innerWidth + .5 || box.left < -.5) tooWide.push(node.tagName + ' ' + words(node));
    if (getComputedStyle(node).overflowX == 'hidden' && node.scrollWidth > node.clientWidth + 1) cut.push(words(node));
  }
  const plots = [...document.querySelectorAll('.drawing')].map(
    drawing => [...drawing.querySelectorAll('svg')].filter(svg => shown(svg.getBoundingClientRect())).length);
  return {page: document.documentElement.scrollWidth, window: innerWidth, outside, overlapping, cut, tooWide, plots,
          texts};
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(document()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory, page) -> Iterator[Browser]:
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        browser.open(page)
        yield browser


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_is_clipped_or_overlaps(browser, width):
    browser.resize(width)
    found = browser.measure(MEASURE)
    assert found["window"] == width
    assert found["page"] <= width
    assert found["texts"] > 100
    for fault in ("outside", "overlapping", "cut", "tooWide"):
        assert found[fault] == [], fault
    assert set(found["plots"]) == {1}


def test_unfolded_texts_and_tables_stay_on_a_narrow_page(browser):
    browser.resize(360)
    browser.measure("document.querySelectorAll('details').forEach(node => node.open = true)")
    try:
        found = browser.measure(MEASURE)
    finally:
        browser.measure("document.querySelectorAll('details').forEach(node => node.open = false)")
    assert found["page"] <= 360
    assert found["cut"] == found["tooWide"] == []


def test_the_page_runs_nothing_and_asks_nobody(browser, page):
    browser.resize(1400)
    browser.open(page)
    browser.measure("1")
    named = {name: [] for name in ("Network.requestWillBeSent", "Log.entryAdded", "Runtime.consoleAPICalled")}
    for event in browser.events:
        if event.get("method") in named:
            named[event["method"]].append(event["params"])
    assert [request["request"]["url"] for request in named["Network.requestWillBeSent"]] == [page.resolve().as_uri()]
    assert named["Log.entryAdded"] == named["Runtime.consoleAPICalled"] == []
    assert browser.measure("document.title") == document().title
    assert browser.measure("document.querySelectorAll('script, img, iframe, link:not([rel=icon])').length") == 0


def test_every_link_of_the_contents_leads_to_a_section(browser):
    count = "[...document.querySelectorAll('nav a')].map(a => !!document.querySelector(a.getAttribute('href')))"
    assert browser.measure(count) == [True] * len(document().sections)


def test_dark_is_dark_and_print_is_light_whatever_the_reader_prefers(browser):
    background = "getComputedStyle(document.body).backgroundColor"
    try:
        browser.prefer("light")
        light = browser.measure(background)
        browser.prefer("dark")
        assert browser.measure(background) != light
        browser.prefer("dark", "print")
        assert browser.measure(background) == light
        assert browser.measure("getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        browser.prefer("light")
