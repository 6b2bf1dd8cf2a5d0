"""Fidelity without sampling: recorded texts, replayed under every method, against the full cache.

texts → replay(full) ─┐
      → replay(method)┴→ per position: −log p of the recorded token, KL(full ‖ method), same best token
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from skipkv.errors import ConfigError
from skipkv.methods import Method
from skipkv.model import Model, integer, log_probability
from skipkv.steering import Steering


@dataclass(frozen=True)
class Fidelity:
    """One method over all texts; each figure is (mean, low, high), a 95 % bootstrap interval over texts.

    Attributes
    ----------
    run : str
        Method, with its steering.
    nll : negative log-likelihood a token, nats
    delta_nll : nll less that of the full cache at the same positions; comparable where ``positions`` differ
    kl : KL divergence of full from the method, nats a token
    same : share of positions with the same best token
    peak_bytes : int
        Most cache bytes of any text.
    texts, positions : int
        Texts that were compacted (all for ``full``; 0: the run never compacted) and positions counted: those after a
        text's first compaction.
    flagged : float
        Share of the finished sentences that a later one repeats.
    """

    run: str
    nll: tuple[float, float, float]
    delta_nll: tuple[float, float, float]
    kl: tuple[float, float, float]
    same: tuple[float, float, float]
    peak_bytes: int
    texts: int
    positions: int
    flagged: float


@dataclass
class _Text:
    """Sums over one text's counted positions."""

    nll: float
    delta_nll: float
    kl: float
    same: float
    n: int
    compacted: bool


def bootstrap(sums: Sequence[tuple[float, int]], resamples: int, seed: int) -> tuple[float, float, float]:
    """Mean over positions and its 95 % percentile interval, texts drawn with replacement. sums: (total, positions)."""
    array = np.array(sums, np.float64).reshape(-1, 2)
    array = array[array[:, 1] > 0]
    if not len(array):
        return (float("nan"),) * 3
    mean = array[:, 0].sum() / array[:, 1].sum()
    draws = np.random.default_rng(seed).integers(0, len(array), (max(1, resamples), len(array)))
    means = array[draws, 0].sum(1) / array[draws, 1].sum(1)
    return float(mean), *map(float, np.percentile(means, [2.5, 97.5]))


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
    cache : "bf16" or "f32"
    resamples, seed : int
        Of the bootstrap.
    progress : bool

    Returns
    -------
    list of Fidelity
        In order of ``runs``. Positions before a text's first compaction are left out, and texts without one; for a run
        that never compacted (``full``, or budgets beyond every text) all of them are counted.
    """
    integer("resamples", resamples, 1, 1_000_000)
    integer("seed", seed, 0)
    ids = [model.encode(text) for text in texts]
    n_prompts = [1] * len(ids) if prompts is None else list(prompts)
    if any(len(t) < 2 for t in ids):
        raise ConfigError(f"text {next(i for i, t in enumerate(ids) if len(t) < 2)} has less than 2 tokens")
    found: list[list[_Text]] = [[] for _ in runs]
    peaks = [0] * len(runs)
    sentences, flagged = [0] * len(runs), [0] * len(runs)
    with tqdm(total=len(ids) * (len(runs) + 1), unit="replay", disable=None if progress else True) as bar:
        for t, (tokens, n_prompt) in enumerate(zip(ids, n_prompts, strict=True)):
            after = np.array(tokens[1:])
            full = model.replay(tokens, n_prompt=n_prompt, logits=True, cache=cache)
            bar.update()
            reference = full.logits[:-1]
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
                found[r].append(_Text(nll, delta, kl, same, len(here), compacted or not method.compacts))
                peaks[r] = max(peaks[r], run.stats["peak_bytes"])
                sentences[r] += run.stats["sentences"]
                flagged[r] += run.stats["flagged"]
                bar.update()
    results = []
    for r, (method, steering) in enumerate(runs):
        compacted_texts = [t for t in found[r] if t.compacted]
        counted = compacted_texts or found[r]
        name = str(method) + (f"+steer:layer={steering.layer},alpha={steering.alpha:g}" if steering else "")
        names = ("nll", "delta_nll", "kl", "same")
        figures = [bootstrap([(getattr(t, f), t.n) for t in counted], resamples, seed) for f in names]
        share = flagged[r] / max(1, sentences[r])
        results.append(Fidelity(name, *figures, peaks[r], len(compacted_texts), sum(t.n for t in counted), share))
    return results


def json_lines(path: str) -> Iterator[tuple[int, Any]]:
    """(number, value) of every line that is not blank; None where it is no JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut inside of texts
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def read_texts(model: Model, path: str, tokens: int | None, limit: int | None) -> tuple[list[list[int]], list[int]]:
    """Ids of each text and how many are its prompt, from JSON lines: a text, {"text"}, or {"prompt", "output"}."""
    for name, value, low in (("tokens", tokens, 2), ("limit", limit, 1)):
        if value is not None and value < low:
            raise ConfigError(f"{name} is {value}; allowed: integers from {low}")
    texts, prompts = [], []
    for number, value in json_lines(path):
        if limit is not None and len(texts) == limit:
            break
        try:
            if isinstance(value, str):
                value = {"text": value}
            prompt, text = value.get("prompt") or "", value.get("text") or value["output"]
            if not isinstance(prompt, str) or not isinstance(text, str):
                raise TypeError
        except (KeyError, TypeError, AttributeError):
            expected = "a JSON text, an object with a text, or one with prompt and output"
            raise ConfigError(f"{path}: line {number}: expected {expected}") from None
        head = model.encode(prompt) if prompt else []
        ids = (head + model.tokenizer.encode(text, add_special_tokens=not head))[: tokens or model.config.context]
        texts.append(ids[: model.config.context])
        prompts.append(max(1, min(len(head), len(texts[-1]))))
    if not texts:
        raise ConfigError(f"{path}: expected at least one text, found none")
    return texts, prompts


