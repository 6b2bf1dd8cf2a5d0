"""METHOD.md §2-§7 as plain NumPy: scores, selection, sentences, steering strength. Float64, slow and obvious.

Shapes: L slots of one KV head, n_kv KV heads, n query heads per KV head, W window queries, d head size, T tokens,
D hidden size. One KV head at a time wherever METHOD.md speaks of one head. Sums use einsum and not BLAS: equal keys
then give equal cosines and logits to the last bit, so that ties stay ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

METHODS = ("full", "streaming", "h2o", "h2o-last", "snapkv", "rkv", "skipkv", "random")
SIMILAR = 0.5  # §3.3: cosines above this are hits
OFFICIAL_DELIMITERS = ("\n", ".\n", ")\n", "\n\n", ".\n\n", ")\n\n", "?\n\n")
MARKERS = ("Wait", "Alternatively", "again")
MASK64 = (1 << 64) - 1


def softmax(z: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# §2 importance, §3 redundancy


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


def cosines(keys: np.ndarray) -> np.ndarray:
    """§3.1-2: S [L, L] with a zero diagonal."""
    norms = np.sqrt(np.einsum("ld,ld->l", keys, keys))
    unit = keys / (norms + 1e-8)[:, None]
    s = np.einsum("id,jd->ij", unit, unit)
    np.fill_diagonal(s, 0.0)
    return s


def last_hits(s: np.ndarray) -> np.ndarray:
    """§3.3: r(i), the largest j with S[i, j] > 0.5; 0 where there is none."""
    r = np.zeros(len(s), dtype=np.int64)
    for i in range(len(s)):
        hits = np.nonzero(s[i] > SIMILAR)[0]
        if len(hits):
            r[i] = hits[-1]
    return r


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


# ---------------------------------------------------------------------------------------------------------------------
# §6 random


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


# ---------------------------------------------------------------------------------------------------------------------
# §5 penalty and selection


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


def newest_kept(method: str, budget: int, window: int) -> int:
    """§0, §6: how many of the newest slots a method keeps outright; also the slots that are no candidates."""
    if method == "streaming":
        return 0
    if method == "h2o-last":
        return 1
    if method == "h2o":
        return max(window, budget // 2)
    return window


def protected_below(protect: str, prompt: int) -> int:
    """§5: slots at positions below this number are kept outright."""
    if protect == "none":
        return 0
    if protect == "prompt":
        return prompt
    if protect.startswith("sinks:") and protect[6:].isdigit():
        return int(protect[6:])
    raise ValueError(f"protect is {protect!r}; allowed are 'none', 'prompt' and 'sinks:N'")


def keep_highest(score: np.ndarray, protected: np.ndarray, budget: int) -> np.ndarray:
    """§5: protected slots, then the highest scores up to the budget; ties to the lower slot; ascending. All [L]."""
    n_slots = len(protected)
    if n_slots <= budget:
        return np.arange(n_slots)
    kept = [j for j in range(n_slots) if protected[j]]
    if len(kept) > budget:
        raise ValueError(f"{len(kept)} protected slots do not fit into a budget of {budget}")
    rest = [j for j in range(n_slots) if not protected[j]]
    rest.sort(key=lambda j: (-score[j], j))
    return np.array(sorted(kept + rest[: budget - len(kept)]), dtype=np.int64)


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
    compat: str | None = None,
) -> Selection:
    """§5, §6: the slots of one layer that a method keeps.

    keys: [n_kv, L, d] or a list of [L_h, d]. queries: [n_heads, >= 1, d], post-RoPE, the newest last; query head q
    belongs to KV head q // (n_heads / n_kv). positions: None (slot = position), [L], or one [L_h] per head.
    penalties: [m, 3] first, last (included), λ of each flagged sentence. sums: per head [L_h], `h2o` only.
    budget: one number or one per KV head.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}")
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    n_kv = len(keys)
    keys = [np.asarray(k, dtype=np.float64) for k in keys]
    queries = np.asarray(queries, dtype=np.float64)
    group = len(queries) // n_kv
    if positions is None:
        positions = [np.arange(len(k)) for k in keys]
    elif np.ndim(positions[0]) == 0:
        positions = [np.asarray(positions)] * n_kv
    positions = [np.asarray(p) for p in positions]
    budgets = np.broadcast_to(np.asarray(budget), (n_kv,))
    if method == "full":
        return Selection(stack([np.arange(len(k)) for k in keys]), None, None, None, None)
    if method == "h2o" and sums is None:
        raise ValueError("h2o needs the attention sums")

    shared = last_query_score(keys, queries) if method == "h2o-last" else None
    rows: dict[str, list] = {"kept": [], "importance": [], "redundancy": [], "penalty": [], "score": []}
    for h in range(n_kv):
        b = int(budgets[h])
        newest = newest_kept(method, b, window)
        if b <= newest:
            raise ValueError(f"budget is {b}; {method} with a window of {newest} needs at least {newest + 1}")
        if method == "streaming" and b <= sinks:
            raise ValueError(f"budget is {b}; streaming with {sinks} sinks needs at least {sinks + 1}")
        n_slots = len(keys[h])
        n_candidates = max(0, n_slots - newest)
        i_score = r_score = lam = None
        if method in ("snapkv", "rkv", "skipkv"):
            group_queries = queries[h * group : (h + 1) * group, -window:]
            i_score = importance(keys[h], group_queries, window=window, kernel=kernel)
        if method in ("rkv", "skipkv"):
            r_score = redundancy(keys[h])[:n_candidates]
        if method == "skipkv":
            lam = penalty(positions[h], penalties, compat=compat)[:n_candidates]

        if method == "snapkv":
            score = i_score
        elif method == "rkv":
            score = mix * i_score - (1 - mix) * r_score
        elif method == "skipkv":
            score = mix * i_score - (1 - mix) * r_score - lam
        elif method == "h2o":
            score = np.asarray(sums[h], dtype=np.float64)[:n_candidates]
        elif method == "h2o-last":
            score = shared
        elif method == "random":
            score = np.array([noise(seed, sequence, layer, h, p) for p in positions[h][:n_candidates]])
        else:  # streaming: the most recent; its sinks are protected below
            score = positions[h].astype(np.float64)

        protected = positions[h] < protected_below(protect, prompt)
        protected[n_candidates:] = True
        if method == "streaming":
            protected |= positions[h] < sinks
        everywhere = np.concatenate([score, np.zeros(n_slots - n_candidates)])  # the newest are protected: any number
        rows["kept"].append(keep_highest(everywhere, protected, b))
        for name, value in (("importance", i_score), ("redundancy", r_score), ("penalty", lam), ("score", score)):
            rows[name].append(value)
    return Selection(**{name: stack(value) for name, value in rows.items()})


