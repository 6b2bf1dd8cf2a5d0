"""Fidelity without sampling: recorded texts, replayed under every method, against the full cache, of this model or of
the same one in another type.

texts → replay(full) ─┐
      → replay(method)┴→ per position: −log p of the recorded token, KL(full ‖ method), same best token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from skipkv.checks import instance, integer, integers, many, no_bar, one_of, wrong
from skipkv.engine import CACHES
from skipkv.errors import ConfigError
from skipkv.eval.results import Fidelity
from skipkv.eval.statistics import bootstrap
from skipkv.eval.table import Table
from skipkv.methods import Method
from skipkv.model import Model, log_probability
from skipkv.results import Replay, Stats
from skipkv.steering import Steering


@dataclass
class _Text:
    """Sums over one text's counted positions, and the whole replay's statistics."""

    nll: float
    delta_nll: float
    kl: float
    same: float
    n: int
    compacted: bool
    stats: Stats


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare(
    model: Model,
    texts: Sequence[Any],
    runs: Sequence[tuple[Method, Steering | None]],
    *,
    prompts: Sequence[int] | None = None,
    cache: str = "bf16",
    reference: Model | None = None,
    reference_cache: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> list[Fidelity]:
    """Replay every text under every method.

    Parameters
    ----------
    model : Model
    texts : sequence of text or ids
    runs : sequence of (Method, Steering or None)
    prompts : sequence of int, optional
        Tokens of each text that are its prompt; 1 by default.
    cache : "bf16", "f32" or "q8"
    reference : Model, optional
        Whose full cache all is held against, for instance the same checkpoint in another type; ``model`` by default.
    reference_cache : str, optional
        Type of that cache; ``cache`` by default.
    resamples, seed : int
        Of the bootstrap.
    progress : bool

    Returns
    -------
    list of Fidelity
        In order of ``runs``. Positions before a text's first compaction are left out, and texts without one; for a run
        that never compacted (``full``, or budgets beyond every text) all of them are counted.

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C was pressed; its attribute ``results`` holds those of the texts that every run has replayed, if any.
    """
    integer("resamples", resamples, 1, 1_000_000)
    integer("seed", seed, 0)
    instance("model", model, Model)
    reference = instance("reference", model if reference is None else reference, Model)
    if reference.config.vocab != model.config.vocab:
        raise ConfigError(
            f"reference has {reference.config.vocab} tokens in its vocabulary; the model has {model.config.vocab}"
        )
    if reference_cache is not None:
        one_of("reference_cache", reference_cache, CACHES)
    full = partial(reference.replay, logits=True, cache=reference_cache or cache)
    runs = many(runs)
    for pair in runs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], Method):
            raise wrong("runs", pair, "pairs of a Method and a Steering or None")
        model.check_steering(pair[1])
    ids = model.encode_all(texts)
    n_prompts = [1] * len(ids) if prompts is None else integers("prompts", prompts, 1)
    if len(n_prompts) != len(ids):
        raise ConfigError(f"prompts: expected {len(ids)} as there are texts, found {len(n_prompts)}")
    if any(len(t) < 2 for t in ids):
        raise ConfigError(f"text {next(i for i, t in enumerate(ids) if len(t) < 2)} has less than 2 tokens")
    found: list[list[_Text]] = [[] for _ in runs]
    try:
        _replay(model, full, ids, n_prompts, runs, found, cache, progress)
        return _figures(runs, found, resamples, seed)
    except KeyboardInterrupt as interrupt:
        if done := min(map(len, found), default=0):
            interrupt.results = _figures(runs, [replayed[:done] for replayed in found], resamples, seed)
        raise


def _replay(
    model: Model, full: Callable[..., Replay], ids: Sequence[list[int]], n_prompts: Sequence[int],
    runs: Sequence[tuple[Method, Steering | None]], found: Sequence[list[_Text]], cache: str, progress: bool,
) -> None:  # fmt: skip
    """Every text under every method; to found, one by one."""
    with tqdm(total=len(ids) * (len(runs) + 1), unit="replay", disable=no_bar(progress)) as bar:
        for t, (tokens, n_prompt) in enumerate(zip(ids, n_prompts, strict=True)):
            after = np.array(tokens[1:])
            reference = full(tokens, n_prompt=n_prompt).logits[:-1]
            bar.update()
            best = reference.argmax(1)
            for r, (method, steering) in enumerate(runs):
                run = model.replay(
                    tokens, method, steering, n_prompt=n_prompt, sequence=(t, 0), logits=True, trace=method.compacts,
                    cache=cache,
                )  # fmt: skip
                steps = run.trace.steps if run.trace else []
                compacted = bool(steps) and steps[0] < len(tokens) - 1  # so that something came after it
                first = steps[0] if compacted else 0
                # The logits of position p are the first that a compaction after token p could change.
                here, there = run.logits[first:-1], reference[first:]
                kl = 0.0
                for i in range(0, len(here), 128):
                    p, q = _log_softmax(there[i : i + 128]), _log_softmax(here[i : i + 128])
                    kl += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
                nll = -float(log_probability(here, after[first:]).sum())
                delta = nll + float(log_probability(there, after[first:]).sum())
                same = float((here.argmax(1) == best[first:]).sum())
                found[r].append(_Text(nll, delta, kl, same, len(here), compacted or not method.compacts, run.stats))
                bar.update()


def _figures(
    runs: Sequence[tuple[Method, Steering | None]], found: Sequence[Sequence[_Text]], resamples: int, seed: int
) -> list[Fidelity]:
    results = []
    for (method, steering), texts in zip(runs, found, strict=True):
        compacted_texts = [t for t in texts if t.compacted]
        counted = compacted_texts or texts
        names = ("nll", "delta_nll", "kl", "same")
        figures = [bootstrap([(getattr(t, f), t.n) for t in counted], resamples, seed) for f in names]
        share = sum(t.stats.flagged for t in texts) / max(1, sum(t.stats.sentences for t in texts))
        peak, n = max((t.stats.peak_bytes for t in texts), default=0), sum(t.n for t in counted)
        results.append(Fidelity(method, steering, *figures, peak, len(compacted_texts), n, share))
    return results


def table(results: Sequence[Fidelity]) -> Table:
    """A row a result."""

    def cell(figure: tuple[float, float, float], scale: float = 1.0, digits: int = 3) -> str:
        mean, low, high = (scale * x for x in figure)
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    columns = ("method", "nll", "Δnll", "KL(full‖method)", "same best token %", "peak cache MB", "texts", "positions",
               "flagged %")  # fmt: skip
    rows = [
        (f.run if f.texts else f"{f.run} (never compacted)", cell(f.nll), cell(f.delta_nll, digits=4),
         cell(f.kl, digits=4), cell(f.same, 100, 1), f"{f.peak_bytes / 1e6:.2f}", f.texts, f.positions,
         f"{100 * f.flagged:.1f}")
        for f in (instance("results", one, Fidelity) for one in many(results))
    ]  # fmt: skip
    return Table(columns, rows)
