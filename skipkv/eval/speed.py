"""The engine against its machine: read bandwidth and multiply-accumulate peak; prefill and decode as shares of them.

Every figure is a median over repeats within one run; compare ratios of one run, not runs with each other.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from skipkv import _skipkv, devices
from skipkv.checks import no_bar
from skipkv.engine import FORWARD_TOKENS, count_threads
from skipkv.errors import ConfigError
from skipkv.eval.table import Table
from skipkv.load.config import ModelConfig
from skipkv.methods import Full, Method
from skipkv.model import Model

SHAPES = {
    "qwen2.5-0.5b": ModelConfig(
        "qwen2", n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64, hidden=896, ffn=4864, vocab=151936, context=32768,
        norm_eps=1e-6, tied=True, qkv_bias=True, rope_theta=1e6,
    ),
    "r1-distill-qwen-1.5b": ModelConfig(
        "qwen2", n_layers=28, n_heads=12, n_kv_heads=2, head_dim=128, hidden=1536, ffn=8960, vocab=151936,
        context=131072, norm_eps=1e-6, tied=False, qkv_bias=True, rope_theta=1e4,
    ),
    "smollm2-135m": ModelConfig(
        "llama", n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, hidden=576, ffn=1536, vocab=49152, context=8192,
        norm_eps=1e-5, tied=True, rope_theta=1e5,
    ),
}  # fmt: skip
LIMIT_BYTES = 512 << 20  # far above any last-level cache


def random_model(
    shape: str, dtype: str = "bf16", threads: int | None = None, seed: int = 0, device: str = "cpu"
) -> Model:
    """A model of a known shape with random weights and no tokenizer.

    Parameters
    ----------
    shape : str
        A name of `SHAPES`.
    dtype : "bf16", "f32" or "q8"
    threads, seed : int
    device : str
        As of `skipkv.load`.
    """
    if shape not in SHAPES:
        raise ConfigError(f"shape is {shape!r}; allowed: {', '.join(SHAPES)}")
    config = SHAPES[shape]
    count = count_threads(threads)
    core = _skipkv.Model(config.as_dict(), dtype, *devices.find(device))
    rng = np.random.default_rng(seed)
    for name, size, is_matrix in _skipkv.tensors(config.as_dict()):
        if is_matrix:
            values = rng.standard_normal(size, np.float32)
            values *= 1 / np.sqrt(size[1])
        else:
            values = np.ones(size, np.float32) if name.endswith("norm.weight") else np.zeros(size, np.float32)
        core.bind(name, "f32", size, values.reshape(-1).view(np.uint8), count)
    return Model(core, config, None, f"random {shape}", {}, count)


def linear_weights(config: ModelConfig, head: bool = True) -> int:
    """Weights that every token is multiplied with."""
    return sum(
        int(np.prod(size))
        for name, size, is_matrix in _skipkv.tensors(config.as_dict() | {"tied": False})
        if is_matrix and name != "model.embed_tokens.weight" and (head or name != "lm_head.weight")
    )


class _Bench:
    def __init__(self, model: Model, method: Method, cache: str, rows: int, context: int) -> None:
        config = model.config
        self.model, self.vocab = model, config.vocab
        self.session = _skipkv.Session(
            model._core, rows=rows, tokens=max(FORWARD_TOKENS, rows), cache=cache, threads=model.threads,
            method=method.as_dict((config.n_layers, config.n_kv_heads)), vocabulary=None,
        )  # fmt: skip
        self.rng = np.random.default_rng(1)
        self.logits = np.empty((rows, self.vocab), np.float32)
        self.context, self.n_rows = context, rows

    def tokens(self, n: int) -> np.ndarray:
        return self.rng.integers(0, self.vocab, n).astype(np.int32)

    def fill(self, capacity: int, n_prompt: int) -> list[int]:
        """Rows that hold `context` tokens: one is fed, the others are copies."""
        row = self.session.open(capacity, n_prompt=n_prompt)
        first = 0
        while first < self.context:
            n = self.session.chunk(row, min(FORWARD_TOKENS, self.context - first))
            self.session.forward(np.array([[row, n]], np.int32), self.tokens(n))
            first += n
        return [row] + [self.session.fork(row, capacity, i) for i in range(1, self.n_rows)]

    def step(self, rows: list[int], last: bool = False) -> float:
        """Seconds of a greedy step; of the last one the logits are wanted, too."""
        spans, tokens = np.array([(row, 1) for row in rows], np.int32), self.tokens(len(rows))
        best = None if last else np.empty(len(rows), np.int32)
        begin = time.perf_counter()
        self.session.forward(spans, tokens, self.logits[: len(rows)], best=best)
        return time.perf_counter() - begin


def prefill(model: Model, n: int, cache: str, repeats: int) -> dict[str, Any]:
    """Seconds to feed a prompt of n tokens, and the multiply-accumulates it takes."""
    bench = _Bench(model, Full(), cache, 1, n)
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        row = bench.session.open(n)
        begin = time.perf_counter()
        for first in range(0, n, FORWARD_TOKENS):
            part = bench.tokens(min(FORWARD_TOKENS, n - first))
            bench.session.forward(np.array([[row, len(part)]], np.int32), part, bench.logits)
        seconds.append(time.perf_counter() - begin)
        bench.session.close(row)
    c = model.config
    attention = 2 * c.n_layers * c.n_heads * c.head_dim * n * (n + 1) // 2
    macs = n * linear_weights(c, head=False) + c.vocab * c.hidden + attention
    return {"kind": "prefill", "tokens": n, "seconds": statistics.median(seconds[1:]), "macs": macs,
            "bytes": model._core.n_bytes}  # fmt: skip


def decode(
    model: Model, rows: int, context: int, method: Method, cache: str, steps: int, repeats: int
) -> dict[str, Any]:
    """Seconds of one step of `rows` rows with `context` tokens behind them."""
    extra = steps * repeats + 1
    bench = _Bench(model, method, cache, rows, context)
    open_rows = bench.fill(context + extra, min(context, 1 if method.compacts else context))
    bench.step(open_rows)
    before = bench.session.ledger()["evict_seconds"]
    times = [bench.step(open_rows, last=i == extra - 2) for i in range(extra - 1)]
    c, ledger = model.config, bench.session.ledger()
    slots = bench.session.state(open_rows[0])["slots"] / (c.n_layers * c.n_kv_heads)
    weight = {"bf16": 2, "f32": 4, "q8": 34 / 32}[model.dtype]  # bytes; q8: a scale for 32 weights, or for a head's
    number = {"bf16": 2, "f32": 4, "q8": 1 + 4 / c.head_dim}[cache]
    held = 2 * c.n_layers * c.n_kv_heads * c.head_dim * slots  # numbers of one row's keys and values
    read = int(linear_weights(c) * weight + rows * held * number)
    macs = rows * (linear_weights(c) + 2 * c.n_layers * c.n_heads * c.head_dim * slots)
    return {
        "kind": "decode", "rows": rows, "context": context, "method": str(method), "tokens": rows,
        "seconds": statistics.median(times), "macs": macs, "bytes": read, "peak_bytes": ledger["peak_bytes"],
        "evict_share": (ledger["evict_seconds"] - before) / sum(times),
        "hash": hashlib.sha256(bench.logits.tobytes()).hexdigest()[:16],
    }  # fmt: skip


def compaction(model: Model, method: Method, cache: str, repeats: int) -> dict[str, Any]:
    """Seconds of one compaction of one row, all layers, from budget + interval slots."""
    budget, interval = int(np.max(method.budget)), method.interval
    bench = _Bench(model, method, cache, 1, budget)
    seconds, pairs, slots = [], 0, 0
    row = bench.session.open(budget + interval * (repeats + 3), n_prompt=1)
    while len(seconds) < repeats + 1:
        n = bench.session.chunk(row, min(FORWARD_TOKENS, budget + interval))
        before, counted = bench.session.ledger()["evict_seconds"], bench.session.state(row)
        bench.session.forward(np.array([[row, n]], np.int32), bench.tokens(n))
        after = bench.session.state(row)
        if after["compactions"] > counted["compactions"] and counted["compactions"]:  # from a full interval on
            seconds.append(bench.session.ledger()["evict_seconds"] - before)
            pairs, slots = after["pairs"] - counted["pairs"], budget + interval
    heads = model.config.n_layers * model.config.n_kv_heads
    return {"kind": "compaction", "method": str(method), "slots": slots, "seconds": statistics.median(seconds),
            "pairs_share": pairs / (heads * slots * slots)}  # fmt: skip


def measure(
    model: Model, method: Method, *, cache: str, rows: Sequence[int], contexts: Sequence[int], prefill_tokens: int,
    steps: int, repeats: int, limits: tuple[float, float], progress: bool = True,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Prefill, then decoding at every context and number of rows, then a compaction if the method has any.

    Parameters
    ----------
    model : Model
    method : Method
    cache, rows, contexts, prefill_tokens, steps, repeats
        As on the command line.
    limits : (float, float)
        Of the machine, just measured: bytes read and multiply-accumulates a second.
    progress : bool

    Yields
    ------
    dict
        What was measured, and the limits that it is held against.
    """
    jobs: list[Callable[[], dict[str, Any]]] = [lambda: prefill(model, prefill_tokens, cache, repeats)]
    jobs += [lambda r=r, n=n: decode(model, r, n, method, cache, steps, repeats) for n in contexts for r in rows]
    if method.compacts:
        jobs.append(lambda: compaction(model, method, cache, repeats))
    for job in tqdm(jobs, unit="measurement", leave=False, disable=no_bar(progress), file=sys.stderr):
        before, result = limits, job()
        # Memory that is shared with others changes its speed: a job is held against the better of what was there
        # before it and after it.
        limits = machine_limits(model)
        read, macs = map(max, zip(before, limits, strict=True))
        yield result | {"read_bytes_per_second": read, "macs_per_second": macs}


