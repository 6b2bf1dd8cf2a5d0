"""What stands in the tables of a store: one row a run, each figure with its interval."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from skipkv.eval.statistics import Figure
from skipkv.eval.table import Table
from skipkv.methods import Method
from skipkv.trace import StoredMethod

Column = tuple[str, str, float, int]  # name, attribute of `RunSummary`, factor, digits
MAIN: tuple[Column, ...] = (
    ("accuracy, %", "accuracy", 100, 1), ("official, %", "official", 100, 1), ("pass@k, %", "pass_at_k", 100, 1),
    ("Δ full", "difference", 100, 1), ("p", "p", 1, 3), ("length", "length", 1, 0), ("cut, %", "truncated", 100, 1),
    ("kept, %", "compression", 100, 1), ("budget, %", "budget_share", 100, 1), ("peak MB", "peak_bytes", 1e-6, 2),
    ("tokens/s", "tokens_per_second", 1, 0),
)  # fmt: skip
BEHAVIOUR: tuple[Column, ...] = (
    ("length, right", "length_right", 1, 0), ("wrong", "length_wrong", 1, 0),
    ("right – wrong", "length_difference", 1, 0), ("repeats, right", "flagged_right", 1, 1),
    ("wrong", "flagged_wrong", 1, 1), ("re-checks, right", "thoughts_right", 1, 1),
    ("wrong", "thoughts_wrong", 1, 1), ("split words, %", "partial_words", 100, 1), ("mean run", "mean_run", 1, 1),
)  # fmt: skip
RARE = {"official", "pass_at_k", "partial_words", "mean_run"}  # shown where there is any
NOTE = (
    "[…]: 95 % interval, bootstrap over items, samples of one together; –: nothing to count. Δ full: accuracy less\n"
    "that of the full cache, paired over common items; p: McNemar's exact test on first samples. Length: mean tokens,\n"
    "prompt included. Cut: texts that ran to the limit, which are wrong. Kept: slots held at the end, of the own\n"
    "length; budget: of the full cache's mean length, with that length's interval. Repeats, re-checks: sentences a\n"
    "text. p and counts have no interval, nor have tokens/s: one run's time on one machine."
)


@dataclass(frozen=True)
class RunSummary:
    """One run of a store in figures, each with its 95 % interval; None where there is nothing to count.

    Attributes
    ----------
    method : Method or StoredMethod
    steering : str or None
    run, name, task, model : str
        Its hash, its name in tables, what was asked of whom.
    share : float or None
        The budget as a share of the full cache's mean length, where it was given so.
    items, samples, texts, ungraded : int
        Items; most graded samples of one; all texts; those without a grade, which no share counts.
    accuracy : Figure
        Mean over items of the share of right samples.
    official : Figure
        The same by the published rule, where the texts were graded by it, too.
    pass_at_k : Figure
        That one of ``samples`` is right; items with fewer are left out. Where there are at least 2.
    reference : str or None
        The run with the full cache and the same settings otherwise.
    difference : Figure
        Accuracy less the reference's, paired over their ``common`` items.
    common : int
    p : float or None
        Of McNemar's exact test on the first sample of each common item.
    length, length_right, length_wrong, length_difference : Figure
        Mean tokens, prompt included: of all texts, the right ones, the wrong ones; right less wrong.
    truncated : Figure
        Share of texts that ran into the limit.
    flagged_right, flagged_wrong, thoughts_right, thoughts_wrong : Figure
        Sentences a text that a later one repeats, and re-checking ones, of right and wrong texts.
    partial_words, mean_run : Figure
        Fragmentation, where it was recorded: see `fragmentation`.
    compression : Figure
        Slots held at the end as a share of the own length.
    budget_share : Figure
        The budget as a share of the reference's mean length, as the paper counts; the interval is that length's.
    peak_bytes : Figure
        Most cache bytes of a text.
    tokens_per_second : float or None
        Of the whole run, so without an interval.
    command : str
        Makes it again.
    """

    method: Method | StoredMethod
    steering: str | None
    run: str
    name: str
    task: str
    model: str
    share: float | None
    items: int
    samples: int
    texts: int
    ungraded: int
    accuracy: Figure | None
    official: Figure | None
    pass_at_k: Figure | None
    reference: str | None
    difference: Figure | None
    common: int
    p: float | None
    length: Figure | None
    length_right: Figure | None
    length_wrong: Figure | None
    length_difference: Figure | None
    truncated: Figure | None
    flagged_right: Figure | None
    flagged_wrong: Figure | None
    thoughts_right: Figure | None
    thoughts_wrong: Figure | None
    partial_words: Figure | None
    mean_run: Figure | None
    compression: Figure | None
    budget_share: Figure | None
    peak_bytes: Figure | None
    tokens_per_second: float | None
    command: str = ""

    @property
    def budget(self) -> float | None:
        """Slots a head, the mean where heads differ; None without a limit."""
        budget = getattr(self.method, "budget", None)
        return None if budget is None else float(np.mean(budget))


@dataclass(frozen=True)
class Summary:
    """One row a run, in the order of the runs.

    Attributes
    ----------
    rows : tuple of RunSummary
    settings : tuple of dict
        Of each: what all runs of its comparison share.
    """

    rows: tuple[RunSummary, ...]
    settings: tuple[dict[str, Any], ...]

    def comparisons(self) -> Iterator[tuple[dict[str, Any], Summary]]:
        """Settings, and the rows that share them."""
        for shared in {key_of(of): of for of in self.settings}.values():
            rows = [row for row, of in zip(self.rows, self.settings, strict=True) if of == shared]
            yield shared, Summary(tuple(rows), (shared,) * len(rows))

    @property
    def heading(self) -> str:
        """Tasks and models of the rows."""
        return ", ".join(dict.fromkeys(text for row in self.rows for text in (row.task, row.model) if text))

    def table(self) -> Table:
        """What is asked first: accuracy, length, memory."""
        return self._table(MAIN)

    def behaviour(self) -> Table:
        """How right and wrong texts differ, and what eviction leaves of words."""
        return self._table(BEHAVIOUR)

    def _table(self, columns: Sequence[Column]) -> Table:
        shown = [c for c in columns if c[1] not in RARE or any(getattr(row, c[1]) for row in self.rows)]
        rows = [
            [row.name, f"{row.items} × {row.samples}" + (f", {row.ungraded} ungraded" if row.ungraded else ""),
             *(cell(getattr(row, name), scale, digits) for _, name, scale, digits in shown)]
            for row in self.rows
        ]  # fmt: skip
        return Table(["method", "items", *(label for label, *_ in shown)], rows, align="<" + ">" * (len(shown) + 1))

    def csv(self) -> str:
        """Everything; a figure stands in three columns: value, low, high."""
        names = [f.name for f in fields(RunSummary)]
        figures = {f.name for f in fields(RunSummary) if f.type == "Figure | None"}
        parts = {name: (name, f"{name}_low", f"{name}_high") if name in figures else (name,) for name in names}
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column for name in names for column in parts[name]])
        for row in self.as_dict():
            cells = [(row[name] or (None,) * 3) if name in figures else (row[name],) for name in names]
            writer.writerow([cell for some in cells for cell in some])
        return file.getvalue()

    def as_dict(self) -> list[dict[str, Any]]:
        """What JSON can hold of each row."""
        return [{f.name: getattr(row, f.name) for f in fields(row)} | {"method": str(row.method)} for row in self.rows]

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.behaviour()}\n\n{NOTE}"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_() + self.behaviour()._repr_html_()


def key_of(settings: Mapping[str, Any]) -> str:
    """Alike settings have the same."""
    return json.dumps(settings, sort_keys=True, default=str)


def cell(value: Figure | float | None, scale: float, digits: int) -> str:
    """A figure with its interval, or a number; – for neither."""
    if value is None:
        return "–"
    if not isinstance(value, Figure):
        least = 10.0**-digits
        return f"< {least:g}" if 0 < scale * value < least else f"{scale * value:.{digits}f}"
    middle, *ends = (f"{scale * x:.{digits}f}" for x in value if x is not None)
    return f"{middle} [{', '.join(ends) or '–'}]"
