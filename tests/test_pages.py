"""The pages in a real browser: what they draw is what the trace holds, whoever wrote the texts in it.

Every test also asserts that no frame says an error or requests anything but the files that were opened (`browser`).
"""

import html
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from test_viz import HOSTILE, PROMPT, build, outcome

import skipkv
from skipkv import viz
from skipkv.eval import demo, side_by_side
from skipkv.tiny import problems as tiny
from skipkv.viz import encode
from skipkv.viz.report import report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: the pages are not drawn")

TALL = 6000  # pixels of a window in which every token is near enough to be coloured
ALL = [(layer, head) for layer in range(4) for head in range(4)]
PROBE = Path(__file__).with_name("pages.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chromium():
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium):
    chromium.forget()
    yield chromium
    assert chromium.requests() == set(chromium.opened)
    assert chromium.messages == []


@pytest.fixture(scope="module")
def model():
    return skipkv.load("tiny", progress=False)


@pytest.fixture(scope="module")
def trace(model):
    method = "skipkv:budget=48,interval=16,tau=0.88"
    return model.generate(PROMPT, method, trace="scores", max_new_tokens=200, progress=False)[0].trace


@pytest.fixture(scope="module")
def other(model, trace):
    """The same text with other compactions."""
    return model.replay(trace.tokens, "rkv:budget=40,interval=24", n_prompt=trace.n_prompt, trace="scores").trace


@pytest.fixture(scope="module")
def uneven():
    """Heads of different budgets that skip some compactions; a steered token."""
    rng = np.random.default_rng(5)
    texts = [f" t{p}" + ".\n" * (p % 9 == 8) for p in range(120)]
    return build(rng, 120, 4, 4, list(range(15, 120, 15)), texts, scores=("importance", "score"))


@pytest.fixture(scope="module")
def told(model):
    """A small demo: runs, problems, which of them is shown, its traces."""
    problems = tiny.draw(3, level=tiny.Level(steps=(2, 3)))
    runs = list(demo(model, problems, (0.25, 0.5), progress=False))
    number, *traces = side_by_side(model, problems, runs)
    steered = replace(runs[-1].outcome, steering=skipkv.Steering(np.ones(256), 3))
    runs.append(replace(runs[-1], outcome=steered))
    return runs, problems, number, traces


def ready(frame, height=TALL):
    """A document that has drawn itself, in a tall window all of it, and that the mouse reaches."""
    frame.wait("window.view !== undefined")
    frame.evaluate(PROBE)
    if frame.evaluate("view.data.header.view") != "survival":
        frame.wait("probe.drawn()" if height == TALL else "view.spans[0].className !== ''")
    if frame.outer:
        frame.reach()
    return frame


def show(browser, page, tmp_path, width=1200, height=TALL, dark=False):
    """The main frame of a page that has drawn itself."""
    page.save(tmp_path / "page.html")
    return ready(browser.open(tmp_path / "page.html", width, height, dark), height)


def show_report(browser, page, tmp_path, width=1500, dark=False):
    """The main frame of a report and the frames in it."""
    page.save(tmp_path / "page.html")
    main = browser.open(tmp_path / "page.html", width, 3200, dark)
    main.evaluate(PROBE)
    return [
        main,
        *(ready(main.frame(i), 760) for i in range(main.evaluate("document.querySelectorAll('iframe').length"))),
    ]


# -- what a page must show, from the trace


def steps_of(*traces):
    return sorted({step for trace in traces for step in trace.steps})


def count(trace, steps, at, heads):
    """How many of the heads hold each position after so many compactions, and how many tokens are fed."""
    fed = steps[max(at - 1, 0)]
    counts = np.zeros(len(trace.tokens), int)
    for head in heads:
        counts[trace.held(fed, *head) if at else np.arange(fed)] += 1
    return counts, fed


def kinds_of_counts(legend, counts, fed, of):
    """Each token's class: that of the legend's entry whose range its count is in."""
    assert legend[-1] == ["later", "not written yet"]
    by_count = {}
    for kind, label in legend[:-1]:
        label = {"none": "0", "dropped": "0", "held": "1", f"all {of}": str(of)}.get(label, label)
        first, last = re.fullmatch(r"(\d+)(?:–(\d+))?", label).groups()
        by_count |= dict.fromkeys(range(int(first), int(last or first) + 1), kind)
    assert list(by_count) == list(range(of + 1))
    kinds = list(by_count.values())
    assert kinds == sorted(kinds) and kinds[0] == "k0" < kinds[1] and kinds[-1] == "k8"
    return [by_count[c] if p < fed else "later" for p, c in enumerate(counts.tolist())]


def kinds_of_differences(a, b, fed, of):
    """Each token's class in a comparison: who holds it in more heads, in steps of a third of them."""
    found = []
    for p, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        third = next(k for k in (1, 2, 3) if 3 * abs(x - y) <= k * of)
        more = f"{'a' if x > y else 'b'}{third}"
        found.append("later" if p >= fed else more if x != y else "both" if x else "k0")
    return found


def grouped(x):
    return f"{x:,}".replace(",", "\u202f")


def percent(x, of):
    return f"{int(100 * x / of + 0.5)} %"


def after(steps, at):
    if at:
        return f"After compaction {at} of {len(steps)}, {steps[at - 1]} tokens fed: "
    return f"Before the first of {len(steps)} compactions, {steps[0]} tokens fed: "


