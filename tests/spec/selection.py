"""§5, §6: methods as rows of weights, and the slots of one layer that they keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spec.scores import group_logits, importance, key_likeness, key_norm, noise, penalty, redundancy, softmax

METHODS = ("full", "streaming", "h2o", "h2o-last", "snapkv", "rkv", "skipkv", "random", "knorm", "keydiff", "tova",
           "blend")  # fmt: skip
SHARED = ("h2o-last", "tova")  # one kept set for all heads of a layer, window 1
TERMS = ("position", "sums", "importance", "redundancy", "penalty", "noise", "key_norm", "key_likeness")


def weights_of(method: str, mix: float = 0.1, weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """§6: the row of weights of a method, terms in the order in which they are added. weights: those of `blend`."""
    rkv = {"importance": mix, "redundancy": -(1 - mix)}
    row = {
        "streaming": {"position": 1}, "h2o": {"sums": 1}, "h2o-last": {"importance": 1}, "tova": {"importance": 1},
        "snapkv": {"importance": 1}, "rkv": rkv, "skipkv": rkv | {"penalty": -1}, "random": {"noise": 1},
        "knorm": {"key_norm": -1}, "keydiff": {"key_likeness": -1}, "blend": weights or {},
    }[method]  # fmt: skip
    unknown = [name for name in row if name not in TERMS]
    if unknown or not row:
        raise ValueError(f"weights are {row}; allowed are some of {', '.join(TERMS)}")
    return {name: row[name] for name in TERMS if name in row}


def newest_kept(method: str, budget: int, window: int) -> int:
    """§0, §6: how many of the newest slots a method keeps outright; also the slots that are no candidates."""
    if method in SHARED:
        return 1
    return {"streaming": 0, "h2o": max(window, budget // 2)}.get(method, window)


def protected_below(protect: str, prompt: int) -> int:
    """§5: slots at positions below this number are kept outright."""
    if protect.startswith("sinks:") and protect[6:].isdigit():
        return int(protect[6:])
    if protect not in ("none", "prompt"):
        raise ValueError(f"protect is {protect!r}; allowed are 'none', 'prompt' and 'sinks:N'")
    return prompt if protect == "prompt" else 0


def best_first(score: np.ndarray, protected: np.ndarray) -> list[int]:
    """§5: the protected slots, then the others from the highest score down; ties to the lower slot. All [L]."""
    return sorted(range(len(protected)), key=lambda j: (not protected[j], 0 if protected[j] else -score[j], j))


def keep_highest(score: np.ndarray, protected: np.ndarray, budget: int) -> np.ndarray:
    """§5: the best slots up to the budget, ascending. score, protected [L]."""
    if len(protected) > budget < protected.sum():
        raise ValueError(f"{protected.sum()} protected slots do not fit into a budget of {budget}")
    return np.array(sorted(best_first(score, protected)[:budget]), dtype=np.int64)


def keep_layer(scores: list[np.ndarray], protected: list[np.ndarray], budgets: Sequence[int]) -> list[np.ndarray]:
    """§5, allocate="layer": every head its protected slots and a fifth of its budget, the rest to the best of all."""
    kept, others = [], []
    for h, (score, mine, budget) in enumerate(zip(scores, protected, budgets, strict=True)):
        order = best_first(score, mine)
        first = max(int(mine.sum()), math.ceil(budget / 5))
        kept.append(order[:first])
        others += [(-score[j], h, j) for j in order[first:]]
    for _, h, j in sorted(others)[: max(0, int(np.sum(budgets)) - sum(map(len, kept)))]:
        kept[h].append(j)
    return [np.array(sorted(slots), dtype=np.int64) for slots in kept]


@dataclass(eq=False)
class Selection:
    """What one layer keeps. Each field is an array over heads, or a list of arrays where the heads differ in length.

    kept: slots, ascending. The others run over the candidates (slots without the newest ones that the method always
    keeps; `streaming` has no window, so all of them); those the method does not use are None.
    """

    kept: object
    importance: object
    redundancy: object
    penalty: object
    score: object


def stack(rows: list) -> object:
    if any(row is None for row in rows):
        return None
    return np.stack(rows) if len({len(row) for row in rows}) == 1 else list(rows)


def select(
    method: str,
    keys: Sequence[np.ndarray],
    queries: np.ndarray,
    *,
    positions: Sequence | None = None,
    penalties: np.ndarray | None = None,
    budget: int | Sequence[int],
    window: int = 8,
    mix: float = 0.1,
    kernel: int = 7,
    sinks: int = 4,
    protect: str = "none",
    prompt: int = 0,
    seed: int = 0,
    sequence: tuple[int, int] = (0, 0),
    layer: int = 0,
    sums: Sequence[np.ndarray] | None = None,
    weights: Mapping[str, float] | None = None,
    allocate: str = "head",
    compat: str | None = None,
) -> Selection:
    """§5, §6: the slots of one layer that a method keeps.

    keys: [n_kv, L, d] or a list of [L_h, d]. queries: [n_heads, >= 1, d], post-RoPE, the newest last; query head q
    belongs to KV head q // (n_heads / n_kv). positions: None (slot = position), [L], or one [L_h] per head.
    penalties: [m, 3] first, last (included), λ of each flagged sentence. sums: per head [L_h], where they are a term.
    budget: one number or one per KV head. weights: {term: weight}, `blend` only.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}")
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    if allocate not in ("head", "layer") or (allocate == "layer" and method in SHARED):
        raise ValueError(f"allocate is {allocate!r}; allowed is 'head', and 'layer' where each head has its own set")
    n_kv = len(keys)
    keys = [np.asarray(k, dtype=np.float64) for k in keys]
    queries = np.asarray(queries, dtype=np.float64)
    if positions is None:
        positions = [np.arange(len(k)) for k in keys]
    elif np.ndim(positions[0]) == 0:
        positions = [np.asarray(positions)] * n_kv
    positions = [np.asarray(p) for p in positions]
    budgets = np.broadcast_to(np.asarray(budget), (n_kv,))
    if method == "full":
        return Selection(stack([np.arange(len(k)) for k in keys]), None, None, None, None)
    row = weights_of(method, mix, weights)
    if "sums" in row and sums is None:
        raise ValueError(f"{method} needs the attention sums")

    shared = last_query_score(method, keys, queries) if method in SHARED else None
    found: dict[str, list] = {"importance": [], "redundancy": [], "penalty": [], "score": [], "protected": []}
    for h in range(n_kv):
        newest = newest_kept(method, int(budgets[h]), window)
        if budgets[h] <= newest:
            raise ValueError(f"budget is {budgets[h]}; {method} with a window of {newest} needs at least {newest + 1}")
        if method == "streaming" and budgets[h] <= sinks:
            raise ValueError(f"budget is {budgets[h]}; streaming with {sinks} sinks needs at least {sinks + 1}")
        n_slots = len(keys[h])
        n_candidates = max(0, n_slots - newest)
        group = queries[h * len(queries) // n_kv : (h + 1) * len(queries) // n_kv, -window:]
        compute = {
            "position": lambda h=h: positions[h].astype(np.float64),
            "sums": lambda h=h: np.asarray(sums[h], dtype=np.float64),
            "importance": lambda h=h, group=group: importance(keys[h], group, window=window, kernel=kernel),
            "redundancy": lambda h=h: redundancy(keys[h]),
            "penalty": lambda h=h: penalty(positions[h], penalties, compat=compat),
            "noise": lambda h=h: np.array([noise(seed, sequence, layer, h, p) for p in positions[h]]),
            "key_norm": lambda h=h: key_norm(keys[h]),
            "key_likeness": lambda h=h: key_likeness(keys[h]),
        }
        terms = {name: compute[name]()[:n_candidates] for name in row} if shared is None else {}
        score = sum(weight * terms[name] for name, weight in row.items()) if shared is None else shared
        protected = positions[h] < max(protected_below(protect, prompt), sinks if method == "streaming" else 0)
        protected[n_candidates:] = True
        for name in ("importance", "redundancy", "penalty"):
            found[name].append(terms.get(name))
        found["score"].append(score)
        found["protected"].append(protected)

    everywhere = [np.append(s, np.zeros(len(k) - len(s))) for s, k in zip(found["score"], keys, strict=True)]
    protected = found.pop("protected")
    if allocate == "layer":
        kept = keep_layer(everywhere, protected, budgets)
    else:
        kept = [keep_highest(*head) for head in zip(everywhere, protected, budgets, strict=True)]
    return Selection(stack(kept), **{name: stack(values) for name, values in found.items()})


def last_query_score(method: str, keys: list[np.ndarray], queries: np.ndarray) -> np.ndarray:
    """§6 `h2o-last`, `tova`: one score for all heads. keys n_kv x [L, d], queries [n_heads, >= 1, d] -> [L - 1]."""
    if len({len(k) for k in keys}) != 1:
        raise ValueError(f"{method} keeps one set for all heads, so they must hold the same number of slots")
    if len(keys[0]) < 2:
        return np.zeros(0)
    heads = np.split(queries[:, -1:], len(keys))  # per KV head [group, 1, d]
    if method == "tova":  # each query head for itself
        heads = [[query[None] for query in group] for group in heads]
    else:
        heads = [[group] for group in heads]
    return np.mean([softmax(group_logits(k[:-1], q))[0] for k, some in zip(keys, heads, strict=True) for q in some], 0)


def near_tie(selection: Selection, head: int, kept: Sequence[int], *, rtol: float = 1e-5, size: float = 0) -> bool:
    """§9: whether `kept` equals the selection's set of this head but for slots that a rounding error may exchange.

    The slots that differ must be candidates whose reference scores lie within rtol of each other, relative to the
    terms the score is the sum of (the score itself can be near 0), or to `size` where that is more: 1 for a cosine.
    Cosines near 0.5 are the caller's to look at.
    """
    mine, other = np.asarray(selection.kept[head]), np.asarray(kept)
    lost, won = np.setdiff1d(mine, other), np.setdiff1d(other, mine)
    if len(lost) == 0 and len(won) == 0:
        return True
    score = selection.score[head]
    if len(lost) != len(won) or max(lost.max(), won.max()) >= len(score):
        return False
    changed = np.concatenate([lost, won])
    size = max(size, np.abs(score[changed]).max())
    if selection.redundancy is not None:
        parts = [part[head][changed] for part in (selection.importance, selection.redundancy) if part is not None]
        size += sum(parts).max()
    return bool(np.ptp(score[changed]) <= rtol * size)