def last_query_score(keys: list[np.ndarray], queries: np.ndarray) -> np.ndarray:
    """§6 `h2o-last`: one score for all heads. keys n_kv x [L, d], queries [n_heads, >= 1, d] -> [L - 1]."""
    if len({len(k) for k in keys}) != 1:
        raise ValueError("h2o-last keeps one set for all heads, so they must hold the same number of slots")
    group = len(queries) // len(keys)
    per_head = []
    for h, k in enumerate(keys):
        z = group_logits(k[:-1], queries[h * group : (h + 1) * group, -1:])
        per_head.append(softmax(z)[0] if len(k) > 1 else np.zeros(0))
    return np.mean(per_head, axis=0)


def near_tie(selection: Selection, head: int, kept: Sequence[int], *, rtol: float = 1e-5) -> bool:
    """§9: whether `kept` equals the selection's set of this head but for slots that a rounding error may exchange.

    The slots that differ must be candidates whose reference scores lie within rtol of each other, relative to the
    terms the score is the sum of (the score itself can be near 0). Cosines near 0.5 are the caller's to look at.
    """
    mine, other = np.asarray(selection.kept[head]), np.asarray(kept)
    lost, won = np.setdiff1d(mine, other), np.setdiff1d(other, mine)
    if len(lost) == 0 and len(won) == 0:
        return True
    score = selection.score[head]
    if len(lost) != len(won) or max(lost.max(), won.max()) >= len(score):
        return False
    changed = np.concatenate([lost, won])
    size = np.abs(score[changed]).max()
    if selection.redundancy is not None:
        size += (selection.importance[head][changed] + selection.redundancy[head][changed]).max()
    return bool(np.ptp(score[changed]) <= rtol * size)


