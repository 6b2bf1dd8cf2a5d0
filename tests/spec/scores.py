"""§2, §3, §5, §6: what one KV head's slots are scored by.

Shapes: L slots of one KV head, n query heads per KV head, W window queries, d head size. Sums use einsum and not BLAS:
equal keys then give equal cosines and logits to the last bit, so that ties stay ties.
"""

from __future__ import annotations

import math

import numpy as np

SIMILAR = 0.5  # §3.3: cosines above this are hits
MASK64 = (1 << 64) - 1


def softmax(z: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def group_logits(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """§2.2: raw logits, maximum over the group. keys [L, d], queries [n, W, d] -> z [W, L]."""
    d = keys.shape[1]
    return np.einsum("nwd,ld->nwl", queries, keys).max(axis=0) / math.sqrt(d)


def importance(keys: np.ndarray, queries: np.ndarray, *, window: int = 8, kernel: int = 7) -> np.ndarray:
    """§2: I[j] of one KV head. keys [L, d], queries [n, <= W, d] of its group -> [L - W]."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}; it must be odd and at least 1")
    n_candidates = max(0, len(keys) - window)
    if n_candidates == 0:
        return np.zeros(0)
    z = group_logits(keys[:n_candidates], queries)
    m = softmax(z).mean(axis=0)
    half = kernel // 2
    return np.array([m[max(0, j - half) : j + half + 1].max() for j in range(n_candidates)])


def unit_keys(keys: np.ndarray) -> np.ndarray:
    """§3.1: k̂ [L, d]."""
    return keys / (key_norm(keys) + 1e-8)[:, None]


def key_norm(keys: np.ndarray) -> np.ndarray:
    """§6: ‖K[j]‖₂. keys [L, d] -> [L]."""
    return np.sqrt(np.einsum("ld,ld->l", keys, keys))


def key_likeness(keys: np.ndarray) -> np.ndarray:
    """§6: k̂_j·s/‖s‖, s the sum of all k̂; 0 where s is 0. keys [L, d] -> [L]."""
    unit = unit_keys(keys)
    total = unit.sum(axis=0)
    length = math.sqrt(float(total @ total))
    return np.einsum("ld,d->l", unit, total) / length if length > 0 else np.zeros(len(keys))


def cosines(keys: np.ndarray) -> np.ndarray:
    """§3.1-2: S [L, L] with a zero diagonal."""
    unit = unit_keys(keys)
    s = np.einsum("id,jd->ij", unit, unit)
    np.fill_diagonal(s, 0.0)
    return s


def last_hits(s: np.ndarray) -> np.ndarray:
    """§3.3: r(i), the largest j with S[i, j] > 0.5; 0 where there is none."""
    return np.array([max(np.nonzero(row > SIMILAR)[0], default=0) for row in s], dtype=np.int64)


def redundancy(keys: np.ndarray) -> np.ndarray:
    """§3: R[j] of one KV head over all L slots. keys [L, d] -> [L]."""
    s = cosines(keys)
    for i, j in enumerate(last_hits(s)):
        s[i, j] = 0.0  # r(i) = 0 is also "no hit": such a row loses S[i, 0], and row 0 only its zero diagonal
    c = s.sum(axis=0) / len(s)
    return softmax(c)


def cosine_margin(keys: np.ndarray) -> float:
    """§9: distance from 0.5 of the nearest cosine that decides an r(i): row i's S[i, j] for j >= r(i), j != i."""
    s = cosines(keys)
    margin = math.inf
    for i, r in enumerate(last_hits(s)):
        deciding = [j for j in range(r, len(s)) if j != i]
        if deciding:
            margin = min(margin, float(np.abs(s[i, deciding] - SIMILAR).min()))
    return margin


def splitmix64(x: int) -> int:
    """Output of SplitMix64 after one step from state x."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def noise(seed: int, sequence: tuple[int, int], layer: int, head: int, position: int) -> float:
    """§6 `random`: uniform in [0, 1), a multiple of 2^-24, so exact in float32. sequence = (prompt, sample) index."""
    x = splitmix64(seed & MASK64)
    for a in (*sequence, layer, head, position):
        x = splitmix64(x ^ (int(a) & MASK64))
    return (x >> 40) * 2.0**-24


def penalty(positions: np.ndarray, penalties: np.ndarray | None, *, compat: str | None = None) -> np.ndarray:
    """§5: λ of each slot of one head. positions [L]; penalties [m, 3] = first, last (included), λ -> [L]."""
    out = np.zeros(len(positions))
    if penalties is None:
        return out
    for first, last, value in np.asarray(penalties, dtype=np.float64).reshape(-1, 3):
        members = (positions >= first) & (positions <= last)
        if compat == "official" and members.sum() < 2:
            continue
        out[members] = value
    return out
