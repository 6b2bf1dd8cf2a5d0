"""Ours against transformers on the CPU: one row decoding, eight rows decoding, a prompt, in one interleaved run.

    python tests/bench/compare.py MODEL_DIR [--threads N] [--repeats 15] [--steps 8] [--dtype auto] [--json]

Prints, for each measurement, the median seconds of ours and of transformers in bfloat16 and in float32, the ratio of
ours to the faster of the two (above 1: ours is faster), and our share of this machine's read bandwidth and
multiply-accumulate peak, which are measured in the same run. MODEL_DIR is a directory that both can read.

What makes it fair:

* Ours, transformers in bfloat16 and transformers in float32 each live in a process of their own, with the same number
  of threads, and take turns: a turn is one untimed step, then `--steps` timed ones (one untimed and one timed prompt);
  the order rotates from repeat to repeat. Who is not at work waits on a pipe. In one process that would not do:
  torch's threads spin for some milliseconds after their last loop, on the processors that ours are just using. Between
  two turns there is a pause in which they go to sleep, and the untimed step wakes the next ones up. Their waiting
  policy is left as the environment has it (OMP_WAIT_POLICY); it is printed with the results.
* transformers runs under inference_mode with its sdpa attention and its default cache, a DynamicCache, prefilled once
  (the eight rows are copies of one, as ours are), rows of equal length so that nothing is padded, tokens made
  beforehand; only `model.forward` is timed. Of a prompt it computes the logits of the last position only, as we do.
  Neither side samples. Both caches grow by the same number of tokens during the run.
* Ours runs as `load` loads the model by default (bf16 weights where they are stored so, unless --dtype says otherwise)
  with generate's default cache (bf16).

Speeds mean something on an otherwise idle machine only.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

# (kind, rows, tokens of context or prompt)
MEASUREMENTS = {
    "decode, 1 row, context 128": ("decode", 1, 128),
    "decode, 8 rows, context 1024": ("decode", 8, 1024),
    "prefill of 512": ("prefill", 1, 512),
}
WORKERS = ("ours", "bfloat16", "float32")
PAUSE = 0.05  # far above the milliseconds for which an OpenMP thread spins by default


class Ours:
    def __init__(self, args: argparse.Namespace) -> None:
        import skipkv
        from skipkv.eval import speed as bench
        from skipkv.methods import Full

        self.bench, self.full, self.args = bench, Full(), args
        self.model = skipkv.load(args.model, dtype=args.dtype, threads=args.threads, progress=False)
        self.open: dict[str, Any] = {}

    def about(self) -> dict[str, Any]:
        return {"variant": self.model._core.variant, "dtype": self.model.dtype, "name": self.model.name}

    def limits(self) -> list[float]:
        return list(self.model._core.limits(self.bench.LIMIT_BYTES, self.model.threads))

    def prepare(self, name: str) -> dict[str, float]:
        """Also the bytes and multiply-accumulates that one step, or one prompt, takes."""
        kind, rows, n = MEASUREMENTS[name]
        if kind == "prefill":
            taken = self.bench.prefill(self.model, n, "bf16", 1)
        else:
            taken = self.bench.decode(self.model, rows, n, self.full, "bf16", 1, 1)
            state = self.bench._Bench(self.model, self.full, "bf16", rows, n)
            self.open[name] = state, state.fill(n + (self.args.steps + 1) * self.args.repeats, n)
        return {"bytes": taken["bytes"], "macs": taken["macs"]}

    def turn(self, name: str) -> list[float]:
        kind, _, n = MEASUREMENTS[name]
        if kind == "prefill":
            return [self.bench.prefill(self.model, n, "bf16", 1)["seconds"]]
        state, rows = self.open[name]
        return [state.step(rows) for _ in range(self.args.steps + 1)][1:]


class Transformers:
    def __init__(self, args: argparse.Namespace, dtype: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.transformers, self.args = torch, transformers, args
        key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, attn_implementation="sdpa", **{key: getattr(torch, dtype)}
        ).eval()
        torch.manual_seed(0)
        known = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"  # the latter is its older name
        self.caches: dict[str, Any] = {}

    def about(self) -> dict[str, Any]:
        return {"torch": self.torch.__version__, "transformers": self.transformers.__version__}

    def tokens(self, *shape: int) -> Any:
        return self.torch.randint(0, self.model.config.vocab_size, shape)

    def forward(self, tokens: Any, cache: Any) -> None:
        with self.torch.inference_mode():
            self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{self.cache_name: cache})

    def prepare(self, name: str) -> dict[str, float]:
        kind, rows, n = MEASUREMENTS[name]
        if kind == "decode":
            cache = self.transformers.DynamicCache()
            self.forward(self.tokens(1, n), cache)
            with self.torch.inference_mode():
                cache.batch_repeat_interleave(rows)
            self.caches[name] = cache
        return {}

    def turn(self, name: str) -> list[float]:
        kind, rows, n = MEASUREMENTS[name]
        seconds = []
        for _ in range(2 if kind == "prefill" else self.args.steps + 1):
            cache = self.caches.get(name) or self.transformers.DynamicCache()
            tokens = self.tokens(rows, n if kind == "prefill" else 1)
            begin = time.perf_counter()
            self.forward(tokens, cache)
            seconds.append(time.perf_counter() - begin)
        return seconds[1:]


def work(args: argparse.Namespace) -> None:
    """A worker: one JSON call a line, [method, arguments …], one JSON result a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not get among the answers
    worker: Any = Ours(args) if args.worker == "ours" else Transformers(args, args.worker)
    print(json.dumps(worker.about()), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, method)(*arguments)), file=answers, flush=True)


