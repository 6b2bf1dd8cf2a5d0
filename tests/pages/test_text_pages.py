"""Kept, compare and survival in a real browser: what they draw is what the trace holds.

Every test also asserts that no frame says an error or requests anything but the file that was opened (`browser`).
"""

import html
import re
from collections import Counter

import numpy as np
import pytest
from reading import (
    ALL,
    CELLS,
    after,
    assert_state,
    count,
    drag,
    dropped,
    fed_by,
    hover,
    kinds_of_counts,
    look,
    percent,
    press,
    selections,
    sentence_of,
    show,
    tip_of,
    wait,
)
from traces import HOSTILE, build

from skipkv import viz
from skipkv.viz import encode

pytestmark = pytest.mark.browser


def test_the_browser_sees_what_goes_wrong(browser):
    port = "http://127.0.0.1:4567"  # whether anybody listens or not
    inner = f"<script>console.error('said inside'); fetch('{port}/inside').catch(() => (window.done = 1))</script>"
    framed = f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(inner)}"></iframe>'
    tab = browser.open(f"<img src={port}/outside>{framed}<script>throw Error('thrown')</script>")
    wait(tab.frames[1], "window.done")
    browser.close()
    assert browser.requests == {browser.file.as_uri(), f"{port}/outside", f"{port}/inside"}
    assert all(any(text in said for said in browser.messages) for text in ("said inside", "thrown"))
    browser.requests.clear(), browser.messages.clear()


# -- one trace


