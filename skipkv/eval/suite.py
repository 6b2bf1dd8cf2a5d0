"""The paper's tables, measured beside its figures, for any task and model.

variants × budgets → cells, one evaluation for each kind of batch, all in one store → grouping, budgets, ablation, SEAL
rows → one store each, under one memory limit → throughput
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from skipkv.eval import paper
from skipkv.eval.calibrate import unseen
from skipkv.eval.evaluate import finish
from skipkv.eval.figures import cell
from skipkv.eval.records import Record, time_of
from skipkv.eval.scales import scale_of
from skipkv.eval.table import Table
from skipkv.eval.work import Evaluation
from skipkv.model import Model
from skipkv.run import pad
from skipkv.steering import Steering

SUITES = ("seed",)
ROWS = 10  # of the published batches


# Method, steering (constant: γ = 0), batches. Padding that is reserved makes a batch that of left-padded rows.
ALONE, PADDED, GROUPED = {}, {"padding": "reserve"}, {"padding": "reserve", "grouping": True}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("full", "", ALONE), "seal": ("full", "constant", ALONE), "alone": ("skipkv", "adaptive", ALONE),
    "h2o": ("h2o", "", PADDED), "rkv": ("rkv", "", PADDED), "skipkv": ("skipkv", "", PADDED),
    "steered": ("skipkv", "adaptive", PADDED), "grouped": ("skipkv", "adaptive", GROUPED),
}  # fmt: skip
TABLES = {
    "Batch grouping (Table 3): skipkv + steering": (
        0, {"alone": "1 row", "steered": "{} rows", "grouped": "{} rows, grouped"}),
    "Accuracy and length against budget": (
        0, {"full": "full", "h2o": "h2o", "rkv": "rkv", "grouped": "skipkv + steering + grouping"}),
    "Ablation (Table 2)": (
        -3, {"rkv": "rkv", "skipkv": "+ sentence score", "steered": "+ steering", "grouped": "+ grouping"}),
    "SEAL": (0, {"full": "full", "seal": "full + constant steering"}),
}  # fmt: skip
THROUGHPUT = "Throughput (Table 1)"
SPEEDS = {"full": "full", "seal": "SEAL", "rkv": "rkv", "grouped": "skipkv + steering"}
COLUMNS = (("accuracy, %", "accuracy", 100, 1), ("paper", "accuracy_paper", 1, 1), ("length", "length", 1, 0),
           ("paper", "length_paper", 1, 0), ("cut, %", "cut", 100, 1), ("valid budget", "valid", 1, 0),
           ("paper", "valid_paper", 1, 0), ("peak MB", "peak_bytes", 1e-6, 2))  # fmt: skip
SPEED_COLUMNS = (("samples/min", "speed", 1, 2), ("paper", "speed_paper", 1, 2), ("× full", "ratio", 1, 2),
                 ("paper", "ratio_paper", 1, 2), ("× full's best", "honest", 1, 2), ("paper", "honest_paper", 1, 2),
                 ("at once", "at_once", 1, 0), ("cache MB", "pool_bytes", 1e-6, 1))  # fmt: skip
NOTE = """\
[…]: 95 % interval, bootstrap over items. –: the paper has no such figure, or there is none of this model.
Budgets that are shares are of the full cache's mean length here, as the paper's are of its own. Length: mean tokens,
prompt included. Valid budget: mean slots that padding leaves. One row has no padding, and its texts are the same alone
and among others, so it is measured in a batch. Throughput: texts over the time of one run on this machine, so without
interval; × full: at the same rows; × full's best: at the rows where the full cache is fastest. At once: texts that
were in the cache together at most under one memory limit; rows wait for room, where the paper ran out of memory."""


class Suite:
    """All tables of the paper for one task and model; all texts are kept, so that the same call goes on.

    Parameters
    ----------
    task : str
    model : Model
    steering : Steering
        Its α is for all but what calibration changes.
    out : path
    calibration : mapping, optional
        As `calibrate.load` gives it.
    kind : callable
        Makes the evaluations of all but the throughput, as `Evaluation` does.
    options
        As of `Evaluation`.
    """

    def __init__(
        self, task: str, model: Model, steering: Steering, out: str, calibration: Mapping[str, Any] | None = None,
        kind: Callable[..., Evaluation] = Evaluation, **options: Any,
    ) -> None:  # fmt: skip
        self.task, self.model, self.out, self.kind = task, model, Path(out), kind
        self.scale, self.size = scale_of(task), paper.size_of(model.config)
        self.budgets = paper.shares(self.size, task) or self.scale.budgets
        self.options = {"rows": ROWS} | options
        self.calibration = calibration
        self.tau = calibration["tau"] if calibration else self.scale.tau
        adaptive = replace(steering, alpha=calibration["alpha"]) if calibration else steering
        self.vectors = {"": None, "adaptive": adaptive, "constant": replace(adaptive, gamma=0.0)}
        of = self.size, task
        self.points, self.valid, self.published = (x.get(of, {}) for x in (paper.POINTS, paper.VALID, paper.SPEEDS))

    def _make(self, kind: Callable[..., Evaluation], asked: Sequence[tuple[str, str]], **options: Any) -> Evaluation:
        methods = [(self.scale.method(VARIANTS[v][0], b, self.tau), self.vectors[VARIANTS[v][1]]) for v, b in asked]
        made = kind(self.task, self.model, methods, **(self.options | options))
        if self.calibration:
            unseen(self.calibration["problems"], made.items, self.calibration["file"])
            made.about["calibration"] = {k: self.calibration[k] for k in ("tau", "alpha", "data", "file")}
        return made

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Measure everything; rows by the title of their table."""
        cells, cap = self._cells()
        tables = {title: list(self._rows(cells, *about)) for title, about in TABLES.items()}
        return tables | {THROUGHPUT: self._speeds(cells["full", ""]["longest"], cap)}

    def _cells(self) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, int]]:
        """Of each variant and budget what stands in its rows; and the cap, where the full cache's texts set it."""
        cells = {}
        for batches in (ALONE, PADDED, GROUPED):
            # The full cache, of which budgets are shares, stands first everywhere, and runs once.
            kinds = [v for v, of in VARIANTS.items() if of[2] is batches or v == "full"]
            asked = [(v, b) for v in kinds for b in self._budgets(v)]
            made = self._make(self.kind, asked, out=self.out, **batches)
            runs = list(made.runs)
            found = {row.run: row for row in finish(made).summary().rows}
            padded = pad([len(prompt) for prompt in made.prompts], made.options["rows"], "grouping" in batches)[1]
            padding = np.mean(padded) if batches else 0
            for (variant, budget), run in zip(asked, runs, strict=True):
                row, at = found[run.line["run"]], self.budgets.index(budget) if budget else 0
                slots, (accuracies, lengths) = row.budget, self.points.get(variant, ((), ()))
                cells[variant, budget] = {
                    "budget": "" if slots is None else f"{slots:.0f} ({budget[:-1]} %)" if "%" in budget else budget,
                    "accuracy": row.accuracy, "accuracy_paper": _at(accuracies, at), "length": row.length,
                    "length_paper": _at(lengths, at), "cut": row.truncated,
                    "valid": None if slots is None else slots - padding,
                    "valid_paper": _at(self.valid.get(variant, ()), at),
                    "peak_bytes": row.peak_bytes, "run": row.run,
                    "longest": max(r.stats["peak_bytes"] for r in made.records(run)),
                }  # fmt: skip
        return cells, {} if made.cap else {"max_new_tokens": runs[-1].cap}

    def _budgets(self, variant: str) -> tuple[str, ...]:
        return ("",) if VARIANTS[variant][0] == "full" else self.budgets

    def _rows(self, cells: Mapping[Any, Any], first: int, labels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        for budget in ("", *self.budgets[first:]):
            for variant, label in labels.items():
                if (variant, budget) in cells:
                    yield {"method": label.format(self.options["rows"]), **cells[variant, budget]}

    def _speeds(self, longest: int, cap: dict[str, int]) -> list[dict[str, Any]]:
        limit = self.options.get("memory_limit") or self.scale.memory * longest
        asked, rows = [(variant, self._budgets(variant)[0]) for variant in SPEEDS], []
        for n in self.scale.rows:
            out = self.out / "throughput" / f"{n}-rows-{limit}-bytes"
            made = self._make(Evaluation, asked, out=out, rows=n, memory_limit=limit, **cap)
            runs = list(made.runs)
            finish(made)
            for (variant, _), run in zip(asked, runs, strict=True):
                texts = made.records(run)
                at = paper.ROWS.index(n) if n in paper.ROWS else len(paper.ROWS)
                rows.append({
                    "rows": n, "method": SPEEDS[variant], "speed": speed(texts), "at_once": at_once(texts),
                    "speed_paper": _at(self.published.get(variant, ()), at),
                    "pool_bytes": max(r.stats["pool_peak_bytes"] for r in texts),
                })  # fmt: skip
        for speeds, ratio, honest in (("speed", "ratio", "honest"), ("speed_paper", "ratio_paper", "honest_paper")):
            full = {row["rows"]: row[speeds] for row in rows if row["method"] == SPEEDS["full"]}
            best = max(filter(None, full.values()), default=None)
            for row in rows:
                value, same = row[speeds], full[row["rows"]]
                row |= {ratio: value and same and value / same, honest: value and best and value / best}
        return rows

    def report(self, tables: Mapping[str, Sequence[Mapping[str, Any]]], show: Callable[[Table], str]) -> str:
        """All tables as text, each as ``show`` writes it."""
        model = f"{self.model.name}; the paper's: {paper.NAMES[self.size]}" if self.size else self.model.name
        parts = [f"# {self.task}, {model}"]
        for title, rows in tables.items():
            kind, columns = ("rows", SPEED_COLUMNS) if title == THROUGHPUT else ("budget", COLUMNS)
            cells = [[row[kind], row["method"], *(cell(row[k], s, d) for _, k, s, d in columns)] for row in rows]
            labels = [kind, "method", *(column[0] for column in columns)]
            parts += [f"## {title}", show(Table(labels, cells, align="<<" + ">" * len(columns)))]
        of = f"calibrated: {self.calibration['file']}" if self.calibration else "by default"
        v = self.vectors["adaptive"]
        parts += [NOTE, f"Steering at layer {v.layer}, α {v.alpha:g}, γ {v.gamma:g}; τ {self.tau:g} ({of})."]
        return "\n\n".join([*parts, f"    {self.options.get('command', '')}"]) + "\n"


def _at(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else None


def speed(texts: Sequence[Record]) -> float:
    """Texts a minute, over the time of all parts of their run."""
    return 60 * len(texts) / time_of(texts)


def at_once(texts: Sequence[Record]) -> int:
    """How many were in the cache together at most."""
    most = 0
    for segment in {r.segment for r in texts}:
        ends = [(r.seconds - r.stats["seconds"], r.seconds) for r in texts if r.segment == segment]
        moments = sorted([(begin, 1) for begin, _ in ends] + [(end, -1) for _, end in ends])
        most = max(most, int(np.cumsum([change for _, change in moments]).max()))
    return most
