"""Reading and moving a page that has drawn itself, and what it must show, from the trace."""

import re
import time

import numpy as np
import pytest

TALL = 6000  # pixels of a window in which every token is near enough to be coloured
ALL = [(layer, head) for layer in range(4) for head in range(4)]


# -- showing a page


def wait(frame, condition):
    """Until an expression of JavaScript is true. Playwright's own wait evaluates text, which the pages do not allow."""
    end = time.monotonic() + 60  # seconds: far more than anything here takes, so that a busy machine fails no test
    while not frame.evaluate(condition):
        assert time.monotonic() < end, f"not yet true: {condition}"
        frame.page.wait_for_timeout(10)


def ready(frame, height=TALL):
    """A document that has drawn itself, in a tall window all of it, and that the mouse reaches."""
    wait(frame, "window.view !== undefined")
    if frame.evaluate("view.data.header.view") != "survival":
        spans = "view.spans" if height == TALL else "[view.spans[0]]"
        wait(frame, f"{spans}.every((token) => token.className)")
    if frame.parent_frame:
        reach(frame)
    return frame


def reach(frame):
    """Until the mouse reaches this frame: Chromium hands events to the outer one until it has composed both."""
    frame.evaluate("addEventListener('mousemove', () => (window.reached = true), { capture: true, once: true })")
    frame.frame_element().scroll_into_view_if_needed()
    box, end = frame.frame_element().bounding_box(), time.monotonic() + 60
    while not frame.evaluate("window.reached"):
        assert time.monotonic() < end, "the mouse does not reach the frame"
        for x in (3, 4):  # a mouse that rests does not move
            frame.page.mouse.move(box["x"] + x, box["y"] + 3)


def show(browser, page, height=TALL, **options):
    """The main frame of a page that has drawn itself."""
    return ready(browser.open(page, height=height, **options).main_frame, height)


def show_report(browser, page, width=1500, **options):
    """The main frame of a report and the frames in it."""
    main = browser.open(page, width, 3200, **options).main_frame
    return [main, *(ready(element.content_frame(), 760) for element in main.query_selector_all("iframe"))]


# -- moving


def drag(frame, at):
    """Take the slider's thumb and move it, as a hand would."""
    slider, thumb, mouse = frame.locator("#frame"), 16, frame.page.mouse
    box, now, most = slider.bounding_box(), *frame.evaluate("[view.frame, view.data.frames - 1]")
    y = box["y"] + box["height"] / 2
    begin, end = (box["x"] + thumb / 2 + (box["width"] - thumb) * value / most for value in (now, at))
    mouse.move(begin, y), mouse.down()
    mouse.move((begin + end) / 2, y), mouse.move(end, y), mouse.up()
    wait(frame, f"view.frame === {at}")


def press(frame, key, at):
    """A key on the slider, and where it leads."""
    frame.locator("#frame").press(key)
    wait(frame, f"view.frame === {at}")


def selections(frame):
    """Choices of layer and KV head, made as they are asked for, and the heads that each means."""
    yield ALL
    frame.locator("#layer").select_option(index=2)
    yield [(1, head) for head in range(4)]
    frame.locator("#head").select_option(index=3)
    yield [(1, 2)]
    frame.locator("#layer").select_option(index=0)
    yield [(layer, 2) for layer in range(4)]


# -- reading

LOOK = """() => {
  const painted = (element, kind) => [kind, getComputedStyle(element).backgroundColor, getComputedStyle(element).color];
  const entries = [...document.querySelectorAll("#legend .entry")].map((e) => [e.firstChild, e.lastChild.textContent]);
  return {
    tokens: view.spans.map((token) => painted(token, token.classList[0] ?? "")),
    swatches: entries.map(([swatch]) => painted(swatch, swatch.classList[1])),
    legend: entries.map(([swatch, label]) => [swatch.classList[1], label]),
    name: document.querySelector(".legend-name").textContent, state: byId("state").textContent,
    frames: [Number(byId("frame").value), view.frame],
    fonts: [getComputedStyle(document.body).backgroundColor, getComputedStyle(view.spans[0]).font],
  };
}"""

# The colours of a canvas, [rows][columns]; of a copy, as Chromium warns where a page's own canvas is read again.
CELLS = """(canvas) => {
  const { width, height } = canvas, copy = new OffscreenCanvas(width, height);
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const colour = ([r, g, b, a]) => (a ? `rgb(${r}, ${g}, ${b})` : "rgba(0, 0, 0, 0)");
  const row = (y) => Array.from({ length: width }, (_, x) => colour(data.subarray(4 * (y * width + x))));
  return Array.from({ length: height }, (_, y) => row(y));
}"""

