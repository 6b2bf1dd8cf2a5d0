"""Summaries of hand-made records against figures computed by hand; fragmentation against brute force."""

import csv
import io
import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from stored import RECORDS, RUNS, SETTINGS, record

from skipkv import Compaction, ConfigError, Trace
from skipkv.eval.figures import RunSummary
from skipkv.eval.summary import fragmentation, summarise
from skipkv.eval.table import Table


@pytest.fixture(scope="module")
def rows():
    return dict(zip("frs", summarise(RECORDS, RUNS).rows, strict=True))


def values(row, *names):
    return [figure if (figure := getattr(row, name)) is None else pytest.approx(figure.value) for name in names]


def test_figures_by_hand(rows):
    full, rkv, skip = rows.values()
    assert [(r.name, r.items, r.samples, r.texts, r.ungraded) for r in rows.values()] == [
        ("full", 3, 2, 6, 0), ("rkv:budget=50", 3, 2, 6, 0), ("skipkv:budget=50+steer:layer=3,alpha=1", 3, 2, 6, 0),
    ]  # fmt: skip
    assert values(full, "accuracy", "pass_at_k", "truncated") == [3 / 6, 2 / 3, 0]
    assert values(rkv, "accuracy", "pass_at_k", "truncated") == [2 / 6, 2 / 3, 1 / 6]
    # Ten tokens of each are its prompt.
    names = ("length", "length_right", "length_wrong", "length_difference")
    assert values(full, *names) == [(800 + 60) / 6, (270 + 30) / 3, (530 + 30) / 3, 100 - 560 / 3]
    assert values(rkv, *names) == [(890 + 60) / 6, (140 + 20) / 2, (750 + 40) / 4, 80 - 197.5]
    assert values(rkv, "flagged_right", "flagged_wrong", "thoughts_right") == [3, 17 / 4, 3]
    assert values(skip, "thoughts_right", "thoughts_wrong", "partial_words", "mean_run") == [None] * 4
    assert values(rkv, "compression", "peak_bytes") == [0.5, 2e6]
    # Segments are the items' here, of 2 seconds each.
    assert full.tokens_per_second == pytest.approx(800 / 6)
    assert (rkv.share, rkv.command, rkv.steering, skip.steering) == (0.5, "again r", None, "layer=3,alpha=1")


def test_differences_to_full_by_hand(rows):
    full, rkv, skip = rows.values()
    assert (full.reference, full.difference, full.common, full.p, full.budget_share) == (None, None, 0, None, None)
    assert rkv.reference == skip.reference == "f"
    assert rkv.common == 3 and rkv.difference.value == pytest.approx((-0.5 - 0.5 + 0.5) / 3)
    assert rkv.p == 1.0  # of the first samples one is full's alone, none rkv's
    assert skip.common == 2 and skip.difference.value == pytest.approx(0.25) and skip.p == 1.0
    length = full.length
    assert rkv.budget_share == pytest.approx((50 / length.value, 50 / length.high, 50 / length.low))


def test_every_figure_has_an_interval_around_it(rows):
    for row in rows.values():
        figures = [getattr(row, f.name) for f in fields(RunSummary) if f.type == "Figure | None"]
        known = [figure for figure in figures if figure]
        assert len(known) > 8 and all(f.low <= f.value <= f.high for f in known if f.low is not None)
    assert rows["f"].accuracy.high - rows["f"].accuracy.low > 0.5  # three items say little


def test_the_order_in_which_texts_ended_is_nothing_to_an_interval():
    assert summarise(RECORDS[::-1], RUNS).as_dict() == summarise(RECORDS, RUNS).as_dict()


def test_a_run_is_compared_with_the_full_cache_of_its_own_settings():
    other = RUNS["r"] | {"run": "o", "sampling": {"temperature": 0.0}}
    of = [replace(r, run="o") for r in RECORDS if r.run == "r"]
    summary = summarise(RECORDS + of, RUNS | {"o": other})
    assert [row.reference for row in summary.rows] == [None, "f", "f", None]
    parts = list(summary.comparisons())
    assert [[row.run for row in part.rows] for _, part in parts] == [["f", "r", "s"], ["o"]]
    assert [shared["sampling"]["temperature"] for shared, _ in parts] == [0.6, 0.0] and parts[0][0] == SETTINGS


def test_what_is_not_known_is_a_dash():
    one = [record("f", "a", 0, None), record("r", "b", 0, True, seconds=0.0)]
    summary = summarise(one, RUNS)
    full, rkv = summary.rows
    assert (full.accuracy, full.ungraded, rkv.difference, rkv.p, rkv.common) == (None, 1, None, None, 0)
    assert rkv.accuracy == (1, 0, 1) and rkv.length == (100, None, None) and rkv.tokens_per_second is None
    lines = [" ".join(line.split()) for line in str(summary.table()).splitlines()]
    assert lines[1] == "full 1 × 0, 1 ungraded – – – 100 [–] 0.0 [0.0, 100.0] 50.0 [–] – 2.00 [–] 90"
    assert lines[2].startswith("rkv:budget=50 1 × 1 100.0 [0.0, 100.0] – – 100 [–]")
    assert all(name not in text for name in ("nan", "None") for text in (str(summary), summary._repr_html_()))
    assert summarise([], RUNS).rows == ()


