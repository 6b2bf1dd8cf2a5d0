"""The engine against its machine: read bandwidth and multiply-accumulate peak; prefill and decode as shares of them.

Every figure is a median over repeats within one run, in which methods take turns; compare ratios of one run, not runs
with each other.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from skipkv import _skipkv, devices
from skipkv.checks import no_bar
from skipkv.engine import FORWARD_TOKENS, count_threads
from skipkv.errors import CapacityError, ConfigError
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
COMPACTING = ("compare", "score", "select", "compact")  # ops of a compaction
MATRICES = ("q, k, v", "o", "gate, up", "down", "head")  # ops that multiply in the weights' type, others in float32


def random_model(
    shape: str, dtype: str = "bf16", threads: int | None = None, seed: int = 0, device: str = "cpu"
) -> Model:
    """A model of a known shape with random weights and no tokenizer.

    Parameters
    ----------
    shape : str
        A name of `SHAPES`.
    dtype : "bf16", "f32", "q8" or "bf16a16"
    threads, seed : int
    device : str
        As of `skipkv.load`.
    """
    if shape not in SHAPES:
        raise ConfigError(f"shape is {shape!r}; allowed: {', '.join(SHAPES)}")
    config = SHAPES[shape]
    return model_of(config, random_tensors(config, seed), dtype, threads, device, f"random {shape}")


def model_of(
    config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], dtype: str = "bf16", threads: int | None = None,
    device: str = "cpu", name: str = "random",
) -> Model:  # fmt: skip
    """A model of these tensors, float32 or the bits of bf16 as uint16, without a tokenizer."""
    count = count_threads(threads)
    core = _skipkv.Model(config.as_dict(), dtype, *devices.find(device))
    for tensor, values in tensors:
        stored = "bf16" if values.dtype == np.uint16 else "f32"
        core.bind(tensor, stored, values.shape, values.reshape(-1).view(np.uint8), count)
    return Model(core, config, None, name, {}, count)


def random_tensors(config: ModelConfig, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Names, as in checkpoints, and values of a model with random matrices and no bias."""
    rng = np.random.default_rng(seed)
    for name, size, is_matrix in _skipkv.tensors(config.as_dict()):
        if is_matrix:
            values = rng.standard_normal(size, np.float32)
            values *= 1 / np.sqrt(size[1])
        else:
            values = np.ones(size, np.float32) if name.endswith("norm.weight") else np.zeros(size, np.float32)
        yield name, values


def linear_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied with."""
    return sum(
        int(np.prod(size))
        for name, size, is_matrix in _skipkv.tensors(config.as_dict() | {"tied": False})
        if is_matrix and name != "model.embed_tokens.weight"
    )


def widths(model: Model, cache: str) -> tuple[float, float]:
    """Bytes of a weight, and of a number in the cache; q8: with a scale for 32 weights, or for a head's numbers."""
    return ({"bf16": 2, "bf16a16": 2, "f32": 4, "q8": 34 / 32}[model.dtype],
            {"bf16": 2, "f32": 4, "q8": 1 + 4 / model.config.head_dim}[cache])  # fmt: skip