def machine_limits(model: Model) -> tuple[float, float]:
    """Bytes that this machine reads, and multiply-accumulates that it does, in a second."""
    return model._core.limits(LIMIT_BYTES, model.threads)


COLUMNS = {"measurement": 38, "ms": 8, "tokens/s": 8, "GB/s": 6, "read %": 6, "Gflop/s": 7, "peak %": 6,
           "cache MB": 8, "evict %": 7, "logits": 16}  # fmt: skip


def table(results: Iterable[dict[str, Any]] = ()) -> Table:
    """A row a measurement: its time, and what it reads and computes as shares of what the machine does at most.

    evict %: share of the time that went into compactions; logits: hash of the last step's.
    """
    align = "<" + ">" * (len(COLUMNS) - 1)
    return Table(list(COLUMNS), [cells(r) for r in results], list(COLUMNS.values()), align)


def cells(r: dict[str, Any]) -> tuple[str, ...]:
    """One row of `table`."""
    ms = f"{1e3 * r['seconds']:.2f}"
    if r["kind"] == "compaction":
        what = f"compaction, {r['slots']} slots, {100 * r['pairs_share']:.1f} % of pairs"
        return (what, ms, *[""] * (len(COLUMNS) - 2))
    decoding = r["kind"] == "decode"
    read, macs = r["bytes"] / r["seconds"], r["macs"] / r["seconds"]
    return (
        f"decode, {r['rows']} rows, context {r['context']}" if decoding else f"prefill of {r['tokens']}",
        ms, f"{r['tokens'] / r['seconds']:.1f}",
        f"{read / 1e9:.2f}", f"{100 * read / r['read_bytes_per_second']:.0f}",
        f"{2 * macs / 1e9:.1f}", f"{100 * macs / r['macs_per_second']:.0f}",
        f"{r['peak_bytes'] / 1e6:.1f}" if decoding else "", f"{100 * r['evict_share']:.2f}" if decoding else "",
        r["hash"] if decoding else "",
    )  # fmt: skip