def assert_state(state, trace, at, heads):
    """The state line of one trace against the counts."""
    counts, fed = count(trace, trace.steps, at, heads)
    total, of = int(counts.sum()), len(heads)
    mean = f"{int(total / of + 0.5)}{' on average' if total % of else ''}"
    says = f"each of {of} heads holds {mean}" if of > 1 else f"the head holds {total}"
    start = f"{after(trace.steps, at)}{says} of {fed} ({percent(total, fed * of)})"
    assert state.startswith(start), (state, start)
    rest, size = state.removeprefix(start), dict(trace.bytes).get(fed)
    if at and size is not None:
        value, unit = re.fullmatch(r", the whole cache takes ([\d.]+) (B|kB)\.", rest).groups()
        assert float(value) * {"B": 1, "kB": 1e3}[unit] == pytest.approx(size, rel=0.005)  # three digits
    else:
        assert rest == "."


def state_of_two(traces, steps, at, heads):
    """The state line of two traces."""
    (a, fed), (b, _) = (count(trace, steps, at, heads) for trace in traces)
    a, b, of, both = int(a.sum()), int(b.sum()), fed * len(heads), 0
    for head in heads:
        one, two = (trace.held(fed, *head) if at else np.arange(fed) for trace in traces)
        both += len(np.intersect1d(one, two))
    parts = {"both hold": both, "only a": a - both, "only b": b - both, "neither": of - a - b + both}
    shares = ", ".join(f"{name} {grouped(x)} ({percent(x, of)})" for name, x in parts.items())
    heads = f"{len(heads)} head{'s' if len(heads) > 1 else ''}"
    return f"{after(steps, at)}{grouped(of)} slots of {heads}: {shares}."


def dropped(trace, position, layer, head):
    """The compaction, from 1, by which a head has given up a position; None where it holds it to the end."""
    later = ((at, step) for at, step in enumerate(trace.steps, 1) if step > position)
    return next((at for at, step in later if position not in trace.held(step, layer, head)), None)


def fed_by(trace, at):
    return f"compaction {at} ({trace.steps[at - 1]} tokens fed)"


# -- reading and moving a page


def look(frame):
    """What is seen; a colour stands for one class, in the text and in the legend."""
    seen = frame.evaluate("probe.look()")
    colours = {}
    for kind, *colour in seen["tokens"] + seen["swatches"]:
        assert not kind or colours.setdefault(kind, colour) == colour
    assert len({background for background, _ in colours.values()}) == len(colours)
    slider, shown = seen["frames"]
    assert slider == shown
    return seen | {"kinds": [kind for kind, *_ in seen["tokens"]]}


THUMB = 16  # pixels: the middle of the slider's thumb stays half of it inside the slider
SLIDER = """(({left, top, width, height}, value) =>
    [left + THUMB / 2 + ((width - THUMB) * value) / byId("frame").max, top + height / 2]
)(byId("frame").getBoundingClientRect(), VALUE)""".replace("THUMB", str(THUMB))


def drag(browser, frame, at):
    """Take the slider's thumb and move it, as a hand would."""
    begin, end = (frame.point(SLIDER.replace("VALUE", value)) for value in ("byId('frame').value", str(at)))
    browser.mouse("Moved", "Pressed", at=begin)
    for x in ((begin[0] + end[0]) / 2, end[0]):
        browser.mouse("Moved", at=(x, end[1]), buttons=1, button="left")
    browser.mouse("Released", at=end)
    frame.wait(f"view.frame === {at}")


def press(browser, frame, key, at):
    """A key on the slider, and where it leads."""
    frame.evaluate("byId('frame').focus()")
    browser.key(key)
    frame.wait(f"view.frame === {at}")


def choose(browser, frame, select, option):
    """An option of a select by keys; the first is 0."""
    frame.evaluate(f"byId('{select}').focus()")
    now = frame.evaluate(f"byId('{select}').selectedIndex")
    for _ in range(abs(option - now)):
        browser.key("ArrowDown" if option > now else "ArrowUp")
    frame.wait(f"byId('{select}').selectedIndex === {option}")


def selections(browser, frame):
    """Choices of layer and KV head, made as they are asked for, and the heads that each means."""
    yield ALL
    choose(browser, frame, "layer", 2)
    yield [(1, head) for head in range(4)]
    choose(browser, frame, "head", 3)
    yield [(1, 2)]
    choose(browser, frame, "layer", 0)
    yield [(layer, 2) for layer in range(4)]


def tip_of(frame):
    tip = frame.evaluate("probe.tip()")
    assert not tip["hidden"] and tip["inside"]
    return tip


def hover(browser, frame, position):
    browser.mouse("Moved", at=frame.middle(f"view.spans[{position}]"))
    return tip_of(frame)


# -- the driver itself


def test_the_driver_sees_what_goes_wrong(chromium, tmp_path):
    chromium.forget()
    port = "http://127.0.0.1:4567"  # whether anybody listens or not
    inner = f"<script>console.error('said inside'); fetch('{port}/inside').catch(() => (window.done = 1))</script>"
    framed = f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(inner)}"></iframe>'
    (tmp_path / "page.html").write_text(f"<img src={port}/outside>{framed}<script>throw Error('thrown')</script>")
    frame = chromium.open(tmp_path / "page.html").frame(0)
    frame.wait("window.done")
    assert chromium.requests() == {*chromium.opened, f"{port}/outside", f"{port}/inside"}
    for text in ("said inside", "thrown"):
        chromium.until(lambda text=text: any(text in said for said in chromium.messages), f"{text!r} was not seen")
    with pytest.raises(AssertionError, match="nothing is not defined"):
        frame.evaluate("nothing")


