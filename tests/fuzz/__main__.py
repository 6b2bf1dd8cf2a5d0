"""Fuzzing at length, in processes that may crash.

    python -m tests.fuzz --inputs 1000000 --seed 1 [--target config] [--jobs 2] [--out DIR]

Every input follows from seed, target and number. What fails is kept in DIR as TARGET-HASH, and belongs into the corpus
once it is mended.
"""

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

WALL = 60  # seconds after which an input hangs: a process that sleeps computes nothing


def work(target, seed, first, step, last, state, out):
    """Runs every step-th input; state: [number, when it began, unexpected exceptions, kB at most]."""
    from fuzz import targets

    state, known = np.memmap(state, np.int64, "r+"), set()
    targets.seeds_of(target)
    for number in range(first, last, step):
        state[:2] = number, time.time()
        raw = targets.made(target, seed, number)
        error = targets.attempt(target, raw)
        state[3] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if error is not None:
            state[2] += 1
            keep(out, target, raw)
            lines = traceback.format_exception(error)
            where = type(error), *[line for line in lines if line.startswith("  File")][-1:]
            if where not in known:
                known.add(where)
                print(f"{target} {number}: {''.join(lines[-4:])}", file=sys.stderr, flush=True)


def keep(out, target, raw):
    (out / f"{target}-{hashlib.sha256(raw).hexdigest()[:12]}").write_bytes(raw)


class Worker:
    """A process that runs its part of a target's inputs, and is started again behind what ended it."""

    def __init__(self, args, target, first, last):
        self.args, self.target, self.last = args, target, last
        self.file = Path(tempfile.mkstemp(prefix="skipkv-fuzz-")[1])
        self.file.write_bytes(bytes(32))
        self.state = np.memmap(self.file, np.int64, "r+")
        self.crashes = self.hangs = 0
        self.start(first)

    def start(self, first):
        self.state[:2] = first - self.args.jobs, time.time()
        words = self.target, self.args.seed, first, self.args.jobs, self.last, self.file, self.args.out
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--work"]
        self.process = subprocess.Popen([*command, *map(str, words)], env=os.environ | {"RUST_BACKTRACE": "0"})

    def look(self):
        """Whether it still has something to do."""
        status, late = self.process.poll(), time.time() - self.state[1] > WALL
        if status is None and not late:
            return True
        if status is None:
            self.process.kill()
            self.process.wait()
        number = int(self.state[0])
        if status != 0:
            self.hangs, self.crashes = self.hangs + late, self.crashes + (not late)
            what = "hangs" if late else f"ends its process with status {status}"
            print(f"{self.target} {number}: {what}", file=sys.stderr, flush=True)
            from fuzz import targets

            keep(self.args.out, self.target, targets.made(self.target, self.args.seed, number))
            if number + self.args.jobs < self.last:
                self.start(number + self.args.jobs)
                return True
        self.file.unlink()
        return False


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "skipkv-fuzz", metavar="DIR")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    from fuzz.targets import TARGETS

    total, most = np.zeros(4, np.int64), 0
    for name in [args.target] if args.target else TARGETS:
        n = args.inputs if args.target else round(args.inputs * TARGETS[name].share / 100)
        begun, workers = time.time(), [Worker(args, name, i, n) for i in range(args.jobs)]
        left = workers
        while left := [worker for worker in left if worker.look()]:
            time.sleep(0.2)
        found = np.array([n, *np.sum([(w.crashes, w.hangs, w.state[2]) for w in workers], axis=0)])
        peak = max(int(w.state[3]) for w in workers) // 1000
        total, most = total + found, max(most, peak)
        print(f"{name:10} {line(found, peak)}, {time.time() - begun:.0f} s", flush=True)
    print(f"{'all':10} {line(total, most)}")
    return int(total[1:].any())


def line(found, peak):
    inputs, crashes, hangs, others = found
    return f"{inputs} inputs, {crashes} crashes, {hangs} hangs, {others} unexpected exceptions, peak RSS {peak} MB"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        target, *counts, state, out = sys.argv[2:]
        work(target, *map(int, counts), state, Path(out))
    else:
        sys.exit(main())