# ---------------------------------------------------------------------------------------------------------------------
# §4 sentences


@dataclass(eq=False)
class Sentences:
    """Finished sentences. spans [n, 2] first and last position, labels [n] 1 = non-execution, closed [n] delimiter."""

    spans: np.ndarray
    labels: np.ndarray
    closed: np.ndarray


def is_delimiter_text(text: str) -> bool:
    """§4, delimiters="auto"."""
    return text.endswith("\n") and not text.rstrip().endswith(":")


def is_marker_text(text: str) -> bool:
    """§4, markers="auto": as written or in lower case, spaces at the ends aside."""
    bare = text.strip(" ")
    return any(bare in (marker, marker.lower()) for marker in MARKERS)


def official_ids(encode: Callable[[str], Sequence[int]]) -> tuple[set[int], set[int]]:
    """§4: delimiter and marker ids of the released code, `encode` without special tokens: the last id of each."""
    return {encode(s)[-1] for s in OFFICIAL_DELIMITERS}, {encode(s)[-1] for s in MARKERS}


def has_marker(ids: Sequence[int], texts: Sequence[str], markers: object, first: int, last: int) -> bool:
    """Whether tokens first … last (included) contain a marker, as one token or (auto) a run of two or three."""
    for start in range(first, last + 1):
        if markers != "auto":
            if int(ids[start]) in markers:
                return True
            continue
        for end in range(start, min(start + 2, last) + 1):
            if is_marker_text("".join(texts[start : end + 1])):
                return True
    return False


def segment(
    ids: Sequence[int],
    texts: Sequence[str],
    *,
    delimiters: str | Collection[int] = "auto",
    markers: str | Collection[int] = "auto",
    n_prompt: int = 0,
    compat: str | None = None,
) -> Sentences:
    """§4: the finished sentences of one row. ids [T], texts [T] the text of each token.

    delimiters, markers: "auto" or a set of ids (`official_ids` finds the released code's).
    n_prompt matters under compat="official" only.
    """
    for name, value in (("delimiters", delimiters), ("markers", markers)):
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"{name} is {value!r}; here it is 'auto' or a set of ids")
    spans: list[list[int]] = []
    labels: list[int] = []
    closed: list[int] = []
    first = 0  # first token of the open sentence
    after_delimiter = False
    for t in range(len(ids)):
        delimiter = is_delimiter_text(texts[t]) if delimiters == "auto" else int(ids[t]) in delimiters
        if not delimiter:
            after_delimiter = False
            continue
        if after_delimiter and compat != "official":
            spans[-1][1] = t
        else:
            spans.append([first, t])
            labels.append(int(has_marker(ids, texts, markers, first, t)))
            closed.append(t)
        first = t + 1
        after_delimiter = True
    if compat == "official":
        in_prompt = [t for t in range(n_prompt) if has_marker(ids, texts, markers, t, t)]
        for s, (start, end) in enumerate(spans):
            tokens = in_prompt[:1] + list(range(n_prompt, len(ids)))  # of the prompt only the first marker counts
            labels[s] = int(any(start <= t <= end and has_marker(ids, texts, markers, t, t) for t in tokens))
    return Sentences(
        np.array(spans, dtype=np.int64).reshape(-1, 2), np.array(labels, np.int64), np.array(closed, np.int64)
    )


