"""Pages hold exactly what the trace holds, in a form that nothing of a trace can break."""

import base64
import json
import re
import shutil
import subprocess
import time
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import skipkv
from skipkv import Compaction, ConfigError, Trace, viz
from skipkv.eval import Fidelity, Outcome
from skipkv.viz import curves, encode, views

PROMPT = "<s><|user|> Dot = 9. Leo = Dot + plums. plums = 4.Find Leo.<|assistant|><think>\n"
HOSTILE = [
    "</script>", "<script>alert(1)</script>", "<!--", "-->", "]]>", "&amp;", "&", '"', "'", "\\", "`${x}`", "\u2028",
    "\u2029", "\u202e", "\ufffd", "\ufffd\ufffd", "", "\n", "\r\n", "\t", "\0", "<think>", "{{data}}", "\U0001f600",
    "\u200b", "\ud800", "http://example.org/x.js", ".\n\n", "é", "漢",
]  # fmt: skip


# -- reading a page as the format says, without the code that wrote it


def decode(page):
    """Header and arrays of a page's data block."""
    block = re.search(r'<script type="text/plain" id="data">([A-Za-z0-9+/=]*)</script>', page.html)
    raw = zlib.decompress(base64.b64decode(block[1], validate=True))
    length = int.from_bytes(raw[:4], "little")
    header, at, arrays = json.loads(raw[4 : 4 + length]), 4 + length, {}
    for name, kind, size in header["arrays"]:
        dtype = np.dtype(kind).newbyteorder("<")
        arrays[name] = np.frombuffer(raw, dtype, size, at)
        at += size * dtype.itemsize
    assert at == len(raw)
    return header, arrays


def held(header, arrays, run, head, frame):
    """Positions that a head (its place among those on the page) holds in a frame."""
    n, steps = len(header["texts"]), header["steps"]
    age = arrays[f"ages{run}"][head * n : (head + 1) * n]
    fed = steps[max(frame - 1, 0)] if steps else n
    found = []
    for p in range(fed):
        first = next((f for f, s in enumerate(steps, 1) if s > p), len(steps) + 1)
        if age[p] == 0 or frame < first + int(age[p]) - 1:
            found.append(p)
    return found


def assert_same(trace, header, arrays, run=0):
    """The page against `Trace.held`, every frame and head."""
    n_heads = len(header["heads"])
    for frame in range(len(header["steps"]) + 1):
        step = header["steps"][frame - 1] if frame else None
        for i, layer in enumerate(header["layers"]):
            for j, head in enumerate(header["heads"]):
                fed = header["steps"][0] if header["steps"] else len(trace.tokens)
                expected = trace.held(step, layer, head) if frame else np.arange(fed)
                assert held(header, arrays, run, i * n_heads + j, frame) == expected.tolist(), (frame, layer, head)


def build(rng, n, layers, heads, steps, texts=None, method="rkv:budget=8", share=0.7, scores=(), order=False):
    """A trace of random nested kept sets; each head has its own budgets and skips some steps."""
    compactions = []
    for layer in range(layers):
        for head in range(heads):
            slots, fed = np.zeros(0, np.int32), 0
            for step in steps:
                if rng.random() > share:
                    continue
                slots, fed = np.concatenate([slots, np.arange(fed, step, dtype=np.int32)]), step
                size = int(rng.integers(0, len(slots) + 1))
                kept = slots[np.sort(rng.choice(len(slots), size, replace=False))]
                kept = rng.permutation(kept) if order else kept
                n_candidates = int(rng.integers(0, len(slots) + 1))
                values = {name: rng.normal(size=n_candidates).astype(np.float32) for name in scores}
                compactions.append(Compaction(step, layer, head, len(slots), kept, values or None))
                slots = kept
    compactions.sort(key=lambda c: (c.step, c.layer, c.head))
    texts = texts or [f" t{p}" for p in range(n)]
    ends = [p for p, text in enumerate(texts) if text.endswith("\n")]
    starts = [0, *(p + 1 for p in ends)]
    sentences = [(a, b, b, int(rng.integers(2)), float(rng.random()), 0) for a, b in zip(starts, ends, strict=False)]
    return Trace(
        list(range(n)), texts, min(2, n), layers, heads, method, compactions, sentences, {0: 1.25},
        [(step, 100 * step) for step in sorted({c.step for c in compactions})], {"model": "random"},
    )  # fmt: skip


@st.composite
def traces(draw):
    n = draw(st.integers(1, 40))
    steps = sorted(draw(st.sets(st.integers(1, n), max_size=8)))
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    method = draw(st.sampled_from(["rkv:budget=8", "rkv:budget=8,evict=False"]))
    texts = [draw(st.sampled_from(HOSTILE)) for _ in range(n)]
    return build(rng, n, layers, heads, steps, texts, method, order=draw(st.booleans()))


@pytest.fixture(scope="module")
def model():
    return skipkv.load("tiny", progress=False)


@pytest.fixture(scope="module")
def recorded(model):
    method = "skipkv:budget=48,interval=16,tau=0.88"
    return model.generate(PROMPT, method, trace="scores", max_new_tokens=200, progress=False)[0].trace


