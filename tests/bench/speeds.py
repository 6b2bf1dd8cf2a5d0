"""Speeds of the CUDA backend with random weights, one after the other into a JSON file: the last stage of gpu.py.

    python -m tests.bench.speeds --out FILE [--shape r1-distill-qwen-7b] [--seconds 500] [--cache-gb 40] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from skipkv import CapacityError, _skipkv
from skipkv.eval import speed
from skipkv.load.config import ModelConfig
from skipkv.methods import Full, Method, parse_method
from skipkv.model import Model
from tests.bench.gpu import LEAST, Skipped, write
from tests.bench.shapes import SHAPES, transformers_config

TOKENS, QUICK = (2048, 1024, 8192), (48, 24, 64)  # of a prompt, of a short and of a long context
SAMPLE = 8192  # tokens of a sample, where batches are as large as they can be


def random_tensors(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """As `speed.random_tensors`, but bf16 numbers of one pool again and again: 15 GB of fresh ones take minutes."""
    pool = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    for name, size, is_matrix in _skipkv.tensors(config.as_dict()):
        if is_matrix:
            scaled = (pool / np.float32(np.sqrt(size[1]))).view(np.uint32) >> 16
            yield name, np.resize(scaled.astype(np.uint16), size)
        else:
            yield name, np.full(size, 0x3F80 if name.endswith("norm.weight") else 0, np.uint16)  # 1 or 0


def decode(model: Model, rows: int, context: int, method: Method, steps: int) -> dict[str, Any]:
    return speed.decode(model, rows, context, [method], "bf16", steps, 1)[0]


def largest_batch(model: Model, method: Method, limit: int, tokens: int, steps: int) -> dict[str, Any]:
    """A step of the largest batch whose samples of `tokens` tokens fit, half-way through them."""
    rows, each = speed.largest_batch(model, method, "bf16", limit, tokens)
    found = decode(model, rows, tokens // 2, method, steps)
    per_minute = speed.samples_per_minute(rows, tokens, found["seconds"])
    return found | {"row_bytes": each, "limit_bytes": limit, "samples_per_minute": per_minute}


@functools.cache
def transformers_model(config: ModelConfig, where: str) -> Any:
    """The same shape, random weights in bfloat16."""
    import torch
    import transformers

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(where):
        return transformers.AutoModelForCausalLM.from_config(transformers_config(config)).eval()


def compaction(model: Model, method: Method, rows: int, repeats: int) -> dict[str, Any]:
    """Seconds by which a step that compacts all rows is longer than the others.

    evict_seconds: the ledger's: without the moves, which the host does not wait for, and with the rest of the step's
    forward where the copy of its logits was not waited for.
    """
    budget = int(np.max(method.budget))
    bench = speed._Bench(model, method, "bf16", rows, budget)
    open_rows = bench.fill(budget + method.interval * (repeats + 2))
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    while len(found[True]) <= repeats:
        done, before = bench.session.state(open_rows[0])["compactions"], bench.session.ledger()["evict_seconds"]
        seconds = bench.step(open_rows)
        compacted = bench.session.state(open_rows[0])["compactions"] > done
        found[compacted].append((seconds, bench.session.ledger()["evict_seconds"] - before))
    seconds, evicting = np.median(found[True][1:], axis=0)  # the first one has fewer slots
    seconds -= np.median(found[False], axis=0)[0]
    return {"kind": "compaction", "method": str(method), "rows": rows, "slots": budget + method.interval,
            "seconds": float(seconds), "evict_seconds": float(evicting)}  # fmt: skip


def measure_transformers(config: ModelConfig, kind: str, rows: int, n: int, quick: bool) -> dict[str, Any]:
    """Seconds of a prompt of n tokens, or of a step with n tokens behind it, with its default attention."""
    import torch

    if not torch.cuda.is_available() and not quick:
        raise Skipped("torch sees no GPU")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers_model(config, where)
    with torch.device(where), torch.inference_mode():
        one, seconds = torch.zeros(rows, 1, dtype=torch.long), []
        wait = torch.cuda.synchronize if where == "cuda" else lambda: None
        past = None
        if kind == "decode":
            past = model(torch.zeros(rows, n, dtype=torch.long), logits_to_keep=1).past_key_values
        for _ in range(4):
            ids, kept = (one, past) if past else (torch.zeros(1, n, dtype=torch.long), None)
            wait()
            begin = time.perf_counter()
            model(ids, past_key_values=kept, logits_to_keep=1)
            wait()
            seconds.append(time.perf_counter() - begin)
        return {"kind": f"transformers {kind}", "rows": rows, "context": n, "tokens": rows if past else n,
                "seconds": float(np.median(seconds[1:])), "variant": where}  # fmt: skip


Job = tuple[str, Callable[[], dict[str, Any]]]


def ours(args: argparse.Namespace) -> Iterator[Job]:
    """The most telling first; what comes first is what the others are held against."""
    small = args.quick
    config = SHAPES[args.shape]
    model = speed.model_of(config, random_tensors(config), device="cuda")
    sizes = "budget=32,interval=16" if small else "budget=1024,interval=128"
    methods = [Full(), parse_method(f"skipkv:{sizes}")]
    steps, (prompt, short, long) = (2, QUICK) if small else (8, TOKENS)
    few, many = ([1, 3], [5]) if small else ([1, 10, 100], [50, 256])
    limit = 38_000_000 if small else int(args.cache_gb * 1e9)  # 36 MB are workspace

    def limits() -> dict[str, Any]:
        read, macs, _ = model._core.limits(1 << 20 if small else speed.LIMIT_BYTES, model.threads)
        return {"kind": "limits", "read_bytes_per_second": read, "macs_per_second": macs,
                "variant": model._core.variant}  # fmt: skip

    def decodes(counts: list[int], context: int) -> Iterator[Job]:
        for rows, method in itertools.product(counts, methods):
            yield (f"decode, {method.name}, {rows} rows, context {context}",
                   functools.partial(decode, model, rows, context, method, steps))  # fmt: skip

    yield "the device's own rates", limits
    yield from decodes(few, short)
    yield f"prefill of {prompt}", functools.partial(speed.prefill, model, prompt, "bf16", 2)
    # streaming only selects and moves, snapkv has the importance on top, rkv and skipkv that and what keys alone say.
    for name in ("streaming", "snapkv", "rkv", "skipkv"):
        method = parse_method(f"{name}:{sizes}")
        for rows in (1, 8):
            yield f"compaction, {name}, {rows} rows", functools.partial(compaction, model, method, rows, 2)
    yield from decodes(few, long)
    for method in methods:
        yield (f"largest batch, {method.name}, {limit / 1e9:g} GB of cache",
               functools.partial(largest_batch, model, method, limit, 200 if small else SAMPLE, steps))  # fmt: skip
    yield from decodes(many, short)
    yield from decodes(many, long)


def theirs(args: argparse.Namespace) -> Iterator[Job]:
    """After ours: both models at once may be too large."""
    prompt, short, _ = QUICK if args.quick else TOKENS
    for kind, rows, n in (("prefill", 1, prompt), ("decode", 1, short), ("decode", 10, short)):
        yield (f"transformers, {kind} of {rows} rows, {n} tokens",
               functools.partial(measure_transformers, SHAPES[args.shape], kind, rows, n, args.quick))  # fmt: skip


def measure(args: argparse.Namespace, begin: float) -> None:
    """Writes them all anew after each."""
    found: list[dict[str, Any]] = []
    for name, job in itertools.chain(ours(args), theirs(args)):
        left = args.seconds - (time.monotonic() - begin)
        result: dict[str, Any]
        try:
            if left < LEAST and not args.quick:
                raise Skipped(f"{left:.0f} s were left")
            result = job()
        except CapacityError as error:
            result = {"failure": f"does not fit: {error}"}
        except Exception as error:
            result = {"failure": f"{'skipped' if isinstance(error, Skipped) else type(error).__name__}: {error}"}
        found.append({"name": name} | result | {"at": round(time.monotonic() - begin, 1)})
        write(args.out, json.dumps(found, indent=1))
    failed = sum("failure" in f for f in found)
    print(f"{len(found) - failed} measured, {failed} not")


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="r1-distill-qwen-7b")
    parser.add_argument("--seconds", type=float, default=500, help="after which nothing more is begun")
    parser.add_argument("--cache-gb", type=float, default=40, help="of the largest batches")
    parser.add_argument("--quick", action="store_true", help="few rows and tokens")
    measure(parser.parse_args(), begin)


if __name__ == "__main__":
    main()
