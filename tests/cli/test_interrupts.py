"""Ctrl-C at moments drawn at random: what is done comes back, the next call gives the same, and nothing else is said.

SKIPKV_INTERRUPTS: how many moments, over all that is interrupted; 28 by default.
"""

import io
import json
import math
import os
import random
import signal
import sys
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout

import pytest
from generations import PROBLEMS, make, run, same, stream

from skipkv.cli import main
from skipkv.engine import Engine
from skipkv.eval import speed
from skipkv.eval.store import Store
from skipkv.tiny import problems as box

pytestmark = pytest.mark.sanitize

MOMENTS = int(os.environ.get("SKIPKV_INTERRUPTS", 28))
TINY = ["--quiet", "--threads", "1"]


def interrupted(target, seconds):
    """(what its work gives, what it raises) where Ctrl-C comes after so many seconds; None where it came too late."""

    def send():
        sent.append(1)
        os.kill(os.getpid(), signal.SIGINT)

    handler, sent, result, error = signal.getsignal(signal.SIGINT), [], None, None
    timer = threading.Timer(seconds, send)
    try:
        timer.start()
        try:
            result = target.work()
        finally:
            timer.cancel()
            timer.join()
    except KeyboardInterrupt as caught:
        error = caught
    assert signal.getsignal(signal.SIGINT) is handler
    within = error and target.outermost in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return (result, error) if sent and (result is not None or within) else None


def command(*argv):
    """(status, standard output, standard error) of a command."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main([*argv, *TINY])
    return status, out.getvalue(), err.getvalue()


class Generate:
    """The call; every text is whole, or the beginning of one."""

    outermost = "work"  # function that Ctrl-C may come out of

    def __init__(self, model, folder):
        self.model = model
        self.want = self.work()

    def work(self):
        return run(self.model, PROBLEMS[:6], make("rkv"), n=2, rows=3, max_new_tokens=60, temperature=0.8)

    def check(self, outs, error):
        ended = outs if error is None else getattr(error, "outputs", [])  # it may not have begun
        whole = [out for out in ended if out.finish_reason != "interrupted"]
        same(whole, [out for out in self.want if (out.prompt, out.sample) in {(o.prompt, o.sample) for o in whole}])
        assert error or len(outs) == len(self.want)
        for out, want in zip(outs or [], self.want, strict=False):
            assert out.tokens == want.tokens[: len(out.tokens)] and want.text.startswith(out.text)


class Stream(Generate):
    """Half of its time it is suspended."""

    def work(self):
        self.events = []
        for event in stream(self.model, PROBLEMS[:4], make("rkv"), rows=3, max_new_tokens=60):
            self.events.append(event)
            time.sleep(3e-4)
        return [event.generation for event in self.events if event.generation]

    def check(self, outs, error):
        for out in self.want:
            tokens = [event.token for event in self.events if event.prompt == out.prompt and event.token is not None]
            assert tokens == out.tokens[: len(tokens)]
        if outs is not None:
            super().check(sorted(outs, key=lambda out: out.prompt), None)


class Command:
    """A command that prints its results as JSON; `done` are those of them that no time is in."""

    argv, outermost = (), "main"

    def __init__(self, model, folder):
        self.folder = folder
        self.want = self.done(self.work())

    def work(self):
        return command(*self.argv)

    def check(self, result, error):
        assert error is None and result[0] in (0, 130) and "Traceback" not in result[2], (error, result)
        self.compare(result)

    def compare(self, result):
        done = self.done(result) if result[1] else []
        assert done == self.want[: len(done)]


class GenerateCommand(Command):
    argv = ("generate", "tiny", "--json", "--rows", "2", "--max-new-tokens", "60",
            *(part for text in PROBLEMS[:5] for part in ("--prompt", text)))  # fmt: skip

    def done(self, result):
        outs = [json.loads(line) for line in result[1].splitlines()]
        return {out["prompt"]: out["tokens"] for out in outs if out["finish_reason"] != "interrupted"}

    def compare(self, result):
        assert self.done(result).items() <= self.want.items()


class Eval(Command):
    """What is in the store stays; the same command goes on, and ends as if nothing had been."""

    number = 0

    def work(self):
        self.number += 1
        self.store = self.folder / str(self.number)
        return self.go_on()

    def go_on(self):
        return command("eval", "tiny", "--methods", "full;rkv:budget=64,interval=16", "--limit", "4",
                       "--max-new-tokens", "60", "--rows", "3", "--out", str(self.store))  # fmt: skip

    def done(self, result):
        return sorted((r.run, r.item, r.tokens, r.correct) for r in Store(self.store).records())

    def compare(self, result):
        begun = self.store.exists() and any(self.store.iterdir())
        assert all(line in self.want for line in (self.done(result) if begun else ()))
        status, _, err = self.go_on()
        assert (status, err) == (0, "") and self.done(None) == self.want


class Demo(Command):
    def work(self):
        return command("demo", "--problems", "1", "--steps", "2-2", "--budgets", "0.5", "--json",
                       "--out", str(self.folder / "demo.html"))  # fmt: skip

    def done(self, result):
        return [run | {"tokens_per_second": 0} for run in json.loads(result[1])["runs"]]


class Compare(Command):
    """Of the texts that are through, as if there were no more."""

    def __init__(self, model, folder):
        self.file = folder / "texts.jsonl"
        lines = [json.dumps({"prompt": p["prompt"], "output": "Dot = 9.\n\nLeo = 13.\n\n" * 9}) for p in box.draw(4)]
        self.file.write_text("\n".join(lines))
        self.want = [json.loads(self.work(limit)[1]) for limit in (1, 2, 3, 4)]

    def work(self, limit=4):
        return command("compare", "tiny", str(self.file), "--methods", "full;rkv:budget=40,interval=16", "--bootstrap",
                       "50", "--json", "--limit", str(limit))  # fmt: skip

    def done(self, result):
        return self.want[: 1 + self.want.index(json.loads(result[1]))]


class Bench(Command):
    argv = ("bench", "tiny", "--rows", "1,2", "--contexts", "32", "--prefill", "32", "--steps", "2", "--repeats", "1",
            "--method", "rkv:budget=48,interval=16", "--json")  # fmt: skip

    def done(self, result):
        return [(r["kind"], r.get("rows"), r.get("context"), r.get("hash")) for r in json.loads(result[1])["results"]]


@pytest.fixture(scope="module", autouse=True)
def limits(model):
    """Those of the machine are measured once: that takes a bench a second, and eight under sanitizers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "LIMIT_BYTES", 1 << 20)
        found = speed.machine_limits(model)
        patch.setattr(speed, "machine_limits", lambda _: found)
        yield


