"""skipkv eval: a task under several methods, what a store holds, grading again."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from skipkv.checks import CONSTANTS
from skipkv.commands import eval_report, eval_suite
from skipkv.commands.options import METHOD_HELP, add_device, add_numbers, add_types, load_model, numbers
from skipkv.errors import ConfigError
from skipkv.eval.cluster import ClusterEvaluation
from skipkv.eval.evaluate import Results, finish
from skipkv.eval.marking import regrade
from skipkv.eval.records import Record
from skipkv.eval.store import Store
from skipkv.eval.table import Table
from skipkv.eval.tasks import TASKS
from skipkv.eval.work import Evaluation

HELP = "Run a task under several methods, keep every text, go on where it ended; show and grade what is kept."
NUMBERS = {
    "max_new_tokens": "tokens of an answer at most; by default the task's", "temperature": "", "top_k": "", "top_p": "",
    "min_p": "", "repetition_penalty": "", "seed": "", "rows": "sequences in flight at once",
    "brake": "step in after so many repeated sentences in a row",
}  # fmt: skip
GIVEN = ("sampling", "memory_limit", "grouping", "padding", "cache")


def add(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK|calibrate|show|regrade|report")
    for name, task in TASKS.items():
        _add_task(commands.add_parser(name, help=task.help, description=f"{name}: {task.help}."), name)
    chosen = commands.add_parser("calibrate", help=eval_suite.CALIBRATE, description=eval_suite.CALIBRATE)
    tasks = chosen.add_subparsers(dest="of", required=True, metavar="TASK")
    for name, task in TASKS.items():
        parser = tasks.add_parser(name, help=task.help, description=f"{name}: {eval_suite.CALIBRATE}.")
        eval_suite.add_calibrate(parser)
        _add_settings(parser, name)
    show = commands.add_parser("show", help="what a store holds; texts and grades one by one")
    show.add_argument("store", metavar="DIR")
    show.add_argument("--item", help="every text of this item")
    show.add_argument("--method", help="only runs whose name holds this")
    eval_report.add(commands.add_parser("report", help=eval_report.HELP, description=eval_report.HELP))
    again = commands.add_parser("regrade", help="grade what a store holds, without generating")
    again.add_argument("store", metavar="DIR")
    again.add_argument("--rule", default="default", choices=["default", "official"])
    again.add_argument("--data", metavar="FILE.jsonl", help="the items; by default as they were published")
    _add_unsafe(again)
    for command in (show, again):
        command.add_argument("--json", action="store_true", help="for machines")
        command.add_argument("--quiet", action="store_true", help="no progress")


def _add_task(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--methods", help=f"{METHOD_HELP}; several with ; between; budget=20%% is a share of the full "
                        "cache's mean length")  # fmt: skip
    eval_suite.add_suite(parser)
    parser.add_argument("--out", dest="store", metavar="DIR", help="keeps all texts; what is there is not made again")
    parser.add_argument("--grouping", action="store_true", default=argparse.SUPPRESS, help="groups of similar prompts")
    parser.add_argument("--padding", choices=["none", "reserve"], default=argparse.SUPPRESS,
                        help="reserve: what padding would hold comes off the budgets")  # fmt: skip
    parser.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="over a Ray cluster: this, or one that "
                        "runs, or one on this machine")  # fmt: skip
    _add_settings(parser, name)


def _add_settings(parser: argparse.ArgumentParser, name: str) -> None:
    task = TASKS[name]
    own = {"default": "tiny"} if name == "tiny" else {"required": True}
    parser.add_argument("--model", help="a directory, a hub id, or tiny", **own)
    parser.add_argument("--data", metavar="FILE.jsonl", help="the items; by default as they were published")
    parser.add_argument("--prompt", choices=list(task.prompts), help=f"by default {next(iter(task.prompts))}")
    parser.add_argument("--samples", type=int, default=1, help="of every item")
    parser.add_argument("--limit", type=int, help="only the first items")
    add_numbers(parser, **NUMBERS)
    parser.add_argument(
        "--sampling", choices=["checkpoint"], default=argparse.SUPPRESS,
        help="as the checkpoint recommends, in all that no option says",
    )  # fmt: skip
    parser.add_argument("--memory-limit", type=int, metavar="BYTES", default=argparse.SUPPRESS,
                        help="of the cache; on a GPU of all but the weights")  # fmt: skip
    parser.add_argument("--fragmentation", action="store_true", help="measure how eviction tears words")
    _add_unsafe(parser)
    add_device(parser)
    add_types(parser, ["auto", *CONSTANTS["weight_dtypes"]], "auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_unsafe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--unsafe", action="store_true", help="run programs without a sandbox; the results say so")


def run(args: argparse.Namespace) -> int:
    if args.task == "show":
        return _show(args)
    if args.task == "report":
        return eval_report.run(args, Store(args.store))
    if args.task == "regrade":
        store = Store(args.store)
        changed = regrade(store, args.rule, args.data, args.unsafe, progress=not args.quiet)
        results = Results(store.records(rule=args.rule), store.runs())
        print(json.dumps({"changed": changed}) if args.json else f"{changed} grades changed\n\n{results}")
        return 0
    settings = {name: getattr(args, name) for name in ("data", "prompt", "samples", "limit", "unsafe", "fragmentation")}
    settings |= {"out": args.store, "progress": not args.quiet, "command": shlex.join(["skipkv", *args.argv])}
    settings |= numbers(args, (*NUMBERS, *GIVEN))
    if args.task != "calibrate":
        eval_suite.check(args)
    if args.store is not None:
        Store(args.store, create=True)  # refused before the model is loaded
    if args.task == "calibrate":
        return eval_suite.calibrate(args, settings)
    status, make = 0, _evaluations(args)
    if args.ray is not None and not args.suite:
        args.device = "cpu"  # workers compute, here is only asked what the model is
    model = load_model(args)
    try:
        if args.suite:
            return eval_suite.run(args, make, model, settings)
        results = finish(make(args.task, model, args.methods, **settings))
    except KeyboardInterrupt as interrupt:
        if not hasattr(interrupt, "results"):  # nothing had begun
            raise
        results, status = interrupt.results, 130
    print(json.dumps(results.summary().as_dict()) if args.json else results)
    if status and args.store is not None:
        print(f"skipkv: {len(results.records)} texts are in {args.store}; the same command goes on", file=sys.stderr)
    return status


def _evaluations(args: argparse.Namespace) -> Callable[..., Evaluation]:
    """What makes them: on this machine, or over a cluster."""
    if args.ray is None:
        return Evaluation
    path = Path(args.model)
    source = str(path.resolve()) if path.is_dir() else args.model
    return partial(ClusterEvaluation, (source, args.device, args.dtype, args.threads), args.ray or None)


def _show(args: argparse.Namespace) -> int:
    store = Store(args.store)
    records = [r for r in store.records() if args.item in (None, r.item) and (args.method or "") in r.method]
    if args.item is None:
        runs = [_summary(line, [r for r in records if r.run == run]) for run, line in store.runs().items()]
        runs = [row for row in runs if (args.method or "") in row["method"]]
        table = Table(("run", "task", "method", "done", "right", "accuracy, %"), align="<<<>>>")
        for row in runs:
            accuracy = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
            done = f"{row['done']} of {row['total']}"
            table.rows.append((row["run"], row["task"], row["method"], done, row["right"], accuracy))
        print(json.dumps(runs) if args.json else table)
        return 0
    if not records:
        raise ConfigError(f"{args.store}: there is no text of item {args.item!r:.80}; skipkv eval show lists the runs")
    print(json.dumps([r.as_dict() for r in records]) if args.json else "\n\n".join(map(_text, records)))
    return 0


def _summary(line: dict, records: list[Record]) -> dict:
    graded = sum(r.correct is not None for r in records)
    right = sum(bool(r.correct) for r in records)
    items = line.get("items", {})
    total = items.get("n", 0) * items.get("samples", 0)
    return {
        "run": line["run"], "task": line.get("task", ""),
        "method": records[0].method if records else line.get("method", ""),
        "done": len(records), "total": total, "graded": graded, "right": right,
        "accuracy": right / graded if graded else None,
    }  # fmt: skip


def _text(r: Record) -> str:
    verdict = "not graded" if r.correct is None else "right" if r.correct else "wrong"
    parts = [verdict, r.grade and r.grade.found and f"found {r.grade.found!r:.60}", r.grade and r.grade.note]
    parts += [f"{len(r.prompt_tokens)} + {len(r.tokens)} tokens ({r.finish_reason})"]
    parts += ["ran without a sandbox"] if r.grade and r.grade.unsafe else []
    return f"--- {r.task} {r.item}, sample {r.sample}, {r.method}: {', '.join(filter(None, parts))}\n{r.text}"