def table(results: Sequence[Fidelity]) -> str:
    """For people."""

    def cell(figure: tuple[float, float, float], scale: float = 1.0, digits: int = 3) -> str:
        mean, low, high = (scale * x for x in figure)
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    rows = [("method", "nll", "Δnll", "KL(full‖method)", "same best token %", "peak cache MB", "texts", "positions",
             "flagged %")]  # fmt: skip
    for f in results:
        run = f.run if f.texts else f"{f.run} (never compacted)"
        rows.append((run, cell(f.nll), cell(f.delta_nll, digits=4), cell(f.kl, digits=4), cell(f.same, 100, 1),
                     f"{f.peak_bytes / 1e6:.2f}", str(f.texts), str(f.positions),
                     f"{100 * f.flagged:.1f}"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (" ".join(f"{text:{width + 1}}" for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'skipkv[viz]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(results: Sequence[Fidelity], path: str) -> None:
    """KL divergence of every method with its interval."""
    pyplot = _pyplot()
    shown = [f for f in results if np.isfinite(f.kl[0])]
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(shown) + 1.2), layout="constrained")
    means = np.array([f.kl for f in shown]).reshape(-1, 3)
    at = np.arange(len(shown))
    axes.errorbar(means[:, 0], at, xerr=np.abs(means[:, 1:] - means[:, :1]).T, fmt="o", capsize=3)
    axes.set_yticks(at, [f.run for f in shown])
    axes.invert_yaxis()
    axes.set_xlabel("KL divergence from the full cache, nats a token (95 % over texts)")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(args: argparse.Namespace) -> int:
    from skipkv.cli import parse_run
    from skipkv.model import load

    runs = [parse_run(text.strip()) for text in args.methods.split(";") if text.strip()]
    if not runs:
        raise ConfigError(f'methods is {args.methods!r}; allowed: methods separated by ";"')
    if args.plot:
        _pyplot()  # refused now, not after the work
    model = load(args.model, device=args.device, dtype=args.dtype, threads=args.threads, progress=not args.quiet)
    texts, prompts = read_texts(model, args.texts, args.tokens, args.limit)
    results = compare(
        model, texts, runs, prompts=prompts, cache=args.cache, resamples=args.bootstrap, seed=args.seed,
        progress=not args.quiet,
    )  # fmt: skip
    print(json.dumps([asdict(f) for f in results]) if args.json else table(results))
    if args.plot:
        plot(results, args.plot)
    return 0
