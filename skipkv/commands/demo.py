"""skipkv demo"""

import argparse
import json
import re
import sys
import time
import webbrowser
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from skipkv.checks import integer
from skipkv.commands.options import add_common
from skipkv.errors import ConfigError
from skipkv.eval import tiny
from skipkv.methods import parse_method
from skipkv.model import load
from skipkv.steering import Steering
from skipkv.tiny import problems as box
from skipkv.viz.report import report

HELP = "The model in the box under seven methods: a table, and a report to look at."


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", type=int, default=100, metavar="N", help="held-out problems (default 100)")
    parser.add_argument("--budgets", default="0.25,0.5", help="shares of the full cache's mean length, comma-separated")
    parser.add_argument("--steps", default="4-8", help="of the problems: fewest-most (default 4-8)")
    parser.add_argument("--brief", action="store_true", help="problems that ask for fewer re-checks")
    parser.add_argument("--protect", default="none", help="none, prompt, sinks:N")
    parser.add_argument("--tau", type=float, default=tiny.TAU, help="similarity from which on a sentence is a repeat")
    parser.add_argument("--model", default="tiny", metavar="DIR", help="another checkpoint of skipkv.tiny.train")
    parser.add_argument("--steering", metavar="FILE", help="the vector; by default that of the model in the box")
    parser.add_argument("-o", "--out", default="skipkv-demo.html", metavar="FILE.html", help="the report")
    parser.add_argument("--open", action="store_true", help="open the report in a browser")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    shares = _shares(args.budgets)
    level = replace(box.Level(), steps=_steps(args.steps), brief=float(args.brief))
    problems = box.draw(integer("problems", args.problems, 1, None), level=level)
    parse_method(tiny.method("skipkv", "1048576", args.protect, args.tau))  # refuses what could not run later
    begin = time.perf_counter()
    model = load(args.model, threads=args.threads, progress=False)
    vector = args.steering or ("tiny" if args.model == "tiny" else None)
    steering = Steering.load(vector, alpha=tiny.ALPHA) if vector else None
    runs, table, path, status = [], tiny.table(), None, 0
    if not args.json:
        print(f"{len(problems)} held-out problems, the same prompts for every run\n\n{table.head}", flush=True)
    try:
        for done in tiny.demo(
            model, problems, shares, steering, protect=args.protect, tau=args.tau, progress=not args.quiet
        ):
            runs.append(done)
            if not args.json:
                tqdm.write(table.line(tiny.cells(done)), file=sys.stdout)
        problem, *traces = tiny.side_by_side(model, runs)
        which = f"{args.steps} steps{', asked for few re-checks' if args.brief else ''}"
        report(runs, problems[problem], problem, *traces, which=which).save(args.out)
        path = Path(args.out).resolve()
    except KeyboardInterrupt:
        status = 130
    if args.json:
        rows = [run.as_dict() for run in runs]
        print(json.dumps({"problems": len(problems), "runs": rows, "report": path and str(path)}))
    elif path:
        print(f"\n{tiny.NOTE}\n\nreport: {path} ({time.perf_counter() - begin:.0f} s)")
    if args.open and path:
        webbrowser.open(path.as_uri())
    return status


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"budgets is {text!r}; allowed: shares above 0, up to 1, separated by commas")
    return list(dict.fromkeys(shares))


def _steps(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    most = len(box.NAMES) - 1
    if not 1 <= low <= high <= most:
        raise ConfigError(f"steps is {text!r}; allowed: fewest-most from 1 to {most}")
    return low, high
