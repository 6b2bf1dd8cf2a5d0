"""A trace as arrays that are small once deflated.

    kept sets → ages [n_heads, n]: which compaction of a position's life, counted from 1, drops it; 0: none does
    scores → of each compacted head: candidates, (low, high) of each score, codes between them; the ages give positions

A slot that is gone does not come back, so one small number a position and head says everything about all compactions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from skipkv.errors import ConfigError
from skipkv.trace import SCORES, Compaction, Trace

Head = tuple[int, int]  # layer, KV head
HEADS = 1 << 14  # of all layers: far more than any model has


@dataclass
class Encoded:
    """The scored compactions of some heads.

    Attributes
    ----------
    names : list of str
        Of ``importance``, ``redundancy``, ``penalty``, ``score``.
    index : int32 [n_scored, 3]
        Frame, head (its place among those chosen), candidates: the oldest slots held before.
    bounds : float32 [n_scored, n_names, 2]
        Lowest and highest finite value.
    codes : uint16 or uint8 [sum of n_names × candidates]
        Compaction by compaction, name by name: 0 … top − 1 between the bounds; top: not finite.
    """

    names: list[str]
    index: np.ndarray
    bounds: np.ndarray
    codes: np.ndarray


def is_virtual(trace: Trace) -> bool:
    """Whether the run dropped nothing and the kept sets are what the method would have kept."""
    return not trace.method.evict


def check(trace: Trace) -> None:
    """Refuse a trace whose parts do not fit each other."""
    n = len(trace.tokens)
    if n == 0:
        raise ConfigError("trace has no tokens; allowed: at least one")
    if len(trace.texts) != n:
        raise ConfigError(f"trace has {n} tokens, but {len(trace.texts)} texts")
    shape = trace.n_layers, trace.n_kv_heads
    if min(shape) < 1 or shape[0] * shape[1] > HEADS:
        raise ConfigError(f"trace has {shape[0]} layers × {shape[1]} KV heads; allowed: from 1 to {HEADS} heads in all")
    if not 0 <= trace.n_prompt <= n:
        raise ConfigError(f"trace has a prompt of {trace.n_prompt} tokens; allowed: 0 to {n}")
    end = -1
    for s in trace.sentences:
        if not (_numbers(s, 6) and end < s[0] <= s[1] < n):
            raise ConfigError(
                f"trace: sentence {tuple(s)}; allowed: (first, last, closed, thought, lambda, repeats) that follow "
                f"each other, below {n}, all finite"
            )
        end = s[1]
    for pair in trace.alphas.items():
        if not (_numbers(pair, 2) and 0 <= pair[0] < n):
            raise ConfigError(f"trace: (position, α) is {pair}; allowed: positions below {n}, finite α")
    for pair in trace.bytes:
        if not (_numbers(pair, 2) and 0 <= pair[0] <= n and pair[1] >= 0):
            raise ConfigError(f"trace: (step, bytes) is {pair}; allowed: steps from 0 to {n}, bytes from 0")
    for c in trace.compactions:
        if not (0 <= c.layer < trace.n_layers and 0 <= c.head < trace.n_kv_heads and 1 <= c.step <= n):
            raise ConfigError(
                f"trace: compaction of layer {c.layer}, head {c.head} at step {c.step}; allowed: layers below "
                f"{trace.n_layers}, heads below {trace.n_kv_heads}, steps from 1 to {n}"
            )


def _numbers(values: Sequence[Any], count: int) -> bool:
    return len(values) == count and all(isinstance(v, Real) and math.isfinite(v) for v in values)


def by_head(trace: Trace, heads: Sequence[Head]) -> list[list[Compaction]]:
    """The compactions of each head in order of step."""
    found: dict[Head, list[Compaction]] = {head: [] for head in heads}
    for c in trace.compactions:
        if (c.layer, c.head) in found:
            found[c.layer, c.head].append(c)
    return [sorted(found[head], key=lambda c: c.step) for head in heads]


def births(steps: np.ndarray, n: int) -> np.ndarray:
    """The first frame of each position, int64 [n]: frame f ≥ 1 is after the compaction at steps[f − 1]."""
    return np.searchsorted(steps, np.arange(n), side="right") + 1


def ages(trace: Trace, heads: Sequence[Head], steps: Sequence[int]) -> np.ndarray:
    """When each head gave up each position.

    Parameters
    ----------
    trace : Trace
    heads : sequence of (layer, KV head)
    steps : sequence of int
        Ascending; those of the trace and maybe more.

    Returns
    -------
    uint8 or uint16 [n_heads, n]
        0: never; a ≥ 1: by the compaction at ``steps[births(p) + a − 2]``, the a-th that position p met.

    Raises
    ------
    ConfigError
        A kept set is no subset of what was held before.
    """
    n, grid = len(trace.tokens), np.asarray(steps, np.int64)
    first = births(grid, n)
    # 255 and 65535 are left for "never" when the ages become frames.
    out = np.zeros((len(heads), n), np.uint8 if len(grid) < 255 else np.uint16)
    mark = np.zeros(n, bool)
    for row, history in enumerate(by_head(trace, heads)):
        before, fed = np.zeros(0, np.int64), 0
        for c in history:
            held = np.concatenate([before, np.arange(fed, c.step)])
            inside = (c.kept >= 0) & (c.kept < n)
            mark[c.kept[inside]] = True
            stays = mark[held]
            mark[c.kept[inside]] = False
            if np.count_nonzero(stays) != len(c.kept):
                wrong = np.setdiff1d(c.kept, held)
                what = f"keeps position {wrong[0]}, which was not held" if len(wrong) else "keeps a position twice"
                raise ConfigError(f"trace: layer {c.layer}, head {c.head} at step {c.step} {what}")
            gone = held[~stays]
            frame = int(np.searchsorted(grid, c.step)) + 1
            out[row, gone] = frame - first[gone] + 1
            before, fed = held[stays], c.step
    return out


def scores(trace: Trace, heads: Sequence[Head], steps: Sequence[int], bits: int) -> Encoded | None:
    """The recorded scores, quantised; None where there are none.

    Candidates are put in order of position: a method that leaves slots in order of score lists them otherwise.
    """
    grid = np.asarray(steps, np.int64)
    scored = [(row, c) for row, history in enumerate(by_head(trace, heads)) for c in history if c.scores]
    names = [name for name in SCORES if scored and all(name in c.scores for _, c in scored)]
    if not names:
        return None
    top, kind = (1 << bits) - 1, np.uint8 if bits == 8 else np.uint16
    index, bounds, codes = [], [], []
    for row, history in enumerate(by_head(trace, heads)):
        slots, fed = np.zeros(0, np.int64), 0
        for c in history:
            slots = np.concatenate([slots, np.arange(fed, c.step)])
            if c.scores:
                n = len(c.scores[names[0]])
                order = np.argsort(slots[:n], kind="stable")
                values = np.stack([c.scores[name] for name in names])[:, order].astype(np.float64)
                finite = np.isfinite(values)
                low = np.where(finite, values, np.inf).min(axis=1, initial=np.inf)
                high = np.where(finite, values, -np.inf).max(axis=1, initial=-np.inf)
                low, high = np.where(np.isfinite(low), low, 0.0), np.where(np.isfinite(high), high, 0.0)
                scale = np.where(high > low, (top - 1) / np.where(high > low, high - low, 1.0), 0.0)
                code = np.rint((np.where(finite, values, low[:, None]) - low[:, None]) * scale[:, None])
                index.append((int(np.searchsorted(grid, c.step)) + 1, row, n))
                bounds.append(np.stack([low, high], axis=1))
                codes.append(np.where(finite, code, top).astype(kind).ravel())
            slots, fed = np.asarray(c.kept, np.int64), c.step
    return Encoded(names, np.array(index, np.int32), np.array(bounds, np.float32), np.concatenate(codes))


def sizes(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """The caches over tokens fed: bytes of their pages where all traces say how large those are, else slots.

    Returns
    -------
    list of dict
        ``unit``: "bytes" or "slots"; ``points``: corners (tokens fed, value) of a run's line, at a compaction the value
        before it and the one after; ``full``: the same of a cache that drops nothing.
    """
    pages = [[t.settings.get(name) for name in ("page_slots", "page_bytes", "full_page_bytes")] for t in traces]
    in_bytes = all(isinstance(size, int) and 0 < size < 1 << 32 for of in pages for size in of)
    found = []
    for t, of in zip(traces, pages, strict=True):
        slots, page, full_page = of if in_bytes else (1, 1, 1)
        n, heads = len(t.tokens), [(layer, head) for layer in range(t.n_layers) for head in range(t.n_kv_heads)]
        before, after = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)  # pages of all heads
        for history in by_head(t, [] if is_virtual(t) else heads):
            held = fed = 0
            for c in [*history, None]:
                until = c.step if c else n
                occupied = -(-(held + np.arange(until - fed + 1)) // slots)
                before[fed + 1 : until + 1] += occupied[1:]
                after[fed:until] += occupied[:-1]
                if c:
                    held, fed = len(c.kept), c.step
            after[n] += occupied[-1]
        full = -(-np.arange(n + 1) // slots) * len(heads)
        if is_virtual(t):
            before = after = full
        points, full = _corners(before * page, after * page), _corners(full * full_page, full * full_page)
        found.append({"unit": "bytes" if in_bytes else "slots", "points": points, "full": full})
    return found


def _corners(before: np.ndarray, after: np.ndarray) -> list[list[int]]:
    """Points (x, before[x]), (x, after[x]) without those on a straight line between their neighbours."""
    x, y = np.repeat(np.arange(len(before)), 2), np.stack([before, after], axis=1).ravel()
    new = np.append(True, (np.diff(x) != 0) | (np.diff(y) != 0))
    x, y = x[new], y[new]
    dx, dy = np.diff(x), np.diff(y)
    corner = np.concatenate([[True], dx[1:] * dy[:-1] != dx[:-1] * dy[1:], [True]])
    return np.stack([x, y], axis=1)[corner].tolist()
