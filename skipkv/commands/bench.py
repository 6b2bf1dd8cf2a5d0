"""skipkv bench"""

import argparse
import json

from tqdm import tqdm

from skipkv.checks import CONSTANTS, integer
from skipkv.commands.options import METHOD_HELP, add_common, add_device, add_types, integers, load_model
from skipkv.errors import ConfigError
from skipkv.eval import speed
from skipkv.load.config import MAX_CONTEXT
from skipkv.methods import parse_method

HELP = "Measure this machine's limits and the engine against them."
MOST = {"rows": 1 << 16, "contexts": MAX_CONTEXT, "prefill": MAX_CONTEXT, "steps": 10_000, "repeats": 10_000}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a directory, a hub id, or tiny")
    parser.add_argument("--random-weights", metavar="SHAPE", help=f"no file: {', '.join(speed.SHAPES)}")
    parser.add_argument("--rows", default="1,8", help="rows that decode together, comma-separated")
    parser.add_argument("--contexts", default="128,1024", help="tokens already in the cache")
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--steps", type=int, default=16, help="decode steps a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", default="full", help=METHOD_HELP)
    add_device(parser)
    add_types(parser, CONSTANTS["weight_dtypes"], "bf16")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    if bool(args.model) == bool(args.random_weights):
        raise ConfigError("bench: expected a model or --random-weights SHAPE, one of them")
    method = parse_method(args.method)
    given = {name: integers(name, str(getattr(args, name))) for name in MOST}
    for name, values in given.items():
        for value in values:
            integer(name, value, 1, MOST[name])
    if args.random_weights:
        model = speed.random_model(args.random_weights, args.dtype, args.threads, device=args.device)
    else:
        model = load_model(args)
    limits = speed.machine_limits(model)
    head = {"model": model.name, "variant": model._core.variant, "dtype": args.dtype, "cache": args.cache,
            "threads": model.threads, "read_bytes_per_second": limits[0], "macs_per_second": limits[1]}  # fmt: skip
    table = speed.table()
    if not args.json:
        print(f"{model.name}, {args.dtype} weights, {args.cache} cache, {head['variant']}, {model.threads} threads, "
              f"{method}")  # fmt: skip
        print(f"limits: {limits[0] / 1e9:.2f} GB/s read, {2 * limits[1] / 1e9:.1f} Gflop/s\n\n{table.head}", flush=True)
    results, status = [], 0
    try:
        for result in speed.measure(
            model, method, cache=args.cache, rows=given["rows"], contexts=given["contexts"],
            prefill_tokens=args.prefill, steps=args.steps, repeats=args.repeats, limits=limits,
            progress=not args.quiet,
        ):  # fmt: skip
            results.append(result)
            if not args.json:
                tqdm.write(table.line(speed.cells(result)))
    except KeyboardInterrupt:
        status = 130
    if args.json:
        print(json.dumps(head | {"results": results}))
    return status