def test_all_right_and_none_right():
    records = [record("f", str(i), 0, True) for i in range(40)] + [record("r", str(i), 0, False) for i in range(40)]
    full, rkv = summarise(records, RUNS).rows
    assert full.accuracy[:1] + full.accuracy[2:] == (1, 1) and 0.85 < full.accuracy.low < 0.97
    assert rkv.accuracy[:2] == (0, 0) and 0.03 < rkv.accuracy.high < 0.15
    assert rkv.difference.value == -1 and rkv.difference.low == -1 and rkv.p == pytest.approx(2 / 2**40)
    assert full.length_wrong is rkv.length_right is full.length_difference is None


def test_the_published_rule_stands_beside_the_default():
    official = [replace(r, correct=r.item == "a" if r.run == "f" else None) for r in RECORDS]
    summary = summarise(RECORDS, RUNS, official)
    assert [row.official and row.official.value for row in summary.rows] == [pytest.approx(1 / 3), None, None]
    assert "official, %" in summary.table().columns and "official, %" not in summarise(RECORDS, RUNS).table().columns


def test_tables_csv_and_json_hold_the_same(rows):
    summary = summarise(RECORDS, RUNS)
    found = list(csv.DictReader(io.StringIO(summary.csv())))
    for line, row in zip(found, rows.values(), strict=True):
        for field in fields(RunSummary):
            value = getattr(row, field.name)
            if field.type == "Figure | None":
                cells = [line[field.name + end] for end in ("", "_low", "_high")]
                assert [float(cell) if cell else None for cell in cells] == list(value or (None,) * 3)
            else:
                assert line[field.name] == ("" if value is None else str(value))
    assert json.loads(json.dumps(summary.as_dict()))[1]["accuracy"] == list(rows["r"].accuracy)
    table = summary.table().markdown().splitlines()
    assert len(table) == 5 and all(line.count(" | ") == len(summary.table().columns) - 1 for line in table[2:])


def test_a_cell_of_markdown_is_no_markup():
    made = Table(("a|b", "c"), [("<b>`x`\n|*y*", "[z](u)")], align="<>").markdown()
    assert made == "| a\\|b | c |\n|---|---:|\n| \\<b\\>\\`x\\` \\|\\*y\\* | \\[z\\](u) |"


def test_a_run_without_description_is_refused():
    for runs in ({}, {**RUNS, "r": {"share": 1}}):
        with pytest.raises(ConfigError, match="has no description with its method"):
            summarise(RECORDS, runs)


# -- fragmentation


def torn(texts, compactions, layers=1, heads=1):
    return Trace(list(range(len(texts))), texts, 1, layers, heads, "rkv:budget=4", compactions)


def kept(step, positions, layer=0, head=0):
    return Compaction(step, layer, head, step, np.array(positions, np.int32))


def test_fragmentation_by_hand():
    texts = ["un", "like", "ly", " so", "\n", "what", "ever", " is"]  # unlikely| so|\n|whatever| is
    assert fragmentation(torn(texts, [])) == {"partial_words": 0, "mean_run": 8}
    # Held: un, ly, so, what, and those fed since: unlikely and whatever are torn; runs of 1, 2, 1, 1.
    cut = torn(texts, [kept(4, [0, 1, 2, 3]), kept(7, [3, 0, 5, 2])])
    assert fragmentation(cut) == {"partial_words": 2 / 5, "mean_run": 5 / 4}
    assert fragmentation(torn(texts, [kept(8, [])])) == {"partial_words": 0, "mean_run": 0}
    two = torn(texts, [kept(7, [3, 0, 5, 2], head=1)], heads=2)
    assert fragmentation(two) == {"partial_words": 1 / 5, "mean_run": (8 + 5 / 4) / 2}


def test_fragmentation_against_brute_force():
    rng = np.random.default_rng(8)
    for _ in range(30):
        n, layers, heads = rng.integers(1, 40), *rng.integers(1, 4, 2)
        texts = [str(t) for t in rng.choice(["a", " b", "c ", " ", "", "\n", "d e", "\ufffd"], n)]
        compactions = []
        for layer, head in np.ndindex(layers, heads):
            slots, fed = np.zeros(0, int), 0
            for step in sorted(set(rng.integers(1, n + 1, 3).tolist())):
                slots, fed = np.append(slots, np.arange(fed, step)), step
                slots = rng.permutation(slots)[: rng.integers(0, len(slots) + 1)]
                compactions.append(kept(step, slots, layer, head))
        trace = torn(texts, compactions, layers, heads)
        words, partial, runs = [[]], [], []
        for p, text in enumerate(texts):
            if words[-1] and (text[:1].isspace() or texts[p - 1][-1:].isspace()):
                words.append([])
            words[-1].append(p)
        for layer, head in np.ndindex(layers, heads):
            held = set(trace.held(n, layer, head).tolist())
            partial.append(sum(0 < len(held & set(word)) < len(word) for word in words) / len(words))
            begins = sum(p - 1 not in held for p in held)
            runs.append(len(held) / begins if begins else 0)
        found = fragmentation(trace)
        assert math.isclose(found["partial_words"], np.mean(partial)) and math.isclose(found["mean_run"], np.mean(runs))
