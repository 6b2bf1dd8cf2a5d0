"""The store: lines whole or not at all, whoever dies; claims; what is no store is refused and left as it is."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from skipkv import CheckpointError, ConfigError
from skipkv.eval import Grade, Record, Store
from skipkv.eval.store import RESULTS

TEXT = "é\ud800\0\n\r\u2028 \\boxed{1}"
GRADE = Grade(True, "1")
RECORD = Record("sums", "a", 0, "full", "f" * 16, [1, 2], [3], TEXT, "stop", {"steered": 1}, 1.5, "s", True, GRADE)
KEPT = "task item sample method prompt_tokens tokens text correct finish_reason stats"


def some(n, text=TEXT):
    return [replace(RECORD, item=f"item {i}", text=f"{text}{i}") for i in range(n)]


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store", create=True)
    made.add_run({"run": RECORD.run, "method": "full"})
    return made


def test_what_is_written_is_read(store):
    records = some(3)
    for record in records:
        store.add(record)
    store.add_grade(records[0].key, "official", Grade(False, "2", "another"))
    store.add_grade(records[1].key, "default", Grade(False, None, "newer"))
    for other in (store, Store(store.path)):
        assert list(other.runs()) == [RECORD.run]
        assert other.records() == [
            records[0], replace(records[1], correct=False, grade=Grade(False, None, "newer")), records[2]
        ]  # fmt: skip
        official = other.records(rule="official")
        assert [(r.correct, r.grade) for r in official] == [(False, Grade(False, "2", "another"))] + [(None, None)] * 2
        assert records[2].key in other and RECORD.key not in other
    for line in (store.path / RESULTS).read_text("ascii").splitlines():
        assert set(KEPT.split()) <= json.loads(line).keys()


def test_a_line_torn_at_any_byte_is_dropped_and_overwritten(store):
    records = some(2, "text")
    for record in records:
        store.add(record)
    raw = (store.path / RESULTS).read_bytes()
    first = raw.index(b"\n") + 1
    for end in range(len(raw)):
        (store.path / RESULTS).write_bytes(raw[:end])
        torn = Store(store.path)
        assert torn.records() == (records[:1] if end >= first else [])
        torn.add(records[1])
        assert Store(store.path).records() == torn.records() == (records if end >= first else records[1:])
        assert (store.path / RESULTS).read_bytes() == (raw if end >= first else raw[first:])


def test_a_line_torn_after_much_is_cut_where_it_begins(store):
    store.add(RECORD)
    whole = (store.path / RESULTS).read_bytes()
    with open(store.path / RESULTS, "ab") as file:
        file.write(b"x" * 300_000)
    store.add(replace(RECORD, item="b"))
    assert (store.path / RESULTS).read_bytes().startswith(whole + b'{"task"') and len(Store(store.path).records()) == 2


def append(path, name, count):
    mine = Store(path, create=True)
    for record in some(count, name * 5000):
        mine.add(replace(record, item=f"{name} {record.item}"))


def test_processes_append_whole_lines(store):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=append, args=(store.path, name, 25)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = Store(store.path).records()
    assert len(found) == 50 and all(set(r.text[:5000]) == {r.item[0]} for r in found)
    store.refresh()
    assert store.records() == found


CLAIM = """import sys, skipkv.eval
store = skipkv.eval.Store(sys.argv[1], create=True)
print(store.claim(("sums", "a", 0, "r")), flush=True)
"""


def other(store, more="input()"):
    """Another process that claims a generation, and then what `more` says."""
    command, pipe = [sys.executable, "-c", CLAIM + more, str(store.path)], subprocess.PIPE
    return subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe)


def test_a_claim_ends_with_its_process(store):
    key = ("sums", "a", 0, "r")
    holder = other(store)
    assert holder.stdout.readline() == "True\n"
    assert not store.claim(key) and not store.is_free(key) and store.is_free(("sums", "a", 1, "r"))
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    assert store.is_free(key) and store.claim(key)
    second = other(store, "sys.exit()")
    assert second.communicate(timeout=30)[0] == "False\n"
    store.close()
    third = other(store, "sys.exit()")
    assert third.communicate(timeout=30)[0] == "True\n"


def test_what_was_made_before_the_claim_is_let_go(store):
    late = Store(store.path)
    store.add(RECORD)
    assert not late.claim(RECORD.key) and RECORD.key in late


@pytest.mark.parametrize("create", [False, True])
def test_what_is_no_store_is_refused_and_left(tmp_path, create):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="expected a directory of results, found a file"):
        Store(file, create)
    with pytest.raises(ConfigError, match=r"expected a directory with results.jsonl.*, found one with 'file'"):
        Store(tmp_path, create)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and file.read_text() == "mine"


def test_what_is_not_there_is_refused_where_it_is_read(tmp_path):
    with pytest.raises(ConfigError, match="found nothing"):
        Store(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="found an empty one"):
        Store(tmp_path / "empty")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("line", ["{}", "[]", "no", '"text"', '{"task": 1}', "[" * 100_000])
def test_a_line_that_is_none_of_a_store_is_named(store, line):
    store.add(RECORD)
    with open(store.path / RESULTS, "a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match="results.jsonl: line 2: expected one of a store"):
        Store(store.path)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_directory_that_may_not_be_written_is_named_and_stays_readable(store, monkeypatch, number):
    store.add(RECORD)

    def refuse(path, flags, *mode, there=os.open):
        if flags & os.O_RDWR:
            raise OSError(number, os.strerror(number))
        return there(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        store.add(replace(RECORD, item="b"))
    assert caught.value.filename == str(store.path / RESULTS)
    assert Store(store.path).records() == [RECORD]
    with pytest.raises(OSError, match=os.strerror(number)):
        Store(store.path, create=True)


def test_a_full_disk_leaves_whole_lines(store):
    store.add(RECORD)
    whole = (store.path / RESULTS).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, hard))  # as on a full disk, part of it goes in
    try:
        with pytest.raises(OSError) as caught:
            store.add(replace(RECORD, item="b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(store.path / RESULTS)
    assert (store.path / RESULTS).read_bytes() == whole
    store.add(replace(RECORD, item="b"))
    assert len(Store(store.path).records()) == 2


def test_in_memory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Store()
    made.add(RECORD)
    made.add_grade(RECORD.key, "official", Grade(False))
    assert made.records() == [RECORD] and not made.claim(RECORD.key) and made.claim((*RECORD.key[:3], "r"))
    assert not os.listdir(tmp_path)
