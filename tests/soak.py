"""Everything that a run does, over and over in one process: does memory stay, and does it still compute the same?

    python -m tests.soak --minutes 20 [--seed S]

Rounds of mixed rows, methods, forks, limits, replays, traces, streams dropped half-way, scores that fail and Ctrl-C at
any moment, on the model in the box. At every tenth token the ledger must be a recount of what the rows hold, and every
tenth round a fixed generation must come out bit for bit as the first time. Resident memory, measured after each round
when nothing of it is left, must be flat over the second half: the medians of its two parts differ by less than 1 %.
What the C library keeps of freed memory is handed back before (malloc_trim): it is the allocator's, and comes and goes.
"""

import argparse
import ctypes
import gc
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

from generations import PROBLEMS, facts, make
from harness import ALL, SHARING, like_skipkv

import skipkv

FLAT = 0.01  # of resident memory
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


def resident():
    """Bytes, when all is freed that nobody holds."""
    gc.collect()
    TRIM(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def check_ledger(work):
    """The bytes in use are the pages of all slots that the open rows hold."""
    session, config, ledger = work.session, work.config, work.session.ledger()
    rows = [*work.active, *([work.template] if work.template else [])]
    pages = sum(
        -(-len(session.positions(row.number, layer, head)) // 64)
        for row in rows for layer in range(config.n_layers) for head in range(config.n_kv_heads)
    )  # fmt: skip
    assert ledger["live_bytes"] == pages * ledger["page_bytes"], (ledger, pages)
    assert ledger["live_bytes"] <= ledger["reserved_bytes"] <= ledger["pool_bytes"], ledger


NEEDS = ("importance", "redundancy", "penalties")


def failing(c):
    if c.positions[-1] > 150:
        raise ZeroDivisionError
    return like_skipkv(c)


class Soak:
    def __init__(self, seed):
        self.random, self.model = random.Random(seed), skipkv.load("tiny", threads=2, progress=False)
        self.steering = skipkv.Steering.load("tiny", alpha=0.75)
        self.counts = dict.fromkeys(("rounds", "texts", "dropped", "interrupted", "failed", "replays", "probes"), 0)
        self.memory = []
        self.first = self.probe()

    def probe(self):
        """What may never change: samples of two prompts under SkipKV with a trace."""
        options = {"n": 2, "temperature": 0.7, "seed": 3, "max_new_tokens": 80, "trace": "scores", "progress": False}
        return [facts(out) for out in self.model.generate(PROBLEMS[:2], make("skipkv"), self.steering, **options)]

    def method(self):
        r, name = self.random, self.random.choice([*ALL, *SHARING, "custom"])
        protect = r.choice(("none", "prompt", "sinks:2"))
        budget = 192 if protect == "prompt" else r.choice((64, 96))
        made = make(name, budget, r.choice((16, 32)), protect=protect)
        return made if r.random() > 0.05 else skipkv.Custom(failing, NEEDS, budget=budget)

    def run(self):
        """One call of the scheduler, ended in one of four ways."""
        r = self.random
        options = {"max_new_tokens": r.randrange(1, 200), "rows": r.randrange(1, 6), "n": r.choice((1, 1, 2, 3)),
                   "trace": r.choice((False, True, "scores")), "cache": r.choice(("bf16", "f32", "q8")),
                   "temperature": r.choice((0, 0.8)), "memory_limit": r.choice((None, None, 1_500_000, 300_000)),
                   "brake": r.choice((0, 3)), "seed": r.randrange(99)}  # fmt: skip
        prompts = r.sample(PROBLEMS, r.randrange(1, 5))
        work = self.model._run(prompts, self.method(), r.choice((None, self.steering)), **options)
        last = r.randrange(300) if r.random() < 0.2 else None
        if r.random() < 0.3:
            signal.setitimer(signal.ITIMER_REAL, r.random() / 2)
        for i, event in enumerate(work.events()):
            if i % 10 == 0:
                check_ledger(work)
            if event.generation:
                self.counts["interrupted" if event.generation.finish_reason == "interrupted" else "texts"] += 1
            if i == last:
                self.counts["dropped"] += 1
                return
        check_ledger(work)
        assert not work.active

    def replay(self):
        r = self.random
        ids = self.model.encode(r.choice(PROBLEMS)) + [r.randrange(200) for _ in range(r.randrange(300))]
        trace = self.model.replay(ids, self.method(), n_prompt=20, trace=r.choice((True, "scores"))).trace
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            trace.save(file.name)
            assert [c.kept.tolist() for c in skipkv.Trace.load(file.name).compactions] == [
                c.kept.tolist() for c in trace.compactions
            ]
        self.counts["replays"] += 1

    def round(self):
        try:
            try:
                self.replay() if self.random.random() < 0.25 else self.run()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (skipkv.CapacityError, ZeroDivisionError):
            self.counts["failed"] += 1
        except KeyboardInterrupt:  # between two events it is the caller's
            self.counts["interrupted"] += 1
        self.counts["rounds"] += 1
        if self.counts["rounds"] % 10 == 0:
            self.counts["probes"] += 1
            assert self.probe() == self.first, "the same generation has come out differently"

    def work(self, seconds):
        """Rounds for so long; the two medians of memory in the second half, in bytes."""
        handler = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        end = time.monotonic() + seconds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while time.monotonic() < end or len(self.memory) < 40:
                self.round()
                self.memory.append(resident())
        signal.signal(signal.SIGALRM, handler)
        half = self.memory[len(self.memory) // 2 :]
        parts = median(half[: len(half) // 2]), median(half[len(half) // 2 :])
        print(f"{self.counts}; resident {parts[0] / 1e6:.1f} and {parts[1] / 1e6:.1f} MB")
        return parts


def soak(minutes, seed):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before, after = Soak(seed).work(60 * minutes)
    assert abs(after - before) < FLAT * before, f"resident memory goes from {before} to {after} bytes"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    soak(**vars(parser.parse_args()))