@pytest.mark.parametrize("name", ["trace", "uneven"])
def test_kept_at_every_compaction(browser, request, name):
    trace = request.getfixturevalue(name)
    last = len(trace.steps)
    frame = show(browser, viz.kept(trace))

    def check(at, heads):
        seen, of = look(frame), len(heads)
        counts, fed, _ = count(trace, trace.steps, at, heads)
        assert seen["kinds"] == kinds_of_counts(seen["legend"], counts, fed, of)
        assert seen["name"] == (f"Heads that hold a token, of {of}:" if of > 1 else "A token is")
        assert_state(seen["state"], trace, at, heads)

    check(last, ALL)
    for at in reversed(range(last)):
        press(frame, "ArrowLeft", at)
        check(at, ALL)
    for key, at in (("ArrowRight", 1), ("End", last), ("Home", 0)):
        press(frame, key, at)
    for heads, at in zip(selections(frame), (last // 2, last - 1, 1, last), strict=True):
        drag(frame, at)
        check(at, heads)


def test_kept_shows_each_token_once_and_in_order(browser, trace):
    frame = show(browser, viz.kept(trace))
    texts = frame.locator("#text .body > span").all_text_contents()
    assert [text.replace("⏎", "").replace("\n", "") for text in texts] == [t.replace("\n", "") for t in trace.texts]
    assert sum(text.count("⏎") for text in texts) == sum(t.count("\n") for t in trace.texts) > 10
    margins = frame.locator(".margin > *").all_text_contents()
    for i, (_, last, _, thought, lam, _) in enumerate(trace.sentences, 1):
        kind = "prompt" if last < trace.n_prompt else "re-check" if thought else ""
        assert margins[3 * i - 3 : 3 * i] == [str(i), kind, f"λ {lam:.2f}" if lam > 0 else ""]
    assert set(margins[3 * len(trace.sentences) :]) <= {"…", ""}


def test_the_strip_has_the_colours_of_the_text(browser, trace, other):
    """Also after the colour scheme has changed."""
    for page in (viz.kept(trace, trace.steps[4]), viz.compare(trace, other, trace.steps[4])):
        frame, strips = show(browser, page), []
        for scheme in ("light", "dark"):
            frame.page.emulate_media(color_scheme=scheme)
            frame.evaluate("new Promise(requestAnimationFrame)")  # before which the page hears of it
            [strip] = frame.locator(".strip.held").evaluate(CELLS)
            assert strip == [background for _, background, _ in look(frame)["tokens"]]
            strips.append(set(strip))
        assert len(strips[0]) > 4 and strips[0] & strips[1] == {"rgba(0, 0, 0, 0)"}


LINE = """(line) => {
  const box = line.parentElement.getBoundingClientRect(), matrix = line.getScreenCTM();
  const place = ({ x, y }) => new DOMPoint(x, y).matrixTransform(matrix);
  const inside = ({ x, y }) => [(x - box.left) / box.width, (box.bottom - y) / box.height];
  return [getComputedStyle(line).stroke, [...line.points].map(place).map(inside)];
}"""


def test_the_caches_lines(browser, model, trace):
    """As high as the cache was, beside the full cache; a run without a compaction has one, too."""
    full = model.replay(trace.tokens, n_prompt=trace.n_prompt, trace=True).trace
    h2o = model.replay(trace.tokens, "h2o:budget=40,interval=16", n_prompt=trace.n_prompt, trace=True).trace
    whole = encode.sizes([full])[0]["full"]
    for page, runs in (
        (viz.kept(trace), {"work": trace}), (viz.kept(full), {"work": full}),
        (viz.compare(full, trace), {"a3": full, "b3": trace}), (viz.compare(trace, h2o), {"a3": trace, "b3": h2o}),
    ):  # fmt: skip
        frame = show(browser, page)
        lines = {"dim": whole} | {
            name: size["points"] for name, size in zip(runs, encode.sizes(list(runs.values())), strict=True)
        }
        most = max(value for line in lines.values() for _, value in line)
        [scale] = [text for text in frame.locator(".scale").all_text_contents() if "dashed" in text]
        value, unit = re.fullmatch(r"to ([\d.]+) (kB|MB), dashed: full", scale).groups()
        assert float(value) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(most, rel=0.005)
        drawn = frame.locator(".strip.cache polyline").all()
        for (name, line), element in zip(lines.items(), drawn, strict=True):
            colour, points = element.evaluate(LINE)
            assert colour == "rgb({}, {}, {})".format(*frame.evaluate(f"rgb('{name}')"))
            np.testing.assert_allclose(points, np.array(line) / [len(trace.tokens), most], atol=1e-4)


def test_a_long_text_is_coloured_where_one_looks_and_in_print(browser):
    n, at = 2000, 5
    texts = [f" t{p}" + "\n" * (p % 5 == 4) for p in range(n)]
    trace = build(np.random.default_rng(6), n, 1, 1, list(range(250, n + 1, 250)), texts, share=1.0)
    counts, fed, _ = count(trace, trace.steps, at, [(0, 0)])
    expected = ["later" if p >= fed else "k8" if counts[p] else "k0" for p in range(n)]
    frame = show(browser, viz.kept(trace), height=700)
    drag(frame, at)
    frame.locator("#text").hover()
    near, top = """() => {
      const box = byId("text").getBoundingClientRect();
      const seen = ({ top, bottom }) => bottom > box.top && top < box.bottom;
      return view.spans.filter((t) => seen(t.getBoundingClientRect())).map((t) => [t.at, t.classList[0] ?? ""]);
    }""", 0
    for _ in range(4):
        frame.page.mouse.wheel(0, 2000)
        wait(frame, f"byId('text').scrollTop > {top} && ({near})().every(([, kind]) => kind)")
        top, seen = frame.evaluate("byId('text').scrollTop"), frame.evaluate(near)
        assert len(seen) > 60 and all(kind == expected[p] for p, kind in seen)
    # What was never near has no colour yet: a move of the slider costs the same in a text of any length.
    assert frame.evaluate("view.spans.filter((token) => !token.className).length") > 100
    frame.page.pdf()
    assert look(frame)["kinds"] == expected


def test_playing_ends_at_the_last_compaction(browser, trace):
    frame = show(browser, viz.kept(trace))
    frame.evaluate("""() => {
      const { setInterval } = window, { paint } = view;
      window.setInterval = (f) => setInterval(f, 1);
      window.seen = [];
      view.paint = () => (seen.push(view.frame), paint.call(view));
    }""")
    frame.locator("#play").click()
    wait(frame, "seen.length && byId('play').getAttribute('aria-label') === 'Play the compactions'")
    assert frame.evaluate("seen") == list(range(len(trace.steps) + 1))


# -- two traces


def kinds_of_differences(a, b, fed, of):
    """Each token's class in a comparison: who holds it in more heads, in steps of a third of them."""
    found = []
    for p, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        third = next(k for k in (1, 2, 3) if 3 * abs(x - y) <= k * of)
        more = f"{'a' if x > y else 'b'}{third}"
        found.append("later" if p >= fed else more if x != y else "both" if x else "k0")
    return found


def state_of_two(traces, steps, at, heads):
    """The state line of two traces."""
    (a, fed, _), (b, *_) = (count(trace, steps, at, heads) for trace in traces)
    a, b, of, both = int(a.sum()), int(b.sum()), fed * len(heads), 0
    for head in heads:
        one, two = (trace.held(fed, *head) if at else np.arange(fed) for trace in traces)
        both += len(np.intersect1d(one, two))
    parts = {"both hold": both, "only a": a - both, "only b": b - both, "neither": of - a - b + both}
    shares = ", ".join(f"{name} {grouped(x)} ({percent(x, of)})" for name, x in parts.items())
    heads = f"{len(heads)} head{'s' if len(heads) > 1 else ''}"
    return f"{after(steps, at)}{grouped(of)} slots of {heads}: {shares}."


def grouped(x):
    return f"{x:,}".replace(",", "\u202f")


def test_compare_at_every_compaction(browser, trace, other):
    steps = sorted({*trace.steps, *other.steps})
    last, kinds = len(steps), set()
    frame = show(browser, viz.compare(trace, other))

    def check(at, heads):
        seen = look(frame)
        (a, fed, _), (b, *_) = (count(t, steps, at, heads) for t in (trace, other))
        assert seen["kinds"] == kinds_of_differences(a, b, fed, len(heads))
        assert seen["state"] == state_of_two((trace, other), steps, at, heads)
        # The middle of a scale whose ends the legend names.
        between = {"a2", "b2"} if len(heads) > 1 else set()
        assert set(seen["kinds"]) <= {kind for kind, _ in seen["legend"]} | between
        kinds.update(seen["kinds"])

    check(last, ALL)
    for at in reversed(range(last)):
        press(frame, "ArrowLeft", at)
        check(at, ALL)
    for heads, at in zip(selections(frame), (last, last // 2, 3, last - 1), strict=True):
        drag(frame, at)
        check(at, heads)
    assert kinds == {"later", "k0", "both", "a1", "a2", "a3", "b1", "b2", "b3"}
    for option, alone in ((1, trace), (2, other)):
        frame.locator("#show").select_option(index=option)
        seen, heads = look(frame), [(layer, 2) for layer in range(4)]
        counts, fed, _ = count(alone, steps, last - 1, heads)
        assert seen["kinds"] == kinds_of_counts(seen["legend"], counts, fed, 4)
        assert seen["state"] == state_of_two((trace, other), steps, last - 1, heads)


# -- the tooltip


def assert_lambda(line, lam, run=""):
    if lam > 0:
        value = re.fullmatch(rf"{run}λ (\d\.\d+) by the end: a later sentence repeats it", line)[1]
        assert float(value) == pytest.approx(lam, abs=6e-4)  # three digits, of four
    else:
        assert line == f"{run}λ 0: not repeated later"


def after_sentence(lines, trace, position, run=""):
    """The tooltip's lines behind those on place and sentence, which are asserted."""
    place, sentence, *rest = lines
    assert place == f"position {position}{', prompt' if position < trace.n_prompt else ''}"
    found = sentence_of(trace, position)
    if not found:
        assert sentence == "sentence not finished"
        return rest
    number, thought, lam, repeats = found
    kind = "re-checking" if thought else "execution"
    assert sentence == f"sentence {number}, {kind}{', repeats an earlier one' if repeats else ''}"
    assert_lambda(rest[0], lam, run)
    return rest[1:]


def assert_scores(rows, scores, place):
    """The tooltip's table against what was recorded of one candidate."""
    assert list(rows) == [*(n for n in ("importance", "redundancy", "penalty", "score") if n in scores), "rank"]
    for name, values in scores.items():
        # A step of the quantisation, float32's rounding, and the tooltip's: five decimals, three digits below 0.001.
        step = float(np.ptp(values)) / 65534 + 1e-6 * float(np.abs(values).max())
        assert float(rows[name]) == pytest.approx(float(values[place]), abs=step + 5e-6)
    score, step = scores["score"], np.ptp(scores["score"]) / 65534
    rank, size = map(int, re.fullmatch(r"(\d+) of (\d+) candidates", rows["rank"]).groups())
    assert size == len(score)
    assert 1 + (score > score[place] + step).sum() <= rank <= 1 + (score > score[place] - step).sum()


def squares(traces, fed, position):
    return [[position in t.held(fed, layer, head) for t in traces] for head in range(4) for layer in range(4)]


CHOOSE = "choose one layer and one head to see its scores"


def test_hover_over_all_heads(browser, trace):
    at = len(trace.steps) // 2
    counts, fed, _ = count(trace, trace.steps, at, ALL)
    frame = show(browser, viz.kept(trace, fed))
    some = np.random.default_rng(7).choice(len(trace.tokens), 10, replace=False)
    for p in [0, *some.tolist(), len(trace.tokens) - 1]:
        tip = hover(frame, p)
        assert tip["code"].rstrip("⏎") == trace.texts[p].rstrip("\n")
        lines = after_sentence(tip["lines"], trace, p)
        assert lines == ([f"held by {counts[p]} of 16 heads", CHOOSE] if p < fed else ["not written yet"])
        assert tip["squares"] == (squares([trace], fed, p) if p < fed else [])
    frame.page.mouse.move(5, 5)
    wait(frame, "byId('tip').hidden")


@pytest.mark.parametrize("name", ["trace", "uneven"])
def test_hover_over_one_head(browser, request, name):
    trace = request.getfixturevalue(name)
    layer, head = 1, 2
    history = [c for c in trace.compactions if (c.layer, c.head) == (layer, head)]
    before, c = history[len(history) // 2 - 1 :][:2]
    slots = [*before.kept.tolist(), *range(before.step, c.step)]
    candidates, kept = slots[: len(c.scores["score"])], set(c.kept.tolist())
    frame = show(browser, viz.kept(trace, c.step))
    frame.locator("#layer").select_option(index=layer + 1), frame.locator("#head").select_option(index=head + 1)
    groups = [
        [p for p in candidates if p in kept], [p for p in candidates if p not in kept], slots[len(candidates) :],
        sorted(set(range(c.step)) - set(slots)), range(c.step, len(trace.tokens)),
    ]  # fmt: skip
    assert groups[0] and groups[1] and groups[3] and bool(groups[2]) == (name == "trace")
    rng = np.random.default_rng(8)
    for p in [0, *(p for group in groups for p in rng.permutation(group)[:3].tolist())]:
        tip = hover(frame, p)
        lines = after_sentence(tip["lines"], trace, p)
        if p in trace.alphas:
            assert lines.pop(0) == f"steered, α {trace.alphas[p]:.2f}"
        if p >= c.step:
            assert lines == ["not written yet"]
            continue
        end = dropped(trace, p, layer, head)
        held = f"held, until {fed_by(trace, end)}" if end else "held to the end"
        assert lines.pop(0) == (held if p in kept else f"dropped by {fed_by(trace, end)}")
        if p in candidates:
            assert lines == []
            assert_scores(tip["rows"], c.scores, candidates.index(p))
        else:
            why = "among the newest, kept outright" if p in slots else "it was gone before"
            assert lines == [f"no score: {why}"] and tip["rows"] == {}
    skipped = [step for step in trace.steps if step not in {c.step for c in history}]
    assert bool(skipped) == (name == "uneven")
    for step in skipped:
        drag(frame, trace.steps.index(step) + 1)
        assert hover(frame, 0)["lines"][-1] == "this head was not compacted at this step"


def test_hover_over_two_traces(browser, trace, other):
    steps = sorted({*trace.steps, *other.steps})
    at = steps.index(other.steps[3]) + 1
    fed = steps[at - 1]
    frame = show(browser, viz.compare(trace, other, fed))
    for p in np.random.default_rng(9).choice(fed, 8, replace=False).tolist():
        tip = hover(frame, p)
        lines = after_sentence(tip["lines"], trace, p, "a: ")
        if found := sentence_of(other, p):
            assert_lambda(lines.pop(0), found[2], "b: ")
        held = [count(t, steps, at, ALL)[0][p] for t in (trace, other)]
        assert lines == [*(f"{run}: held by {n} of 16 heads" for run, n in zip("ab", held, strict=True)), CHOOSE]
        assert tip["squares"] == squares([trace, other], fed, p)


def test_keys_and_clicks_reach_every_token(browser, trace):
    """Although the mouse rests over the text, which scrolls below it."""
    n, firsts = len(trace.tokens), [s[0] for s in trace.sentences]
    frame = show(browser, viz.kept(trace), height=700)
    text, mouse = frame.locator("#text"), frame.page.mouse
    text.hover()
    text.focus()

    def check(p, rest=None):
        wait(frame, f"view.at === {p}")
        # Two pictures later the page has heard that it was scrolled, and that the mouse is over other text.
        frame.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        after_sentence(tip_of(frame)["lines"], trace, p)
        assert frame.evaluate("view.spans.filter((token) => token.matches('.here')).map((token) => token.at)") == [p]
        box, area = (frame.evaluate(f"{of}.getBoundingClientRect()") for of in (f"view.spans[{p}]", "byId('text')"))
        assert box["top"] >= area["top"] and box["bottom"] <= area["bottom"]
        assert f"position {p}" in frame.evaluate("byId('spoken').textContent")

    for key, p in [
        ("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowDown", firsts[1]),
        ("ArrowDown", firsts[2]), ("ArrowUp", firsts[1]), ("End", n - 1), ("ArrowRight", n - 1), ("ArrowLeft", n - 2),
        ("Home", 0), ("ArrowLeft", 0),
    ]:  # fmt: skip
        frame.page.keyboard.press(key)
        check(p)
    frame.page.keyboard.press("Escape")
    wait(frame, "byId('tip').hidden && !document.querySelector('.here')")
    box = frame.locator(".strip.held").bounding_box()
    for p in (n - 3, n // 2, 4):
        mouse.click(box["x"] + box["width"] * (p + 0.5) / n, box["y"] + 5)
        check(p)
    assert hover(frame, 7)["lines"][0] == "position 7, prompt"
    text.hover()
    mouse.wheel(0, 2000)
    wait(frame, "byId('tip').hidden")


# -- survival


def test_survival_cell_by_cell(browser, trace):
    layer, n, steps = 2, len(trace.tokens), trace.steps
    frame = show(browser, viz.survival(trace, layer), height=900)
    labels = {"prompt": "held: prompt", "work": "held: execution", "check": "held: re-checking", "k0": "dropped"}
    legend = frame.locator("#legend .entry").all_text_contents()
    assert [text.removeprefix("ab") for text in legend] == [*labels.values(), "not written yet"]
    ground = "(element) => getComputedStyle(element).backgroundColor"
    colour = {kind: frame.locator(f"#legend .{kind}").evaluate(ground) for kind in labels}
    colour["later"] = frame.locator("body").evaluate(ground)
    assert len(set(colour.values())) == 5
    kinds = ["work"] * n
    for first, last, _, thought, *_ in trace.sentences:
        kinds[first : last + 1] = ["check" if thought else "work"] * (last + 1 - first)
    kinds[: trace.n_prompt] = ["prompt"] * trace.n_prompt
    maps = [canvas.evaluate(CELLS) for canvas in frame.locator(".map canvas").all()]
    titles = frame.locator("h2").all_text_contents()
    assert len(maps) == 4 and all(len(rows) == len(steps) + 1 for rows in maps)
    for head, rows in enumerate(maps):
        for at, row in enumerate(rows):
            counts, fed, _ = count(trace, steps, at, [(layer, head)])
            expected = [kinds[p] if counts[p] else "k0" if p < fed else "later" for p in range(n)]
            assert row == [colour[kind] for kind in expected], (head, at)
        held = Counter(kinds[p] for p in trace.held(steps[-1], layer, head).tolist())
        assert titles[head] == (
            f"head {head} in the end {held.total()} of {steps[-1]}: {held['prompt']} of the prompt, "
            f"{held['work']} of execution, {held['check']} of re-checking"
        )


def test_hover_and_keys_over_survival(browser, trace):
    layer, heads, n, frames = 2, [1, 3], len(trace.tokens), len(trace.steps) + 1
    frame = show(browser, viz.survival(trace, layer, heads), height=900)
    rng = np.random.default_rng(10)

    def check(p, at, head):
        place, when, state = frame.locator("#tip div").all_text_contents()
        number, thought, lam, _ = sentence_of(trace, p) or (0, 0, 0.0, 0)
        kind = "prompt" if p < trace.n_prompt else "re-checking" if thought else "execution"
        sentence = f", sentence {number}" if number else ""
        assert place == f"position {p}, {kind}{sentence}" + (f", λ {round(lam, 4):.3f}" if lam else "")
        assert when == (f"after {fed_by(trace, at)}" if at else "before the first compaction")
        end = dropped(trace, p, layer, head)
        held = f"held, until {fed_by(trace, end)}" if end else "held, to the end"
        gone = f"dropped by {fed_by(trace, end)}" if end and end <= at else held
        assert state == ("not written yet" if p >= trace.steps[max(at - 1, 0)] else gone)

    for k, head in enumerate(heads):
        canvas = frame.locator(".map canvas").nth(k)
        box = canvas.bounding_box()
        for p, at in zip(rng.integers(0, n, 8).tolist(), rng.integers(0, frames, 8).tolist(), strict=True):
            x, y = box["x"] + box["width"] * (p + 0.5) / n, box["y"] + box["height"] * (at + 0.5) / frames
            frame.page.mouse.move(x, y)
            check(p, at, head)
        canvas.focus()
        for key, dx, dy in (("ArrowUp", 0, -1), ("ArrowLeft", -1, 0), ("ArrowDown", 0, 1), ("ArrowRight", 1, 0)):
            frame.page.keyboard.press(key)
            p, at = min(max(p + dx, 0), n - 1), min(max(at + dy, 0), frames - 1)
            check(p, at, head)
        assert f"position {p}" in frame.locator("#spoken").text_content()


# -- the page's own decoder


@pytest.mark.parametrize("seed", range(4))
def test_the_browser_decodes_the_same_sets(browser, seed):
    rng = np.random.default_rng(seed)
    n = 30 if seed else 300  # the first with ages of 16 bits
    steps = sorted(rng.choice(np.arange(1, n + 1), 6 if seed else 260, replace=False).tolist())
    texts = (HOSTILE * n)[:n]
    a, b = (build(rng, n, 2, 2, steps[i:], texts) for i in (0, 1))
    frame = show(browser, viz.compare(a, b), height=700)
    found = frame.evaluate("""() => view.data.runs.map((run) => view.data.fed.map((_, f) =>
        [0, 1, 2, 3].map((h) => heldPositions(view.data, run, h, f))))""")
    counts = frame.evaluate("""() => view.data.fed.map((_, f) => [[0], [1], [0, 1]].map((which) => {
        const out = new Uint16Array(view.data.n), runs = which.map((i) => view.data.runs[i]);
        return [countHeld(view.data, runs, [0, 3], f, out), Array.from(out)]; }))""")
    for at, step in enumerate(sorted({*a.steps, *b.steps}), 1):
        sets = [[set(t.held(step, *pair).tolist()) for pair in np.ndindex(2, 2)] for t in (a, b)]
        assert [list(map(set, run[at])) for run in found] == sets
        sets.append([x & y for x, y in zip(*sets, strict=True)])
        for (sizes, counted), of in zip(counts[at], sets, strict=True):
            assert sizes == [len(of[0]), len(of[3])] and counted == [(p in of[0]) + (p in of[3]) for p in range(n)]


def test_the_browser_finds_scores(browser, trace):
    frame = show(browser, viz.kept(trace), height=700)
    found = frame.evaluate("""() => view.data.header.steps.map((_, i) => [0, 5].map((h) =>
        view.spans.map((_, p) => scoresAt(view.data, view.data.runs[0], h, i + 1, p))))""")
    checked = 0
    for c in (c for c in trace.compactions if (c.layer, c.head) in ((0, 0), (1, 1))):
        row = found[trace.steps.index(c.step)][c.layer]
        earlier = [x for x in trace.compactions if (x.layer, x.head, x.step < c.step) == (c.layer, c.head, True)]
        slots = [*(earlier[-1].kept.tolist() if earlier else []), *range(earlier[-1].step if earlier else 0, c.step)]
        n = len(c.scores["score"])
        assert [p for p, value in enumerate(row) if value] == slots[:n]
        for name, values in c.scores.items():
            tolerance = np.ptp(values) / 65534 + 1e-6 * np.abs(values).max()  # a step of the quantisation
            np.testing.assert_allclose([row[p][name] for p in slots[:n]], values, atol=tolerance)
        ranks = [row[p]["rank"] for p in slots[:n]]
        assert min(ranks) == 1 and max(ranks) <= n == row[slots[0]]["size"]
        checked += n
    assert checked > 100


def test_the_browser_shows_what_cannot_be_seen(browser, trace):
    shown = {
        "a\n\n": ["a⏎\n⏎\n", "a⏎⏎"], "a\nb\n": ["a⏎\nb⏎\n", "a⏎\nb⏎"], "\t\r": ["⇥\t␍"] * 2,
        "\0\x7f": ["␀⟨U+007F⟩"] * 2, "\u2028\u202e\u200b": ["⟨U+2028⟩⟨U+202E⟩⟨U+200B⟩"] * 2,
        "": ["∅"] * 2, "\ufffd": ["\ufffd"] * 2,
        "<b>&\"'": ["<b>&\"'"] * 2, "\U0001f469\u200d\U0001f4bb": ["\U0001f469\u200d\U0001f4bb"] * 2,
    }  # fmt: skip
    frame = show(browser, viz.kept(trace), height=700)
    code = "(texts) => texts.map((text) => [visible(text, false), visible(text, true)])"
    assert frame.evaluate(code, list(shown)) == list(shown.values())
    assert frame.evaluate("visible('\\ud800', true)") == "⟨U+D800⟩"
    blocks = frame.evaluate("view.data.runs[0].blocks.map(({ first, last, number }) => [first, last, number])")
    assert [p for first, last, _ in blocks for p in range(first, last + 1)] == list(range(len(trace.tokens)))
    assert [number for *_, number in blocks if number] == list(range(1, len(trace.sentences) + 1))