KINDS = [Generate, Stream, GenerateCommand, Eval, Demo, Compare, Bench]


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_any_moment(kind, model, tmp_path):
    target, rng, left = kind(model, tmp_path), random.Random(kind.__name__), math.ceil(MOMENTS / len(KINDS))
    begin = time.perf_counter()
    target.work()
    took = time.perf_counter() - begin
    free = run(model, PROBLEMS[:2], make("skipkv"))
    while left:
        found = interrupted(target, rng.random() * took)
        if found:
            target.check(*found)
            same(run(model, PROBLEMS[:2], make("skipkv")), free)
            left -= 1


@pytest.mark.parametrize("kind, session, n_done, within_destructor", [
    (Demo, 3, 2, False), (Compare, 5, 1, False), (Compare, 5, 1, True), (Bench, 3, 2, False),
])  # fmt: skip
def test_what_is_done_is_printed(kind, session, n_done, within_destructor, model, tmp_path, monkeypatch):
    """Ctrl-C as the n-th session is made; also where Python drops what it raises."""
    owner, name = (speed, "_Bench") if kind is Bench else (Engine, "_session")
    made, original = [], getattr(owner, name)

    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def make_session(*args, **options):
        made.append(1)
        if len(made) == session:
            signal.raise_signal(signal.SIGINT) if not within_destructor else Dropped()
            for _ in range(1000 * within_destructor):  # until it comes again
                time.sleep(0.01)
        return original(*args, **options)

    target, hook = kind(model, tmp_path), sys.unraisablehook
    monkeypatch.setattr(owner, name, make_session)
    status, out, err = target.work()
    assert status == 130 and err == "" and sys.unraisablehook is hook
    assert target.done((status, out, err)) == target.want[:n_done]
