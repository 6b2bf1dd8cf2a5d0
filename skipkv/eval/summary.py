"""The records of a store, summed up run by run.

records of a run → sums by item → figures (statistics.py) ─┐
records of the full cache under the same settings ─────────┴→ and differences → RunSummary → table, CSV
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from skipkv.checks import instance, many
from skipkv.errors import ConfigError
from skipkv.eval import statistics
from skipkv.eval.figures import RunSummary, Summary, key_of
from skipkv.eval.records import Record, time_of
from skipkv.eval.statistics import Figure
from skipkv.trace import Trace, read_method

SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)  # what a share, and a difference of two, can be
# Of a run's description: what may differ between the methods of one comparison. The rest are its settings.
OWN = {"run", "method", "parameters", "steering", "share", "cap", "padding", "grouping", "rows", "items", "command",
       "checkpoint", "calibration"}  # fmt: skip


def summarise(
    records: Sequence[Record], runs: Mapping[str, Mapping[str, Any]], official: Sequence[Record] = ()
) -> Summary:
    """Figures of every run that has records.

    Parameters
    ----------
    records : sequence of Record
    runs : dict
        Hash → description: ``method`` as `parse_method` reads it, ``steering``, ``share``, ``checkpoint``
        and ``command`` where it has them, and the settings: all that is not `OWN`.
    official : sequence of Record
        The same with grades by the published rule.

    Raises
    ------
    ConfigError
        A record's run is not described, or without its method.
    """
    instance("runs", runs, Mapping)
    records, official = (
        [instance(name, r, Record) for r in many(of)] for name, of in (("records", records), ("official", official))
    )
    texts: dict[str, list[Record]] = {run: [] for run in runs}
    # In an order of their own: the bootstrap draws places, and texts end in another order each time.
    for record in sorted(records, key=lambda r: (r.item, r.sample)):
        if not isinstance(runs.get(record.run, {}).get("method"), str):
            raise ConfigError(f"run {record.run!r:.80} of item {record.item!r:.80} has no description with its method")
        texts[record.run].append(record)
    texts = {run: of for run, of in texts.items() if of}
    settings = {run: {k: v for k, v in runs[run].items() if k not in OWN} for run in texts}
    full = {
        key_of(settings[run]): of for run, of in reversed(texts.items())
        if read_method(runs[run]["method"]).name == "full" and not runs[run].get("steering")
    }  # fmt: skip
    grades = {r.key: r.correct for r in official}
    rows = [_row(of, runs[run], full.get(key_of(settings[run])), grades) for run, of in texts.items()]
    return Summary(tuple(rows), tuple(settings.values()))


def _row(
    texts: Sequence[Record], about: Mapping[str, Any], full: Sequence[Record] | None, official: Mapping[Any, Any]
) -> RunSummary:
    total = _by_item(texts)

    def each(values: Sequence[Any], chosen: np.ndarray) -> Figure | None:
        """Mean over those chosen of the texts that have the value."""
        array = np.array([np.nan if v is None else v for v in values], np.float64)
        chosen = chosen * np.isfinite(array)
        return statistics.ratio(total(np.nan_to_num(array) * chosen), total(chosen))

    every = np.ones(len(texts))
    right, wrong = (np.array([r.correct is found for r in texts], np.float64) for found in (True, False))
    graded, solved = total(right + wrong), total(right)
    samples = int(graded.max())
    enough = graded == samples
    lengths = np.array([r.length for r in texts], np.float64)
    stats = {name: [r.stats.get(name) for r in texts]
             for name in ("flagged", "thoughts", "partial_words", "mean_run", "compression", "peak_bytes")}  # fmt: skip
    method = read_method(about["method"])
    took = time_of(texts)
    return RunSummary(
        method, about.get("steering"), texts[0].run, texts[0].method, texts[0].task, about.get("checkpoint", ""),
        about.get("share"), len(graded), samples, len(texts), len(texts) - int(graded.sum()),
        accuracy=_accuracy(_grades(texts)), official=_accuracy(_grades(texts, official)),
        pass_at_k=statistics.mean(statistics.pass_at_k(graded[enough], solved[enough], samples), SHARE)
        if samples > 1 else None,
        **_against(texts, full, getattr(method, "budget", None)),
        length=statistics.ratio(total(lengths), total(every)),
        length_right=each(lengths, right), length_wrong=each(lengths, wrong),
        length_difference=statistics.difference(
            *(np.stack([total(v * right), total(v * wrong)], axis=1) for v in (lengths, every))
        ),
        truncated=statistics.mean(total([r.truncated for r in texts]) / total(every), SHARE),
        flagged_right=each(stats["flagged"], right), flagged_wrong=each(stats["flagged"], wrong),
        thoughts_right=each(stats["thoughts"], right), thoughts_wrong=each(stats["thoughts"], wrong),
        **{name: each(stats[name], every) for name in ("partial_words", "mean_run", "compression", "peak_bytes")},
        tokens_per_second=sum(len(r.tokens) for r in texts) / took if took else None,
        command=about.get("command", ""),
    )  # fmt: skip


def _by_item(texts: Sequence[Record]) -> Callable[[Sequence[float]], np.ndarray]:
    """Sums values of texts over each item."""
    place = {item: i for i, item in enumerate(dict.fromkeys(r.item for r in texts))}
    at = np.array([place[r.item] for r in texts])
    return lambda values: np.bincount(at, values, len(place))


def _against(texts: Sequence[Record], full: Sequence[Record] | None, budget: Any) -> dict[str, Any]:
    """The figures beside those of the full cache."""
    nothing = dict.fromkeys(("reference", "difference", "p", "budget_share")) | {"common": 0}
    if full is None or texts is full:
        return nothing
    total = _by_item(full)
    length = statistics.ratio(total([r.length for r in full]), total([1.0] * len(full)))
    here, there = _grades(texts), _grades(full)
    common = [item for item in here if item in there]
    apart = np.array([np.mean(here[item]) - np.mean(there[item]) for item in common])
    firsts = [(here[item][0], there[item][0]) for item in common]
    return {
        "reference": full[0].run, "difference": statistics.mean(apart, DIFFERENCE), "common": len(common),
        "p": statistics.mcnemar(firsts.count((True, False)), firsts.count((False, True))) if common else None,
        "budget_share": Figure(*(x and float(np.mean(budget)) / x for x in (length[0], length[2], length[1])))
        if budget is not None else None,
    }  # fmt: skip


def _grades(texts: Sequence[Record], other: Mapping[Any, bool | None] | None = None) -> dict[str, list[bool]]:
    """Of each item that has any, in order of its samples: the records' own, or others by key."""
    found: dict[str, list[bool]] = {}
    for r in texts:
        correct = r.correct if other is None else other.get(r.key)
        if correct is not None:
            found.setdefault(r.item, []).append(correct)
    return found


