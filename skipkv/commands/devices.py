"""skipkv devices"""

import argparse
import json

from skipkv.devices import every
from skipkv.eval.table import Table

HELP = "List where models can compute, and why not elsewhere."


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    found = every()
    if args.json:
        print(json.dumps(found))
        return 0
    table = Table(("device", "variant", "usable", ""))
    for row in found:
        table.rows.append((row["device"], row["variant"] or "", "yes" if row["usable"] else "no", row["about"]))
    print(table)
    return 0
