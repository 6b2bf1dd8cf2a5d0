"""A trace as arrays that are small once deflated.

    kept sets → ages [n_heads, n]: which compaction of a position's life, counted from 1, drops it; 0: none does
    scores → of each compacted head: candidates, (low, high) of each score, codes between them; the ages give positions

A slot that is gone does not come back, so one small number a position and head says everything about all compactions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from numbers import Real
from typing import Any

import numpy as np

from skipkv.checks import instance
from skipkv.errors import ConfigError
from skipkv.trace import SCORES, Compaction, Trace

Head = tuple[int, int]  # layer, KV head
HEADS = 1 << 14  # of all layers: far more than any model has
CELLS = 1 << 27  # heads × tokens: a small file can claim more than memory holds


def check(trace: Trace) -> None:
    """Refuse a trace whose parts do not fit each other."""
    n, layers, heads = len(instance("trace", trace, Trace).tokens), trace.n_layers, trace.n_kv_heads
    if n == 0:
        raise ConfigError("trace has no tokens; allowed: at least one")
    if len(trace.texts) != n:
        raise ConfigError(f"trace has {n} tokens, but {len(trace.texts)} texts")
    if min(layers, heads) < 1 or layers * heads > HEADS:
        raise ConfigError(f"trace has {layers} layers × {heads} KV heads; allowed: from 1 to {HEADS} heads in all")
    if layers * heads * n > CELLS:
        raise ConfigError(f"trace has {n} tokens × {layers * heads} heads; allowed: up to {CELLS} of both together")
    if not 0 <= trace.n_prompt <= n:
        raise ConfigError(f"trace has a prompt of {trace.n_prompt} tokens; allowed: 0 to {n}")
    ordered = f"(first, last, closed, thought, lambda, repeats) that follow each other, below {n}, all finite"
    end = -1
    for s in trace.sentences:
        if not (_numbers(s, 6) and end < s[0] <= s[1] < n):
            raise ConfigError(f"trace: sentence {tuple(s)}; allowed: {ordered}")
        end = s[1]
    for pair in trace.alphas.items():
        if not (_numbers(pair, 2) and 0 <= pair[0] < n):
            raise ConfigError(f"trace: (position, α) is {pair}; allowed: positions below {n}, finite α")
    for pair in trace.bytes:
        if not (_numbers(pair, 2) and 0 <= pair[0] <= n and pair[1] >= 0):
            raise ConfigError(f"trace: (step, bytes) is {pair}; allowed: steps from 0 to {n}, bytes from 0")
    inside = f"layers below {layers}, heads below {heads}, steps from 1 to {n}"
    for c in trace.compactions:
        if not (0 <= c.layer < layers and 0 <= c.head < heads and 1 <= c.step <= n):
            found = f"compaction of layer {c.layer}, head {c.head} at step {c.step}"
            raise ConfigError(f"trace: {found}; allowed: {inside}")


def _numbers(values: Sequence[Any], count: int) -> bool:
    return len(values) == count and all(isinstance(v, Real) and math.isfinite(v) for v in values)


def history(trace: Trace, heads: Sequence[Head]) -> Iterator[tuple[int, Compaction, np.ndarray]]:
    """Each head's compactions in order of step: (its place, compaction, positions of the slots held before)."""
    rows = {head: row for row, head in enumerate(heads)}
    last = -1
    for c in sorted(trace.compactions, key=lambda c: (c.layer, c.head, c.step)):
        row = rows.get((c.layer, c.head), -1)
        if row >= 0:
            if row != last:
                slots, fed, last = np.zeros(0, np.int64), 0, row
            yield row, c, np.concatenate([slots, np.arange(fed, c.step)])
            slots, fed = c.kept.astype(np.int64), c.step


def ages(trace: Trace, heads: Sequence[Head], steps: Sequence[int]) -> np.ndarray:
    """When each head gave up each position: uint8 or uint16 [n_heads, n]; 0: never, a: by the a-th step that it met.

    Steps are ascending, those of the trace and maybe more. A kept set that is no subset of what was held before is a
    ConfigError.
    """
    n = len(trace.tokens)
    met = np.searchsorted(steps, np.arange(n), side="right")  # steps before each position
    # 255 and 65535 are left for "never" when the ages become frames.
    out = np.zeros((len(heads), n), np.uint8 if len(steps) < 255 else np.uint16)
    for row, c, held in history(trace, heads):
        stays = np.isin(held, c.kept)
        if np.count_nonzero(stays) != len(c.kept):
            wrong = np.setdiff1d(c.kept, held)
            what = f"keeps position {wrong[0]}, which was not held" if len(wrong) else "keeps a position twice"
            raise ConfigError(f"trace: layer {c.layer}, head {c.head} at step {c.step} {what}")
        gone = held[~stays]
        out[row, gone] = np.searchsorted(steps, c.step) + 1 - met[gone]
    return out


