"""The problems of the model in the box under several methods: accuracy, length, cache bytes.

problems × (method, steering) → generate → graded → one row a run
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skipkv.generate import Generation
from skipkv.methods import Method
from skipkv.model import Model
from skipkv.steering import Steering

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def grade(text: str, answer: str) -> bool:
    """Whether the last ``\\boxed{…}`` holds the answer."""
    found = BOXED.findall(text)
    return bool(found) and found[-1].strip() == answer


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@dataclass(frozen=True)
class Outcome:
    """One run over all problems.

    Attributes
    ----------
    run : str
    right, n : int
    low, high : float
        95 % interval (Wilson) of the accuracy right / n.
    length : float
        Mean tokens, prompt included.
    truncated : int
        Texts that ran into the limit.
    peak_bytes : float
        Mean over problems of the most cache bytes.
    flagged : float
        Share of sentences that a later one repeats.
    steered : int
    tokens_per_second : float
    """

    run: str
    right: int
    n: int
    low: float
    high: float
    length: float
    truncated: int
    peak_bytes: float
    flagged: float
    steered: int
    tokens_per_second: float

    @property
    def accuracy(self) -> float:
        return self.right / self.n


def evaluate(
    model: Model,
    problems: Sequence[dict[str, str]],
    method: Method,
    steering: Steering | None = None,
    **options: Any,
) -> tuple[Outcome, list[Generation]]:
    """Run all problems under one method.

    Parameters
    ----------
    model : Model
    problems : sequence of {"prompt", "answer"}
    method : Method
    steering : Steering, optional
    options
        As for `Model.generate`.
    """
    begin = time.perf_counter()
    outs = model.generate([p["prompt"] for p in problems], method, steering, **options)
    seconds = time.perf_counter() - begin
    right = sum(grade(out.text, p["answer"]) for out, p in zip(outs, problems, strict=True))
    n = len(outs)
    sentences = sum(out.stats.sentences for out in outs)
    name = str(method) + (f"+steer:layer={steering.layer},alpha={steering.alpha:g}" if steering else "")
    outcome = Outcome(
        name, right, n, *wilson(right, n),
        length=sum(len(out.prompt_tokens) + len(out.tokens) for out in outs) / n,
        truncated=sum(out.finish_reason in ("length", "context") for out in outs),
        peak_bytes=sum(out.stats.peak_bytes for out in outs) / n,
        flagged=sum(out.stats.flagged for out in outs) / max(1, sentences),
        steered=sum(out.stats.steered for out in outs),
        tokens_per_second=sum(len(out.tokens) for out in outs) / seconds,
    )  # fmt: skip
    return outcome, outs
