"""Evaluations that are killed, and two that share a store: nothing is lost or made twice, the table is the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skipkv.eval import Store, evaluate
from skipkv.eval.store import RESULTS

METHODS = "full:tau=0.8;rkv:budget=64,interval=16;random:budget=50%,interval=16"
SETTINGS = {"limit": 12, "samples": 2, "temperature": 0.7, "rows": 4, "max_new_tokens": 60, "seed": 5,
            "padding": "reserve"}  # fmt: skip
TEXTS = 3 * 12 * 2


def command(store, **changes):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | changes).items()]
    return [sys.executable, "-m", "skipkv", "eval", "tiny", "--methods", METHODS, "--out", str(store), "--quiet",
            "--threads", "1", *options]  # fmt: skip


def start(store, **changes):
    return subprocess.Popen(command(store, **changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def lines(store):
    """Whole lines of the results, as they stand."""
    path = Path(store) / RESULTS
    raw = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]


def facts(records):
    """What does not depend on the machine or on who made it."""
    timings = ("seconds", "pool_bytes", "pool_peak_bytes")
    kept = []
    for r in records:
        line = r.as_dict()
        line["stats"] = {name: value for name, value in line["stats"].items() if name not in timings}
        kept.append({name: value for name, value in line.items() if name not in ("seconds", "segment")})
    return sorted(kept, key=lambda line: (line["run"], line["item"], line["sample"]))


def untimed(results):
    return [row | {"tokens_per_second": 0, "command": ""} for row in results.summary().as_dict()]


def fork(model, store, texts):
    """A process that evaluates, without the second that Python takes to begin. With so many texts in the store it waits
    for its end: however late the kill comes, it comes at work."""
    child = os.fork()
    if not child:
        add, left = Store.add, iter(range(texts))

        def add_some(self, record):
            if next(left, None) is None:
                signal.pause()
            add(self, record)

        Store.add = add_some
        try:
            evaluate("tiny", model, METHODS, out=store, progress=False, **SETTINGS)
        finally:
            os._exit(0)
    return child


@pytest.fixture(scope="module")
def undisturbed(model):
    return evaluate("tiny", model, METHODS, progress=False, **SETTINGS)


def test_killed_twenty_times_it_ends_like_one_that_was_not(tmp_path, model, undisturbed):
    rng, store, before, kills = random.Random(3), tmp_path / "store", [], 0
    while kills < 20:
        workers = [fork(model, store, TEXTS // 21) for _ in range(2 if kills == 7 else 1)]
        begun = time.monotonic()
        while len(lines(store)) == len(before) and time.monotonic() - begun < 20:  # until it has begun to write
            time.sleep(0.002)
        time.sleep(rng.random() * 0.01)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
        kills += len(workers)
        after = lines(store)
        assert after[: len(before)] == before  # nothing that was there is lost or changed
        before = after
    assert kills <= 21 and len(before) < TEXTS  # the last kill hit it at work
    results = evaluate("tiny", model, METHODS, out=store, progress=False, **SETTINGS)
    made = lines(store)
    assert len({(line["item"], line["sample"], line["run"]) for line in made}) == len(made) == TEXTS
    assert facts(results.records) == facts(undisturbed.records) and untimed(results) == untimed(undisturbed)


def test_two_share_the_work(tmp_path, undisturbed):
    workers = [start(tmp_path / "store") for _ in range(2)]
    out = [finish(worker) for worker in workers]
    made = lines(tmp_path / "store")
    assert len(made) == TEXTS and facts(Store(tmp_path / "store").records()) == facts(undisturbed.records)
    assert all("rkv:budget=64,interval=16" in text for text in out)


def test_ctrl_c_keeps_what_ended_and_says_how_to_go_on(tmp_path, undisturbed):
    store = tmp_path / "store"
    process = start(store)
    while len(lines(store)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    n = len(lines(store))
    assert process.returncode == 130 and f"skipkv: {n} texts are in {store}; the same command goes on" in err
    assert 3 <= n < TEXTS and "Traceback" not in err
    finish(start(store))
    assert facts(Store(store).records()) == facts(undisturbed.records)
