"""Pages of traces: what stayed, where two runs differ, who still holds what.

Trace, chosen heads → header and arrays (encode) → pack → template of the view
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from skipkv.errors import ConfigError
from skipkv.trace import Trace
from skipkv.viz import encode
from skipkv.viz.page import Page, asset, fill, pack

LIMIT = 5_000_000  # bytes of a page up to which scores go into it
TEXT_SCRIPTS = ("decode.js", "draw.js", "strips.js", "tip.js", "text.js")
SURVIVAL_SCRIPTS = ("decode.js", "draw.js", "strips.js", "survival.js")

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

    Returns
    -------
    Page

    Raises
    ------
    ConfigError
        The texts or the shapes of the models differ, or as for `kept`.
    """
    for trace in (a, b):
        encode.check(trace)
    n = min(len(a.tokens), len(b.tokens))
    for p in range(n):
        if (a.tokens[p], a.texts[p]) != (b.tokens[p], b.texts[p]):
            raise ConfigError(
                f"the texts differ at position {p}: {a.texts[p]!r} (token {a.tokens[p]}) and {b.texts[p]!r} "
                f"(token {b.tokens[p]}); replay one text under both methods"
            )
    if len(a.tokens) != len(b.tokens):
        lengths = f"{len(a.tokens)} and {len(b.tokens)} tokens"
        raise ConfigError(f"the texts have {lengths}; replay one text under both methods")
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

    Returns
    -------
    Page

    Raises
    ------
    ConfigError
        A parameter is out of range, or the trace does not fit itself.
    """
    encode.check(trace)
    chosen = _choose(trace, _one("layer", layer, trace.n_layers), heads)
    header, arrays = _describe("survival", [trace], chosen, [int(s) for s in trace.steps])
    title = f"Who still holds what: layer {layer}, {trace.method}"
    return Page(fill(title, asset("survival.html"), SURVIVAL_SCRIPTS, pack(header, arrays)), title)


def _text_page(view: str, traces: Sequence[Trace], chosen: Chosen, step: int | None, title: str) -> Page:
    """The page with the finest scores that fit."""
    steps = sorted({int(s) for trace in traces for s in trace.steps})
    header, arrays = _describe(view, traces, chosen, steps)
    header["start"] = _frame(steps, step, len(traces[0].tokens))
    body = asset("text.html")
    recorded = _recorded(traces, chosen)
    for bits in (16, 8) if recorded else ():
        if recorded * bits > 64 * LIMIT:  # they never deflate to less than an eighth
            continue
        more = _scores(traces, chosen, steps, bits)
        page = Page(fill(title, body, TEXT_SCRIPTS, pack(header | more[0], arrays | more[1])), title)
        if len(page.html) <= LIMIT:
            return page
    if recorded:
        header["left_out"] = LIMIT
    return Page(fill(title, body, TEXT_SCRIPTS, pack(header, arrays)), title)


def _describe(view: str, traces: Sequence[Trace], chosen: Chosen, steps: Sequence[int]) -> tuple[dict, dict]:
    """Header and arrays of a page, scores aside."""
    first, sizes = traces[0], encode.sizes(traces)
    header = {
        "view": view, "texts": first.texts, "n_prompt": first.n_prompt, "layers": chosen[0], "heads": chosen[1],
        "n_layers": first.n_layers, "n_kv_heads": first.n_kv_heads, "steps": steps,
        "traces": [
            {"method": str(t.method), "model": str(t.settings.get("model", "")), "virtual": encode.is_virtual(t),
             "sentences": [[int(s[0]), int(s[1]), int(s[3]), round(float(s[4]), 4), int(s[5])] for s in t.sentences],
             "alphas": [[int(p), round(float(alpha), 4)] for p, alpha in sorted(t.alphas.items())],
             "steps": [int(s) for s in t.steps], "cache": size, "bytes": [[int(s), int(b)] for s, b in t.bytes]}
            for t, size in zip(traces, sizes, strict=True)
        ],
    }  # fmt: skip
    return header, {f"ages{i}": encode.ages(t, _pairs(chosen), steps).ravel() for i, t in enumerate(traces)}


def _recorded(traces: Sequence[Trace], chosen: Chosen) -> int:
    """How many scores the traces hold for these heads."""
    inside = set(_pairs(chosen))
    return sum(
        len(values) for t in traces for c in t.compactions if c.scores and (c.layer, c.head) in inside
        for values in c.scores.values()
    )  # fmt: skip


def _scores(traces: Sequence[Trace], chosen: Chosen, steps: Sequence[int], bits: int) -> tuple[dict, dict]:
    """What scores add to header and arrays."""
    names: list[list[str]] = []
    arrays: dict[str, np.ndarray] = {}
    for i, trace in enumerate(traces):
        found = encode.scores(trace, _pairs(chosen), steps, bits)
        names.append(found.names if found else [])
        if found:
            arrays |= {f"index{i}": found.index.ravel(), f"bounds{i}": found.bounds.ravel(), f"codes{i}": found.codes}
    return {"scores": names, "bits": bits}, arrays


def _frame(steps: Sequence[int], step: int | None, n: int) -> int:
    """The last frame at or before a step; frame f ≥ 1 is after the compaction at steps[f − 1]."""
    if step is None:
        return len(steps)
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or not 0 <= step <= n:
        raise ConfigError(f"step is {step!r}; allowed: integers from 0 to {n}")
    return sum(s <= step for s in steps)


def _choose(trace: Trace, layers: Choice, heads: Choice) -> Chosen:
    """The layers and KV heads that a page holds."""
    return _some("layers", layers, trace.n_layers), _some("heads", heads, trace.n_kv_heads)


def _pairs(chosen: Chosen) -> list[encode.Head]:
    return [(layer, head) for layer in chosen[0] for head in chosen[1]]


def _some(name: str, value: Choice, n: int) -> list[int]:
    if value is None:
        return list(range(n))
    if isinstance(value, (int, np.integer)) or not isinstance(value, Iterable) or isinstance(value, str):
        return [_one(name, value, n)]
    found = sorted({_one(name, v, n) for v in value})
    if not found:
        raise ConfigError(f"{name} is {value!r}; allowed: at least one integer from 0 to {n - 1}")
    return found


def _one(name: str, value: Any, n: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < n:
        raise ConfigError(f"{name} is {value!r}; allowed: integers from 0 to {n - 1}")
    return int(value)
