"""skipkv view"""

import argparse

from skipkv import viz
from skipkv.commands.options import integers
from skipkv.errors import ConfigError
from skipkv.trace import Trace

HELP = "Draw what a recorded run kept, as one page that works offline."


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", nargs="+", metavar="trace",
                        help="a .npz of generate --trace; two of the same text are compared")  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="where the slider starts: after so many tokens")
    parser.add_argument("--layers", help="comma-separated; all by default")
    parser.add_argument("--heads", help="KV heads, comma-separated; all by default")
    parser.add_argument("-o", "--out", required=True, metavar="FILE.html")


def run(args: argparse.Namespace) -> int:
    traces = [Trace.load(path) for path in args.traces]
    if len(traces) > 2:
        raise ConfigError(f"view: {len(traces)} traces; allowed: one, or two of the same text to compare")
    layers, heads = (
        integers(name, text) if text is not None else None
        for name, text in (("layers", args.layers), ("heads", args.heads))
    )
    draw = viz.compare if len(traces) == 2 else viz.kept
    draw(*traces, step=args.step, layers=layers, heads=heads).save(args.out)
    print(args.out)
    return 0
