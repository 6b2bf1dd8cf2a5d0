"""skipkv eval --suite and skipkv eval calibrate."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skipkv.commands.options import load_model
from skipkv.errors import ConfigError
from skipkv.eval import tiny
from skipkv.eval.calibrate import calibrate as choose
from skipkv.eval.calibrate import load, training_items
from skipkv.eval.suite import SUITES, Suite
from skipkv.eval.table import Table
from skipkv.eval.work import Evaluation
from skipkv.model import Model
from skipkv.steering import Steering, parse_steering
from skipkv.writing import write_whole

CALIBRATE = "choose τ and α on training data, for --suite"
VECTOR = "FILE.safetensors,layer=…,alpha=…"
OWN = ("methods", "grouping", "padding")  # what a suite says itself


def add_suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=SUITES, help="all tables of the paper, its figures beside; needs --out")
    parser.add_argument("--steering", metavar=VECTOR, help="the suite's vector; tiny has its own")
    parser.add_argument("--calibration", metavar="FILE.json", help="the suite's τ and α, of skipkv eval calibrate")


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="FILE.json", help="what is chosen")
    parser.add_argument("--store", metavar="DIR", help="keeps all texts; what is there is not made again")
    parser.add_argument("--steering", metavar=VECTOR, help="its alpha is the default; tiny has its own")
    parser.add_argument("--budget", default="25%", help="at which the methods are compared (default 25%%)")


def _vector(args: argparse.Namespace) -> Steering:
    if args.steering:
        return parse_steering(args.steering)
    if args.model != "tiny":
        raise ConfigError("--steering is not given; allowed: a vector that skipkv steer extract has made of this model")
    return Steering.load("tiny", alpha=tiny.ALPHA)


def run(args: argparse.Namespace, make: Callable[..., Evaluation], model: Model, settings: dict[str, Any]) -> int:
    vector = _vector(args)
    found = load(args.calibration, model, vector) if args.calibration else None
    suite = Suite(args.task, model, vector, calibration=found, kind=make, **settings)
    tables = suite.tables()
    path = Path(args.store) / "suite.md"
    write_whole(path, suite.report(tables, Table.markdown).encode("utf-8", "replace"))
    print(json.dumps(tables) if args.json else f"{suite.report(tables, str)}\n{path}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before the model is loaded."""
    if args.suite is None:
        for name in ("steering", "calibration"):
            if getattr(args, name):
                raise ConfigError(f"--{name} is for --suite; allowed in --methods: +steer:FILE, tau=, alpha=")
        if args.methods is None:
            raise ConfigError("--methods is not given; allowed: methods, or --suite")
        return
    for name in OWN:
        if getattr(args, name, None) is not None:
            raise ConfigError(f"--suite has its own {name}; allowed: --{name} without it")
    if args.store is None:
        raise ConfigError("--suite keeps its texts and tables; allowed: with --out DIR")
    _vector(args)


def calibrate(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    vector = _vector(args)
    training_items(args.of, args.data, args.limit)  # refused before the model is loaded
    found, table = choose(args.of, load_model(args), vector, budget=args.budget, **settings)
    write_whole(args.out, json.dumps(found | {"command": settings["command"]}, indent=1).encode())
    chosen = {name: found[name] for name in ("tau", "alpha")}
    print(json.dumps(chosen) if args.json else f"{table}\n\nτ {found['tau']:g}, α {found['alpha']:g}: {args.out}")
    return 0
