"""The demo's report, pages inside of notebooks, hostile texts and the looks of everything, in a real browser."""

from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from reading import TALL, assert_near, drag, hover, look, press, ready, show, show_report, wait
from traces import HOSTILE, RUNS, build, outcome

from skipkv import Custom, viz
from skipkv.viz.page import fill
from skipkv.viz.report import report

pytestmark = pytest.mark.browser


def words(frame):
    return " ".join(frame.locator(".report").inner_text().split())


def test_the_report_tells_the_runs(browser, told):
    runs, problems, number, traces = told
    problem = problems[number]
    main, *frames = show_report(browser, report(runs, problem, number, *traces, which="2-3 steps"))
    rows = [row.locator("td").all_text_contents() for row in main.locator("tbody tr").all()]
    assert len(rows) == len(runs) == 14
    for cells, run in zip(rows, runs, strict=True):
        o, texts = run.outcome, run.texts
        share = f"{run.method.budget} ({run.share:.0%})".replace("%", " %") if run.share else ""
        length = sum(len(text.prompt_tokens) + len(text.tokens) for text in texts) / 3
        peak = sum(text.stats["peak_bytes"] for text in texts) / 3e3
        assert cells == [
            run.method.name + (" + steering" if run.steered else ""), share, f"{100 * o.right / 3:.1f}",
            f"{100 * o.low:.1f}–{100 * o.high:.1f}", f"{length:.1f}", f"{peak:.1f}", f"{o.tokens_per_second:.0f}",
            f"{o.truncated}",
        ]  # fmt: skip
    picture = main.locator("svg").inner_html()
    names = {run.method.name + (" + steering" if run.steered else "") for run in runs}
    assert all(f">{text}</text>" in picture for text in {*names, "Accuracy against budget, 3 problems"})
    assert main.locator("pre").all_text_contents() == [problem["prompt"]]
    for part in (
        "The reasoning model in the box on 3 held-out problems (2-3 steps), the same",
        "rewarded by construction, and the model was trained with hidden slots, to live with an evicting cache.",
        f"Answer: {problem['answer']}", f"Problem {number}, as the full", "interval=32", "; steering: layer=3,alpha=1.",
    ):  # fmt: skip
        assert part in words(main)
    for frame, trace in zip(frames, traces, strict=True):
        assert str(trace.method) in frame.locator("#about").text_content()
        assert_near(frame, trace, len(trace.steps))


def test_a_report_says_only_of_the_model_in_the_box_how_it_was_trained(browser, told):
    runs, problems, number, (a, b) = told
    a = replace(a, settings=a.settings | {"model": "my <b>model</b>"})
    main, *_ = show_report(browser, report(runs[:-1], problems[number], number, a, b))
    assert "The model my <b>model</b> on 3 held-out problems, the same" in words(main)
    assert "rewarded by construction." in words(main) and not {"trained", "steering:"} & set(words(main).split())


def test_the_sliders_of_a_report_move_together(browser, told, trace, other):
    runs, problems, number, _ = told
    _, a, b = show_report(browser, report(runs, problems[number], number, trace, other))
    assert trace.steps != other.steps
    for one, two, at in ((a, b, 3), (b, a, 1), (a, b, 0), (b, a, len(other.steps)), (a, b, 5)):
        moved, follows = (trace, other) if one is a else (other, trace)
        assert one.evaluate("view.frame") != at
        drag(one, at)
        expected = sum(step <= moved.steps[at - 1] for step in follows.steps) if at else 0
        wait(two, f"view.frame === {expected}")
        assert_near(one, moved, at)
        assert_near(two, follows, expected)
    press(a, "ArrowRight", 6)
    wait(b, f"view.frame === {sum(step <= trace.steps[5] for step in other.steps)}")


def test_a_notebooks_styles_stay_outside(browser, trace):
    page = viz.kept(trace)
    expected = look(show(browser, page, page.height))
    styles = """
        span, header, main, canvas, p, div:not(.cell) { display: none !important; color: red !important; }
        * { background: yellow; font: 40px serif; } :root { --paper: red; --ink: red; --k0: red; --k8: red; }"""
    cell = f'<div class="cell">{page._repr_html_()}</div>'
    notebook = f'<!doctype html><style>{styles}</style><body style="margin: 0">{cell}'
    frame = ready(browser.open(notebook).frames[1], page.height)
    seen = look(frame)
    assert seen == expected and len([kind for kind in seen["kinds"] if kind]) > 100
    assert hover(frame, 3)["lines"][0] == "position 3, prompt"
    drag(frame, 2)
    assert_near(frame, trace, 2)