# -- kept sets


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces())
def test_the_page_holds_the_kept_sets(trace):
    header, arrays = decode(viz.kept(trace))
    assert_same(trace, header, arrays)
    assert header["texts"] == trace.texts
    assert header["traces"][0]["virtual"] == str(trace.method).endswith("evict=False")


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize(
    "method", ["skipkv:budget=64/48/40/32,interval=16,tau=0.88", "rkv:budget=48,interval=16,compat=official"]
)
def test_a_real_trace(model, recorded, method, evict):
    trace = model.replay(recorded.tokens, f"{method},evict={evict}", n_prompt=recorded.n_prompt, trace="scores").trace
    header, arrays = decode(viz.kept(trace))
    assert_same(trace, header, arrays)
    assert header["traces"][0]["virtual"] is not evict
    assert_scores(trace, header, arrays)


def test_a_saved_trace_gives_the_same_page(recorded, tmp_path):
    recorded.save(tmp_path / "trace.npz")
    assert viz.kept(Trace.load(tmp_path / "trace.npz")).html == viz.kept(recorded).html


def test_a_trace_without_compactions(model, recorded):
    trace = model.replay(recorded.tokens, "full", trace=True).trace
    header, arrays = decode(viz.kept(trace))
    assert header["steps"] == [] and header["start"] == 0
    assert_same(trace, header, arrays)
    decode(viz.survival(trace, 0)), decode(viz.compare(trace, recorded))


def test_more_than_254_compactions_need_wider_ages():
    trace = build(np.random.default_rng(0), 300, 1, 1, range(1, 300), share=1.0)
    header, arrays = decode(viz.kept(trace))
    assert arrays["ages0"].dtype == np.uint16
    assert_same(trace, header, arrays)


def test_chosen_layers_and_heads(recorded):
    header, arrays = decode(viz.kept(recorded, layers=[3, 1], heads=2))
    assert (header["layers"], header["heads"]) == ([1, 3], [2])
    assert_same(recorded, header, arrays)


def test_the_slider_starts_where_asked(recorded):
    steps = recorded.steps
    for step, frame in [(None, len(steps)), (0, 0), (steps[0] - 1, 0), (steps[0], 1), (steps[1] + 1, 2)]:
        assert decode(viz.kept(recorded, step))[0]["start"] == frame


def test_sentences_alphas_and_bytes(recorded):
    run = decode(viz.kept(recorded))[0]["traces"][0]
    assert [s[:3] for s in run["sentences"]] == [[s[0], s[1], int(s[3])] for s in recorded.sentences]
    np.testing.assert_allclose(
        [s[3] for s in run["sentences"]], [s[4] for s in recorded.sentences], atol=5e-5
    )  # rounded
    assert run["bytes"] == [list(b) for b in recorded.bytes]
    assert run["alphas"] == [] and run["steps"] == recorded.steps


