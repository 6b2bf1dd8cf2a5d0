"""τ and α of SkipKV, chosen on training data, never on what is measured afterwards.

A line of values of τ, then one of α at the chosen τ; each value stands beside the default on the same items. Taken is
1. the most accurate of those whose accuracy is above the default's, with the 95 % interval of the difference above 0;
2. or else the shortest of those that are no less accurate and shorter, with the interval of that below 0;
3. or else the default: what lies within the noise changes nothing.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from skipkv.checks import number
from skipkv.errors import CheckpointError, ConfigError, warn
from skipkv.eval import statistics
from skipkv.eval.evaluate import finish
from skipkv.eval.figures import cell
from skipkv.eval.records import Record
from skipkv.eval.scales import scale_of
from skipkv.eval.statistics import Figure
from skipkv.eval.table import Table
from skipkv.eval.tasks import DRAWN, Item, digest, find_task, load_items
from skipkv.eval.work import Evaluation
from skipkv.load.files import read_object, show
from skipkv.model import Model
from skipkv.steering import FLOAT_MAX, Steering
from skipkv.tiny.problems import draw

TAUS, ALPHAS = (0.75, 0.8, 0.85, 0.9, 0.95), (0.5, 0.75, 1.0, 1.5)


def training_items(task: str, data: str | None, limit: int | None) -> list[Item]:
    """Items to choose on; of ``tiny`` by default the first of its stream "choose".

    Raises
    ------
    ConfigError
        There is no data, or one of its problems is of the task's own.
    """
    if data is None:
        if find_task(task).hub:
            raise ConfigError("data is not given; allowed: a file of training problems, none of them the task's own")
        drawn = enumerate(draw(limit or DRAWN, "choose"))
        return [Item(f"choose/{i}", p["prompt"], p["answer"]) for i, p in drawn]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these are not the published ones
        items, found = load_items(task, data)
    try:
        own = items if found == find_task(task).digest else load_items(task)[0]
    except CheckpointError as error:
        warn(f"{data}: that it holds none of the task's own problems is checked where it is used only: {error}")
        own = []
    unseen({problem(item) for item in items}, own, data)
    return items[:limit]


def problem(item: Item) -> str:
    """Names a problem, however it is spaced."""
    return hashlib.sha256(" ".join(item.problem.split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def unseen(problems: Iterable[str], items: Iterable[Item], file: str) -> None:
    """Refuse to measure on items that something was chosen on, or to choose on these."""
    problems = set(problems)
    for item in items:
        if problem(item) in problems:
            raise ConfigError(f"{file}: the problem of item {item.id!r:.80} is one that is measured; allowed: others")


def calibrate(
    task: str, model: Model, steering: Steering, data: str | None = None, *, budget: str = "25%",
    limit: int | None = None, **options: Any,
) -> tuple[dict[str, Any], Table]:  # fmt: skip
    """Choose τ and α for all budgets at once.

    Parameters
    ----------
    task : str
    model : Model
    steering : Steering
        Its α is the default.
    data : path, optional
        See `training_items`.
    budget : str
        At which they are chosen.
    limit : int, optional
        Only the first items.
    options
        As of `Evaluation`.

    Returns
    -------
    found : dict
        ``tau``, ``alpha``, what they were chosen on and for, and every value that was tried.
    table : Table
    """
    items, scale = training_items(task, data, limit), scale_of(task)
    tau, alpha, lines = scale.tau, steering.alpha, []

    def line(name: str, values: Sequence[float], default: float) -> float:
        nonlocal tau, alpha
        values = sorted({*values, default})
        asked = [(scale.method("skipkv", budget, tau if name == "alpha" else v),
                  replace(steering, alpha=v if name == "alpha" else alpha)) for v in values]  # fmt: skip
        made = Evaluation(task, model, asked, items, **options)
        runs = list(made.runs)
        found = {row.run: row for row in finish(made).summary().rows}
        rows = {v: found[run.line["run"]] for v, run in zip(values, runs, strict=True)}
        texts = {v: made.records(run) for v, run in zip(values, runs, strict=True)}
        chosen, differences = choose(texts, default)
        lines.extend(
            {"parameter": name, "value": v, "accuracy": rows[v].accuracy, "length": rows[v].length,
             "more_accurate": differences[v][0], "longer": differences[v][1], "default": v == default,
             "chosen": v == chosen} for v in values
        )  # fmt: skip
        return chosen

    tau = line("tau", TAUS, tau)
    alpha = line("alpha", ALPHAS, alpha)
    found = {
        "tau": tau, "alpha": alpha, "task": task, "budget": budget, "items": len(items), "data": digest(items),
        "model": model.hashes, "vector": vector(steering), "tried": lines, "problems": [problem(i) for i in items],
    }  # fmt: skip
    return found, _table(lines)


def choose(texts: Mapping[float, Sequence[Record]], default: float) -> tuple[float, dict[float, tuple[Figure, Figure]]]:
    """The value by the rule above; and every value's accuracy and length less those of the default."""
    differences = {v: (_apart(of, texts[default], "correct"), _apart(of, texts[default], "length"))
                   for v, of in texts.items()}  # fmt: skip
    above = [v for v, (more, _) in differences.items() if more.low is not None and more.low > 0]
    if above:
        return max(above, key=lambda v: (differences[v][0].value, -differences[v][1].value)), differences
    shorter = [v for v, (more, longer) in differences.items()
               if more.value >= 0 and longer.high is not None and longer.high < 0]  # fmt: skip
    return min(shorter, key=lambda v: differences[v][1].value, default=default), differences


def _apart(texts: Sequence[Record], others: Sequence[Record], name: str) -> Figure:
    here, there = (_by_item(of, name) for of in (texts, others))
    bounds = (-1.0, 1.0) if name == "correct" else None
    return statistics.mean([here[item] - there[item] for item in here], bounds)


def _by_item(texts: Sequence[Record], name: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for r in texts:
        values.setdefault(r.item, []).append(float(getattr(r, name)))
    return {item: float(np.mean(of)) for item, of in values.items()}


def vector(steering: Steering) -> str:
    return hashlib.sha256(steering.vector.tobytes()).hexdigest()


def load(path: str | PathLike[str], model: Model, steering: Steering) -> dict[str, Any]:
    """What `calibrate` found, for the same model and vector.

    Raises
    ------
    CheckpointError
        The file is not such a file, or of another model or vector.
    """
    found = read_object(Path(path))
    for name, low, high in (("tau", 0.0, 1.0), ("alpha", -FLOAT_MAX, FLOAT_MAX)):
        try:
            number(name, found.get(name), low, high)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
    for name, own in (("model", model.hashes), ("vector", vector(steering))):
        if found.get(name) != own:
            raise CheckpointError(f"{path}: {name}: expected what is used here, found another")
    for name, kind in (("problems", list), ("data", str)):
        if not isinstance(found.get(name), kind):
            raise CheckpointError(f"{path}: {name}: expected what it was made on, found {show(found.get(name))}")
    return found | {"file": fspath(path)}


COLUMNS = (("accuracy, %", "accuracy", 100, 1), ("Δ default", "more_accurate", 100, 1), ("length", "length", 1, 0),
           ("Δ default", "longer", 1, 0))  # fmt: skip


def _table(lines: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [line["parameter"], f"{line['value']:g}" + " (default)" * line["default"],
         *(cell(line[key], scale, digits) for _, key, scale, digits in COLUMNS), "←" if line["chosen"] else ""]
        for line in lines
    ]  # fmt: skip
    return Table(["", "value", *(column[0] for column in COLUMNS), "chosen"], rows, align="<<>>>>>")