# -- hostile texts


ATTACKS = [
    "<script>window.pwned=1</script>", "</script><script>window.pwned=1</script>", "'><svg onload=window.pwned=1>",
    "\"></iframe><img src=x onerror=window.pwned=1>", "</iframe><img src=x onerror='window.pwned=1'>",
    "</style><script>window.pwned=1</script>", "</title><script>window.pwned=1</script>", "</pre><b>", "<!--", "-->",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>", "<img src=http://127.0.0.1:4567/>", "`",
    "${window.pwned=1}", "<link rel=stylesheet href=http://127.0.0.1:4567/x.css>", "&quot;", "&lt;b&gt;", "&#39;", "&",
    "'", '"', "\\", "{{data}}", "[[frames]]", "javascript:window.pwned=1", "<a href='javascript:window.pwned=1'>x</a>",
    '" onmouseover=window.pwned=1 x="', "' onfocus=window.pwned=1 autofocus='", "</textarea></select></template>",
    "<svg><animate onbegin=window.pwned=1 attributeName=x dur=1s>", "</svg><foreignObject><body onload=window.pwned=1>",
    "<math><mtext><style><img src=x onerror=window.pwned=1></style></mtext></math>", "}</style>{", "\\3c script\\3e",
    "<meta http-equiv=refresh content=0;url=http://127.0.0.1:4567/>", "<object data=http://127.0.0.1:4567/></object>",
    "<![CDATA[<script>window.pwned=1</script>]]>", "<?xml-stylesheet href=http://127.0.0.1:4567/x?>", "&#x3c;b&#62;",
    "<details open ontoggle=window.pwned=1>", "@import 'http://127.0.0.1:4567/x.css'", "expression(window.pwned=1)",
    '<noscript><p title="</noscript><img src=x onerror=window.pwned=1>">', "<base href=http://127.0.0.1:4567/>",
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
def test_hostile_traces_run_nothing(browser, name):
    hostile, harmless = map(MAKE[name], hostile_and_harmless())
    expected = elements(show(browser, harmless))
    frame = show(browser, hostile)
    assert elements(frame) == expected
    assert frame.evaluate("document.title") == hostile.title and ATTACK in hostile.title
    assert ATTACK in frame.locator("#about").text_content()
    if name != "survival":
        texts = frame.locator("#text .body > span").all_text_contents()
        assert texts[len(HOSTILE) :] == ATTACKS
        for p in range(len(HOSTILE), len(texts)):
            tip = hover(frame, p)
            assert tip["code"] == texts[p] and set(tip["elements"]) <= {"CODE", "DIV", "I", "B", "SMALL"}
    tab = browser.open("<!doctype html><meta charset=utf-8>" + hostile._repr_html_(), height=TALL)
    assert elements(ready(tab.frames[1], hostile.height)) == expected
    assert elements(tab.main_frame) == Counter(["HTML", "HEAD", "META", "BODY", "IFRAME"])


def test_a_hostile_report_runs_nothing(browser, told):
    hostile, harmless = hostile_and_harmless()
    calm = {"prompt": "x", "answer": "x"}
    expected = [elements(f) for f in show_report(browser, report(told[0], calm, 0, harmless, harmless))]
    problem = {"prompt": f"{ATTACK}[[answer]]", "answer": f"{ATTACK}[[table]]{{{{script}}}}"}
    main, *frames = show_report(browser, report(told[0], problem, 0, hostile, hostile))
    assert [elements(frame) for frame in (main, *frames)] == expected and len(frames) == 2
    assert main.locator("pre").all_text_contents() == [problem["prompt"]]
    assert f"Answer: {problem['answer']}" in main.locator("p").all_text_contents()
    assert all(ATTACK in element.get_attribute("title") for element in main.locator("iframe").all())


def test_hostile_names_in_a_picture_run_nothing(browser):
    found, files = [], []
    for name in ("x", ATTACK):
        def score(c):
            return c.keys[:, 0]

        score.__name__ = name[:40]  # stands in the legend
        picture = viz.curve([*RUNS, outcome(Custom(score, budget=64), 5)], title=name)
        frame = browser.open(fill("", picture.inline(), ())).main_frame
        found.append(elements(frame))
        texts = frame.locator("svg text").all_text_contents()
        assert name in texts and any(score.__name__ in text for text in texts)
        assert frame.locator("svg").get_attribute("aria-label") == name
        files.append([element.tag for element in ElementTree.fromstring(picture._repr_svg_()).iter()])
    assert found[0] == found[1] and files[0] == files[1]


# -- looks

# Every text that is shown: its contrast (WCAG 2), its boxes, whether they are inside something that scrolls sideways.
SHOWN = """() => {
  const style = (element) => getComputedStyle(element);
  const rgb = (colour) => {
    const [r, g, b, a] = colour.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a ?? 1];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((x, i) => x * a + below[i] * (1 - a));
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * linear(colour[i] / 255), 0);
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement, range = document.createRange();
    range.selectNodeContents(node);
    const boxes = [...range.getClientRects()].filter((box) => box.width > 0 && box.height > 0);
    if (!node.textContent.trim() || !boxes.length) continue;
    if (element.closest("script, style, option, title, .hidden, [hidden]")) continue;
    if (!element.checkVisibility({ contentVisibilityAuto: true })) continue;
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(style(e));
    const ground = chain.reduce((below, s) => over(rgb(s.backgroundColor), below), [255, 255, 255]);
    const ink = rgb(element.closest("svg") ? style(element).fill : style(element).color);
    ink[3] *= chain.reduce((product, s) => product * Number(s.opacity), 1);
    const [low, high] = [luminance(ground), luminance(over(ink, ground))].sort((a, b) => a - b);
    found.push({
      text: node.textContent.trim(), kinds: [...element.classList], contrast: (high + 0.05) / (low + 0.05),
      colours: [ground, over(ink, ground)].map((colour) => colour.map(Math.round).join()),
      scrolls: chain.slice(2).some((s) => ["auto", "scroll"].includes(s.overflowX)),
      boxes: boxes.map((box) => [box.left, box.top, box.right, box.bottom]),
    });
  }
  return found;
}"""
CLASSES = {
    "kept": {"later", *(f"k{i}" for i in range(9))}, "kept of one head": {"later", "k0", "k8"},
    "compare": {"later", "k0", "both", "a1", "a2", "a3", "b1", "b2", "b3"},
    "compare of one head": {"later", "k0", "both", "a3", "b3"},
    "survival": {"later", "k0", "prompt", "work", "check"}, "report": {"later", "k8"},
}  # fmt: skip


@pytest.fixture
def texts_of(browser, told, trace, other):
    """The texts of every kind of page, those of its frames too."""

    def texts(name, **options):
        chosen = {"layers": 1, "heads": 2} if name.endswith("one head") else {}
        kind, step = name.split()[0], trace.steps[-2]
        if kind == "report":
            runs, problems, number, traces = told
            page = report(runs, problems[number], number, *traces)
            return [frame.evaluate(SHOWN) for frame in show_report(browser, page, **options)]
        make = {
            "kept": lambda: viz.kept(trace, step, **chosen), "survival": lambda: viz.survival(trace, 2),
            "compare": lambda: viz.compare(trace, other, step, **chosen),
        }  # fmt: skip
        return [show(browser, make[kind](), **options).evaluate(SHOWN)]

    return texts


@pytest.mark.parametrize("name", CLASSES)
def test_every_text_can_be_read_in_light_and_dark(texts_of, name):
    light, dark = (texts_of(name, dark=dark) for dark in (False, True))
    for texts, dark_texts in zip(light, dark, strict=True):
        assert len(texts) > 5
        for one, two in zip(texts, dark_texts, strict=True):
            assert one["text"] == two["text"]
            assert one["contrast"] >= 4.5 and two["contrast"] >= 4.5, (one, two)
            assert one["colours"] != two["colours"], one
    assert CLASSES[name] <= {kind for texts in light for text in texts for kind in text["kinds"]}


@pytest.mark.parametrize("width", [420, 1500])
@pytest.mark.parametrize("name", CLASSES)
def test_no_text_covers_another_or_leaves_the_page(texts_of, name, width):
    for texts in texts_of(name, width=width):
        of = np.array([i for i, text in enumerate(texts) for _ in text["boxes"]])
        left, top, right, bottom = np.array([box for text in texts for box in text["boxes"]]).T
        across = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
        down = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
        # A font's box is a little taller than its line: lines of one paragraph touch.
        crossing = np.argwhere(np.triu((across > 2) & (down > 4) & (of[:, None] != of)))
        assert [(texts[of[i]]["text"], texts[of[j]]["text"]) for i, j in crossing] == []
        assert [t["text"] for t in texts if not t["scrolls"] and max(box[2] for box in t["boxes"]) > width] == []
