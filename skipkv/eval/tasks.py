"""The tasks: where their items come from, how they are asked, how long an answer may be, how it is graded.

    hub at a pinned revision ┐
    --data file.jsonl        ┼→ rows → Item; a digest of all problems tells whether they are the published ones
    the box (tiny)           ┘
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from skipkv.checks import integer, many, one_of, path_of, text_of
from skipkv.errors import BackendError, CheckpointError, ConfigError, warn
from skipkv.eval.prompts import CODING, COMPLETION, MATH, Prompt
from skipkv.load.files import show
from skipkv.load.texts import json_lines
from skipkv.tiny.problems import draw

DRAWN, MOST_DRAWN = 100, 100_000  # problems of tiny, unless there are to be more; at most
PROGRAM = "program"  # how what has to run is graded


@dataclass(frozen=True)
class Item:
    """One problem.

    Attributes
    ----------
    id, problem, answer : str
    more : mapping
        The row's other fields.
    """

    id: str
    problem: str
    answer: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One row of `TASKS`.

    Attributes
    ----------
    prompts : mapping
        By name; the first is the default.
    cap : int or None
        New tokens at most; None: twice the longest text of the full cache.
    grading : str
        Kind of `grading.grade`, or `PROGRAM`.
    help : str
    hub : (repository, revision, file), optional
    names : mapping
        What the hub calls an item's id, problem and answer, where that is something else.
    digest : str
        `digest` of the published problems; empty where it is not known.
    context : int or None
        Tokens at most, prompt included.
    needs : tuple of str
        Texts that an item has besides.
    """

    prompts: Mapping[str, Prompt]
    cap: int | None
    grading: str
    help: str
    hub: tuple[str, str, str] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    context: int | None = None
    needs: tuple[str, ...] = ()


