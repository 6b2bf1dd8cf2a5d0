"""skipkv methods"""

import argparse
import json

from skipkv.checks import plain
from skipkv.eval.table import Table
from skipkv.methods import CLASSES, PARAMETERS, TABLE

HELP = "List the eviction methods and their parameters."


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps({"methods": TABLE, "parameters": PARAMETERS}))
        return 0
    methods = Table(("method", "what it keeps, and its parameters"))
    for name in CLASSES:
        methods.rows += [(name, TABLE[name]["summary"]), ("", TABLE[name]["parameters"].replace(" ", ", "))]
    parameters = Table(("parameter", "meaning (range; default)"))
    for name, p in PARAMETERS.items():
        default = "required" if p["default"] is None else f"default {p['default']}"
        parameters.rows.append((name, f"{p['summary']} ({plain(p['low'])} to {plain(p['high'])}; {default})"))
    parameters.rows += [
        ("protect", "slots kept besides: none, prompt, sinks:N"),
        ("allocate", "head, or layer: the heads of a layer share their budgets"),
        ("evict", "False: score and trace, drop nothing"),
        ("compat", "official, or single deviations of the released code"),
    ]
    print(f"{methods}\n\n{parameters}")
    return 0
