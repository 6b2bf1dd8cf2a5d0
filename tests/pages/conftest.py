"""Chromium, driven by Playwright, and the traces that the pages are made of."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from traces import PROMPT, build

import skipkv
from skipkv.eval import demo, side_by_side
from skipkv.tiny import problems as tiny

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def chromium():
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: the pages are not drawn")
    if CHROMIUM is None:
        pytest.skip("no chromium: the pages are not drawn")
    with driver.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def browser(chromium, tmp_path):
    """`browser.open(page)` shows a page of `skipkv.viz` or HTML; no frame may request anything or complain."""
    browser = Browser(chromium, tmp_path / "page.html")
    yield browser
    browser.close()
    assert browser.requests <= {browser.file.as_uri()}
    assert browser.messages == []


class Browser:
    def __init__(self, chromium, file):
        self.chromium, self.file, self.tab, self.requests, self.messages = chromium, file, None, set(), []

    def open(self, page, width=1200, height=900, dark=False):
        """The tab that shows a page; the one before it is closed."""
        self.close()
        text = page if isinstance(page, str) else page.html
        self.file.write_text(text, encoding="utf-8")
        size = {"width": width, "height": height}
        self.tab = self.chromium.new_page(viewport=size, color_scheme="dark" if dark else "light")
        self.tab.set_default_timeout(60_000)  # far more than anything here takes: a busy machine fails no test
        self.tab.on("request", lambda request: self.requests.add(request.url))
        self.tab.on("pageerror", lambda error: self.messages.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        self.tab.on("console", lambda message: self.messages.append(message.text))  # the pages say nothing at all
        self.tab.goto(self.file.as_uri())
        return self.tab

    def close(self):
        for frame in self.tab.frames if self.tab else ():  # what frames in a process of their own say is heard late
            listed = "performance.getEntriesByType('resource').map((entry) => entry.name)"
            self.requests.update(frame.evaluate(listed))
        if self.tab:
            self.tab.close()
            self.tab = None


@pytest.fixture(scope="session")
def trace(model):
    method = "skipkv:budget=48,interval=16,tau=0.88"
    return model.generate(PROMPT, method, trace="scores", max_new_tokens=200, progress=False)[0].trace


@pytest.fixture(scope="session")
def other(model, trace):
    """The same text with other compactions."""
    return model.replay(trace.tokens, "rkv:budget=40,interval=24", n_prompt=trace.n_prompt, trace="scores").trace


@pytest.fixture(scope="session")
def uneven():
    """Heads of different budgets that skip some compactions; a steered token."""
    texts = [f" t{p}" + ".\n" * (p % 9 == 8) for p in range(120)]
    return build(np.random.default_rng(5), 120, 4, 4, list(range(15, 120, 15)), texts, scores=("importance", "score"))


@pytest.fixture(scope="session")
def told(model):
    """A small demo: runs, problems, which of them is shown, its traces."""
    problems = tiny.draw(3, level=tiny.Level(steps=(2, 3)))
    runs = list(demo(model, problems, (0.25, 0.5), progress=False))
    number, *traces = side_by_side(model, runs)
    steered = replace(runs[-1].outcome, steering=skipkv.Steering(np.ones(256), 3))
    runs.append(replace(runs[-1], outcome=steered))
    return runs, problems, number, traces