def _accuracy(grades: Mapping[str, Sequence[bool]]) -> Figure | None:
    return statistics.mean([sum(of) / len(of) for of in grades.values()], SHARE)


def fragmentation(trace: Trace) -> dict[str, float]:
    """How far eviction has torn a text, by the last kept sets; means over layers and KV heads.

    Returns
    -------
    partial_words
        Share of the words of which a head holds some tokens, but not all. A word ends where white space begins.
    mean_run
        Mean number of consecutive positions held.
    """
    n = len(instance("trace", trace, Trace).tokens)
    held = np.ones((trace.n_layers, trace.n_kv_heads, n), bool)
    last = {(c.layer, c.head): c for c in sorted(trace.compactions, key=lambda c: c.step)}
    for c in last.values():
        held[c.layer, c.head, : c.step] = False
        held[c.layer, c.head, c.kept] = True
    held = held.reshape(-1, n)
    texts = trace.texts
    starts = [p for p in range(n) if p == 0 or texts[p][:1].isspace() or texts[p - 1][-1:].isspace()]
    counts = np.add.reduceat(held, starts, axis=1, dtype=np.int64)
    sizes = np.diff([*starts, n])
    runs = held[:, 0] + (held[:, 1:] & ~held[:, :-1]).sum(axis=1)
    return {
        "partial_words": float(((counts > 0) & (counts < sizes)).mean()),
        "mean_run": float((held.sum(axis=1) / np.maximum(runs, 1)).mean()),
    }
