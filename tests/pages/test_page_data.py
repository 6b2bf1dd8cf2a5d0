"""Pages hold exactly what the trace holds, in a form that nothing of a trace can break."""

import base64
import html
import json
import re
import time
import tracemalloc
import zlib
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from traces import HOSTILE, PROMPT, build, sentences_of

from skipkv import Compaction, ConfigError, Error, Trace, viz
from skipkv.viz import encode, views

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
    positions, steps = np.arange(len(header["texts"])), header["steps"]
    age = arrays[f"ages{run}"].reshape(-1, len(positions))[head].astype(int)
    met = np.searchsorted(steps, positions, side="right")
    fed = steps[max(frame - 1, 0)] if steps else len(positions)
    return np.flatnonzero((positions < fed) & ((age == 0) | (frame < met + age))).tolist()


def assert_same(trace, page, run=0):
    """The page against `Trace.held`, every frame and head; header and arrays."""
    header, arrays = decode(page)
    for frame, step in enumerate([None, *header["steps"]]):
        for place, pair in enumerate((layer, head) for layer in header["layers"] for head in header["heads"]):
            fed = header["steps"][0] if header["steps"] else len(trace.tokens)
            expected = trace.held(step, *pair) if frame else np.arange(fed)
            assert held(header, arrays, run, place, frame) == expected.tolist(), (frame, pair)
    return header, arrays


@st.composite
def traces(draw):
    n = draw(st.integers(1, 40))
    steps = sorted(draw(st.sets(st.integers(1, n), max_size=8)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    method = draw(st.sampled_from(["rkv:budget=8", "rkv:budget=8,evict=False"]))
    texts = [draw(st.sampled_from(HOSTILE)) for _ in range(n)]
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return build(rng, n, *shape, steps, texts, method, order=draw(st.booleans()))


# -- kept sets


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces())
def test_the_page_holds_the_kept_sets(trace):
    header, _ = assert_same(trace, viz.kept(trace))
    assert header["texts"] == trace.texts
    assert header["traces"][0]["virtual"] == str(trace.method).endswith("evict=False")


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("method", [
    "skipkv:budget=64/48/40/32,interval=16,tau=0.88", "rkv:budget=48,interval=16,compat=official",
    "rkv:budget=48,interval=16,allocate=layer", "knorm:budget=48,interval=16",
])  # fmt: skip
def test_a_real_trace(model, trace, method, evict):
    found = model.replay(trace.tokens, f"{method},evict={evict}", n_prompt=trace.n_prompt, trace="scores").trace
    header, arrays = assert_same(found, viz.kept(found))
    assert header["traces"][0]["virtual"] is not evict
    assert_scores(found, header, arrays)


def test_a_saved_trace_gives_the_same_page(trace, tmp_path):
    trace.save(tmp_path / "trace.npz")
    assert viz.kept(Trace.load(tmp_path / "trace.npz")).html == viz.kept(trace).html


def test_a_trace_without_compactions(model, trace):
    full = model.replay(trace.tokens, "full", trace=True).trace
    header, _ = assert_same(full, viz.kept(full))
    assert header["steps"] == [] and header["start"] == 0
    decode(viz.survival(full, 0)), decode(viz.compare(full, trace))


def test_more_than_254_compactions_need_wider_ages():
    trace = build(np.random.default_rng(0), 300, 1, 1, range(1, 300), share=1.0)
    assert assert_same(trace, viz.kept(trace))[1]["ages0"].dtype == np.uint16


def test_chosen_layers_and_heads(trace):
    header, _ = assert_same(trace, viz.kept(trace, layers=[3, 1], heads=2))
    assert (header["layers"], header["heads"]) == ([1, 3], [2])
    header, _ = assert_same(trace, viz.survival(trace, 2, heads=[1, 3]))
    assert (header["view"], header["layers"], header["heads"]) == ("survival", [2], [1, 3]) and "scores" not in header


def test_the_slider_starts_where_asked(trace):
    steps = trace.steps
    for step, frame in [(None, len(steps)), (0, 0), (steps[0] - 1, 0), (steps[0], 1), (steps[1] + 1, 2)]:
        assert decode(viz.kept(trace, step))[0]["start"] == frame


def test_sentences_alphas_and_bytes(trace):
    run = decode(viz.kept(trace))[0]["traces"][0]
    for found, (first, last, _, thought, similarity, repeats) in zip(run["sentences"], trace.sentences, strict=True):
        assert found == [first, last, int(thought), pytest.approx(similarity, abs=5e-5), int(repeats)]  # rounded
    assert run["bytes"] == [list(b) for b in trace.bytes]
    assert run["alphas"] == [] and run["steps"] == trace.steps


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces(), st.integers(0, 2**32 - 1), st.data())
def test_compare_holds_both(a, seed, data):
    n = len(a.tokens)
    steps = sorted(data.draw(st.sets(st.integers(1, n), max_size=8)))
    b = build(np.random.default_rng(seed), n, a.n_layers, a.n_kv_heads, steps, a.texts)
    page = viz.compare(a, b)
    for run, trace in enumerate((a, b)):
        header, _ = assert_same(trace, page, run)
        assert header["traces"][run]["method"] == str(trace.method)
    assert header["steps"] == sorted({*a.steps, *b.steps})


