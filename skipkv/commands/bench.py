"""skipkv bench"""

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from skipkv.checks import CONSTANTS, integer
from skipkv.commands.options import METHOD_HELP, add_common, add_device, add_types, integers, load_model
from skipkv.engine import MEMORY_MAX
from skipkv.errors import ConfigError
from skipkv.eval import speed
from skipkv.eval.table import Table
from skipkv.load.config import MAX_CONTEXT
from skipkv.methods import Full, Method, parse_method
from skipkv.model import Model

HELP = "Measure this machine's limits and the engine against them."
MOST = {"rows": 1 << 16, "contexts": MAX_CONTEXT, "prefill": MAX_CONTEXT, "steps": 10_000, "repeats": 10_000,
        "length": MAX_CONTEXT}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a directory, a hub id, or tiny")
    parser.add_argument("--random-weights", metavar="SHAPE", help=f"no file: {', '.join(speed.SHAPES)}")
    parser.add_argument("--rows", default="1,8", help="rows that decode together, comma-separated")
    parser.add_argument("--contexts", default="128,1024", help="tokens already in the cache")
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--steps", type=int, default=16, help="decode steps a measurement")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each method")
    parser.add_argument("--methods", default="full", help=f"{METHOD_HELP}; several with ; between take turns")
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--ops", action="store_true", help="each op of a step, of a prompt and of a compaction: bytes "
                        "moved, multiply-accumulates, share of the nearer limit")  # fmt: skip
    tables.add_argument("--memory-limit", type=int, metavar="BYTES", help="of the cache: samples a minute of full and "
                        "of the methods, from one row to the largest batch")  # fmt: skip
    parser.add_argument("--length", type=int, default=2048, help="decoded tokens of a sample, with --memory-limit")
    add_device(parser)
    add_types(parser, CONSTANTS["weight_dtypes"], "bf16")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    if bool(args.model) == bool(args.random_weights):
        raise ConfigError("bench: expected a model or --random-weights SHAPE, one of them")
    methods = [parse_method(text.strip()) for text in args.methods.split(";") if text.strip()]
    if not methods:
        raise ConfigError(f'methods is {args.methods!r}; allowed: methods separated by ";"')
    given = {name: integers(name, str(getattr(args, name))) for name in MOST}
    for name, values in given.items():
        for value in values:
            integer(name, value, 1, MOST[name])
    if args.memory_limit is not None:
        integer("memory_limit", args.memory_limit, 1, MEMORY_MAX)
    if args.random_weights:
        model = speed.random_model(args.random_weights, args.dtype, args.threads, device=args.device)
    else:
        model = load_model(args)
    check_context(args, model, methods, given["contexts"])
    limits = speed.machine_limits(model)
    head = {"model": model.name, "variant": model._core.variant, "dtype": args.dtype, "cache": args.cache,
            "threads": model.threads, **limits}  # fmt: skip
    columns, cells, results = measurements(args, model, methods, given, limits)
    align = "".join("<" if name in ("measurement", "op", "method") else ">" for name in columns)
    table = Table(list(columns), [], list(columns.values()), align)
    if not args.json:
        print(f"{model.name}, {args.dtype} weights, {args.cache} cache, {head['variant']}, {model.threads} threads")
        read, flops, matrix = (limits[name] / 1e9 for name in limits)
        more = "; shares are of those measured beside each" if "read %" in columns else ""
        flop = f"{2 * flops:.1f} Gflop/s of float32, {2 * matrix:.1f} of {args.dtype}"
        print(f"limits: {read:.2f} GB/s read, {flop}{more}")
        print(f"\n{table.head}", flush=True)
    found, status = [], 0
    try:
        for result in results:
            found.append(result)
            for row in cells(result) if not args.json else ():
                tqdm.write(table.line(row))
    except KeyboardInterrupt:
        status = 130
    if args.json:
        print(json.dumps(head | {"results": found}))
    return status


def check_context(args: argparse.Namespace, model: Model, methods: list[Method], contexts: list[int]) -> None:
    """Refuse now what the model has no context for."""
    longest, steps = model.config.context, args.steps * args.repeats + 1
    if args.memory_limit:
        integer("length", args.length, 2 * args.steps + 4, longest)
    else:
        integer("prefill", args.prefill, 1, longest)
        if max(contexts) + steps > longest:
            room = f"integers that leave room for {steps} steps in the model's context of {longest}"
            raise ConfigError(f"contexts is {max(contexts)}; allowed: {room}")
    for method in methods:
        if method.compacts and (need := speed.compaction_tokens(method, args.repeats)) > longest:
            raise ConfigError(f"{method} takes {need} tokens to measure; the model's context is {longest}")


def measurements(
    args: argparse.Namespace, model: Model, methods: list[Method], given: dict[str, list[int]],
    limits: dict[str, float],
) -> tuple[dict[str, int], Callable[[dict[str, Any]], list[tuple[str, ...]]], Iterable[dict[str, Any]]]:  # fmt: skip
    """Columns, the rows under them that tell a result, and the results."""
    if args.memory_limit:
        methods = [Full(), *(method for method in methods if method != Full())]
        results = speed.batches(
            model, methods, args.cache, args.memory_limit, args.length, args.steps, args.repeats, not args.quiet
        )
        return speed.BATCH_COLUMNS, speed.cells, results
    results = speed.measure(
        model, methods, cache=args.cache, rows=given["rows"], contexts=given["contexts"], prefill_tokens=args.prefill,
        steps=args.steps, repeats=args.repeats, limits=limits, timed=args.ops, progress=not args.quiet,
    )  # fmt: skip
    return (speed.OP_COLUMNS, speed.op_cells, results) if args.ops else (speed.COLUMNS, speed.cells, results)