# -- one trace


@pytest.mark.parametrize("name", ["trace", "uneven"])
def test_kept_at_every_compaction(browser, tmp_path, request, name):
    trace = request.getfixturevalue(name)
    last = len(trace.steps)
    frame = show(browser, viz.kept(trace), tmp_path)

    def check(at, heads):
        seen, of = look(frame), len(heads)
        assert seen["kinds"] == kinds_of_counts(seen["legend"], *count(trace, trace.steps, at, heads), of)
        assert seen["name"] == (f"Heads that hold a token, of {of}:" if of > 1 else "A token is")
        assert_state(seen["state"], trace, at, heads)

    check(last, ALL)
    for at in reversed(range(last)):
        press(browser, frame, "ArrowLeft", at)
        check(at, ALL)
    press(browser, frame, "ArrowRight", 1)
    press(browser, frame, "End", last)
    press(browser, frame, "Home", 0)
    for heads, at in zip(selections(browser, frame), (last // 2, last - 1, 1, last), strict=True):
        drag(browser, frame, at)
        check(at, heads)


def test_kept_shows_each_token_once_and_in_order(browser, tmp_path, trace):
    frame = show(browser, viz.kept(trace), tmp_path)
    texts = frame.evaluate("probe.texts('#text .body > span')")
    assert [text.replace("⏎", "").replace("\n", "") for text in texts] == [t.replace("\n", "") for t in trace.texts]
    assert sum(text.count("⏎") for text in texts) == sum(t.count("\n") for t in trace.texts) > 10
    margins = frame.evaluate("probe.texts('.margin > *')")
    for i, (_, last, _, thought, lam, _) in enumerate(trace.sentences, 1):
        kind = "prompt" if last < trace.n_prompt else "re-check" if thought else ""
        assert margins[3 * i - 3 : 3 * i] == [str(i), kind, f"λ {lam:.2f}" if lam > 0 else ""]
    assert set(margins[3 * len(trace.sentences) :]) <= {"…", ""}


def test_the_strip_has_the_colours_of_the_text(browser, tmp_path, trace, other):
    """Also after the colour scheme has changed."""
    for page in (viz.kept(trace, trace.steps[4]), viz.compare(trace, other, trace.steps[4])):
        frame = show(browser, page, tmp_path)
        # Younger than the page's own listener, so called after it.
        scheme = "matchMedia('(prefers-color-scheme: dark)')"
        frame.evaluate(f"{scheme}.addEventListener('change', () => (window.changed = true))")
        strips = []
        for dark in (False, True):
            if dark:
                browser.colours("dark")
                frame.wait("window.changed")
            strips.append(frame.evaluate("probe.strip()"))
            assert strips[-1] == [background for _, background, _ in look(frame)["tokens"]]
        assert len(set(strips[0])) > 4 and set(strips[0]) & set(strips[1]) == {"rgba(0, 0, 0, 0)"}


def test_the_caches_lines(browser, tmp_path, model, trace):
    """As high as the cache was, beside the full cache; a run without a compaction has one, too."""
    full = model.replay(trace.tokens, n_prompt=trace.n_prompt, trace=True).trace
    h2o = model.replay(trace.tokens, "h2o:budget=40,interval=16", n_prompt=trace.n_prompt, trace=True).trace
    n = len(trace.tokens)
    for page, runs in (
        (viz.kept(trace), {"work": trace}),
        (viz.kept(full), {"work": full}),
        (viz.compare(full, trace), {"a3": full, "b3": trace}),
        (viz.compare(trace, h2o), {"a3": trace, "b3": h2o}),
    ):
        frame = show(browser, page, tmp_path)
        lines = [np.array(size["points"]).T for size in encode.sizes(list(runs.values()))]
        most = max(line[1].max() for line in [*lines, np.array(encode.sizes([full])[0]["full"]).T])
        [scale] = [text for text in frame.evaluate("probe.texts('.scale')") if "dashed" in text]
        value, unit = re.fullmatch(r"to ([\d.]+) (kB|MB), dashed: full", scale).groups()
        assert float(value) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(most, rel=0.005)
        for name, (x, y) in zip(runs, lines, strict=True):
            drawn = frame.evaluate(f"probe.cache('{name}')")
            # Beside a jump the line's own width is in the way, and a second run may cover it.
            level = [p for p in range(2, n - 2) if len({*np.interp([p - 2, p, p + 1, p + 3], x, y)}) == 1 and drawn[p]]
            assert len(level) > n / 4
            height = frame.evaluate("document.querySelector('.strip.cache').clientHeight") - 3
            for p in level:
                assert drawn[p] - 1 == pytest.approx(np.interp(p, x, y) / most * height, abs=1), (name, p)


def test_a_long_text_is_coloured_where_one_looks_and_in_print(browser, tmp_path):
    n, at = 2000, 5
    texts = [f" t{p}" + "\n" * (p % 5 == 4) for p in range(n)]
    trace = build(np.random.default_rng(6), n, 1, 1, list(range(250, n + 1, 250)), texts, share=1.0)
    counts, fed = count(trace, trace.steps, at, [(0, 0)])
    expected = ["later" if p >= fed else "k8" if counts[p] else "k0" for p in range(n)]
    frame = show(browser, viz.kept(trace), tmp_path, height=700)
    drag(browser, frame, at)
    where, top = frame.middle("byId('text')"), 0
    for _ in range(4):
        browser.mouse("Wheel", at=where, deltaX=0, deltaY=2000)
        frame.wait(f"byId('text').scrollTop > {top} && probe.near().every(([, kind]) => kind)")
        top = frame.evaluate("byId('text').scrollTop")
        near = frame.evaluate("probe.near()")
        assert len(near) > 60 and all(kind == expected[p] for p, kind in near)
    # What was never near has no colour yet: a move of the slider costs the same in a text of any length.
    assert frame.evaluate("view.spans.filter((token) => !token.className).length") > 100
    browser.call("Page.printToPDF", browser.session)
    assert look(frame)["kinds"] == expected


def test_playing_ends_at_the_last_compaction(browser, tmp_path, trace):
    frame = show(browser, viz.kept(trace), tmp_path)
    frame.evaluate("{ const real = setInterval; window.setInterval = (f) => real(f, 1); }")
    frame.evaluate(
        "{ window.seen = []; const real = view.paint; view.paint = () => (seen.push(view.frame), real.call(view)); }"
    )
    label = "byId('play').getAttribute('aria-label')"
    browser.mouse("Moved", "Pressed", "Released", at=frame.middle("byId('play')"))
    frame.wait(f"seen.length && {label} === 'Play the compactions'")
    assert frame.evaluate("seen") == list(range(len(trace.steps) + 1))


# -- two traces


def test_compare_at_every_compaction(browser, tmp_path, trace, other):
    steps = steps_of(trace, other)
    last = len(steps)
    frame = show(browser, viz.compare(trace, other), tmp_path)
    kinds = set()

    def check(at, heads):
        seen = look(frame)
        (a, fed), (b, _) = (count(t, steps, at, heads) for t in (trace, other))
        assert seen["kinds"] == kinds_of_differences(a, b, fed, len(heads))
        assert seen["state"] == state_of_two((trace, other), steps, at, heads)
        # The middle of a scale whose ends the legend names.
        between = {"a2", "b2"} if len(heads) > 1 else set()
        assert set(seen["kinds"]) <= {kind for kind, _ in seen["legend"]} | between
        kinds.update(seen["kinds"])

    check(last, ALL)
    for at in reversed(range(last)):
        press(browser, frame, "ArrowLeft", at)
        check(at, ALL)
    for heads, at in zip(selections(browser, frame), (last, last // 2, 3, last - 1), strict=True):
        drag(browser, frame, at)
        check(at, heads)
    assert kinds == {"later", "k0", "both", "a1", "a2", "a3", "b1", "b2", "b3"}
    for option, alone in ((1, trace), (2, other)):
        choose(browser, frame, "show", option)
        seen, heads = look(frame), [(layer, 2) for layer in range(4)]
        assert seen["kinds"] == kinds_of_counts(seen["legend"], *count(alone, steps, last - 1, heads), 4)
        assert seen["state"] == state_of_two((trace, other), steps, last - 1, heads)


# -- the tooltip


def sentence_of(trace, position):
    """Number, whether it re-checks, λ, whether it repeats; None where it is not finished."""
    found = (i for i, s in enumerate(trace.sentences) if s[0] <= position <= s[1])
    return next(((i + 1, *trace.sentences[i][3:6]) for i in found), None)


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
    assert list(rows) == [
        *(name for name in ("importance", "redundancy", "penalty", "score") if name in scores),
        "rank",
    ]
    for name, values in scores.items():
        value = float(values[place])
        # A step of the quantisation, float32's rounding, and the tooltip's: five decimals, three digits below 0.001.
        step = float(np.ptp(values)) / 65534 + 1e-6 * float(np.abs(values).max())
        assert float(rows[name]) == pytest.approx(value, abs=step + 5e-6)
    score, step = scores["score"], np.ptp(scores["score"]) / 65534
    rank, size = map(int, re.fullmatch(r"(\d+) of (\d+) candidates", rows["rank"]).groups())
    assert size == len(score)
    assert 1 + (score > score[place] + step).sum() <= rank <= 1 + (score > score[place] - step).sum()


def squares(traces, fed, position):
    return [[[position in t.held(fed, layer, head) for head in range(4)] for layer in range(4)] for t in traces]


CHOOSE = "choose one layer and one head to see its scores"


def test_hover_over_all_heads(browser, tmp_path, trace):
    at = len(trace.steps) // 2
    counts, fed = count(trace, trace.steps, at, ALL)
    frame = show(browser, viz.kept(trace, fed), tmp_path)
    some = np.random.default_rng(7).choice(len(trace.tokens), 10, replace=False)
    for p in [0, *some.tolist(), len(trace.tokens) - 1]:
        tip = hover(browser, frame, p)
        assert tip["code"].rstrip("⏎") == trace.texts[p].rstrip("\n")
        lines = after_sentence(tip["lines"], trace, p)
        if p < fed:
            assert lines == [f"held by {counts[p]} of 16 heads", CHOOSE]
            assert tip["squares"] == squares([trace], fed, p)
        else:
            assert lines == ["not written yet"] and tip["squares"] is None
    browser.mouse("Moved", at=(5, 5))
    frame.wait("byId('tip').hidden")


@pytest.mark.parametrize("name", ["trace", "uneven"])
def test_hover_over_one_head(browser, tmp_path, request, name):
    trace = request.getfixturevalue(name)
    layer, head = 1, 2
    history = [c for c in trace.compactions if (c.layer, c.head) == (layer, head)]
    before, c = history[len(history) // 2 - 1 :][:2]
    slots = [*before.kept.tolist(), *range(before.step, c.step)]
    candidates = slots[: len(c.scores["score"])]
    kept = set(c.kept.tolist())
    frame = show(browser, viz.kept(trace, c.step), tmp_path)
    choose(browser, frame, "layer", layer + 1), choose(browser, frame, "head", head + 1)
    groups = [
        [p for p in candidates if p in kept], [p for p in candidates if p not in kept], slots[len(candidates) :],
        sorted(set(range(c.step)) - set(slots)), range(c.step, len(trace.tokens)),
    ]  # fmt: skip
    assert groups[0] and groups[1] and groups[3] and bool(groups[2]) == (name == "trace")
    rng = np.random.default_rng(8)
    for p in [0, *(p for group in groups for p in rng.permutation(group)[:3].tolist())]:
        tip = hover(browser, frame, p)
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
        drag(browser, frame, trace.steps.index(step) + 1)
        assert hover(browser, frame, 0)["lines"][-1] == "this head was not compacted at this step"


def test_hover_over_two_traces(browser, tmp_path, trace, other):
    steps = steps_of(trace, other)
    at = steps.index(other.steps[3]) + 1
    fed = steps[at - 1]
    frame = show(browser, viz.compare(trace, other, fed), tmp_path)
    for p in np.random.default_rng(9).choice(fed, 8, replace=False).tolist():
        tip = hover(browser, frame, p)
        lines = after_sentence(tip["lines"], trace, p, "a: ")
        if found := sentence_of(other, p):
            assert_lambda(lines.pop(0), found[2], "b: ")
        held = [count(t, steps, at, ALL)[0][p] for t in (trace, other)]
        assert lines == [*(f"{run}: held by {n} of 16 heads" for run, n in zip("ab", held, strict=True)), CHOOSE]
        assert tip["squares"] == squares([trace, other], fed, p)


def test_keys_and_clicks_reach_every_token(browser, tmp_path, trace):
    """Although the mouse rests over the text, which scrolls below it."""
    n, firsts = len(trace.tokens), [s[0] for s in trace.sentences]
    frame = show(browser, viz.kept(trace), tmp_path, height=700)
    rests = frame.middle("byId('text')")
    browser.mouse("Moved", at=rests)
    frame.evaluate("byId('text').focus()")

    def check(p):
        frame.wait(f"view.at === {p}")
        # Two pictures later the page has heard that it was scrolled, and that the mouse is over other text.
        frame.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        browser.mouse("Moved", at=rests)
        tip = tip_of(frame)
        after_sentence(tip["lines"], trace, p)
        assert frame.evaluate("probe.marked()") == [p] and frame.evaluate(f"probe.visible({p})")
        assert f"position {p}" in frame.evaluate("byId('spoken').textContent")

    for key, p in [
        ("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowDown", firsts[1]),
        ("ArrowDown", firsts[2]), ("ArrowUp", firsts[1]), ("End", n - 1), ("ArrowRight", n - 1), ("ArrowLeft", n - 2),
        ("Home", 0), ("ArrowLeft", 0),
    ]:  # fmt: skip
        browser.key(key)
        check(p)
    browser.key("Escape")
    frame.wait("byId('tip').hidden && !probe.marked().length")
    box = "document.querySelector('.strip.held').getBoundingClientRect()"
    for p in (n - 3, n // 2, 4):
        rests = frame.point(f"[{box}.left + ({box}.width * {p + 0.5}) / {n}, {box}.top + 5]")
        browser.mouse("Moved", "Pressed", "Released", at=rests)
        check(p)
    assert hover(browser, frame, 7)["lines"][0] == "position 7, prompt"
    browser.mouse("Wheel", at=frame.middle("byId('text')"), deltaX=0, deltaY=2000)
    frame.wait("byId('tip').hidden")


# -- survival


def test_survival_cell_by_cell(browser, tmp_path, trace):
    layer, n, steps = 2, len(trace.tokens), trace.steps
    frame = show(browser, viz.survival(trace, layer), tmp_path, height=900)
    labels = {"prompt": "held: prompt", "work": "held: execution", "check": "held: re-checking", "k0": "dropped"}
    legend = frame.evaluate("probe.texts('#legend .entry')")
    assert [text.removeprefix("ab") for text in legend] == [*labels.values(), "not written yet"]
    swatch = "getComputedStyle(document.querySelector('#legend .{}')).backgroundColor"
    colour = {kind: frame.evaluate(swatch.replace("{}", kind)) for kind in labels}
    colour["later"] = frame.evaluate("getComputedStyle(document.body).backgroundColor")
    assert len(set(colour.values())) == 5
    kinds = ["work"] * n
    for first, last, _, thought, *_ in trace.sentences:
        kinds[first : last + 1] = ["check" if thought else "work"] * (last + 1 - first)
    kinds[: trace.n_prompt] = ["prompt"] * trace.n_prompt
    maps = frame.evaluate("probe.maps()")
    titles = frame.evaluate("probe.texts('h2')")
    assert len(maps) == 4 and all(len(rows) == len(steps) + 1 for rows in maps)
    for head, rows in enumerate(maps):
        for at, row in enumerate(rows):
            counts, fed = count(trace, steps, at, [(layer, head)])
            expected = [kinds[p] if counts[p] else "k0" if p < fed else "later" for p in range(n)]
            assert row == [colour[kind] for kind in expected], (head, at)
        held = Counter(kinds[p] for p in trace.held(steps[-1], layer, head).tolist())
        assert titles[head] == (
            f"head {head} in the end {held.total()} of {steps[-1]}: {held['prompt']} of the prompt, "
            f"{held['work']} of execution, {held['check']} of re-checking"
        )


def test_hover_over_survival(browser, tmp_path, trace):
    layer, heads, n, steps = 2, [1, 3], len(trace.tokens), trace.steps
    frame = show(browser, viz.survival(trace, layer, heads), tmp_path, height=900)
    rng = np.random.default_rng(10)
    for k, head in enumerate(heads):
        box = f"document.querySelectorAll('.map canvas')[{k}].getBoundingClientRect()"
        for p, at in zip(rng.integers(0, n, 8).tolist(), rng.integers(0, len(steps) + 1, 8).tolist(), strict=True):
            x, y = (p + 0.5) / n, (at + 0.5) / (len(steps) + 1)
            browser.mouse("Moved", at=frame.point(f"[{box}.left + {box}.width * {x}, {box}.top + {box}.height * {y}]"))
            place, when, state = frame.evaluate("probe.texts('#tip div')")
            number, thought, lam, _ = sentence_of(trace, p) or (0, 0, 0.0, 0)
            kind = "prompt" if p < trace.n_prompt else "re-checking" if thought else "execution"
            sentence = f", sentence {number}" if number else ""
            assert place == f"position {p}, {kind}{sentence}" + (f", λ {round(lam, 4):.3f}" if lam else "")
            assert when == (f"after {fed_by(trace, at)}" if at else "before the first compaction")
            end = dropped(trace, p, layer, head)
            held = f"held, until {fed_by(trace, end)}" if end else "held, to the end"
            gone = end and end <= at
            now = (
                "not written yet"
                if p >= steps[max(at - 1, 0)]
                else f"dropped by {fed_by(trace, end)}"
                if gone
                else held
            )
            assert state == now


# -- curves


LONG = "skipkv:budget={},interval=32,tau=0.88,window=8,protect=sinks:4+steer:layer=2,alpha=1.25"
RUNS = [
    outcome("full", 9), *(outcome(f"rkv:budget={b},interval=32", r) for b, r in [(64, 2), (128, 5), (256, 8)]),
    *(outcome(LONG.format(b), 7) for b in (64, 256)),
]  # fmt: skip


def test_a_curve_draws_itself(browser, tmp_path):
    viz.curve(RUNS).save(tmp_path / "page.html")
    page = browser.open(tmp_path / "page.html")
    page.evaluate(PROBE)
    titles = page.evaluate("probe.texts('svg [role=list] > g > title')")
    assert [title.split(": accuracy")[0] for title in titles] == [r.run for r in RUNS]
    places = [page.middle(f"document.querySelectorAll('svg [role=list] .marker')[{i}]") for i in range(len(RUNS))]
    (_, full), (x0, y0), (x1, y1), (x2, y2) = places[:4]
    assert y0 > y1 > y2 > full  # more right is higher
    assert x1 - x0 == pytest.approx(x2 - x1, abs=1) and x0 < x1  # doubled budgets are as far apart
    assert page.evaluate("probe.cells('tr')") == []
    browser.mouse("Moved", "Pressed", "Released", at=page.middle("document.querySelector('summary')"))
    page.wait("document.querySelector('details').open")
    rows = page.evaluate("probe.cells('tr')")
    assert rows[0] == ["run", "budget", "accuracy, %"] and [row[0] for row in rows[1:]] == [r.run for r in RUNS]
    assert [row[1:] for row in rows[1:3]] == [["", "90.0 [85.0, 94.0]"], ["64", "20.0 [15.0, 24.0]"]]


# -- the report


def assert_near(frame, trace, at):
    """The tokens of a frame of usual height that are near enough to be coloured, and the state line."""
    seen = look(frame)
    expected = kinds_of_counts(seen["legend"], *count(trace, trace.steps, at, ALL), len(ALL))
    near = [pair for pair in zip(seen["kinds"], expected, strict=True) if pair[0]]
    assert len(near) > 50 and all(kind == right for kind, right in near)
    assert_state(seen["state"], trace, at, ALL)


def test_the_report_tells_the_runs(browser, tmp_path, told):
    runs, problems, number, traces = told
    problem = problems[number]
    main, *frames = show_report(browser, report(runs, problem, number, *traces, which="2-3 steps"), tmp_path)
    rows = main.evaluate("probe.cells('tbody tr')")
    assert len(rows) == len(runs) == 14
    for cells, run in zip(rows, runs, strict=True):
        o, texts = run.outcome, run.texts
        share = f"{run.method.budget} ({run.share:.0%})".replace("%", " %") if run.share else ""
        length = sum(len(text.prompt_tokens) + len(text.tokens) for text in texts) / 3
        peak = sum(text.stats.peak_bytes for text in texts) / 3e3
        assert cells == [
            run.method.name + (" + steering" if run.steered else ""), share, f"{100 * o.right / 3:.1f}",
            f"{100 * o.low:.1f}–{100 * o.high:.1f}", f"{length:.1f}", f"{peak:.1f}", f"{o.tokens_per_second:.0f}",
            f"{o.truncated}",
        ]  # fmt: skip
    assert main.evaluate("document.querySelectorAll('svg [role=list] .marker').length") == len(runs)
    assert main.evaluate("probe.texts('pre')") == [problem["prompt"]]
    text = " ".join(main.evaluate("document.querySelector('.report').innerText").split())
    for part in (
        "The reasoning model in the box on 3 held-out problems (2-3 steps), the same",
        "rewarded by construction, and the model was trained with hidden slots, to live with an evicting cache.",
        f"Answer: {problem['answer']}",
        f"Problem {number}, as the full",
        "interval=32",
        "; steering: layer=3,alpha=1.",
    ):
        assert part in text
    for frame, trace in zip(frames, traces, strict=True):
        assert str(trace.method) in frame.evaluate("byId('about').textContent")
        assert_near(frame, trace, len(trace.steps))


def test_a_report_says_only_of_the_model_in_the_box_how_it_was_trained(browser, tmp_path, told):
    runs, problems, number, (a, b) = told
    a = replace(a, settings=a.settings | {"model": "my <b>model</b>"})
    main, *_ = show_report(browser, report(runs[:-1], problems[number], number, a, b), tmp_path)
    text = " ".join(main.evaluate("document.querySelector('.report').innerText").split())
    assert "The model my <b>model</b> on 3 held-out problems, the same" in text
    assert "rewarded by construction." in text and "trained" not in text and "steering:" not in text


def test_the_sliders_of_a_report_move_together(browser, tmp_path, told, trace, other):
    runs, problems, number, _ = told
    _, a, b = show_report(browser, report(runs, problems[number], number, trace, other), tmp_path)
    assert trace.steps != other.steps
    for one, two, at in ((a, b, 3), (b, a, 1), (a, b, 0), (b, a, len(other.steps)), (a, b, 5)):
        moved, follows = (trace, other) if one is a else (other, trace)
        assert one.evaluate("view.frame") != at
        drag(browser, one, at)
        expected = sum(step <= moved.steps[at - 1] for step in follows.steps) if at else 0
        two.wait(f"view.frame === {expected}")
        assert_near(one, moved, at)
        assert_near(two, follows, expected)
    press(browser, a, "ArrowRight", 6)
    b.wait(f"view.frame === {sum(step <= trace.steps[5] for step in other.steps)}")


# -- embedded


def test_a_notebooks_styles_stay_outside(browser, tmp_path, trace):
    page = viz.kept(trace)
    expected = look(show(browser, page, tmp_path, height=page.height))
    styles = """
        span, header, main, canvas, p, div:not(.cell) { display: none !important; color: red !important; }
        * { background: yellow; font: 40px serif; } :root { --paper: red; --ink: red; --k0: red; --k8: red; }"""
    cell = f'<div class="cell">{page._repr_html_()}</div>'
    notebook = f'<!doctype html><style>{styles}</style><body style="margin: 0">{cell}'
    (tmp_path / "notebook.html").write_text(notebook, encoding="utf-8")
    frame = ready(browser.open(tmp_path / "notebook.html").frame(0), page.height)
    seen = look(frame)
    assert seen == expected and len([kind for kind in seen["kinds"] if kind]) > 100
    assert hover(browser, frame, 3)["lines"][0] == "position 3, prompt"
    drag(browser, frame, 2)
    assert_near(frame, trace, 2)


# -- hostile texts


ATTACKS = [
    "<script>window.pwned=1</script>", "</script><script>window.pwned=1</script>", "'><svg onload=window.pwned=1>",
    "\"></iframe><img src=x onerror=window.pwned=1>", "</iframe><img src=x onerror='window.pwned=1'>",
    "</style><script>window.pwned=1</script>", "</title><script>window.pwned=1</script>", "</pre><b>", "<!--", "-->",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>", "<img src=http://127.0.0.1:4567/>", "`",
    "${window.pwned=1}", "<link rel=stylesheet href=http://127.0.0.1:4567/x.css>", "&quot;", "&lt;b&gt;", "&#39;", "&",
    "'", '"', "\\", "{{data}}", "[[frames]]",
]  # fmt: skip
ATTACK = "".join(ATTACKS)


def hostile_and_harmless():
    """Two traces that differ in nothing but their words."""
    texts = [*HOSTILE, *ATTACKS]
    calm = ["t\n" if text.endswith("\n") else "t" for text in texts]
    for words, name in ((texts, ATTACK), (calm, "x")):
        rng, n = np.random.default_rng(11), len(texts)
        trace = build(rng, n, 2, 2, [n // 2, n], words, f"custom:{name}", share=1.0)
        trace.settings["model"] = name
        yield trace


def elements(frame):
    """How many elements of which name there are; nothing has run that came with a text."""
    assert frame.evaluate("window.pwned") is None
    return Counter(frame.evaluate("[...document.querySelectorAll('*')].map((element) => element.tagName)"))


MAKE = {"kept": viz.kept, "compare": lambda t: viz.compare(t, t), "survival": lambda t: viz.survival(t, 0)}


@pytest.mark.parametrize("name", MAKE)
def test_hostile_traces_run_nothing(browser, tmp_path, name):
    hostile, harmless = map(MAKE[name], hostile_and_harmless())
    expected = elements(show(browser, harmless, tmp_path))
    frame = show(browser, hostile, tmp_path)
    assert elements(frame) == expected
    assert frame.evaluate("document.title") == hostile.title and ATTACK in hostile.title
    assert ATTACK in frame.evaluate("byId('about').textContent")
    if name != "survival":
        texts = frame.evaluate("probe.texts('#text .body > span')")
        assert texts[len(HOSTILE) :] == ATTACKS
        for p in range(len(HOSTILE), len(texts)):
            tip = hover(browser, frame, p)
            assert tip["code"] == texts[p] and set(tip["elements"]) <= {"CODE", "DIV", "CANVAS", "SMALL"}
    (tmp_path / "notebook.html").write_text(
        "<!doctype html><meta charset=utf-8>" + hostile._repr_html_(), encoding="utf-8"
    )
    outer = browser.open(tmp_path / "notebook.html", 1200, TALL)
    assert elements(ready(outer.frame(0), hostile.height)) == expected
    assert elements(outer) == Counter(["HTML", "HEAD", "META", "BODY", "IFRAME"])


def test_a_hostile_report_runs_nothing(browser, tmp_path, told):
    hostile, harmless = hostile_and_harmless()
    calm = {"prompt": "x", "answer": "x"}
    expected = [elements(f) for f in show_report(browser, report(told[0], calm, 0, harmless, harmless), tmp_path)]
    problem = {"prompt": f"{ATTACK}[[answer]]", "answer": f"{ATTACK}[[table]]{{{{script}}}}"}
    main, *frames = show_report(browser, report(told[0], problem, 0, hostile, hostile), tmp_path)
    assert [elements(frame) for frame in (main, *frames)] == expected and len(frames) == 2
    assert main.evaluate("probe.texts('pre')") == [problem["prompt"]]
    assert f"Answer: {problem['answer']}" in main.evaluate("probe.texts('p')")
    assert all(
        ATTACK in title for title in main.evaluate("[...document.querySelectorAll('iframe')].map((f) => f.title)")
    )


def test_hostile_names_of_runs_run_nothing(browser, tmp_path):
    found = []
    for name in ("x", ATTACK):
        viz.curve([outcome(f"custom:score={name},budget=8", 3)], title=name).save(tmp_path / "page.html")
        page = browser.open(tmp_path / "page.html")
        page.evaluate(PROBE)
        found.append(elements(page))
        assert page.evaluate("probe.texts('.title')") == [name]
    assert found[0] == found[1]


# -- looks


KINDS = ["kept", "kept of one head", "compare", "compare of one head", "survival", "curve", "report"]
CLASSES = {
    "kept": {"later", *(f"k{i}" for i in range(9))}, "kept of one head": {"later", "k0", "k8"},
    "compare": {"later", "k0", "both", "a1", "a2", "a3", "b1", "b2", "b3"},
    "compare of one head": {"later", "k0", "both", "a3", "b3"},
    "survival": {"later", "k0", "prompt", "work", "check"}, "curve": {"title", "right"}, "report": {"later", "k8"},
}  # fmt: skip


def texts_of(browser, name, told, trace, other, tmp_path, **options):
    """The texts of every kind of page, those of its frames too."""
    runs, problems, number, traces = told
    if name == "report":
        page = report(runs, problems[number], number, *traces)
        return [frame.evaluate("probe.shown()") for frame in show_report(browser, page, tmp_path, **options)]
    if name == "curve":
        viz.curve(RUNS).save(tmp_path / "page.html")
        frame = browser.open(tmp_path / "page.html", **options)
        frame.evaluate(PROBE)
        return [frame.evaluate("probe.shown()")]
    chosen = {"layers": 1, "heads": 2} if name.endswith("one head") else {}
    kind, step = name.split()[0], trace.steps[-2]
    pages = {
        "kept": lambda: viz.kept(trace, step, **chosen), "compare": lambda: viz.compare(trace, other, step, **chosen),
        "survival": lambda: viz.survival(trace, 2),
    }  # fmt: skip
    return [show(browser, pages[kind](), tmp_path, **options).evaluate("probe.shown()")]


@pytest.mark.parametrize("name", KINDS)
def test_every_text_can_be_read_in_light_and_dark(browser, tmp_path, told, trace, other, name):
    light, dark = (texts_of(browser, name, told, trace, other, tmp_path, dark=dark) for dark in (False, True))
    for texts, dark_texts in zip(light, dark, strict=True):
        assert len(texts) > 5
        for one, two in zip(texts, dark_texts, strict=True):
            assert one["text"] == two["text"]
            assert one["contrast"] >= 4.5 and two["contrast"] >= 4.5, (one, two)
            assert one["colours"] != two["colours"], one
    assert CLASSES[name] <= {kind for texts in light for text in texts for kind in text["kinds"]}


@pytest.mark.parametrize("width", [420, 1500])
@pytest.mark.parametrize("name", KINDS)
def test_no_text_covers_another_or_leaves_the_page(browser, tmp_path, told, trace, other, name, width):
    for texts in texts_of(browser, name, told, trace, other, tmp_path, width=width):
        of = np.array([i for i, text in enumerate(texts) for _ in text["boxes"]])
        left, top, right, bottom = np.array([box for text in texts for box in text["boxes"]]).T
        across = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
        down = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
        # A font's box is a little taller than its line: lines of one paragraph touch.
        crossing = np.argwhere(np.triu((across > 2) & (down > 4) & (of[:, None] != of)))
        assert [(texts[of[i]]["text"], texts[of[j]]["text"]) for i, j in crossing] == []
        assert [t["text"] for t in texts if not t["scrolls"] and max(box[2] for box in t["boxes"]) > width] == []
