"""What the core needs to know of a vocabulary to follow sentences, re-checks and <think> (METHOD §4, §7)."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from skipkv import _skipkv
from skipkv.checks import CONSTANTS, floats, integer, integers, items, number, text_of, wrong
from skipkv.errors import ConfigError
from skipkv.load.tokenizer import Tokenizer
from skipkv.methods import compat_bits

MARKERS = ("Wait", "Alternatively", "again")
SPELLINGS = {*MARKERS, *(marker.lower() for marker in MARKERS)}
OFFICIAL_DELIMITERS = ("\n", ".\n", ")\n", "\n\n", ".\n\n", ")\n\n", "?\n\n")
DELIMITER, MARKER, PARAGRAPH, NEWLINE = (CONSTANTS[name] for name in ("delimiter", "marker", "paragraph", "newline"))

Ids = str | Collection[int]


@dataclass(frozen=True, eq=False)
class Sentences:
    """Finished sentences of a text, and where it thinks.

    Attributes
    ----------
    spans : int32 [n, 2]
        First and last position, both included.
    labels : int32 [n]
        1: non-execution (re-checking), 0: execution.
    closed : int32 [n]
        Position of the delimiter that closed it; later delimiters only extend the span.
    inside : bool [T]
        Which tokens of the text stand between ``<think>`` and ``</think>``; one that completes a marker does not.
    """

    spans: np.ndarray
    labels: np.ndarray
    closed: np.ndarray
    inside: np.ndarray

    def __len__(self) -> int:
        return len(self.spans)


def is_delimiter(text: str) -> bool:
    return text.endswith("\n") and not text.rstrip().endswith(":")


def _marker_runs(pieces: Sequence[tuple[int, str]]) -> Iterable[tuple[int, int, int]]:
    """Two or three tokens that spell a marker. pieces: ids with their texts, spaces kept."""
    starts, middles, ends = defaultdict(list), defaultdict(list), defaultdict(list)
    for token, text in pieces:
        starts[text.lstrip(" ")].append(token)
        middles[text].append(token)
        ends[text.rstrip(" ")].append(token)
    middles[""] = [-1]  # none
    for marker in SPELLINGS:
        n = len(marker)
        for i in range(n + 1):
            for j in range(i, n + 1):
                for a, b, c in product(starts[marker[:i]], middles[marker[i:j]], ends[marker[j:]]):
                    yield (-1, a, c) if b < 0 else (a, b, c)


def classify(texts: Sequence[str], delimiters: Ids = "auto", markers: Ids = "auto") -> tuple[np.ndarray, np.ndarray]:
    """Flags of every vocabulary entry (uint8 [vocab]) and the runs of tokens that spell a marker (int32 [n, 3])."""
    vocab = len(texts)
    flags = np.zeros(vocab, np.uint8)
    runs: set[tuple[int, int, int]] = set()
    if isinstance(delimiters, str) and delimiters == "auto":
        delimiters = [i for i, text in enumerate(texts) if is_delimiter(text)]
    flags[integers("delimiters", delimiters, 0, vocab - 1)] |= DELIMITER
    if isinstance(markers, str) and markers == "auto":
        flags[[i for i, text in enumerate(texts) if text.strip(" ") in SPELLINGS]] |= MARKER
        pieces = [(i, text) for i, text in enumerate(texts) if text and any(text.strip(" ") in m for m in SPELLINGS)]
        # A marker beside a token of spaces is one already.
        alone = {i for i, _ in pieces if flags[i] & MARKER}
        runs = set(_marker_runs([piece for piece in pieces if piece[0] not in alone]))
    else:
        flags[integers("markers", markers, 0, vocab - 1)] |= MARKER
    flags[[i for i, text in enumerate(texts) if "\n\n" in text]] |= PARAGRAPH
    return flags, np.array(sorted(runs), np.int32).reshape(-1, 3)


def joined(pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes one behind the other (uint8), and where each of them starts (int64 [n + 1])."""
    return np.frombuffer(b"".join(pieces), np.uint8), np.cumsum([0, *map(len, pieces)], dtype=np.int64)


def official_ids(tokenizer: Tokenizer) -> tuple[set[int], ...]:
    """Delimiter and marker ids of the released code: the last id of each string."""
    wanted = (OFFICIAL_DELIMITERS, MARKERS)
    return tuple({i for text in texts for i in tokenizer.spell(text)[-1:]} for texts in wanted)