class Worker:
    def __init__(self, kind: str, args: argparse.Namespace) -> None:
        command = [sys.executable, os.path.abspath(__file__), args.model, "--worker", kind, "--dtype", args.dtype]
        for option in ("threads", "repeats", "steps"):
            command += [f"--{option}", str(getattr(args, option))]
        self.kind = kind
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {self.kind!r} ended with exit status {self.process.wait()}")
        return json.loads(line)

    def __call__(self, *call: str) -> Any:
        time.sleep(PAUSE)
        print(json.dumps(call), file=self.process.stdin, flush=True)
        return self.answer()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    workers: list[Worker] = []
    try:
        workers += [Worker(kind, args) for kind in WORKERS]  # one after the other: loading uses all threads, too
        ours = workers[0]
        limits = ours("limits")
        results = []
        for name in MEASUREMENTS:
            taken = [worker("prepare", name) for worker in workers][0]
            seconds: dict[str, list[float]] = {kind: [] for kind in WORKERS}
            for repeat in range(args.repeats):
                for worker in workers[repeat % 3 :] + workers[: repeat % 3]:
                    seconds[worker.kind] += worker("turn", name)
            medians = {kind: statistics.median(values) for kind, values in seconds.items()}
            quartiles = {kind: statistics.quantiles(values, n=4)[::2] if len(values) > 1 else [values[0]] * 2
                         for kind, values in seconds.items()}  # fmt: skip
            best = min(("bfloat16", "float32"), key=medians.__getitem__)
            results.append({"name": name, "seconds": medians, "quartiles": quartiles, "faster": best,
                            "ratio": medians[best] / medians["ours"], **taken})  # fmt: skip
        again = ours("limits")
        limits = [max(pair) for pair in zip(limits, again, strict=True)]  # a disturbance only makes them smaller
        for result in results:
            result["bandwidth_share"] = result["bytes"] / result["seconds"]["ours"] / limits[0]
            result["peak_share"] = result["macs"] / result["seconds"]["ours"] / limits[1]
        return {**ours.about, **workers[1].about, "threads": args.threads, "repeats": args.repeats,
                "steps": args.steps, "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
                "read_bytes_per_second": limits[0], "macs_per_second": limits[1], "results": results}  # fmt: skip
    finally:
        for worker in workers:
            worker.process.stdin.close()
            worker.process.wait()


def show(found: dict[str, Any]) -> None:
    print(
        f"{found['name']}: ours in {found['dtype']}, {found['variant']}; transformers {found['transformers']}, torch "
        f"{found['torch']}; {found['threads']} threads each, OMP_WAIT_POLICY {found['wait_policy']}; "
        f"medians of {found['repeats']} turns (quartiles)"
    )
    read, macs = found["read_bytes_per_second"], found["macs_per_second"]
    print(f"limits: {read / 1e9:.2f} GB/s read, {2 * macs / 1e9:.1f} Gflop/s")
    for r in found["results"]:
        times = ", ".join(
            f"{kind} {1e3 * r['seconds'][kind]:.2f} ms ({1e3 * low:.2f}–{1e3 * high:.2f})"
            for kind, (low, high) in r["quartiles"].items()
        )
        print(f"{r['name']}: {r['ratio']:.2f} x transformers in {r['faster']}: {times}; ours at "
              f"{100 * r['bandwidth_share']:.0f} % of bandwidth, {100 * r['peak_share']:.0f} % of peak")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint that both sides read")
    parser.add_argument("--threads", type=int, help="of each side; all processors of this process by default")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each side")
    parser.add_argument("--steps", type=int, default=8, help="timed decode steps of a turn")
    parser.add_argument("--dtype", default="auto", help="of our weights: auto, bf16, f32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads is None:
        args.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if min(args.threads, args.repeats, args.steps) < 1:
        parser.error("threads, repeats, steps: allowed: integers from 1")
    if not os.path.isdir(args.model):
        parser.error(f"model is {args.model!r}; allowed: a directory")
    if args.worker:
        work(args)
        return
    found = measure(args)
    print(json.dumps(found)) if args.json else show(found)


if __name__ == "__main__":
    main()
