"""What a run gives back: texts, events, counts. Each result carries the method and the steering that made it."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from skipkv.methods import Method
from skipkv.steering import Steering
from skipkv.trace import Trace


@dataclass(frozen=True)
class Stats:
    """Counts of one generation or replay. Bytes are of the key/value cache.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
    thinking_tokens, answer_tokens : int
        Fed inside ``<think> … </think>``, and after it; the last new token of a generation is not fed.
    seconds : float
        From the row's opening to its end; rows of a batch share the machine.
    live_bytes, peak_bytes, full_bytes : int
        Of this row: at its end, at most, and what a full cache of its length would take.
    pool_bytes, pool_peak_bytes : int
        Of the whole run: set aside, and most in use, when this row ended.
    compactions, evicted : int
        Compactions of the row; slots dropped over all layers and heads.
    pairs : int
        Pairs of keys that the redundancy score looked at.
    compression : float
        Slots held at the end as a share of those that a full cache of this row's length holds.
    compression_of_full : float or None
        The same against the length ``full_length`` given to the run; None without one.
    sentences, flagged, thoughts : int
        Finished sentences; those that a later one repeats; N_o, re-checking ones while thinking.
    steered : int
        Tokens that were steered.
    braked : int
        Token count at which the loop brake first stepped in; 0: never.
    """

    prompt_tokens: int
    new_tokens: int
    thinking_tokens: int
    answer_tokens: int
    seconds: float
    live_bytes: int
    peak_bytes: int
    full_bytes: int
    pool_bytes: int
    pool_peak_bytes: int
    compactions: int
    evicted: int
    pairs: int
    compression: float
    compression_of_full: float | None
    sentences: int
    flagged: int
    thoughts: int
    steered: int
    braked: int = 0


@dataclass(frozen=True)
class Result:
    """Base of all results.

    Attributes
    ----------
    method : Method
    steering : Steering or None
    """

    method: Method
    steering: Steering | None

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold of it: neither method and steering nor the trace."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("method", "steering", "trace")}
        return {name: asdict(value) if isinstance(value, Stats) else value for name, value in kept.items()}


@dataclass(frozen=True)
class Generation(Result):
    """One finished (or interrupted) text.

    Attributes
    ----------
    text : str
        The new text, special tokens left out; a stop string and what follows it too.
    tokens : list of int
        The new tokens, the stop token included.
    finish_reason : str
        ``"stop"`` (stop id or string), ``"length"`` (max_new_tokens), ``"context"`` (the model's context is full),
        ``"interrupted"``.
    prompt_tokens : list of int
    prompt, sample : int
        Indices: which prompt of the call, which of its ``n`` samples.
    stats : Stats or None
        None where an interrupted run never opened the row.
    trace : Trace or None
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: list[int]
    prompt: int
    sample: int
    stats: Stats | None = None
    trace: Trace | None = None


@dataclass(frozen=True)
class Event:
    """A piece of a text as it grows. ``generation`` is there with the last piece."""

    prompt: int
    sample: int
    token: int | None
    text: str
    generation: Generation | None = None


@dataclass(frozen=True, eq=False)
class Replay(Result):
    """A recorded text under a method.

    Attributes
    ----------
    logprobs : float64 [n - 1]
        Log-probability of tokens 1 … n − 1, each given those before it.
    logits : float32 [n, vocab] or None
        Where asked for.
    stats : Stats
    trace : Trace or None
    """

    logprobs: np.ndarray
    logits: np.ndarray | None
    stats: Stats
    trace: Trace | None
