"""Grades of texts: on the spot, of programs once a run's texts are there, and again without generating.

What was cut off is wrong, whatever stands in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from skipkv.errors import ConfigError
from skipkv.eval import grading, programs
from skipkv.eval.records import Grade, Record
from skipkv.eval.sandbox import Sandbox
from skipkv.eval.store import Store
from skipkv.eval.tasks import PROGRAM, Item, find_task, load_items

CUT = "cut off"


def mark(kind: str, item: Item, record: Record, rule: str = "default") -> Grade | None:
    """A text's grade; None of a program, which has to run."""
    if record.truncated:
        return Grade(False, None, CUT)
    return None if kind == PROGRAM else grading.grade(kind, record.text, item.answer, rule)


def mark_all(
    kind: str, items: Mapping[str, Item], records: Iterable[Record], rule: str, sandbox: Sandbox | None, progress: bool
) -> Iterator[tuple[Record, Grade]]:
    """Every text with its grade, as these come; the sandbox is for programs."""
    left = []
    for record in records:
        grade = mark(kind, items[record.item], record, rule)
        if grade:
            yield record, grade
        else:
            left.append(record)
    if left:
        texts = [(items[record.item], record.text) for record in left]
        for place, grade in programs.grade_all(texts, sandbox, progress):
            yield left[place], replace(grade, unsafe=sandbox.unsafe)


def regrade(
    store: Store, rule: str = "default", data: str | None = None, unsafe: bool = False, progress: bool = True
) -> int:
    """Grade all texts of a store again; how many grades are others than before.

    Parameters
    ----------
    store : Store
    rule : "default" or "official"
        Grades of each rule stand beside those of the other.
    data : path, optional
        The items; by default from where each run had them.
    unsafe, progress
        As for `evaluate`.

    Raises
    ------
    ConfigError
        An item is not among those that the task loads.
    """
    changed = 0
    runs: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for line in store.runs().values():
        runs.setdefault((line["task"], data or line["source"]), []).append(line)
    for (name, source), lines in runs.items():
        task = find_task(name)
        records = [record for line in lines for record in store.records(line["run"], rule)]
        items = {item.id: item for item in load_items(name, source, max(line["items"]["n"] for line in lines))[0]}
        for record in records:
            if record.item not in items:
                raise ConfigError(f"{store.path}: item {record.item!r:.80}: expected one of {source or name}")
        sandbox = Sandbox(unsafe) if task.grading == PROGRAM else None
        for record, grade in mark_all(task.grading, items, records, rule, sandbox, progress):
            if grade != record.grade:
                store.add_grade(record.key, rule, grade)
                changed += 1
    return changed