def vocabulary(tokenizer: Tokenizer, delimiters: Ids = "auto", markers: Ids = "auto") -> tuple:
    """The core's view of a tokenizer: (flags [vocab], marker runs [n, 3], the tokens' bytes, their starts [vocab + 1]).

    delimiters, markers : "auto", "official" (the released code's) or ids.
    """
    texts = tokenizer.token_texts
    if isinstance(delimiters, str) and delimiters == "official":
        delimiters = official_ids(tokenizer)[0]
    if isinstance(markers, str) and markers == "official":
        markers = official_ids(tokenizer)[1]
    flags, runs = classify(texts, delimiters, markers)
    if not any("\n\n" in texts[i] for i in tokenizer.spell("a.\n\nb")):
        # This tokenizer writes a blank line as two tokens; the second one counts as it.
        flags[[i for i, text in enumerate(texts) if text == "\n"]] |= NEWLINE
    return flags, runs, *joined(tokenizer.token_bytes)


def blank_lines(ids: Sequence[int], vocabulary: tuple) -> np.ndarray:
    """Which tokens end a blank line (bool [T]): those that steering steers, and that part the steps of a thinking."""
    flags = vocabulary[0][np.asarray(ids, np.int64)]
    newline = np.concatenate([[False, False], (flags & NEWLINE) > 0])
    return ((flags & PARAGRAPH) > 0) | (newline[2:] & newline[1:-1] & ~newline[:-2])


def thinking(ids: Sequence[int], vocabulary: tuple) -> np.ndarray:
    """Which tokens stand between ``<think>`` and ``</think>`` (bool [T]); one that completes a marker does not."""
    return _skipkv.segment(np.asarray(ids, np.int32), vocabulary, len(vocabulary[0]), 0, 0)[3]


def segment(
    ids: Sequence[int], texts: Sequence[str], *, delimiters: Ids = "auto", markers: Ids = "auto", n_prompt: int = 0,
    compat: str | Iterable[str] | None = None,
) -> Sentences:  # fmt: skip
    """The finished sentences of a text, by the code that decides in a run (METHOD §4).

    Parameters
    ----------
    ids : sequence of int [T]
    texts : sequence of str [T]
        Text of each token; ``<think>`` and ``</think>`` are found wherever their characters stand.
    delimiters, markers : "auto" or ids
        What ends a sentence; what makes it one of re-checking.
    n_prompt : int
        Tokens of the prompt; matters with ``compat`` only.
    compat : None, "official" or names
        Rules of the released code.

    Raises
    ------
    ConfigError
        The lengths differ, or something is neither an id nor a text.
    """
    pieces = items(texts)
    if pieces is None:
        raise wrong("texts", texts, "a text of each token")
    own = integers("ids", ids)
    if len(own) != len(pieces):
        raise ConfigError(f"texts: expected {len(own)} as there are ids, found {len(pieces)}")
    kinds: dict[tuple[int, str], int] = {}
    own = [kinds.setdefault((i, text_of("texts", piece)), len(kinds)) for i, piece in zip(own, pieces, strict=True)]

    def mapped(name: str, value: Ids) -> Ids:
        if isinstance(value, str):
            if value != "auto":
                raise wrong(name, value, "'auto' or ids")
            return value
        chosen = set(integers(name, value))
        return [kind for (token, _), kind in kinds.items() if token in chosen]

    known = [piece for _, piece in kinds] or [""]
    words = classify(known, mapped("delimiters", delimiters), mapped("markers", markers))
    words += joined([piece.encode(errors="replace") for piece in known])
    own, n_prompt = np.array(own, np.int32), integer("n_prompt", n_prompt)
    return Sentences(*_skipkv.segment(own, words, len(known), n_prompt, compat_bits("full", compat)))


def flag_repeats(vectors: Any, tau: float = 0.95, *, compat: str | Iterable[str] | None = None) -> np.ndarray:
    """λ of each sentence: its similarity with the later sentence that repeats it best, 0 where none does (METHOD §4).

    Parameters
    ----------
    vectors : float [n, D]
        Sentence vectors in order of the text; scaled to length 1 here.
    tau : float
        Similarity above which a later sentence repeats an earlier one.
    compat : None, "official" or names
        With ``"latest-flag"`` the latest repetition sets λ, not the best one.

    Raises
    ------
    ConfigError
        The vectors are no such array of finite numbers, or tau is no number.

    Returns
    -------
    float32 [n]
    """
    vectors = floats("vectors", vectors, "n, D")
    # By a power of two, which rounds nothing, so that no length leaves the range of float32.
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
    vectors = np.ldexp(vectors, 1 - np.frexp(largest)[1])
    tau = number("tau", tau, -math.inf, math.inf, "a number")
    return _skipkv.flag_repeats(vectors, tau, compat_bits("full", compat))