TIP = """() => {
  const tip = byId("tip"), all = (selector) => [...tip.querySelectorAll(selector)], box = tip.getBoundingClientRect();
  const filled = (run) => getComputedStyle(run).backgroundColor !== "rgba(0, 0, 0, 0)";
  return {
    seen: !tip.hidden && box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight,
    code: tip.querySelector("code")?.textContent,
    lines: all(":scope > div:not(.grid)").map((line) => line.textContent),
    rows: Object.fromEntries(all("tr").map((row) => [...row.cells].map((cell) => cell.textContent))),
    squares: all(".squares i").map((head) => [...head.children].map(filled)),
    elements: all("*").map((element) => element.tagName),
  };
}"""


def look(frame):
    """What is seen; a colour stands for one class, in the text and in the legend."""
    seen, colours = frame.evaluate(LOOK), {}
    for kind, *colour in seen["tokens"] + seen["swatches"]:
        assert not kind or colours.setdefault(kind, colour) == colour
    assert len({background for background, _ in colours.values()}) == len(colours)
    slider, shown = seen["frames"]
    assert slider == shown
    return seen | {"kinds": [kind for kind, *_ in seen["tokens"]]}


def tip_of(frame):
    tip = frame.evaluate(TIP)
    assert tip["seen"]
    return tip


def hover(frame, position):
    frame.locator("#text .body > span").nth(position).hover()
    return tip_of(frame)


# -- what a page must show


def count(trace, steps, at, heads):
    """How many of the heads hold each position after so many compactions, how many tokens are fed, the heads' sizes."""
    fed = steps[max(at - 1, 0)]
    held = [trace.held(fed, *head) if at else np.arange(fed) for head in heads]
    return np.bincount(np.concatenate(held), minlength=len(trace.tokens)), fed, [len(of) for of in held]


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


def percent(x, of):
    return f"{int(100 * x / of + 0.5)} %"


def after(steps, at):
    if at:
        return f"After compaction {at} of {len(steps)}, {steps[at - 1]} tokens fed: "
    return f"Before the first of {len(steps)} compactions, {steps[0]} tokens fed: "


def assert_state(state, trace, at, heads):
    """The state line of one trace against the counts."""
    _, fed, held = count(trace, trace.steps, at, heads)
    total, of = sum(held), len(heads)
    mean = f"{int(total / of + 0.5)}{' on average' if len(set(held)) > 1 else ''}"
    says = f"each of {of} heads holds {mean}" if of > 1 else f"the head holds {total}"
    start = f"{after(trace.steps, at)}{says} of {fed} ({percent(total, fed * of)})"
    assert state.startswith(start), (state, start)
    rest, size = state.removeprefix(start), dict(trace.bytes).get(fed)
    if at and size is not None:
        value, unit = re.fullmatch(r", the whole cache takes ([\d.]+) (B|kB)\.", rest).groups()
        assert float(value) * {"B": 1, "kB": 1e3}[unit] == pytest.approx(size, rel=0.005)  # three digits
    else:
        assert rest == "."


def assert_near(frame, trace, at):
    """The tokens of a frame of usual height that are near enough to be coloured, and the state line."""
    seen = look(frame)
    counts, fed, _ = count(trace, trace.steps, at, ALL)
    expected = kinds_of_counts(seen["legend"], counts, fed, len(ALL))
    near = [pair for pair in zip(seen["kinds"], expected, strict=True) if pair[0]]
    assert len(near) > 50 and all(kind == right for kind, right in near)
    assert_state(seen["state"], trace, at, ALL)


def dropped(trace, position, layer, head):
    """The compaction, from 1, by which a head has given up a position; None where it holds it to the end."""
    later = ((at, step) for at, step in enumerate(trace.steps, 1) if step > position)
    return next((at for at, step in later if position not in trace.held(step, layer, head)), None)


def fed_by(trace, at):
    return f"compaction {at} ({trace.steps[at - 1]} tokens fed)"


def sentence_of(trace, position):
    """Number, whether it re-checks, λ, whether it repeats; None where it is not finished."""
    found = (i for i, s in enumerate(trace.sentences) if s[0] <= position <= s[1])
    return next(((i + 1, *trace.sentences[i][3:6]) for i in found), None)
