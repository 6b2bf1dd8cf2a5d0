"""Evaluations: a task under several methods, in a store that keeps every text, so that whatever ends one costs none.

    evaluate → work.py → Results → summary.py

A run is a method with all else that its texts depend on (the model's files, prompt, sampling, version, …); its hash
names it, and what the store has of it is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from skipkv.eval.figures import Summary
from skipkv.eval.records import Record
from skipkv.eval.summary import summarise
from skipkv.eval.tasks import Item
from skipkv.eval.work import Evaluation
from skipkv.methods import Method
from skipkv.model import Model


@dataclass(frozen=True, eq=False)
class Results:
    """What an evaluation has, in order of methods, items, samples.

    Attributes
    ----------
    records : list of Record
    runs : dict
        Descriptions of the runs by their hash.
    """

    records: list[Record]
    runs: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, made: Evaluation) -> Results:
        return cls([record for run in made.runs for record in made.records(run)], made.store.runs())

    def summary(self) -> Summary:
        """Figures of every run."""
        return summarise(self.records, self.runs)

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def evaluate(
    task: str, model: Model, methods: str | Method | Sequence[Any], *,
    data: str | PathLike[str] | Sequence[Item] | None = None, prompt: str | None = None,
    out: str | PathLike[str] | None = None, samples: int = 1, limit: int | None = None, unsafe: bool = False,
    fragmentation: bool = False, progress: bool = True, command: str = "", **options: Any,
) -> Results:  # fmt: skip
    """Run a task under several methods.

    Parameters
    ----------
    task : str
        Of `skipkv.eval.TASKS`.
    model : Model
    methods : str, Method, or a sequence of these and of (method, Steering or None)
        Strings as `parse_run` reads them, several with ``;`` between; a budget may be a share of the mean length that
        the full cache gives under the same settings, ``"rkv:budget=20%"``: the full cache then runs first.
    data : path or items, optional
        See `load_items`; the published set by default.
    prompt : str, optional
        Name of one of the task's prompts; its first by default.
    out : path, optional
        Directory of the store, where what was done before is taken from; in memory by default.
    samples : int
        Of every item.
    limit : int, optional
        Only the first items.
    unsafe : bool
        Run programs that the model wrote without a sandbox.
    fragmentation : bool
        Trace every text, and keep in its stats how far eviction has torn it (`summary.fragmentation`).
    progress : bool
        Show a bar on a terminal.
    command : str
        What makes it again; for the store.
    options
        As for `Model.generate`; ``max_new_tokens`` (and ``context``) are the task's unless they are given.

    Returns
    -------
    Results

    Raises
    ------
    ConfigError, CapacityError, CheckpointError, BackendError
        Refused before anything runs, or as for `Model.generate`. Its attribute ``results`` holds what there is.
    OSError
        The store cannot be written.
    KeyboardInterrupt
        Ctrl-C was pressed before all texts had ended; ``results`` as above. The same call goes on.
    """
    return finish(Evaluation(
        task, model, methods, data, prompt=prompt, out=out, samples=samples, limit=limit, unsafe=unsafe,
        fragmentation=fragmentation, progress=progress, command=command, **options,
    ))  # fmt: skip


def finish(made: Evaluation) -> Results:
    """Work to the end; an error has what there is by then as its ``results``."""
    try:
        for _ in made.rows():
            pass
        return Results.of(made)
    except BaseException as error:
        error.results = Results.of(made)
        raise
