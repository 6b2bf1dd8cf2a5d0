"""The report of a store in a real browser: what it tells, that no text of a store runs, that all of it can be read."""

from dataclasses import replace

import numpy as np
import pytest
from reading import show_report
from test_report_pages import ATTACK, SHOWN, elements, hostile_and_harmless

from skipkv.eval.records import Record
from skipkv.eval.summary import summarise
from skipkv.viz.evaluation import Pair, evaluation

pytestmark = pytest.mark.browser


def summary(name):
    """Two methods on four items, with a name in every place that a store gives one."""
    method = {"f": "full", "r": f"rkv:budget=50,{name}", "s": "skipkv:budget=50"}
    runs = {
        run: {"method": text, "steering": name if run == "s" else None, "command": f"again {name}", "checkpoint": name,
              "prompt": {name: name}}
        for run, text in method.items()
    }  # fmt: skip
    stats = {"flagged": 1, "thoughts": 2, "compression": 0.5, "peak_bytes": 1e6}
    return summarise([
        Record(name, f"{item}", 0, f"{text} {name}", run, [1] * 9, [2] * (20 + item), name, "stop", stats, 1.0, "s",
               item > 1)
        for run, text in method.items() for item in range(4)
    ], runs)  # fmt: skip


def test_the_page_tells_the_tables(browser):
    made = summary("x")
    main, = show_report(browser, evaluation("results", made, note="Left out."))
    for table, shown in zip((made.table(), made.behaviour()), main.locator("table").all(), strict=True):
        rows = [row.locator("td, th").all_text_contents() for row in shown.locator("tr").all()]
        assert rows == [list(table.columns), *map(list, table.rows)]
    pictures = main.locator("svg")
    labels = [pictures.nth(i).get_attribute("aria-label") for i in range(pictures.count())]
    assert labels == ["Accuracy against budget: x", "Length against budget: x"]
    assert main.locator("pre").first.text_content().count("again x") == 3


def test_a_hostile_store_runs_nothing(browser):
    found = []
    for trace, name in zip(hostile_and_harmless(), (f"{ATTACK}[[pairs]]{{{{data}}}}\ud800", "x"), strict=True):
        pair = Pair(name, name, (trace, trace))
        main, *frames = show_report(browser, evaluation(name, summary(name), [pair, replace(pair, item="b")], name))
        assert len(frames) == 4
        found.append([elements(frame) for frame in (main, *frames)])
        clean = name.replace("\ud800", "?")
        assert main.locator("h1").text_content() == clean and main.locator("h2").first.text_content() == clean
    hostile, harmless = found
    texts = ("text", "tspan", "g", "use", "defs", "path", "style")  # of pictures, which write a long name in parts
    for one, two in zip(hostile, harmless, strict=True):
        assert {k: n for k, n in one.items() if k not in texts} == {k: n for k, n in two.items() if k not in texts}


@pytest.mark.parametrize("width", [420, 1500])
def test_every_text_can_be_read(browser, trace, other, width):
    page = evaluation("results", summary("x"), [Pair("p", "full: right", (trace, other))], "Replayed.")
    for frames in (show_report(browser, page, width, dark=dark) for dark in (False, True)):
        texts = frames[0].evaluate(SHOWN)
        assert len(texts) > 60 and all(text["contrast"] >= 4.5 for text in texts)
        boxes = np.array([box for text in texts if not text["scrolls"] for box in text["boxes"]])
        assert boxes[:, 2].max() <= width
