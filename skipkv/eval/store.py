"""A store of generations: a directory of append-only JSON lines that several processes share and a kill does not hurt.

    DIR/runs.jsonl      run → all that its texts depend on
    DIR/results.jsonl   one line a generation: `Record`
    DIR/grades.jsonl    one line a later grade of one; the newest of a rule counts
    DIR/claims          empty: a generation is claimed by a lock on one byte of it

A line is one write under a lock of its file, and what a killed process left of one is cut off before the next. Locks
are the kernel's and end with the process: whatever a killed one had claimed is free again. Not for Windows.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

from skipkv.checks import flag, path_of
from skipkv.errors import CheckpointError, ConfigError
from skipkv.eval.records import Grade, Record
from skipkv.load.files import is_int, open_file, reading, show

RUNS, RESULTS, GRADES, CLAIMS = "runs.jsonl", "results.jsonl", "grades.jsonl", "claims"
CHUNK = 1 << 16
Key = tuple[str, str, int, str]  # task, item, sample, run
MOST = 1 << 53  # of a number: float64 and JSON hold all up to here


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -MOST <= value <= MOST  # NaN compares false


def _count(value: Any) -> bool:
    return is_int(value) and 0 <= value <= MOST


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_count, value))


def _bool(value: Any) -> bool:
    return isinstance(value, bool)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _stats(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_or_none(_number), value.values()))


# What the lines of a store hold, where something is read of it.
ITEMS = {"n": _count, "samples": _count}
RUN = {"run": _text, "task": _text, "method": _text, "steering": _or_none(_text), "share": _or_none(_number),
       "checkpoint": _text, "command": _text}  # fmt: skip
RECORD = {"task": _text, "item": _text, "sample": _count, "method": _text, "run": _text, "prompt_tokens": _ids,
          "tokens": _ids, "text": _text, "finish_reason": _text, "stats": _stats, "seconds": _number, "segment": _text,
          "correct": _or_none(_bool)}  # fmt: skip
GRADE = {"correct": _bool, "found": _or_none(_text), "note": _text, "unsafe": _bool}


def _check(line: Any, kinds: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """The line if it is an object whose values are of these kinds; ValueError."""
    if not isinstance(line, dict):
        raise ValueError(f"found {show(line)}")
    for name, fits in kinds.items():
        if name in line and not fits(line[name]):
            raise ValueError(f"{name} is {show(line[name])}")
    return line


class Store:
    """Generations with their grades; reading follows what other processes write (`refresh`).

    Parameters
    ----------
    directory : path, optional
        None: in memory.
    create : bool
        Make it where it is not there.

    Raises
    ------
    ConfigError
        It is no store and, with ``create``, not an empty directory either.
    CheckpointError
        A line of it is not what stands in a store.
    OSError
        It cannot be made or written; nothing of what stands in it is lost.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, create: bool = False) -> None:
        self.path = None if directory is None else path_of("directory", directory)
        flag("create", create)
        self._read: dict[str, tuple[int, int]] = {}  # of each file: bytes and lines
        self._runs: dict[str, dict[str, Any]] = {}
        self._records: dict[Key, Record] = {}
        self._grades: dict[tuple[Key, str], Grade] = {}
        self._claims: int | None = None
        if self.path is not None:
            self._open(create)
            self.refresh()

    def _open(self, create: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: expected a directory of results, found a file")
        if create:
            self.path.mkdir(parents=True, exist_ok=True)
        there = set(os.listdir(self.path)) if self.path.is_dir() else set()
        if not there & {RUNS, RESULTS} and (there or not create):
            found = f"one with {show(min(there))}" if there else "an empty one" if self.path.is_dir() else "nothing"
            more = " or an empty directory" if create else ""
            raise ConfigError(f"{self.path}: expected a directory with {RESULTS}{more}, found {found}")
        if create:
            for name in (RUNS, RESULTS):
                with self._locked(name):
                    pass

    # -- reading

    def refresh(self) -> None:
        """Read what has been written since."""
        for name, take in ((RUNS, self._take_run), (RESULTS, self._take_record), (GRADES, self._take_grade)):
            self._follow(name, take)

    def _follow(self, name: str, take: Callable[[dict[str, Any]], None]) -> None:
        if self.path is None or not (self.path / name).exists():
            return
        begin, number = self._read.get(name, (0, 0))
        with open_file(self.path / name) as file, reading(self.path / name):
            file.seek(begin)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        for line in whole.split(b"\n")[:-1]:
            number += 1
            try:
                take(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise CheckpointError(f"{self.path / name}: line {number}: expected one of a store: {error}") from None
        self._read[name] = begin + len(whole), number

    def _take_run(self, line: dict[str, Any]) -> None:
        _check(_check(line, RUN).get("items", {}), ITEMS)
        self._runs[line["run"]] = line  # the newest: more items may have been asked for since

    def _take_record(self, line: dict[str, Any]) -> None:
        grade = _check(line, RECORD)["grade"]
        record = Record(**line | {"grade": Grade(**_check(grade, GRADE)) if grade else None})
        self._records.setdefault(record.key, record)

    def _take_grade(self, line: dict[str, Any]) -> None:
        _check(line, RECORD | {"rule": _text})
        key = line["task"], line["item"], line["sample"], line["run"]
        self._grades[key, line["rule"]] = Grade(**_check(line["grade"], GRADE))

    def runs(self) -> dict[str, dict[str, Any]]:
        """Descriptions of the runs by their hash, in the order in which they began."""
        return dict(self._runs)

    def records(self, run: str | None = None, rule: str = "default") -> list[Record]:
        """Generations (of one run) with their grades by one rule, in the order in which they ended."""
        found = []
        for key, record in self._records.items():
            if run in (None, record.run):
                grade = self._grades.get((key, rule)) or (record.grade if rule == "default" else None)
                found.append(replace(record, grade=grade, correct=grade and grade.correct))
        return found

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    # -- writing

    def add_run(self, line: dict[str, Any]) -> None:
        self._append(RUNS, line)
        self._take_run(line)

    def add(self, record: Record) -> None:
        """Write a generation, and let go of its claim."""
        self._append(RESULTS, record.as_dict())
        self._records.setdefault(record.key, record)
        self.release(record.key)

    def add_grade(self, key: Key, rule: str, grade: Grade) -> None:
        task, item, sample, run = key
        line = {"task": task, "item": item, "sample": sample, "run": run, "rule": rule, "grade": asdict(grade)}
        self._append(GRADES, line)
        self._take_grade(line)

    @contextmanager
    def _locked(self, name: str) -> Any:
        """A descriptor at whose end the next line begins."""
        try:
            file = os.open(self.path / name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = at = os.fstat(file).st_size
                while at and (part := os.pread(file, min(CHUNK, at), at - min(CHUNK, at))):
                    end = part.rfind(b"\n") + 1
                    at -= len(part) - end
                    if end:
                        break
                if at < size:
                    os.ftruncate(file, at)
                yield file
            finally:
                os.close(file)  # and the lock with it
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / name)) from None

    def _append(self, name: str, value: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps(value).encode() + b"\n"  # ASCII: whatever stands in a text, lone surrogates too
        with self._locked(name) as file:
            size = os.fstat(file).st_size
            try:
                if os.write(file, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, size)
                raise

    # -- claims

    def claim(self, key: Key) -> bool:
        """Whether the generation is this process's to make: nobody has it, and it is not there."""
        if self.path is None or key in self._records:
            return key not in self._records
        if self._claims is None:  # one descriptor: to close any other of the file would give up all locks
            self._claims = os.open(self.path / CLAIMS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(key))
        except (BlockingIOError, PermissionError):
            return False
        self._follow(RESULTS, self._take_record)  # it may have been written before the claim
        if key in self._records:
            self.release(key)
            return False
        return True

    def is_free(self, key: Key) -> bool:
        """Whether `claim` would give it."""
        free = self.claim(key)
        if free:
            self.release(key)
        return free

    def release(self, key: Key) -> None:
        if self._claims is not None:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, _place(key))

    def close(self) -> None:
        """Give up all claims."""
        if self._claims is not None:
            os.close(self._claims)
            self._claims = None


def _place(key: Key) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "big") >> 2
