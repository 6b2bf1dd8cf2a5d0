"""skipkv compare"""

import argparse
import json

from skipkv.checks import CONSTANTS
from skipkv.commands.options import add_model, load_model
from skipkv.errors import ConfigError
from skipkv.eval.fidelity import compare, table
from skipkv.load.texts import read_texts
from skipkv.steering import parse_run
from skipkv.viz import curve
from skipkv.viz.curves import suffix_of

HELP = "Replay recorded texts under several methods against the full cache; no sampling."


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("texts", help="JSON lines: texts, or objects with a text, or with prompt and output")
    parser.add_argument("--methods", required=True, help='separated by ";", e.g. "full;rkv:budget=256"')
    for name, allowed in (("dtype", "weight_dtypes"), ("cache", "cache_dtypes")):
        what = f"--{name} of the full cache that all is held against, if another"
        parser.add_argument(f"--reference-{name}", choices=CONSTANTS[allowed], help=what)
    parser.add_argument("--tokens", type=int, help="only the first tokens of each text")
    parser.add_argument("--limit", type=int, help="only the first texts")
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples for the intervals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="KL divergence against budget: .png, .pdf or .svg")


def run(args: argparse.Namespace) -> int:
    runs = [parse_run(text.strip()) for text in args.methods.split(";") if text.strip()]
    if args.plot:
        suffix_of("plot", args.plot)
    if not runs:
        raise ConfigError(f'methods is {args.methods!r}; allowed: methods separated by ";"')
    model = load_model(args)
    reference = load_model(args, args.reference_dtype) if args.reference_dtype else model
    texts, prompts = read_texts(args.texts, model.tokenizer, model.config.context, args.tokens, args.limit)
    status = 0
    try:
        results = compare(
            model, texts, runs, prompts=prompts, cache=args.cache, reference=reference,
            reference_cache=args.reference_cache, resamples=args.bootstrap, seed=args.seed, progress=not args.quiet,
        )  # fmt: skip
    except KeyboardInterrupt as interrupt:
        if not hasattr(interrupt, "results"):  # no text is through
            raise
        results, status = interrupt.results, 130
    print(json.dumps([f.as_dict() for f in results]) if args.json else table(results))
    if args.plot:
        curve(results, "kl").save(args.plot)
    return status