TASKS = {
    "gsm8k": Task(
        MATH, 8192, "integer", "grade-school arithmetic, 1319 problems",
        ("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main/test-00000-of-00001.parquet"),
        {"problem": "question"}, "b5107a2ee9aca7016c3179c2354bb2c5f84ad0b4946c25ce2258b14a43179934",
    ),
    "math500": Task(
        MATH, 8192, "math", "competition mathematics, 500 problems; the paper and its code end texts at 8192 new "
        "tokens, the README of that code says 16384",
        ("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "test.jsonl"),
        {"id": "unique_id"}, "458a20f8841d4fc8f11432fe590b493f442b48260aa438d56512cddd98887f23",
    ),
    "aime24": Task(
        MATH, 16384, "integer", "AIME 2024, 30 problems; 16384 tokens at most, prompt included",
        ("HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "data/train-00000-of-00001.parquet"),
        {}, "c9511485b99cd62d5a4b11388019cf2b727d224e6004b4dbafeace4c96ed4108", 16384,
    ),
    "livecodebench": Task(
        CODING, 10000, PROGRAM, "programming contests, release_v1; runs what the model writes, in a sandbox",
        ("livecodebench/code_generation_lite", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505", "test.jsonl"),
        {"id": "question_id", "problem": "question_content"}, needs=("public_test_cases", "private_test_cases"),
    ),
    "humaneval": Task(
        COMPLETION, 8192, PROGRAM, "Python functions, 164 problems; runs what the model writes, in a sandbox",
        ("openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
         "openai_humaneval/test-00000-of-00001.parquet"),
        {"id": "task_id", "problem": "prompt", "answer": "canonical_solution"},
        "2bffccd5458ee7486a43bbd02c9fa731d16911f4c89206ffe296bbeaf98824d6", needs=("entry_point", "test"),
    ),
    "tiny": Task(
        {"plain": Prompt("{problem}")}, None, "boxed", "held-out problems of the model in the box, 100 unless --limit "
        "says more; texts end at twice the longest of the full cache",
    ),
}  # fmt: skip


def find_task(name: str) -> Task:
    return TASKS[one_of("task", name, TASKS, str)]


def digest(items: Iterable[Item]) -> str:
    """SHA-256 over the problems' texts, in order."""
    found = hashlib.sha256()
    for item in items:
        found.update(item.problem.strip().encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def load_items(
    name: str, data: str | PathLike[str] | Sequence[Item] | None = None, limit: int | None = None
) -> tuple[list[Item], str]:
    """The first items of a task, and the digest of all.

    Parameters
    ----------
    name : str
        Of `TASKS`.
    data : path, items or None
        A file of JSON lines, ``{"id", "problem", "answer", …}`` or as the hub has them; None: the hub (cached there
        where it was fetched before), or the box.
    limit : int, optional
        How many; all by default, of ``tiny`` `DRAWN`.

    Raises
    ------
    ConfigError, CheckpointError
        A line lacks a field or has another's id; the hub cannot be reached.
    """
    task = find_task(name)
    if data is None and task.hub is None:
        limit = DRAWN if limit is None else integer("limit", limit, 1, MOST_DRAWN)
        problems = enumerate(draw(max(DRAWN, limit)))
        items = [Item(f"held-out/{i}", p["prompt"], p["answer"]) for i, p in problems]
        return items[:limit], digest(items[:DRAWN])
    if data is not None and not isinstance(data, (str, PathLike)):
        items = many(data)
        if not items or not all(isinstance(item, Item) for item in items):
            raise ConfigError("data holds no items; allowed: a file, or at least one Item")
        for item in items:
            for key in ("id", "problem", "answer"):
                text_of(f"{key} of an item", getattr(item, key))
        return items[:limit], digest(items)
    path = _fetch(name, *task.hub) if data is None else path_of("data", data).expanduser()
    items, seen = [], set()
    for number, row in _rows(path):
        items.append(_item(f"{path}: line {number}", f"{name}/{number - 1}", row, task))
        if items[-1].id in seen:
            raise ConfigError(f"{path}: line {number}: id: {show(items[-1].id)} stands on a line before")
        seen.add(items[-1].id)
    if not items:
        raise ConfigError(f"{path}: expected at least one item, found none")
    found = digest(items)
    if task.digest and found != task.digest:
        warn(f"{path}: expected the {name} problems with SHA-256 {task.digest[:16]}…, found {found[:16]}…")
    return items[:limit], found


def _rows(path: Path) -> Iterable[tuple[int, Any]]:
    if path.suffix != ".parquet":
        return json_lines(str(path))
    try:
        import datasets
    except ImportError:
        raise BackendError(f"{path}: reading it takes the package datasets: pip install 'skipkv[eval]'") from None
    return enumerate(datasets.Dataset.from_parquet(str(path)), 1)


def _item(where: str, number: str, row: Any, task: Task) -> Item:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected a JSON object")
    values, used = {}, set()
    for name in ("id", "problem", "answer"):
        key = name if name in row else task.names.get(name, name)
        default = number if name == "id" else "" if task.grading == PROGRAM and name == "answer" else None
        value = row.get(key, default)
        value = str(value) if type(value) is int else value
        if not isinstance(value, str) or not (value or default == ""):
            raise ConfigError(f"{where}: {name}: expected a text, found {show(value) if key in row else 'nothing'}")
        values[name] = value
        used.add(key)
    if task.grading == "integer":  # gsm8k's answers end with it, with separators; AIME's may begin with zeros
        text = values["answer"].rpartition("####")[2].strip().replace(",", "")
        try:
            values["answer"] = str(int(text))
        except ValueError:
            raise ConfigError(f"{where}: answer: expected an integer, found {show(values['answer'])}") from None
    for key in task.needs:
        if not isinstance(row.get(key), str):
            raise ConfigError(f"{where}: {key}: expected a text, found {show(row[key]) if key in row else 'nothing'}")
    return Item(**values, more={key: value for key, value in row.items() if key not in used})


def _fetch(name: str, repository: str, revision: str, file: str) -> Path:
    import huggingface_hub  # slow to import, and only needed here

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except Exception as error:  # of many unrelated types: HTTP, network, validation, cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"{repository} ({file} at {revision[:12]})"
        expected = f"expected {where} on the Hugging Face hub, or data in a file"
        raise CheckpointError(f"{name}: {expected}: {reason}") from error
