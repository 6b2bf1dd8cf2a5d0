"""§4, §7: sentences, which of them repeat, and how strongly a token is steered. T tokens, D hidden size."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

OFFICIAL_DELIMITERS = ("\n", ".\n", ")\n", "\n\n", ".\n\n", ")\n\n", "?\n\n")
MARKERS = ("Wait", "Alternatively", "again")
Words = str | Collection[int]


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
    delimiters: Words = "auto",
    markers: Words = "auto",
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
    return Sentences(np.array(spans, np.int64).reshape(-1, 2), np.array(labels, np.int64), np.array(closed, np.int64))


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


def think_states(texts: Sequence[str]) -> np.ndarray:
    """§7: where each token stands [T]: "inside" between <think> and </think>, "after" a </think>, "" in neither.

    The markers are found in the joined text. A token that completes one stands in neither; the last one decides.
    """
    ends = np.cumsum([len(text) for text in texts])
    completed = {int(np.argmax(ends >= found.end())): found[0] for found in re.finditer("</?think>", "".join(texts))}
    states, marker = [], None
    for t in range(len(texts)):
        marker = completed.get(t, marker)
        states.append("" if t in completed or marker is None else "inside" if marker == "<think>" else "after")
    return np.array(states, "U6")


def count_thoughts(ids: Sequence[int], texts: Sequence[str], **rules: object) -> int:
    """§4: N_o, finished non-execution sentences whose delimiter stands inside <think>. rules: of `segment`."""
    found = segment(ids, texts, **rules)
    counted = found.labels > 0
    if rules.get("compat") != "official":
        counted &= (think_states(texts) == "inside")[found.closed]
    return int(counted.sum())


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
    steering: Steering, ids: Sequence[int], texts: Sequence[str], *, n_prompt: int = 0, **rules: object
) -> float | None:
    """§7: α_t for the last of these tokens, which is about to be fed, or None where it is not steered."""
    if steering.scope not in ("think", "generation", "all"):
        raise ValueError(f"scope is {steering.scope!r}; allowed are 'think', 'generation' and 'all'")
    if "\n\n" not in texts[-1]:
        return None
    if steering.scope == "think" and think_states(texts)[-1] != "inside":
        return None
    if steering.scope == "generation" and len(ids) <= n_prompt:
        return None
    return min(steering.alpha + steering.gamma * count_thoughts(ids, texts, **rules), steering.alpha_max)
