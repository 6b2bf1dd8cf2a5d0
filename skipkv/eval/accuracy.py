"""Accuracy: problems → generate under a method → graded → one outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from skipkv.errors import ConfigError
from skipkv.eval.grading import grade
from skipkv.eval.results import Outcome
from skipkv.eval.statistics import wilson
from skipkv.methods import Method
from skipkv.model import Model
from skipkv.results import Generation
from skipkv.steering import Steering


def evaluate(
    model: Model,
    problems: Sequence[dict[str, str]],
    method: str | Method,
    steering: Steering | None = None,
    *,
    done: Callable[[], object] | None = None,
    **options: Any,
) -> tuple[Outcome, list[Generation]]:
    """Run all problems under one method.

    Parameters
    ----------
    model : Model
    problems : sequence of {"prompt", "answer"}
    method : str or Method
    steering : Steering, optional
    done : callable, optional
        Called when a text has ended.
    options
        As for `Model.stream`.

    Raises
    ------
    ConfigError
        There is no problem, or as for `Model.stream`.
    KeyboardInterrupt
        Ctrl-C was pressed before all texts had ended.
    """
    if not problems:
        raise ConfigError("problems hold none; allowed: at least one")
    begin = time.perf_counter()
    outs = []
    for event in model.stream([p["prompt"] for p in problems], method, steering, **options):
        if event.generation:
            outs.append(event.generation)
            if done:
                done()
    seconds = time.perf_counter() - begin
    if any(out.finish_reason == "interrupted" for out in outs):
        raise KeyboardInterrupt
    outs.sort(key=lambda out: out.prompt)
    right = sum(grade(out.text, p["answer"]) for out, p in zip(outs, problems, strict=True))
    n = len(outs)
    sentences = sum(out.stats.sentences for out in outs)
    outcome = Outcome(
        outs[0].method, steering, right, n, *wilson(right, n),
        length=sum(len(out.prompt_tokens) + len(out.tokens) for out in outs) / n,
        truncated=sum(out.finish_reason in ("length", "context") for out in outs),
        peak_bytes=sum(out.stats.peak_bytes for out in outs) / n,
        flagged=sum(out.stats.flagged for out in outs) / max(1, sentences),
        steered=sum(out.stats.steered for out in outs),
        tokens_per_second=sum(len(out.tokens) for out in outs) / seconds,
    )  # fmt: skip
    return outcome, outs