def sizes(trace, steps, slots=1, page=1):
    """(step, before, after) of the whole cache from the sets that are held."""
    heads = [(layer, head) for layer in range(trace.n_layers) for head in range(trace.n_kv_heads)]
    found = []
    for step in steps:
        after = [len(trace.held(step, *head)) for head in heads]
        before = [len(trace.held(step - 1, *head)) + 1 for head in heads] if step else after
        found.append((step, *(page * sum(-(-n // slots) for n in size) for size in (before, after))))
    return found


def assert_line(line, expected):
    """A line through corners has, at every step, one value or two of them."""
    x, y = np.array(line).T
    assert len(line) < 2 * len(expected) or len(expected) < 4
    for step, before, after in expected:
        at = y[x == step].tolist()
        assert (at or [np.interp(step, x, y)]) == ([before, after] if before != after else [after]), step


def test_the_caches_line_is_what_the_run_measured(model):
    for method in (
        "rkv:budget=66,interval=16",
        "h2o:budget=40,interval=32",
        "streaming:budget=130/70/66/20,interval=16",
    ):
        out = model.generate(PROMPT, method, trace=True, max_new_tokens=230, progress=False)[0]
        trace, stats = out.trace, out.stats
        [size] = encode.sizes([trace])
        assert size["unit"] == "bytes"
        slots, page = trace.settings["page_slots"], trace.settings["page_bytes"]
        assert_line(size["points"], sizes(trace, range(len(trace.tokens) + 1), slots, page))
        at = {step: value for step, value in size["points"]}  # after
        assert trace.bytes and all(at.get(step, value) == value for step, value in trace.bytes)
        # The last token is not fed.
        assert max(value for step, value in size["points"] if step < len(trace.tokens)) == stats.peak_bytes
        x, y = np.array(size["full"]).T
        assert np.interp(len(trace.tokens) - 1, x, y) == stats.full_bytes


def test_the_cache_of_a_run_that_drops_nothing(model):
    out = model.generate(
        PROMPT, "rkv:budget=40,interval=16,evict=false", trace=True, max_new_tokens=90, progress=False
    )[0]
    full = model.replay(out.trace.tokens, "full", n_prompt=out.trace.n_prompt, trace=True).trace
    for size in encode.sizes([out.trace, full]):
        assert size["points"] == size["full"] and size["unit"] == "bytes"


def test_the_cache_in_slots_where_no_page_was_recorded(model):
    trace = build(np.random.default_rng(1), 40, 2, 2, [10, 20, 30, 40])
    cache = decode(viz.kept(trace))[0]["traces"][0]["cache"]
    assert cache["unit"] == "slots" and cache["full"] == [[0, 0], [40, 160]]
    assert_line(cache["points"], sizes(trace, range(41)))
    for wrong in (0, -1, "64", 1 << 99):
        strange = trace.settings | {"page_slots": wrong, "page_bytes": 8448, "full_page_bytes": 8448}
        assert encode.sizes([replace(trace, settings=strange)]) == [cache]
    [a, b] = encode.sizes([trace, model.replay(list(range(40)), trace=True).trace])  # one unit for two
    assert (a, b["unit"]) == (cache, "slots")


# -- scores


def assert_scores(trace, header, arrays, run=0):
    """Every recorded score, within half a step of the quantisation."""
    names, top = header["scores"][run], 2 ** header["bits"] - 1
    index = arrays[f"index{run}"].reshape(-1, 3)
    bounds, codes = arrays[f"bounds{run}"].reshape(len(index), len(names), 2), arrays[f"codes{run}"]
    found, at = {}, 0
    for (frame, head, size), bound in zip(index.tolist(), bounds, strict=True):
        layer, k = divmod(head, len(header["heads"]))
        key = header["steps"][frame - 1], header["layers"][layer], header["heads"][k]
        part = codes[at : at + len(names) * size].reshape(len(names), size).astype(np.float64)
        found[key] = (
            np.where(part == top, np.nan, bound[:, :1] + (bound[:, 1:] - bound[:, :1]) * part / (top - 1)),
            bound,
        )
        at += len(names) * size
    last, scored = {}, 0
    for c in trace.compactions:
        before, fed = last.get((c.layer, c.head), (np.zeros(0, np.int32), 0))
        slots = np.concatenate([before, np.arange(fed, c.step)])
        last[c.layer, c.head] = c.kept, c.step
        if not c.scores or (c.step, c.layer, c.head) not in found:
            continue
        scored += 1
        values, bound = found[c.step, c.layer, c.head]
        order = np.argsort(slots[: len(c.scores["score"])])
        for j, name in enumerate(names):
            step = (bound[j, 1] - bound[j, 0]) / (top - 1)
            # Half a step, and float32's rounding of the bounds.
            np.testing.assert_allclose(
                values[j], c.scores[name][order], atol=0.5001 * step + 1e-6 * np.abs(bound[j]).max()
            )
    assert scored == len(index) > 0


def test_scores(recorded):
    header, arrays = decode(viz.kept(recorded))
    assert header["scores"] == [["importance", "redundancy", "penalty", "score"]] and header["bits"] == 16
    assert_scores(recorded, header, arrays)


def test_scores_of_slots_out_of_order():
    trace = build(np.random.default_rng(2), 40, 2, 2, [10, 20, 30], scores=("score",), order=True)
    header, arrays = decode(viz.kept(trace))
    assert_scores(trace, header, arrays)


def test_scores_that_are_not_finite():
    values = {"score": np.array([-np.inf, 1.0, np.nan, 3.0], np.float32)}
    trace = Trace([0] * 5, list("abcde"), 1, 1, 1, "custom", [Compaction(5, 0, 0, 5, np.array([1, 4]), values)])
    header, arrays = decode(viz.kept(trace))
    assert arrays["codes0"].tolist() == [65535, 0, 65535, 65534] and arrays["bounds0"].tolist() == [1.0, 3.0]


def test_scores_that_do_not_fit_are_coarser_then_left_out(recorded, monkeypatch):
    sizes = {16: len(viz.kept(recorded).html)}
    monkeypatch.setattr(views, "LIMIT", sizes[16] - 1)
    page = viz.kept(recorded)
    header, arrays = decode(page)
    assert header["bits"] == 8 and "left_out" not in header and len(page.html) < sizes[16]
    assert_scores(recorded, header, arrays)
    monkeypatch.setattr(views, "LIMIT", len(page.html) - 1)
    header, arrays = decode(viz.kept(recorded))
    assert "scores" not in header and header["left_out"] == views.LIMIT
    assert_same(recorded, header, arrays)


# -- the page as a file


class Shape(HTMLParser):
    """Tags, attributes and text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.comments, self.words, self._inside = [], [], [], [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        self._inside = tag

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)
        self._inside = None

    def handle_comment(self, text):
        self.comments.append(text)

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.words.append(data)


def test_hostile_texts_cannot_leave_the_data_block():
    rng = np.random.default_rng(3)
    n = len(HOSTILE)
    harmless = build(rng, n, 1, 2, [n // 2, n])
    hostile = build(rng, n, 1, 2, [n // 2, n], HOSTILE, method="custom:</title><script>alert(1)</script>&\"'")
    hostile.settings["model"] = "</script><img src=x onerror=alert(1)>"
    for make in (viz.kept, lambda t: viz.compare(t, t), lambda t: viz.survival(t, 0)):
        page, calm = make(hostile), Shape(make(harmless).html)
        shape = Shape(page.html)
        assert shape.tags == calm.tags and shape.comments == calm.comments
        assert shape.attributes == calm.attributes
        assert decode(page)[0]["texts"] == HOSTILE
        assert page.html.encode()  # no surrogate is left
        assert "alert" not in re.sub(r"<title>.*?</title>", "", page.html)


def test_notebooks_get_an_isolated_frame(recorded):
    page = viz.kept(recorded)
    shape = Shape(page._repr_html_())
    attributes = {name: value for _, name, value in shape.attributes}
    assert shape.tags == ["iframe", "/iframe"] and attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == page.html
    assert repr(page) == f"<Page {page.title!r}: {len(page.html.encode())} bytes; save(path) writes it>"


def test_pages_load_nothing(recorded, tmp_path):
    pages = [
        viz.kept(recorded),
        viz.compare(recorded, recorded),
        viz.survival(recorded, 0),
        viz.curve([outcome("full", 5)]),
    ]
    for page in pages:
        page.save(tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert text == page.html
        code = text.replace('xmlns="http://www.w3.org/2000/svg"', "")  # a name, not an address
        assert not re.search(
            r"https?:|//[a-z]+\.|@import|url\(|\b(?:src|href)\s*=|import\(|fetch\(|XMLHttpRequest", code
        )
        assert "default-src 'none'" in code


def test_templates_are_all_filled(recorded):
    for page in (viz.kept(recorded), viz.survival(recorded, 0), viz.curve([outcome("full", 5)])):
        assert not re.search(r"\{\{\w+\}\}", page.html)


def test_text_keeps_its_contrast_in_both_themes():
    style = (files("skipkv.viz") / "page.css").read_text()
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part))
        for part in style.split("@media (prefers-color-scheme: dark)")[:2]
    ]
    pairs = [
        ("k0", "k0-ink"),
        ("both", "both-ink"),
        ("paper", "ink"),
        ("raised", "ink"),
        ("paper", "dim"),
        ("raised", "dim"),
    ]
    pairs += [("paper", name) for name in ("work", "check", "lambda", "mark")]
    pairs += [(f"k{i}", "low-ink" if i < 5 else "high-ink") for i in (1, 2, 3, 4, 6, 7, 8)] + [("k5", "k5-ink")]
    pairs += [(f"{run}{i}", f"{run}-{'low' if i < 3 else 'high'}") for run in "ab" for i in (1, 2, 3)]

    def luminance(colour):
        c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for theme in (themes[0], themes[0] | themes[1]):
        for pair in pairs:
            low, high = sorted(luminance(theme[name]) for name in pair)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (pair, theme[pair[0]], theme[pair[1]])
        # A sequential scale: lightness alone tells more from fewer.
        scale = [luminance(theme[f"k{i}"]) for i in range(1, 9)]
        assert scale in (sorted(scale), sorted(scale, reverse=True))


# -- large traces


def large(n=16_000, layers=28, heads=4, budget=1024, frames=100):
    rng = np.random.default_rng(4)
    steps = np.linspace(budget, n, frames).astype(int).tolist()
    history = {}
    for pair in np.ndindex(layers, heads):
        slots, fed = np.zeros(0, np.int32), 0
        for step in steps:
            slots, fed = np.concatenate([slots, np.arange(fed, step, dtype=np.int32)]), step
            before, slots = len(slots), slots[np.sort(rng.permutation(len(slots))[:budget])]
            history[(step, *pair)] = before, slots
    compactions = [Compaction(*key, *history[key]) for key in sorted(history)]
    texts = [" word", ",", " the", " and", ".\n\n", " 42", "<think>", "\ufffd"]
    words = [texts[i] for i in rng.integers(0, len(texts), n)]
    ends = [p for p, word in enumerate(words) if word.endswith("\n")]
    sentences = [
        (a, b, b, int(rng.integers(2)), float(rng.random()), 0)
        for a, b in zip([0, *(e + 1 for e in ends)], ends, strict=False)
    ]
    return Trace(list(range(n)), words, 100, layers, heads, "rkv:budget=1024", compactions, sentences)


def test_a_large_trace_is_small_and_quick():
    trace = large()
    begin = time.perf_counter()
    page = viz.kept(trace)
    seconds = time.perf_counter() - begin
    assert len(page.html.encode()) < 5_000_000
    assert seconds < 60  # about 1 on an idle core; the bound is for a crowded one
    header, arrays = decode(page)
    n = len(trace.tokens)
    ages = arrays["ages0"].reshape(-1, n)
    first = np.searchsorted(header["steps"], np.arange(n), side="right") + 1
    for c in trace.compactions[:: len(trace.compactions) // 50]:
        frame, age = header["steps"].index(c.step) + 1, ages[c.layer * 4 + c.head].astype(int)
        stays = (np.arange(n) < c.step) & ((age == 0) | (first + age - 1 > frame))
        assert np.array_equal(np.flatnonzero(stays), c.kept)


# -- two traces


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces(), st.integers(0, 2**32 - 1), st.data())
def test_compare_holds_both_and_their_differences(a, seed, data):
    n = len(a.tokens)
    steps = sorted(data.draw(st.sets(st.integers(1, n), max_size=8)))
    b = build(np.random.default_rng(seed), n, a.n_layers, a.n_kv_heads, steps, a.texts)
    header, arrays = decode(viz.compare(a, b))
    assert header["steps"] == sorted({*a.steps, *b.steps})
    for run, trace in enumerate((a, b)):
        assert_same(trace, header, arrays, run)
        assert header["traces"][run]["method"] == str(trace.method)
    for frame, step in enumerate(header["steps"], 1):
        for h, (layer, head) in enumerate(np.ndindex(a.n_layers, a.n_kv_heads)):
            x, y = (set(held(header, arrays, run, h, frame)) for run in (0, 1))
            p, q = (set(t.held(step, layer, head).tolist()) for t in (a, b))
            assert (x - y, y - x, x & y) == (p - q, q - p, p & q)


# -- what is refused


def fails(message, function, *args, **options):
    with pytest.raises(ConfigError) as caught:
        function(*args, **options)
    assert str(caught.value) == message


def test_errors_of_parameters(recorded):
    n = len(recorded.tokens)
    fails(f"step is {n + 1}; allowed: integers from 0 to {n}", viz.kept, recorded, n + 1)
    fails(f"step is True; allowed: integers from 0 to {n}", viz.kept, recorded, True)
    fails("layers is 4; allowed: integers from 0 to 3", viz.kept, recorded, layers=4)
    fails("heads is -1; allowed: integers from 0 to 3", viz.kept, recorded, heads=[0, -1])
    fails("heads is []; allowed: at least one integer from 0 to 3", viz.kept, recorded, heads=[])
    fails("layers is '1'; allowed: integers from 0 to 3", viz.compare, recorded, recorded, layers="1")
    fails("layer is 4; allowed: integers from 0 to 3", viz.survival, recorded, 4)
    fails("layer is None; allowed: integers from 0 to 3", viz.survival, recorded, None)
    fails("heads is 1.5; allowed: integers from 0 to 3", viz.survival, recorded, 0, 1.5)


def test_errors_of_compare():
    def trace(tokens, texts, layers=1):
        return Trace(tokens, texts, 1, layers, 2, "full")

    a = trace([1, 2, 3], ["a", "b", "c"])
    hint = "replay one text under both methods"
    fails(
        f"the texts differ at position 1: 'b' (token 2) and '<' (token 9); {hint}",
        viz.compare,
        a,
        trace([1, 9, 3], ["a", "<", "c"]),
    )
    fails(
        f"the texts differ at position 2: 'c' (token 3) and 'd' (token 3); {hint}",
        viz.compare,
        a,
        trace([1, 2, 3], ["a", "b", "d"]),
    )
    fails(f"the texts have 3 and 2 tokens; {hint}", viz.compare, a, trace([1, 2], ["a", "b"]))
    fails("the traces have 1 layers × 2 KV heads and 3 × 2", viz.compare, a, trace([1, 2, 3], ["a", "b", "c"], 3))


INSIDE = "allowed: layers below 1, heads below 2, steps from 1 to 5"


@pytest.mark.parametrize(
    "compactions, message",
    [
        ([(4, 0, 0, [4])], "trace: layer 0, head 0 at step 4 keeps position 4, which was not held"),
        ([(4, 0, 0, [-1])], "trace: layer 0, head 0 at step 4 keeps position -1, which was not held"),
        ([(2, 0, 1, [1]), (4, 0, 1, [0, 1])], "trace: layer 0, head 1 at step 4 keeps position 0, which was not held"),
        ([(4, 0, 0, [1, 1])], "trace: layer 0, head 0 at step 4 keeps a position twice"),
        ([(4, 1, 0, [1])], f"trace: compaction of layer 1, head 0 at step 4; {INSIDE}"),
        ([(6, 0, 0, [1])], f"trace: compaction of layer 0, head 0 at step 6; {INSIDE}"),
    ],
)
def test_errors_of_traces_that_do_not_fit_themselves(compactions, message):
    found = [Compaction(step, layer, head, step, np.array(kept, np.int32)) for step, layer, head, kept in compactions]
    fails(message, viz.kept, Trace([0] * 5, list("abcde"), 1, 1, 2, "rkv:budget=8", found))


SENTENCE = "(first, last, closed, thought, lambda, repeats) that follow each other, below 5, all finite"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layers": -1}, "trace has -1 layers × 2 KV heads; allowed: from 1 to 16384 heads in all"),
        ({"n_layers": 10**9}, "trace has 1000000000 layers × 2 KV heads; allowed: from 1 to 16384 heads in all"),
        ({"n_prompt": 6}, "trace has a prompt of 6 tokens; allowed: 0 to 5"),
        ({"sentences": [(0, 5, 5, 0, 0.0, 0)]}, f"trace: sentence (0, 5, 5, 0, 0.0, 0); allowed: {SENTENCE}"),
        (
            {"sentences": [(0, 2, 2, 0, 0.0, 0), (2, 3, 3, 0, 0.0, 0)]},
            f"trace: sentence (2, 3, 3, 0, 0.0, 0); allowed: {SENTENCE}",
        ),
        ({"sentences": [(0, 1, 1, 0, np.nan, 0)]}, f"trace: sentence (0, 1, 1, 0, nan, 0); allowed: {SENTENCE}"),
        ({"alphas": {5: 1.0}}, "trace: (position, α) is (5, 1.0); allowed: positions below 5, finite α"),
        ({"alphas": {0: np.inf}}, "trace: (position, α) is (0, inf); allowed: positions below 5, finite α"),
        ({"alphas": {0: "a"}}, "trace: (position, α) is (0, 'a'); allowed: positions below 5, finite α"),
        ({"bytes": [(6, 1)]}, "trace: (step, bytes) is (6, 1); allowed: steps from 0 to 5, bytes from 0"),
        ({"bytes": [(5,)]}, "trace: (step, bytes) is (5,); allowed: steps from 0 to 5, bytes from 0"),
    ],
)
def test_errors_of_what_a_file_may_bring(change, message, tmp_path):
    replace(Trace([0] * 5, list("abcde"), 1, 1, 2, "full"), **change).save(tmp_path / "trace.npz")
    fails(message, viz.kept, Trace.load(tmp_path / "trace.npz"))


def test_a_sentence_of_too_few_numbers_is_refused(tmp_path):
    broken = Trace([0] * 5, list("abcde"), 1, 1, 2, "full", sentences=[(0, 1)])
    fails(f"trace: sentence (0, 1); allowed: {SENTENCE}", viz.kept, broken)
    broken.save(tmp_path / "trace.npz")
    with pytest.raises(skipkv.Error, match="trace.npz: expected a skipkv trace, found something else"):
        Trace.load(tmp_path / "trace.npz")


def test_a_method_that_cannot_be_written_is_replaced(tmp_path):
    page = viz.kept(Trace([0], ["a"], 1, 1, 1, "full\ud800"))
    page.save(tmp_path / "page.html")
    assert "full?" in page.title and "full?" in repr(page) and "full?" in page._repr_html_()


def test_errors_of_traces_without_text():
    fails("trace has no tokens; allowed: at least one", viz.kept, Trace([], [], 0, 1, 1, "full"))
    fails("trace has 2 tokens, but 1 texts", viz.survival, Trace([1, 2], ["a"], 1, 1, 1, "full"), 0)


# -- survival


def test_survival_holds_one_layer(recorded):
    header, arrays = decode(viz.survival(recorded, 2, heads=[1, 3]))
    assert (header["view"], header["layers"], header["heads"]) == ("survival", [2], [1, 3])
    assert_same(recorded, header, arrays)
    assert "scores" not in header


# -- curves


def outcome(run, right, n=10, peak=1e6):
    return Outcome(skipkv.Full(), None, right, n, right / n - 0.05, right / n + 0.04, 300.0, 0, peak, 0.5, 0, 10.0, run)


def fidelity(run, kl):
    figures = (1.0, 0.9, 1.1), (0.1, 0.0, 0.2), kl, (0.9, 0.8, 0.95)
    return Fidelity(skipkv.Full(), None, *figures, 10**6, 3, 100, 0.1, run)


SVG = "{http://www.w3.org/2000/svg}"


def drawn(picture):
    """Class of each series → (its titles, the y of its markers)."""
    root = ElementTree.fromstring(picture.svg)
    found = {}
    for group in root.findall(f"{SVG}g"):
        titles = [t.text for t in group.iter(f"{SVG}title")]
        if titles:
            marks = [
                m.get("transform") for g in group.findall(f"{SVG}g") for m in g.findall(f"{SVG}path[@class='marker']")
            ]
            found[group.get("class")] = titles, [tuple(map(float, re.findall(r"[\d.]+", m))) for m in marks]
    return found


def test_a_curve_of_outcomes():
    runs = [outcome("full", 9), *(outcome(f"rkv:budget={b},interval=32", r) for b, r in [(256, 8), (64, 2), (128, 5)])]
    runs.append(outcome("skipkv:interval=32,budget=64", 4))
    picture = viz.curve(runs)
    series = drawn(picture)
    assert series["s1"][0] == [
        "rkv:budget=64,interval=32: accuracy, % 20.0 [15.0, 24.0]",
        "rkv:budget=128,interval=32: accuracy, % 50.0 [45.0, 54.0]",
        "rkv:budget=256,interval=32: accuracy, % 80.0 [75.0, 84.0]",
    ]
    (x0, y0), (x1, y1), (x2, y2) = series["s1"][1]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1  # doubled budgets are as far apart; one decimal
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1
    texts = [t.text for t in ElementTree.fromstring(picture.svg).iter(f"{SVG}text")]
    assert {
        "accuracy, %",
        "budget, slots a head (logarithmic)",
        "full",
        "rkv:interval=32",
        "skipkv:interval=32",
        "64",
        "100",
    } <= set(texts)
    assert len(ElementTree.fromstring(picture.svg).findall(f".//{SVG}rect")) == 1  # the band of full
    assert "<td>rkv:budget=128,interval=32</td><td>128</td><td>50.0 [45.0, 54.0]</td>" in picture.html


def test_curves_tell_series_apart_without_colour():
    picture = viz.curve([outcome(f"rkv:budget=64,interval={i}", 5) for i in range(9)])
    root = ElementTree.fromstring(picture.svg)
    looks = set()
    for group in root.findall(f"{SVG}g"):
        line = group.find(f"{SVG}path[@class='line']")
        if line is not None and group.get("role") is None:
            looks.add((line.get("stroke-dasharray"), group.find(f"{SVG}path[@class='marker']").get("d")))
    assert len(looks) == 9


def test_a_curve_of_fidelities_and_other_axes():
    runs = [
        fidelity("full", (0.0, 0.0, 0.0)),
        fidelity("rkv:budget=64", (0.2, 0.1, 0.3)),
        fidelity("rkv:budget=32", (float("nan"),) * 3),
    ]
    assert drawn(viz.curve(runs))["s1"][0] == [
        "rkv:budget=64: KL divergence from the full cache, nats a token 0.2000 [0.1000, 0.3000]"
    ]
    assert len(drawn(viz.curve(runs, "same", x="peak_bytes"))["s1"][0]) == 2
    assert "no intervals recorded" in viz.curve([outcome("rkv:budget=64", 1)], "length").svg


@pytest.mark.parametrize(
    "run, expected",
    [
        ("full", ("full", None)),
        ("rkv:budget=64", ("rkv", 64.0)),
        ("rkv:budget=64,mix=0.07", ("rkv:mix=0.07", 64.0)),
        ("rkv:mix=0.07,budget=64", ("rkv:mix=0.07", 64.0)),
        ("rkv:budget=96/80/64/48", ("rkv", 72.0)),
        ("rkv:budget=64+32/16", ("rkv", 32.0)),
        ("skipkv:budget=64+steer:layer=2,alpha=1", ("skipkv+steer:layer=2,alpha=1", 64.0)),
        ("skipkv:budget=64,tau=0.9+steer:layer=2,alpha=1", ("skipkv:tau=0.9+steer:layer=2,alpha=1", 64.0)),
        ("custom:score=mine,budget=96/48,tau=0.9", ("custom:score=mine,tau=0.9", 72.0)),
    ],
)
def test_budgets_of_runs(run, expected):
    assert curves.split_budget(run) == expected


def test_budgets_as_methods_write_them():
    for budget in (64, [64, 32], [[64, 32], [16, 12]]):
        methods = {"rkv:mix=0.07": skipkv.RKV(budget, mix=0.07), "custom:score=len": skipkv.Custom(len, budget=budget)}
        for name, method in methods.items():
            assert curves.split_budget(str(method)) == (name, float(np.mean(budget)))


def test_curves_where_all_values_are_the_most_or_none_is_finite():
    runs = [outcome("full", 3), outcome("rkv:budget=64", 3), outcome("rkv:budget=32", 3)]
    runs = [replace(run, low=1.0, high=1.0, right=run.n) for run in runs]
    assert ">99<" in viz.curve(runs).svg and ">100<" in viz.curve(runs).svg and ">101<" not in viz.curve(runs).svg
    half = fidelity("rkv:budget=64", (1.0, float("nan"), 2.0))
    assert list(drawn(viz.curve([half, fidelity("rkv:budget=32", (1.0, 0.5, 2.0))]))) == ["s0"]
    fails("results have no finite kl; allowed: at least one", viz.curve, [half])


def test_long_names_end_inside_of_the_picture():
    name = "custom:score=" + "x" * 200
    picture = viz.curve([outcome(f"{name},budget=8", 3)])
    assert f">{name[:89]}…</text>" in picture.svg and name in picture.html


def test_errors_of_curves(tmp_path):
    runs = [outcome("full", 9)]
    fails("results hold none; allowed: at least one Outcome, or at least one Fidelity", viz.curve, [])
    fails(
        "results hold Outcome, Fidelity; allowed: at least one Outcome, or at least one Fidelity",
        viz.curve,
        [*runs, fidelity("full", (0, 0, 0))],
    )
    fails("y is 'kl'; allowed: accuracy, length, peak_bytes, flagged", viz.curve, runs, "kl")
    fails("x is 'tokens'; allowed: budget, peak_bytes", viz.curve, runs, x="tokens")
    fails("results have no finite kl; allowed: at least one", viz.curve, [fidelity("full", (float("nan"),) * 3)])
    picture = viz.curve(runs)
    fails(f"path is '{tmp_path}/a.png'; allowed: names that end in .svg or .html", picture.save, f"{tmp_path}/a.png")
    picture.save(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == picture.svg


def test_hostile_names_of_runs():
    picture = viz.curve([outcome("custom:score=</svg><script>&\"',budget=8", 3)], title="<b>&")
    ElementTree.fromstring(picture.svg)  # still one well-formed picture
    assert Shape(picture.html).tags.count("script") == 2


# -- the page's own code


NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed; the page's own decoder is not run")


def in_node(page, code):
    """The value of a JavaScript expression over ``data``, the page's unpacked block."""
    script = (files("skipkv.viz") / "decode.js").read_text(encoding="utf-8")
    block = re.search(r'id="data">([^<]*)<', page.html)[1]
    program = f"{script}\nunpack({json.dumps(block)}).then((data) => process.stdout.write(JSON.stringify({code})))"
    done = subprocess.run([NODE, "-"], input=program, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ALL_HELD = """data.runs.map((run) => Array.from({length: data.frames}, (_, f) =>
    data.header.layers.flatMap((_, l) => data.header.heads.map((_, k) =>
        heldPositions(data, run, l * data.header.heads.length + k, f)))))"""


@needs_node
@pytest.mark.parametrize("seed", range(4))
def test_the_browser_decodes_the_same_sets(seed):
    rng = np.random.default_rng(seed)
    n = 30 if seed else 300  # the first with ages of 16 bits
    steps = sorted(rng.choice(np.arange(1, n + 1), 260 if n == 300 else 6, replace=False).tolist())
    a, b = (
        build(rng, n, 2, 2, steps[i::1], HOSTILE * (n // len(HOSTILE)) + HOSTILE[: n % len(HOSTILE)]) for i in (0, 1)
    )
    page = viz.compare(a, b)
    found = in_node(page, ALL_HELD)
    header = decode(page)[0]
    for run, trace in enumerate((a, b)):
        for frame, step in enumerate(header["steps"], 1):
            for h, pair in enumerate(np.ndindex(2, 2)):
                assert found[run][frame][h] == trace.held(step, *pair).tolist()
    counts = in_node(page, """Array.from({length: data.frames}, (_, f) => {
        const [a, b, both] = [0, 0, 0].map(() => new Uint16Array(data.n));
        countHeld(data, data.runs[0], [0, 3], f, a); countHeld(data, data.runs[1], [0, 3], f, b);
        countBoth(data, data.runs[0], data.runs[1], [0, 3], f, both);
        return [a, b, both].map((list) => Array.from(list)); })""")  # fmt: skip
    for frame, step in enumerate(header["steps"], 1):
        sets = [[set(t.held(step, *pair).tolist()) for pair in ((0, 0), (1, 1))] for t in (a, b)]
        sets.append([x & y for x, y in zip(*sets, strict=True)])
        for k in range(3):
            assert counts[frame][k] == [sum(p in s for s in sets[k]) for p in range(n)]


@needs_node
def test_the_browser_finds_scores(recorded):
    page = viz.kept(recorded)
    found = in_node(page, """data.header.steps.map((_, i) => [0, 5].map((h) =>
        Array.from({length: data.n}, (_, p) => scoresAt(data, data.runs[0], h, i + 1, p))))""")  # fmt: skip
    checked = 0
    for c in recorded.compactions:
        if (c.layer, c.head) not in ((0, 0), (1, 1)):
            continue
        row = found[recorded.steps.index(c.step)][c.layer]
        earlier = [x.step for x in recorded.compactions if (x.layer, x.head) == (c.layer, c.head) and x.step < c.step]
        slots = recorded.held(max(earlier), c.layer, c.head).tolist() if earlier else []
        slots += range(earlier[-1] if earlier else 0, c.step)
        n = len(c.scores["score"])
        assert [p for p, value in enumerate(row) if value] == slots[:n]
        for place, p in enumerate(slots[:n]):
            for name, values in c.scores.items():
                tolerance = np.ptp(values) / 65534 + 1e-6 * np.abs(values).max()  # a step of the quantisation
                assert abs(row[p][name] - values[place]) <= tolerance
            checked += 1
        ranks = [row[p]["rank"] for p in slots[:n]]
        assert min(ranks) == 1 and max(ranks) <= n == row[slots[0]]["size"]
    assert checked > 100


@needs_node
def test_the_browser_shows_what_cannot_be_seen(recorded):
    texts = [
        "a\n\n",
        "a\nb\n",
        "\t\r",
        "\0\x7f",
        "\u2028\u202e\u200b",
        "\ud800",
        "",
        "\ufffd",
        "<b>&\"'",
        "\U0001f469\u200d\U0001f4bb",
    ]
    code = f"{json.dumps(texts)}.map((text) => [visible(text, false), visible(text, true)])"
    shown = in_node(viz.kept(recorded), code)
    assert shown == [
        ["a⏎\n⏎\n", "a⏎⏎"], ["a⏎\nb⏎\n", "a⏎\nb⏎"], ["⇥\t␍"] * 2, ["␀⟨U+007F⟩"] * 2, ["⟨U+2028⟩⟨U+202E⟩⟨U+200B⟩"] * 2,
        ["⟨U+D800⟩"] * 2, ["∅"] * 2, ["\ufffd"] * 2, ["<b>&\"'"] * 2, ["\U0001f469\u200d\U0001f4bb"] * 2,
    ]  # fmt: skip


@needs_node
def test_the_browser_covers_the_text_with_sentences(recorded):
    blocks = in_node(viz.kept(recorded), "sentencesOf(data.runs[0], data.n)")
    assert [p for s in blocks for p in range(s["first"], s["last"] + 1)] == list(range(len(recorded.tokens)))
    assert [s["number"] for s in blocks if s["number"]] == list(range(1, len(recorded.sentences) + 1))