def op_costs(model: Model, cache: str, tokens: int, rows: int, slots: float, pairs: float) -> dict[str, Any]:
    """Bytes moved and multiply-accumulates of each op of one forward: {name: (bytes, macs)}.

    Weights, slots and activations are counted once where they are read and once where they are written, activations
    although they may stay in a processor's own cache; only products of matrices and attention are counted as macs.
    Nothing is steered, and without a vocabulary no sentence is added up.

    Parameters
    ----------
    model, cache
    tokens, rows : int
        Of the forward.
    slots : float
        That the rows hold in a head when it ends, all rows together.
    pairs : float
        Of a token and a slot that it sees, in a head.
    """
    c, (weight, number) = model.config, widths(model, cache)
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    family = _skipkv.families()[c.family]

    def linear(n_in: int, n_out: int, n: int = tokens, times: int = c.n_layers) -> tuple[float, int]:
        return times * (n_in * n_out * weight + 4 * n * (n_in + n_out)), times * n * n_in * n_out

    def moved(width: int, times: int = c.n_layers) -> tuple[int, int]:
        return 4 * tokens * width * times, 0

    normed = 2 * c.hidden * (2 * c.n_layers + 1) + 2 * (q + kv) * c.n_layers * bool(family["qk_norm"])
    return {
        "embed": (tokens * c.hidden * (weight + 4), 0), "norm": moved(normed, 1),
        "q, k, v": linear(c.hidden, q + 2 * kv), "rope": moved(2 * (q + kv), c.n_layers - len(c.unrotated)),
        "append": (c.n_layers * tokens * 2 * kv * (4 + number), 0), "keep queries": moved(2 * q),
        "attention": (c.n_layers * (2 * kv * slots * number + 8 * tokens * q), c.n_layers * 2 * q * pairs),
        "receive": (c.n_layers * (kv * slots * number + 4 * tokens * q), c.n_layers * q * pairs),
        "o": linear(q, c.hidden), "add": moved(3 * c.hidden, 2 * c.n_layers), "gate, up": linear(c.hidden, 2 * c.ffn),
        "silu": moved(3 * c.ffn), "down": linear(c.ffn, c.hidden), "last": (8 * rows * c.hidden, 0),
        "head": linear(c.hidden, c.vocab, rows, bool(rows)),
    }  # fmt: skip


def products(costs: dict[str, Any]) -> dict[str, float]:
    """Multiply-accumulates that a model is made of, and those of its matrices among them."""
    return {"macs": sum(macs for name, (_, macs) in costs.items() if name != "receive"),
            "matrix_macs": sum(costs[name][1] for name in MATRICES)}  # fmt: skip


class _Bench:
    def __init__(
        self, model: Model, method: Method, cache: str, rows: int, context: int, timed: bool = False
    ) -> None:
        config = model.config
        self.model, self.vocab, self.method, self.timed = model, config.vocab, method, timed
        self.session = _skipkv.Session(
            model._core, rows=rows, tokens=max(FORWARD_TOKENS, rows), cache=cache, threads=model.threads,
            method=method.as_dict((config.n_layers, config.n_kv_heads)), vocabulary=None, timed=timed,
        )  # fmt: skip
        self.rng = np.random.default_rng(1)
        self.logits = np.empty((rows, self.vocab), np.float32)
        self.context, self.n_rows = context, rows
        self.n_prompt = 1 if method.compacts else context
        self.laps: list[dict[str, float]] = []  # seconds of each op in every forward, if timed

    def tokens(self, n: int) -> np.ndarray:
        return self.rng.integers(0, self.vocab, n).astype(np.int32)

    def row_bytes(self, capacity: int) -> int:
        """Bytes of cache that a row of so many tokens reserves; what may be compacted is decoded."""
        return self.session.row_bytes(capacity, self.n_prompt)

    def fixed_bytes(self, capacity: int) -> int:
        """What stands beside its rows under a limit: 0 on the CPU."""
        return self.session.fixed_bytes(capacity, self.n_prompt)

    def forward(self, spans: list[tuple[int, int]], logits: bool = True, best: bool = False) -> float:
        """Seconds of a forward of these spans, with random tokens."""
        before, rows, n = self.session.seconds(), np.array(spans, np.int32), len(spans)
        tokens = self.tokens(int(rows[:, 1].sum()))
        found = np.empty(n, np.int32) if best else None
        begin = time.perf_counter()
        self.session.forward(rows, tokens, self.logits[:n] if logits else None, best=found)
        seconds = time.perf_counter() - begin
        self.laps.append({name: after - before[name] for name, after in self.session.seconds().items()})
        return seconds

    def open(self, capacity: int) -> int:
        """A row that holds `context` tokens."""
        row = self.session.open(capacity, n_prompt=self.n_prompt)
        first = 0
        while first < self.context:
            n = self.session.chunk(row, min(FORWARD_TOKENS, self.context - first))
            self.forward([(row, n)], logits=False)
            first += n
        return row

    def fill(self, capacity: int) -> list[int]:
        """Rows that hold `context` tokens: one is fed, the others are copies."""
        row = self.open(capacity)
        return [row] + [self.session.fork(row, capacity, i) for i in range(1, self.n_rows)]

    def step(self, rows: list[int], last: bool = False) -> float:
        """Seconds of a greedy step; of the last one the logits are wanted, too."""
        return self.forward([(row, 1) for row in rows], best=not last)

    def slots(self, row: int) -> float:
        """That a head of the row holds, on average."""
        return self.session.state(row)["slots"] / (self.model.config.n_layers * self.model.config.n_kv_heads)

    def ops(self, laps: list[dict[str, float]], costs: dict[str, Any]) -> dict[str, Any]:
        """The ops that took any time: median seconds, bytes and multiply-accumulates of each; none if not timed."""
        found = []
        for name in laps[0] if self.timed else []:
            seconds, (read, macs) = statistics.median(lap[name] for lap in laps), costs.get(name, (0, 0))
            if seconds:
                found.append({"op": name, "seconds": seconds, "bytes": read, "macs": macs,
                              "matrix_macs": macs if name in MATRICES else 0})  # fmt: skip
        return {"ops": found} if self.timed else {}


