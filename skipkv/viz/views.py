"""Pages of traces: what stayed, where two runs differ, who still holds what.

Trace, chosen heads → header and arrays (encode) → pack → template of the view
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from skipkv.checks import integer, integers, wrong
from skipkv.errors import ConfigError
from skipkv.trace import Trace
from skipkv.viz import encode
from skipkv.viz.page import Page, asset, fill, pack

LIMIT = 5_000_000  # bytes of a page up to which scores go into it
SCRIPTS = ("decode.js", "draw.js", "strips.js")

Choice = int | Sequence[int] | None
Chosen = tuple[list[int], list[int]]  # layers, KV heads


def kept(trace: Trace, step: int | None = None, layers: Choice = None, heads: Choice = None) -> Page:
    """The text, every token coloured by how many heads still hold it, with a slider over the compactions.

    Parameters
    ----------
    trace : Trace
        Of ``Model.generate(..., trace=True)`` or ``"scores"``, or of ``Model.replay``.
    step : int, optional
        Where the slider starts: at the last compaction among the first ``step`` tokens fed, 0 before all of them; at
        the last compaction by default.
    layers, heads : int or sequence of int, optional
        What the page holds; all by default. The page lets one choose among them.

    Returns
    -------
    Page
        Recorded scores are in it, quantised to 16 or 8 bits of each compacted head's range, as long as it stays under
        `LIMIT` bytes.

    Raises
    ------
    ConfigError
        A parameter is out of range, or the trace does not fit itself.
    """
    encode.check(trace)
    chosen = _choose(trace, layers, heads)
    return _text_page("kept", [trace], chosen, step, f"What the cache kept: {trace.method}")


def compare(a: Trace, b: Trace, step: int | None = None, layers: Choice = None, heads: Choice = None) -> Page:
    """Two runs over the same text laid over each other: tokens held by both, only one, or none.

    Parameters
    ----------
    a, b : Trace
        Of the same text, as `Model.replay` gives them. Their compactions are matched by step: at each step of either,
        both are shown as they are then.
    step, layers, heads
        As for `kept`.

    Raises
    ------
    ConfigError
        The texts or the shapes of the models differ, or as for `kept`.
    """
    for trace in (a, b):
        encode.check(trace)
    hint = "replay one text under both methods"
    for p, (x, i, y, j) in enumerate(zip(a.texts, a.tokens, b.texts, b.tokens, strict=False)):
        if (x, i) != (y, j):
            raise ConfigError(f"the texts differ at position {p}: {x!r} (token {i}) and {y!r} (token {j}); {hint}")
    if len(a.tokens) != len(b.tokens):
        raise ConfigError(f"the texts have {len(a.tokens)} and {len(b.tokens)} tokens; {hint}")
    shapes = [(trace.n_layers, trace.n_kv_heads) for trace in (a, b)]
    if shapes[0] != shapes[1]:
        raise ConfigError("the traces have {} layers × {} KV heads and {} × {}".format(*shapes[0], *shapes[1]))
    chosen = _choose(a, layers, heads)
    return _text_page("compare", [a, b], chosen, step, f"What two caches kept: {a.method} and {b.method}")


def survival(trace: Trace, layer: int, heads: Choice = None) -> Page:
    """Position × compaction: who still holds what, one map for every KV head of a layer.

    Parameters
    ----------
    trace : Trace
    layer : int
    heads : int or sequence of int, optional
        All by default.

    Raises
    ------
    ConfigError
        A parameter is out of range, or the trace does not fit itself.
    """
    encode.check(trace)
    chosen = _choose(trace, integer("layer", layer, 0, trace.n_layers - 1), heads)
    header, arrays = _describe("survival", [trace], chosen)
    return _fill(f"Who still holds what: layer {layer}, {trace.method}", header, arrays)


def _text_page(view: str, traces: Sequence[Trace], chosen: Chosen, step: int | None, title: str) -> Page:
    """The page with the finest scores that fit."""
    header, arrays = _describe(view, traces, chosen)
    steps, n = header["steps"], len(traces[0].tokens)
    # The last frame at or before a step; frame f ≥ 1 is after the compaction at steps[f − 1].
    header["start"] = len(steps) if step is None else sum(s <= integer("step", step, 0, n) for s in steps)
    heads = list(product(*chosen))
    scored = [c.scores for t in traces for c in t.compactions if c.scores and (c.layer, c.head) in set(heads)]
    recorded = sum(len(values) for scores in scored for values in scores.values())
    for bits in (16, 8) if recorded else ():
        if recorded * bits > 64 * LIMIT:  # they never deflate to less than an eighth
            continue
        names, parts = zip(*(encode.scores(trace, heads, steps, bits) for trace in traces), strict=True)
        more = {f"{name}{i}": array for i, part in enumerate(parts) for name, array in part.items()}
        page = _fill(title, header | {"scores": names, "bits": bits}, arrays | more)
        if len(page.html) <= LIMIT:
            return page
    if recorded:
        header["left_out"] = LIMIT
    return _fill(title, header, arrays)


def _describe(view: str, traces: Sequence[Trace], chosen: Chosen) -> tuple[dict, dict]:
    """Header and arrays of a page, scores aside."""
    one, steps = traces[0], sorted({int(s) for t in traces for s in t.steps})
    header = {
        "view": view, "texts": one.texts, "n_prompt": one.n_prompt, "layers": chosen[0], "heads": chosen[1],
        "n_layers": one.n_layers, "n_kv_heads": one.n_kv_heads, "steps": steps,
        "traces": [
            {"method": str(t.method), "model": str(t.settings.get("model", "")), "virtual": not t.method.evict,
             "sentences": [[s.first, s.last, s.thought, round(s.similarity, 4), s.repeats] for s in t.sentences],
             "alphas": [[int(p), round(float(alpha), 4)] for p, alpha in sorted(t.alphas.items())],
             "steps": [int(s) for s in t.steps], "cache": size, "bytes": [[int(s), int(b)] for s, b in t.bytes]}
            for t, size in zip(traces, encode.sizes(traces), strict=True)
        ],
    }  # fmt: skip
    return header, {f"ages{i}": encode.ages(t, list(product(*chosen)), steps).ravel() for i, t in enumerate(traces)}


def _fill(title: str, header: dict, arrays: dict) -> Page:
    scripts = (*SCRIPTS, "survival.js") if header["view"] == "survival" else (*SCRIPTS, "tip.js", "text.js")
    return Page(fill(title, asset("view.html"), scripts, pack(header, arrays)), title)


def _choose(trace: Trace, layers: Choice, heads: Choice) -> Chosen:
    """The layers and KV heads that a page holds."""
    return _some("layers", layers, trace.n_layers), _some("heads", heads, trace.n_kv_heads)


def _some(name: str, value: Choice, n: int) -> list[int]:
    if value is None:
        return list(range(n))
    found = sorted(set(integers(name, value, 0, n - 1)))
    if not found:
        raise wrong(name, value, f"at least one integer from 0 to {n - 1}")
    return found