def scores(trace: Trace, heads: Sequence[Head], steps: Sequence[int], bits: int) -> tuple[list[str], dict[str, Any]]:
    """The names of the recorded scores (none: no arrays either), and the scores quantised, compaction by compaction.

    index, int32 [3 n_scored]: frame, head (its place among those chosen), candidates: the oldest slots held before
    bounds, float32 [2 n_scored n_names]: lowest and highest finite value of each name
    codes, uint16 or uint8 [sum of n_names × candidates]: 0 … top − 1 between the bounds, top: not finite; name by name,
        in order of position, whatever order a method left the slots in
    """
    inside = set(heads)
    scored = [c for c in trace.compactions if c.scores and (c.layer, c.head) in inside]
    names = [name for name in SCORES if scored and all(name in c.scores for c in scored)]
    if not names:
        return [], {}
    top = (1 << bits) - 1
    index, bounds, codes = [], [], []
    for row, c, slots in history(trace, heads):
        if c.scores:
            n = len(c.scores[names[0]])
            values = np.stack([c.scores[name] for name in names])[:, np.argsort(slots[:n], kind="stable")]
            values, finite = values.astype(np.float64), np.isfinite(values)
            low = values.min(axis=1, keepdims=True, where=finite, initial=np.inf)
            high = values.max(axis=1, keepdims=True, where=finite, initial=-np.inf)
            low, high = np.where(low <= high, (low, high), 0.0)
            code = np.rint((values - low) * ((top - 1) / np.where(high > low, high - low, 1.0)))
            index.append((np.searchsorted(steps, c.step) + 1, row, n))
            bounds.append(np.concatenate([low, high], axis=1).ravel())
            codes.append(np.where(finite, code, top).ravel())
    kind = np.uint8 if bits == 8 else np.uint16
    codes, bounds = np.concatenate(codes).astype(kind), np.concatenate(bounds).astype(np.float32)
    return names, {"index": np.array(index, np.int32).ravel(), "bounds": bounds, "codes": codes}


def sizes(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """The caches over tokens fed: bytes of their pages where all traces say how large those are, else slots.

    Of each the ``unit`` ("bytes" or "slots"), the ``points``: corners (tokens fed, value) of its line, at a compaction
    the value before it and the one after, and ``full``: the same of a cache that drops nothing.
    """
    pages = [[t.settings.get(name) for name in ("page_slots", "page_bytes", "full_page_bytes")] for t in traces]
    in_bytes = all(isinstance(size, int) and 0 < size < 1 << 32 for of in pages for size in of)
    found = []
    for t, of in zip(traces, pages, strict=True):
        slots, page, full_page = of if in_bytes else (1, 1, 1)
        heads = list(np.ndindex(t.n_layers, t.n_kv_heads))
        fed = np.arange(len(t.tokens) + 1)
        whole = -(-fed // slots)
        full = whole * len(heads)
        before, after = full.copy(), full.copy()
        for _, compactions in groupby(history(t, heads if t.method.evict else []), lambda found: found[0]):
            dropped = np.zeros(len(fed), np.int64)
            for _, c, held in compactions:
                dropped[c.step] = len(held) - len(c.kept)
            left = fed - dropped.cumsum()
            before += -(-(left + dropped) // slots) - whole
            after += -(-left // slots) - whole
        lines = {"points": _corners(before * page, after * page), "full": _corners(full * full_page, full * full_page)}
        found.append({"unit": "bytes" if in_bytes else "slots", **lines})
    return found


def _corners(before: np.ndarray, after: np.ndarray) -> list[list[int]]:
    """Points (x, before[x]), (x, after[x]) without those on a straight line between their neighbours."""
    x, y = np.repeat(np.arange(len(before)), 2), np.stack([before, after], axis=1).ravel()
    new = np.append(True, (np.diff(x) != 0) | (np.diff(y) != 0))
    x, y = x[new], y[new]
    dx, dy = np.diff(x), np.diff(y)
    corner = np.concatenate([[True], dx[1:] * dy[:-1] != dx[:-1] * dy[1:], [True]])
    return np.stack([x, y], axis=1)[corner].tolist()