def sentence_vectors(hidden: np.ndarray, sentences: Sentences) -> np.ndarray:
    """§4: mean of the final hidden states [T, D] over each sentence, scaled to length 1 -> [n, D].

    A sentence ends here with the delimiter that closed it: later delimiters extend the span, not the vector.
    """
    out = []
    for (first, _), closed in zip(sentences.spans, sentences.closed, strict=True):
        mean = np.asarray(hidden[first : closed + 1], dtype=np.float64).mean(axis=0)
        norm = math.sqrt(float(mean @ mean))
        out.append(mean / norm if norm > 0 else mean)
    return np.array(out).reshape(len(out), np.shape(hidden)[1])


def flag_repeats(vectors: np.ndarray, tau: float = 0.95, *, compat: str | None = None) -> np.ndarray:
    """§4: λ of each finished sentence, 0 = not flagged. vectors [n, D] of length 1, in order of the text -> [n].

    Comparing all pairs at once equals comparing the new ones at each point of the grid: a flag only depends on later
    sentences, and flags stay.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    flags = np.zeros(len(vectors))
    for i in range(len(vectors)):
        for j in range(i + 1, len(vectors)):
            similarity = float(vectors[i] @ vectors[j])
            if similarity > tau:
                flags[i] = similarity if compat == "official" else max(flags[i], similarity)
    return flags


def inside_think(ids: Sequence[int], think: tuple[Collection, Collection] | None) -> np.ndarray:
    """§7: [T] whether each token stands between <think> and </think>; the last token of either marker does not.

    think: (ways to write <think>, ways to write </think>), each way a sequence of ids. None: nothing is inside.
    """
    inside = np.zeros(len(ids), dtype=bool)
    if think is None:
        return inside
    ids = [int(i) for i in ids]

    def ends_here(ways: Collection, t: int) -> bool:
        return any(ids[max(0, t + 1 - len(way)) : t + 1] == [int(i) for i in way] for way in ways)

    now = False
    for t in range(len(ids)):
        if ends_here(think[0], t):
            now = True
        elif ends_here(think[1], t):
            now = False
        else:
            inside[t] = now
    return inside


def count_thoughts(
    ids: Sequence[int],
    texts: Sequence[str],
    think: tuple[Collection, Collection] | None,
    *,
    delimiters: str | Collection[int] = "auto",
    markers: str | Collection[int] = "auto",
    n_prompt: int = 0,
    compat: str | None = None,
) -> int:
    """§4: N_o, finished non-execution sentences whose closing delimiter stands inside <think> … </think>."""
    found = segment(ids, texts, delimiters=delimiters, markers=markers, n_prompt=n_prompt, compat=compat)
    inside = inside_think(ids, think)
    return sum(
        1
        for label, closed in zip(found.labels, found.closed, strict=True)
        if label and (compat == "official" or inside[closed])
    )


# ---------------------------------------------------------------------------------------------------------------------
# §7 steering


@dataclass(frozen=True, eq=False)
class Steering:
    """§7: x += α·v before block `layer`. vector [D]."""

    vector: np.ndarray
    layer: int
    alpha: float = 1.0
    gamma: float = 0.02
    alpha_max: float = 2.0
    scope: str = "think"


def steering_alpha(
    steering: Steering,
    ids: Sequence[int],
    texts: Sequence[str],
    think: tuple[Collection, Collection] | None,
    *,
    n_prompt: int = 0,
    delimiters: str | Collection[int] = "auto",
    markers: str | Collection[int] = "auto",
) -> float | None:
    """§7: α_t for the last of these tokens, which is about to be fed, or None where it is not steered."""
    if steering.scope not in ("think", "generation", "all"):
        raise ValueError(f"scope is {steering.scope!r}; allowed are 'think', 'generation' and 'all'")
    if "\n\n" not in texts[-1]:
        return None
    if steering.scope == "think" and not inside_think(ids, think)[-1]:
        return None
    if steering.scope == "generation" and len(ids) <= n_prompt:
        return None
    n_thoughts = count_thoughts(ids, texts, think, delimiters=delimiters, markers=markers)
    return min(steering.alpha + steering.gamma * n_thoughts, steering.alpha_max)
