"""Scoring on arrays: the C code that decides in a run, without a model."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from skipkv import _skipkv
from skipkv.checks import POSITION_MAX, array_of, floats, integer, items, pair
from skipkv.errors import ConfigError
from skipkv.methods import CLASSES, SHARED_PARAMETERS, Method, compat_names, parse_method

EXACT = 1 << 24  # the highest position that float32 holds exactly
MOST = 1e17  # of a key, a query, …: the squares of a head's 512 add up to less than float32's largest number


@dataclass(frozen=True, eq=False)
class Selection:
    """What one layer keeps. Arrays over heads, or lists of arrays where the heads differ in length.

    Attributes
    ----------
    kept : int32 [n_kv_heads, budget]
        Indices of the kept slots, ascending (in order of score with ``compat="score-order"``).
    importance, redundancy, penalty, score : float32 [n_kv_heads, n_candidates] or None
        Of the candidates, the slots without the newest ones that are always kept; None where the method has none.
    """

    kept: Any
    importance: Any
    redundancy: Any
    penalty: Any
    score: Any


def _positions(value: Any, n_kv: int, n_slots: int, ordered: bool) -> np.ndarray:
    """int32 [n_kv, n_slots]."""
    if value is None:
        value = np.arange(n_slots)
    where = array_of(value)
    if where is None:
        raise ConfigError(f"positions: expected [{n_slots}] or [{n_kv}, {n_slots}], found {type(value).__name__}")
    if where.ndim > 2 or where.shape[-1:] != (n_slots,) or (where.ndim == 2 and len(where) != n_kv):
        raise ConfigError(f"positions: expected [{n_slots}] or [{n_kv}, {n_slots}], found shape {list(where.shape)}")
    whole = np.issubdtype(where.dtype, np.integer)
    within = whole and where.min(initial=0) >= 0 and where.max(initial=0) <= POSITION_MAX
    if not within or (ordered and (where[..., 1:] <= where[..., :-1]).any()):
        raise ConfigError(f"positions: expected integers from 0 to {POSITION_MAX}, ascending; found others")
    return np.ascontiguousarray(np.broadcast_to(where, (n_kv, n_slots)), np.int32)


def _heads(array: np.ndarray | None, sizes: list[int]) -> Any:
    """The first sizes[h] values of every head: an array where all are alike, else a list of arrays."""
    if array is None:
        return None
    if len(set(sizes)) == 1:
        return np.ascontiguousarray(array[:, : sizes[0]])
    return [head[:size].copy() for head, size in zip(array, sizes, strict=True)]


def select(
    method: str | Method, keys: Any, queries: Any, *, positions: Any = None, penalties: Any = None, sums: Any = None,
    prompt: int = 0, sequence: tuple[int, int] = (0, 0), layer: int = 0, compat: Any = None, **parameters: Any,
) -> Selection:  # fmt: skip
    """The slots that a method keeps of one layer (METHOD §5, §6).

    Parameters
    ----------
    method : str or Method
        A name with ``parameters`` (``select("rkv", …, budget=64)``), a string as in ``generate``, or a method.
    keys : float [n_kv_heads, L, head_dim]
        After RoPE, oldest first.
    queries : float [n_heads, W, head_dim]
        The newest queries after RoPE; query head q belongs to KV head ``q // (n_heads / n_kv_heads)``.
    positions : int [L] or [n_kv_heads, L], optional
        Position of each slot, ascending; the slot's index by default.
    penalties : float [n, 3], optional
        First and last position (included) and λ of each flagged sentence.
    sums : float [n_kv_heads, L], optional
        Attention received by each slot; ``h2o`` needs it.
    prompt : int
        Tokens of the prompt, for ``protect="prompt"``.
    sequence, layer
        For the noise of ``random``.
    compat : None, "official" or names
        See `Method`.

    Raises
    ------
    ConfigError
        A parameter or an array's shape is wrong, or a number is beyond 1e17, where float32 loses what decides.
    """
    if isinstance(method, str) and method in CLASSES:
        unknown = [name for name in parameters if name not in (*CLASSES[method]._parameters(), *SHARED_PARAMETERS)]
        # What every method of a comparison is given, those take that know it.
        shared = {"window", "mix", "kernel", "sinks", "interval", "tau", "seed"}
        wrong = [name for name in unknown if name not in shared and not (name == "budget" and method == "full")]
        if wrong:
            raise ConfigError(
                f"{method} has no parameter {wrong[0]!r}; allowed: {', '.join(CLASSES[method]._parameters())}"
            )
        if "budget" not in parameters and method != "full":
            raise ConfigError(f"{method} needs a budget")
        known = {name: value for name, value in parameters.items() if name not in unknown}
        chosen = CLASSES[method](**known, compat=compat)
    else:
        chosen = parse_method(method)
        if parameters or compat is not None:
            chosen = chosen.with_(**parameters, **({} if compat is None else {"compat": compat}))
    keys = floats("keys", keys, "n_kv_heads, L, head_dim", MOST)
    n_kv, n_slots = keys.shape[:2]
    budget = getattr(chosen, "budget", None)
    if np.shape(budget) not in ((), (n_kv,), (1, n_kv)):
        raise ConfigError(f"budget: expected a number or [{n_kv}], found shape {list(np.shape(budget))}")
    if isinstance(budget, tuple) and np.ndim(budget) == 1:  # one layer: an array is over its heads
        chosen = chosen.with_(budget=(budget,))
    where = _positions(positions, n_kv, n_slots, "score-order" not in compat_names(chosen.name, chosen.compat))
    none = penalties is None or items(penalties) == []
    flagged = None if none else floats("penalties", penalties, "n, 3", MOST)
    if flagged is not None:
        first, last = np.asarray(penalties, np.float64)[:, :2].T  # as given, and not as float32 rounds them
        if not ((first >= 0) & (first <= last) & (last <= EXACT) & (first % 1 == 0) & (last % 1 == 0)).all():
            raise ConfigError(f"penalties: expected whole positions from 0 to {EXACT}, first ≤ last; found others")
    kept, scores, counts = _skipkv.select(
        chosen.as_dict((1, n_kv)), keys, floats("queries", queries, "n_heads, W, head_dim", MOST), where, flagged,
        None if sums is None else floats("sums", sums, "n_kv_heads, L", MOST),
        integer("prompt", prompt, 0, POSITION_MAX + 1), pair("sequence", sequence, 2**63 - 1), integer("layer", layer),
    )  # fmt: skip
    sizes = counts.T.tolist()
    return Selection(_heads(kept, sizes[0]), *(_heads(score, sizes[1]) for score in scores))