# -- the cache's line


def sizes(trace, steps, slots=1, page=1):
    """(step, before, after) of the whole cache from the sets that are held."""
    found = []
    for step in steps:
        after = [len(trace.held(step, *head)) for head in np.ndindex(trace.n_layers, trace.n_kv_heads)]
        before = [len(trace.held(max(step - 1, 0), *head)) + 1 for head in np.ndindex(trace.n_layers, trace.n_kv_heads)]
        found.append((step, *(page * sum(-(-n // slots) for n in size) for size in (before if step else after, after))))
    return found


def assert_line(line, expected):
    """A line through corners has, at every step, one value or two of them."""
    x, y = np.array(line).T
    assert len(line) < 2 * len(expected) or len(expected) < 4
    for step, before, after in expected:
        at = y[x == step].tolist()
        assert (at or [np.interp(step, x, y)]) == ([before, after] if before != after else [after]), step


@pytest.mark.parametrize("method", [
    "rkv:budget=66,interval=16", "h2o:budget=40,interval=32", "streaming:budget=130/70/66/20,interval=16",
    "skipkv:budget=66,interval=16,tau=0.88,allocate=layer",
])  # fmt: skip
def test_the_caches_line_is_what_the_run_measured(model, method):
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
    assert np.interp(len(trace.tokens) - 1, *np.array(size["full"]).T) == stats.full_bytes


def test_the_cache_of_a_run_that_drops_nothing(model):
    method = "rkv:budget=40,interval=16,evict=false"
    out = model.generate(PROMPT, method, trace=True, max_new_tokens=90, progress=False)[0]
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


def assert_scores(trace, header, arrays):
    """Every recorded score, within half a step of the quantisation."""
    names, top = header["scores"][0], 2 ** header["bits"] - 1
    index = arrays["index0"].reshape(-1, 3)
    bounds, codes, at = arrays["bounds0"].reshape(len(index), len(names), 2), arrays["codes0"], 0
    by_head = {(c.step, c.layer, c.head): c for c in trace.compactions}
    for (frame, head, size), bound in zip(index.tolist(), bounds, strict=True):
        layer, k = divmod(head, len(header["heads"]))
        c = by_head.pop((header["steps"][frame - 1], header["layers"][layer], header["heads"][k]))
        earlier = [x for x in trace.compactions if (x.layer, x.head, x.step < c.step) == (c.layer, c.head, True)]
        before, fed = (earlier[-1].kept, earlier[-1].step) if earlier else (np.zeros(0, np.int32), 0)
        order = np.argsort(np.concatenate([before, np.arange(fed, c.step)])[:size])
        for name, (low, high) in zip(names, bound.astype(float), strict=True):
            part, at = codes[at : at + size].astype(float), at + size
            step = (high - low) / (top - 1)
            values = np.where(part == top, np.nan, low + step * part)
            # Half a step, and float32's rounding of the bounds.
            tolerance = 0.5001 * step + 1e-6 * max(abs(low), abs(high))
            np.testing.assert_allclose(values, c.scores[name][order], atol=tolerance)
    assert len(index) > 0 and at == len(codes) and not any(c.scores for c in by_head.values())


def test_scores(trace):
    header, arrays = decode(viz.kept(trace))
    assert header["scores"] == [["importance", "redundancy", "penalty", "score"]] and header["bits"] == 16
    assert_scores(trace, header, arrays)
    mixed = build(np.random.default_rng(2), 40, 2, 2, [10, 20, 30], scores=("score",), order=True)
    assert_scores(mixed, *decode(viz.kept(mixed)))


def test_scores_that_are_not_finite():
    values = {"score": np.array([-np.inf, 1.0, np.nan, 3.0], np.float32)}
    trace = Trace([0] * 5, list("abcde"), 1, 1, 1, "custom", [Compaction(5, 0, 0, 5, np.array([1, 4]), values)])
    _, arrays = decode(viz.kept(trace))
    assert arrays["codes0"].tolist() == [65535, 0, 65535, 65534] and arrays["bounds0"].tolist() == [1.0, 3.0]


def test_scores_that_do_not_fit_are_coarser_then_left_out(trace, monkeypatch):
    size = len(viz.kept(trace).html)
    monkeypatch.setattr(views, "LIMIT", size - 1)
    page = viz.kept(trace)
    header, arrays = decode(page)
    assert header["bits"] == 8 and "left_out" not in header and len(page.html) < size
    assert_scores(trace, header, arrays)
    monkeypatch.setattr(views, "LIMIT", len(page.html) - 1)
    header, _ = assert_same(trace, viz.kept(trace))
    assert "scores" not in header and header["left_out"] == views.LIMIT


# -- the page as a file


MAKE = {"kept": viz.kept, "compare": lambda t: viz.compare(t, t), "survival": lambda t: viz.survival(t, 0)}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_hostile_texts_cannot_leave_the_data_block(make):
    n = len(HOSTILE)
    attack = "custom:</title><script>alert(1)</script>&\"'"
    harmless, hostile = (
        build(np.random.default_rng(3), n, 1, 2, [n // 2, n], *more) for more in ([], [HOSTILE, attack])
    )
    hostile.settings["model"] = "</script><img src=x onerror=alert(1)>"
    page = make(hostile)
    # All that differs is the title's text, in which no tag begins, and the block.
    title, block = r"(?<=<title>)[^<]*(?=</title>)", r'(?<=id="data">)[A-Za-z0-9+/=]*(?=</script>)'
    skeletons = [re.sub(f"{title}|{block}", "", one.html) for one in (page, make(harmless))]
    assert skeletons[0] == skeletons[1] and len(skeletons[0]) > 10_000
    assert decode(page)[0]["texts"] == HOSTILE
    assert page.html.encode()  # no surrogate is left


def test_notebooks_get_an_isolated_frame(trace):
    page = viz.kept(trace)
    frame = '<iframe title="[^"<]*" sandbox="allow-scripts" srcdoc="([^"<]*)" style="[^"<]*"></iframe>'
    assert html.unescape(re.fullmatch(frame, page._repr_html_())[1]) == page.html
    assert repr(page) == f"<Page {page.title!r}: {len(page.html.encode())} bytes; save(path) writes it>"


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_pages_are_whole_and_load_nothing(trace, make, tmp_path):
    page = make(trace)
    page.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text == page.html and "default-src 'none'" in text
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|\b(?:src|href)\s*=|import\(|fetch\(|XMLHttpRequest", text)
    assert not re.search(r"\{\{\w+\}\}", text)


SERIES = [f"s{i}" for i in range(10)]


def test_text_keeps_its_contrast_in_both_themes():
    style = (files("skipkv.viz") / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part))
        for part in style.split("@media (prefers-color-scheme: dark)")[:2]
    )
    pairs = [(ground, ink) for ground in ("paper", "raised") for ink in ("ink", "dim")] + [("k0", "k0-ink")]
    pairs += [("paper", name) for name in ("work", "check", "lambda", "mark", *SERIES)]
    pairs += [(f"k{i}", "low-ink" if i < 5 else "high-ink") for i in (1, 2, 3, 4, 6, 7, 8)] + [("k5", "k5-ink")]
    pairs += [(f"{run}{i}", f"{'low' if i < 3 else 'high'}-ink") for run in "ab" for i in (1, 2, 3)]

    def luminance(colour):
        c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for theme in (light, light | dark):
        for pair in [*pairs, ("both", "low-ink")]:
            low, high = sorted(luminance(theme[name]) for name in pair)
            least = 3 if pair[1] in SERIES else 4.5  # lines, and text
            assert (high + 0.05) / (low + 0.05) >= least, (pair, theme[pair[0]], theme[pair[1]])
        # A sequential scale: lightness alone tells more from fewer.
        scale = [luminance(theme[f"k{i}"]) for i in range(1, 9)]
        assert scale in (sorted(scale), sorted(scale, reverse=True))


def test_a_large_trace_is_small_and_quick():
    n, layers, heads, budget = 16_000, 28, 4, 1024
    rng, history = np.random.default_rng(4), {}
    steps = np.linspace(budget, n, 100).astype(int).tolist()
    for pair in np.ndindex(layers, heads):
        slots, fed = np.zeros(0, np.int32), 0
        for step in steps:
            slots, fed = np.concatenate([slots, np.arange(fed, step, dtype=np.int32)]), step
            before, slots = len(slots), slots[np.sort(rng.permutation(len(slots))[:budget])]
            history[(step, *pair)] = before, slots
    words = rng.choice([" word", ",", " the", " and", ".\n\n", " 42", "<think>", "\ufffd"], n).tolist()
    compactions = [Compaction(*key, *history[key]) for key in sorted(history)]
    trace = Trace(
        list(range(n)), words, 100, layers, heads, "rkv:budget=1024", compactions, sentences_of(rng, words)
    )  # fmt: skip
    begin = time.perf_counter()
    page = viz.kept(trace)
    assert time.perf_counter() - begin < 60  # about 1 on an idle core; the bound is for a crowded one
    assert len(page.html.encode()) < 5_000_000
    header, arrays = decode(page)
    for c in compactions[:: len(compactions) // 50]:
        frame = header["steps"].index(c.step) + 1
        assert held(header, arrays, 0, c.layer * heads + c.head, frame) == c.kept.tolist()


# -- what is refused


def fails(message, function, *args, **options):
    with pytest.raises(ConfigError) as caught:
        function(*args, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("message, call", [
    ("step is {}; allowed: integers from 0 to {}", lambda t: viz.kept(t, len(t.tokens) + 1)),
    ("step is True; allowed: integers from 0 to {1}", lambda t: viz.kept(t, True)),
    ("layers is 4; allowed: integers from 0 to 3", lambda t: viz.kept(t, layers=4)),
    ("heads is -1; allowed: integers from 0 to 3", lambda t: viz.kept(t, heads=[0, -1])),
    ("heads is []; allowed: at least one integer from 0 to 3", lambda t: viz.kept(t, heads=[])),
    ("layers is '1'; allowed: integers from 0 to 3", lambda t: viz.compare(t, t, layers="1")),
    ("layer is 4; allowed: integers from 0 to 3", lambda t: viz.survival(t, 4)),
    ("layer is None; allowed: integers from 0 to 3", lambda t: viz.survival(t, None)),
    ("heads is 1.5; allowed: integers from 0 to 3", lambda t: viz.survival(t, 0, 1.5)),
])  # fmt: skip
def test_errors_of_parameters(trace, message, call):
    n = len(trace.tokens)
    fails(message.format(n + 1, n), call, trace)


@pytest.mark.parametrize("tokens, texts, layers, message", [
    ([1, 9, 3], "a<c", 1, "the texts differ at position 1: 'b' (token 2) and '<' (token 9); {hint}"),
    ([1, 2, 3], "abd", 1, "the texts differ at position 2: 'c' (token 3) and 'd' (token 3); {hint}"),
    ([1, 2], "ab", 1, "the texts have 3 and 2 tokens; {hint}"),
    ([1, 2, 3], "abc", 3, "the traces have 1 layers × 2 KV heads and 3 × 2"),
])  # fmt: skip
def test_errors_of_compare(tokens, texts, layers, message):
    a, b = Trace([1, 2, 3], list("abc"), 1, 1, 2, "full"), Trace(tokens, list(texts), 1, layers, 2, "full")
    fails(message.format(hint="replay one text under both methods"), viz.compare, a, b)


INSIDE = "allowed: layers below 1, heads below 2, steps from 1 to 5"


@pytest.mark.parametrize("compactions, message", [
    ([(4, 0, 0, [4])], "layer 0, head 0 at step 4 keeps position 4, which was not held"),
    ([(4, 0, 0, [-1])], "layer 0, head 0 at step 4 keeps position -1, which was not held"),
    ([(2, 0, 1, [1]), (4, 0, 1, [0, 1])], "layer 0, head 1 at step 4 keeps position 0, which was not held"),
    ([(4, 0, 0, [1, 1])], "layer 0, head 0 at step 4 keeps a position twice"),
    ([(4, 1, 0, [1])], f"compaction of layer 1, head 0 at step 4; {INSIDE}"),
    ([(6, 0, 0, [1])], f"compaction of layer 0, head 0 at step 6; {INSIDE}"),
])  # fmt: skip
def test_errors_of_traces_that_do_not_fit_themselves(compactions, message):
    found = [Compaction(step, layer, head, step, np.array(kept, np.int32)) for step, layer, head, kept in compactions]
    fails(f"trace: {message}", viz.kept, Trace([0] * 5, list("abcde"), 1, 1, 2, "rkv:budget=8", found))


SENTENCE = "(first, last, closed, thought, lambda, repeats) that follow each other, below 5, all finite"


@pytest.mark.parametrize("change, message", [
    ({"n_layers": -1}, "trace has -1 layers × 2 KV heads; allowed: from 1 to 16384 heads in all"),
    ({"n_layers": 10**9}, "trace has 1000000000 layers × 2 KV heads; allowed: from 1 to 16384 heads in all"),
    ({"n_layers": 1 << 13, "tokens": [0] * 8193, "texts": ["a"] * 8193},
     "trace has 8193 tokens × 16384 heads; allowed: up to 134217728 of both together"),
    ({"n_prompt": 6}, "trace has a prompt of 6 tokens; allowed: 0 to 5"),
    *(({"sentences": wrong}, f"trace: sentence {wrong[-1]}; allowed: {SENTENCE}") for wrong in (
        [(0, 5, 5, 0, 0.0, 0)], [(0, 2, 2, 0, 0.0, 0), (2, 3, 3, 0, 0.0, 0)], [(0, 1, 1, 0, np.nan, 0)],
    )),
    ({"alphas": {5: 1.0}}, "trace: (position, α) is (5, 1.0); allowed: positions below 5, finite α"),
    ({"alphas": {0: np.inf}}, "trace: (position, α) is (0, inf); allowed: positions below 5, finite α"),
    ({"alphas": {0: "a"}}, "trace: (position, α) is (0, 'a'); allowed: positions below 5, finite α"),
    ({"bytes": [(6, 1)]}, "trace: (step, bytes) is (6, 1); allowed: steps from 0 to 5, bytes from 0"),
    ({"bytes": [(5,)]}, "trace: (step, bytes) is (5,); allowed: steps from 0 to 5, bytes from 0"),
])  # fmt: skip
def test_errors_of_what_a_file_may_bring(change, message, tmp_path):
    replace(Trace([0] * 5, list("abcde"), 1, 1, 2, "full"), **change).save(tmp_path / "trace.npz")
    fails(message, viz.kept, Trace.load(tmp_path / "trace.npz"))


def test_drawing_takes_the_memory_of_one_head(tmp_path):
    """Beside a byte for every head and position, which is what the page holds."""
    n, layers = 4096, 256
    found = [Compaction(n, layer, 0, n, np.arange(64, dtype=np.int32)) for layer in range(layers)]
    trace = Trace([0] * n, ["a"] * n, 1, layers, 1, "rkv:budget=64", found)
    tracemalloc.start()
    try:
        viz.survival(trace, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * n * layers


def test_a_sentence_of_too_few_numbers_is_refused(tmp_path):
    broken = Trace([0] * 5, list("abcde"), 1, 1, 2, "full", sentences=[(0, 1)])
    fails(f"trace: sentence (0, 1); allowed: {SENTENCE}", viz.kept, broken)
    broken.save(tmp_path / "trace.npz")
    with pytest.raises(Error, match="trace.npz: expected a skipkv trace, found something else"):
        Trace.load(tmp_path / "trace.npz")


def test_a_method_that_cannot_be_written_is_replaced(tmp_path):
    page = viz.kept(Trace([0], ["a"], 1, 1, 1, "full\ud800"))
    page.save(tmp_path / "page.html")
    assert "full?" in page.title and "full?" in repr(page) and "full?" in page._repr_html_()


def test_errors_of_traces_without_text():
    fails("trace has no tokens; allowed: at least one", viz.kept, Trace([], [], 0, 1, 1, "full"))
    fails("trace has 2 tokens, but 1 texts", viz.survival, Trace([1, 2], ["a"], 1, 1, 1, "full"), 0)