def prefill(
    model: Model, n: int, cache: str, repeats: int, timed: bool = False, between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Seconds to feed a prompt of n tokens, and the multiply-accumulates it takes; `timed`: also of every op.

    `between` is called before each repeat.
    """
    bench = _Bench(model, Full(), cache, 1, n, timed)
    seconds, laps = [], []
    parts = [(first, min(FORWARD_TOKENS, n - first)) for first in range(0, n, FORWARD_TOKENS)]
    for _ in range(repeats + 1):  # the first one warms up
        between()
        row = bench.session.open(n)
        bench.laps = []
        seconds.append(sum(bench.forward([(row, part)], logits=first + part == n) for first, part in parts))
        laps.append({name: sum(lap[name] for lap in bench.laps) for name in bench.laps[0]})
        bench.session.close(row)
    each = [op_costs(model, cache, part, first + part == n, first + part, part * first + part * (part + 1) // 2)
            for first, part in parts]  # fmt: skip
    costs = {name: tuple(map(sum, zip(*(c[name] for c in each), strict=True))) for name in each[0]}
    return {"kind": "prefill", "tokens": n, "seconds": statistics.median(seconds[1:]), **products(costs),
            "bytes": model._core.n_bytes, **bench.ops(laps[1:], costs)}  # fmt: skip


def free_memory() -> int | None:
    """Bytes that this machine can still give, as Linux tells."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return None


def check_room(model: Model, benches: Sequence[_Bench], capacity: int) -> None:
    """Refuse rows that the machine's memory cannot hold; a device says so itself."""
    free = free_memory() if model._core.variant in _skipkv.variants() else None
    need = sum(b.n_rows * b.row_bytes(capacity) + b.logits.nbytes for b in benches)
    if free is not None and need > free:
        each = f"{benches[0].n_rows} rows of {capacity} tokens"
        raise CapacityError(f"{each} need {need} bytes of cache and logits; {free} are free")


def decode(
    model: Model, rows: int, context: int, methods: Sequence[Method], cache: str, steps: int, repeats: int,
    timed: bool = False, between: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Seconds of one step of `rows` rows with `context` tokens behind them; `timed`: also of every op.

    Methods take turns of `steps` steps; `between` is called before each round.
    """
    capacity = context + steps * repeats + 1
    benches = [_Bench(model, method, cache, rows, context, timed) for method in methods]
    check_room(model, benches, capacity)
    opened = [bench.fill(capacity) for bench in benches]
    times: list[list[float]] = [[] for _ in methods]
    for bench, open_rows in zip(benches, opened, strict=True):
        bench.step(open_rows)
        bench.laps = []
    before = [bench.session.ledger()["evict_seconds"] for bench in benches]
    for repeat in range(repeats):
        between()
        for i, bench in enumerate(benches):
            last = steps * (repeat + 1 == repeats) - 1
            times[i] += [bench.step(opened[i], last=step == last) for step in range(steps)]
    found = [_decoded(b, r, t, e, cache) for b, r, t, e in zip(benches, opened, times, before, strict=True)]
    return [f | {"speedup": found[0]["seconds"] / f["seconds"]} for f in found]


def _decoded(bench: _Bench, open_rows: list[int], times: list[float], before: float, cache: str) -> dict[str, Any]:
    """What `decode` says of a method."""
    model, rows = bench.model, bench.n_rows
    c, ledger, slots = model.config, bench.session.ledger(), bench.slots(open_rows[0])
    costs = op_costs(model, cache, rows, rows, rows * slots, rows * slots)
    weight, number = widths(model, cache)
    held = 2 * c.n_layers * c.n_kv_heads * c.head_dim * slots  # numbers of one row's keys and values
    read = int(linear_weights(c) * weight + rows * held * number)
    return {
        "kind": "decode", "rows": rows, "context": bench.context, "method": str(bench.method), "tokens": rows,
        "seconds": statistics.median(times), **products(costs), "bytes": read, "peak_bytes": ledger["peak_bytes"],
        "evict_share": (ledger["evict_seconds"] - before) / sum(times),
        "hash": hashlib.sha256(bench.logits.tobytes()).hexdigest()[:16],
        **bench.ops(bench.laps, costs),
    }  # fmt: skip


def compaction_tokens(method: Method, repeats: int) -> int:
    """Tokens of the row that `compaction` feeds."""
    return int(np.max(method.budget)) + method.interval * (repeats + 3)


def compaction(model: Model, method: Method, cache: str, repeats: int, timed: bool = False) -> dict[str, Any]:
    """Seconds of one compaction of one row, all layers, from budget + interval slots; `timed`: also of its parts."""
    budget, interval = int(np.max(method.budget)), method.interval
    bench = _Bench(model, method, cache, 1, budget, timed)
    seconds, laps, pairs, slots = [], [], 0, 0
    row = bench.session.open(compaction_tokens(method, repeats), n_prompt=1)
    while len(seconds) < repeats + 1:
        n = bench.session.chunk(row, min(FORWARD_TOKENS, budget + interval))
        before, counted = bench.session.ledger()["evict_seconds"], bench.session.state(row)
        bench.forward([(row, n)], logits=False)
        after = bench.session.state(row)
        if after["compactions"] > counted["compactions"] and counted["compactions"]:  # from a full interval on
            seconds.append(bench.session.ledger()["evict_seconds"] - before)
            laps.append({name: bench.laps[-1][name] for name in COMPACTING})
            pairs, slots = after["pairs"] - counted["pairs"], budget + interval
    heads = model.config.n_layers * model.config.n_kv_heads
    return {"kind": "compaction", "method": str(method), "slots": slots, "seconds": statistics.median(seconds),
            "pairs_share": pairs / (heads * slots * slots), **bench.ops(laps, {})}  # fmt: skip


def largest_batch(model: Model, method: Method, cache: str, limit: int, length: int) -> tuple[int, int]:
    """Rows of `length` tokens that `limit` bytes hold, and bytes of one."""
    bench = _Bench(model, method, cache, 1, length)
    each, least = bench.row_bytes(length), bench.fixed_bytes(length)
    if each + least > limit:
        beside = f" beside {least} of workspace" if least else ""
        raise CapacityError(
            f"{method}: a row of {length} tokens needs {each} bytes of cache{beside}; memory_limit is {limit}"
        )
    rows = (limit - least) // each
    while least and rows > 1:  # the workspace grows with the rows
        fixed = _Bench(model, method, cache, rows, length).fixed_bytes(length)
        if rows * each + fixed <= limit:
            break
        rows = max(1, min(rows - 1, (limit - fixed) // each))
    return rows, each


def samples_per_minute(rows: int, length: int, seconds: float) -> float:
    """Of `length` decoded tokens each, where a step of all rows takes so long on average."""
    return 60 * rows / (length * seconds)


def batches(
    model: Model, methods: Sequence[Method], cache: str, limit: int, length: int, steps: int, repeats: int,
    progress: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Samples a minute of 1, 2, 4 … rows up to the largest batch that fits `limit` bytes, of the methods in turns.

    A sample is `length` decoded tokens. Its mean step is measured half-way through it, where the full cache is as long
    as on average; to it comes its share of what the compactions of each row cost, measured with one row. The text of
    a prompt, and rows that end before others, cost nothing here.
    """
    context, jobs, benches = length // 2, [], []
    for method in methods:
        most, each = largest_batch(model, method, cache, limit, length)
        n_compactions = max(0, length - int(np.max(method.budget))) / method.interval if method.compacts else 0
        compacting = n_compactions and compaction(model, method, cache, repeats)["seconds"] * n_compactions / length
        bench = _Bench(model, method, cache, most + 1, context)  # one more: what the others are copies of
        benches.append(bench)
        check_room(model, benches, length)
        source = bench.open(length)
        counts = sorted({1 << i for i in range(most.bit_length())} | {most})
        jobs += [(bench, source, rows, each, compacting, []) for rows in counts]
    turns = tqdm(jobs * repeats, unit="measurement", leave=False, disable=no_bar(progress), file=sys.stderr)
    for bench, source, rows, _, _, times in turns:
        forks = [bench.session.fork(source, length, i) for i in range(rows)]
        times += [bench.step(forks) for _ in range(steps + 1)][1:]
        for row in forks:
            bench.session.close(row)
    found = []
    for bench, _, rows, each, compacting, times in jobs:
        seconds = statistics.median(times) + rows * compacting
        found.append({"kind": "batch", "method": str(bench.method), "rows": rows, "length": length, "tokens": rows,
                      "seconds": seconds, "row_bytes": each, "limit_bytes": limit,
                      "samples_per_minute": samples_per_minute(rows, length, seconds)})  # fmt: skip
    first = [f["samples_per_minute"] for f in found if f["method"] == found[0]["method"]]
    for f in found:
        f["of_largest"], f["of_best"] = (f["samples_per_minute"] / of for of in (first[-1], max(first)))
    return found


def measure(
    model: Model, methods: Sequence[Method], *, cache: str, rows: Sequence[int], contexts: Sequence[int],
    prefill_tokens: int, steps: int, repeats: int, limits: dict[str, float], timed: bool = False,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Prefill, then decoding at every context and number of rows, then a compaction of each method that has any.

    Parameters
    ----------
    model : Model
    methods : sequence of Method
    cache, rows, contexts, prefill_tokens, steps, repeats
        As on the command line.
    limits : dict
        Of the machine, just measured by `machine_limits`.
    timed : bool
        Also every op.
    progress : bool

    Yields
    ------
    dict
        What was measured, and the limits that it is held against: medians, too, measured before its first repeat,
        between repeats and after the last, because memory that is shared with others changes its speed.
    """
    seen = [limits]

    def look() -> None:
        seen.append(machine_limits(model))

    jobs: list[Callable[[], list[dict[str, Any]]]]
    jobs = [lambda: [prefill(model, prefill_tokens, cache, repeats, timed, look)]]
    jobs += [lambda r=r, n=n: decode(model, r, n, methods, cache, steps, repeats, timed, look)
             for n in contexts for r in rows]  # fmt: skip
    jobs += [lambda m=m: [compaction(model, m, cache, repeats, timed)] for m in methods if m.compacts]
    for job in tqdm(jobs, unit="measurement", leave=False, disable=no_bar(progress), file=sys.stderr):
        del seen[:-1]
        results = job()
        look()
        medians = {name: statistics.median(one[name] for one in seen) for name in limits}
        for result in results:
            for op in result.get("ops", ()):
                op["share"] = max(shares(op, medians))
            yield result | medians


def machine_limits(model: Model) -> dict[str, float]:
    """Bytes that this machine reads, and multiply-accumulates that it does, of float32 and of the weights' type."""
    names = "read_bytes_per_second", "macs_per_second", "matrix_macs_per_second"
    return dict(zip(names, model._core.limits(LIMIT_BYTES, model.threads), strict=True))


def shares(what: dict[str, Any], limits: dict[str, float]) -> tuple[float, float]:
    """Of the read bandwidth and of the multiply-accumulates."""
    other = what["macs"] - what["matrix_macs"]
    seconds = other / limits["macs_per_second"] + what["matrix_macs"] / limits["matrix_macs_per_second"]
    return what["bytes"] / what["seconds"] / limits["read_bytes_per_second"], seconds / what["seconds"]


# speedup: the first method's time by this one's; evict %: share of the time that went into compactions; logits: hash of
# the last step's.
COLUMNS = {"measurement": 38, "ms": 8, "tokens/s": 8, "GB/s": 6, "read %": 6, "Gflop/s": 7, "peak %": 6,
           "cache MB": 8, "evict %": 7, "logits": 16, "speedup": 7, "method": 6}  # fmt: skip
# near %: share of the nearer of both limits.
OP_COLUMNS = {"op": 14, "ms": 8, "% of ms": 7, "MB": 8, "GB/s": 6, "read %": 6, "Gflop/s": 7, "peak %": 6,
              "near %": 6}  # fmt: skip
# × largest, × best: of the first method's samples a minute with its largest batch, and with its best.
BATCH_COLUMNS = {"rows": 6, "ms": 8, "tokens/s": 8, "cache MB": 8, "samples/min": 11, "× largest": 9, "× best": 7,
                 "method": 6}  # fmt: skip


def title(r: dict[str, Any]) -> str:
    """What was measured."""
    if r["kind"] == "compaction":
        return f"compaction, {r['slots']} slots, {100 * r['pairs_share']:.1f} % of pairs"
    return f"decode, {r['rows']} rows, context {r['context']}" if r["kind"] == "decode" else f"prefill of {r['tokens']}"


def rates(what: dict[str, Any], limits: dict[str, Any]) -> tuple[str, str, str, str]:
    """GB/s, its share, Gflop/s, its share."""
    read, macs = (f"{100 * share:.0f}" for share in shares(what, limits))
    return (f"{what['bytes'] / what['seconds'] / 1e9:.2f}", read,
            f"{2 * what['macs'] / what['seconds'] / 1e9:.1f}", macs)  # fmt: skip


def cells(r: dict[str, Any]) -> list[tuple[str, ...]]:
    """The row of `COLUMNS`, or of `BATCH_COLUMNS`, that says what was measured."""
    ms, method = f"{1e3 * r['seconds']:.2f}", r.get("method", "")
    if r["kind"] == "compaction":
        return [(title(r), ms, *[""] * (len(COLUMNS) - 3), method)]
    per_second = f"{r['tokens'] / r['seconds']:.1f}"
    if r["kind"] == "batch":
        held = f"{r['rows'] * r['row_bytes'] / 1e6:.1f}"
        shares = (f"{r[name]:.2f}" for name in ("samples_per_minute", "of_largest", "of_best"))
        return [(str(r["rows"]), ms, per_second, held, *shares, method)]
    own = ("",) * 4
    if r["kind"] == "decode":
        own = f"{r['peak_bytes'] / 1e6:.1f}", f"{100 * r['evict_share']:.2f}", r["hash"], f"{r['speedup']:.2f}"
    return [(title(r), ms, per_second, *rates(r, r), *own, method)]


def op_cells(r: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of `OP_COLUMNS` that say what was measured, and of each op."""
    total = sum(op["seconds"] for op in r["ops"])
    found = [(", ".join(filter(None, (title(r), r.get("method", "")))), *[""] * (len(OP_COLUMNS) - 1))]
    for op in r["ops"]:
        moved = (f"{op['bytes'] / 1e6:.2f}", *rates(op, r), f"{100 * op['share']:.0f}") if op["bytes"] else ("",) * 6
        found.append((f"  {op['op']}", f"{1e3 * op['seconds']:.3f}", f"{100 * op['seconds'] / total:.1f}", *moved))
    return found
