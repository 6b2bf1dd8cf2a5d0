"""skipkv eval report"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipkv.errors import ConfigError
from skipkv.eval.figures import NOTE, RunSummary, Summary
from skipkv.eval.records import Record
from skipkv.eval.summary import summarise
from skipkv.model import load
from skipkv.viz.evaluation import Pair, evaluation, pictures
from skipkv.writing import write_whole

HELP = "Sum a store up: a table, a CSV, curves, and a page to look at."


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="DIR", help="of skipkv eval --out")
    parser.add_argument("-o", "--out", dest="folder", metavar="DIR", help="default: report in the store")
    parser.add_argument("--model", help="shows what two methods kept: a directory, a hub id, or tiny")
    parser.add_argument("--pair", metavar='"A;B"', help="these two, as the table names them (default: the first and "
                        "the last that drop something at the smallest budget)")  # fmt: skip
    parser.add_argument("--items", help="whose tokens are shown, comma-separated (default: the first that only one of "
                        "the two solves)")  # fmt: skip
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace, store: Any) -> int:
    """Report on a store: what has ``records(rule=…)`` and ``runs()``."""
    records = store.records()
    summary = summarise(records, store.runs(), store.records(rule="official"))
    if not summary.rows:
        raise ConfigError(f"{args.store}: expected results, found none")
    pairs, note = _pairs(args, summary, records)
    folder = Path(args.folder or Path(args.store) / "report")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "table.md", _markdown(summary).encode("utf-8", "replace"))
    write_whole(folder / "results.csv", summary.csv().encode("utf-8", "replace"))
    for number, (_, part) in enumerate(summary.comparisons()):
        for name, picture in pictures(part).items():
            picture.save(folder / f"{name}{f'-{number + 1}' if number else ''}.svg")
    evaluation(f"skipkv eval: {Path(args.store).resolve().name}", summary, pairs, note).save(folder / "report.html")
    if args.json:
        print(json.dumps({"rows": summary.as_dict(), "report": str(folder)}))
        return 0
    for _, part in summary.comparisons():
        print(f"{part.heading}\n\n{part.table()}\n\n{part.behaviour()}\n")
    print(f"{NOTE}\n\nreport: {folder}")
    return 0


def _markdown(summary: Summary) -> str:
    parts = []
    for _, part in summary.comparisons():
        parts += [f"## {part.heading}", part.table().markdown(), part.behaviour().markdown()]
        parts += dict.fromkeys(f"    {' '.join(row.command.split())}" for row in part.rows if row.command)
    return "\n\n".join([*parts, NOTE]) + "\n"


def _pairs(args: argparse.Namespace, summary: Summary, records: Sequence[Record]) -> tuple[list[Pair], str]:
    """What two methods kept of chosen items, and what stands above it."""
    if args.model is None:
        if args.pair or args.items:
            raise ConfigError("--pair and --items choose what is replayed: they need --model")
        return [], "Left out: without --model there is nothing to replay the texts with."
    rows = _choose(args.pair, summary)
    if rows is None:
        return [], "Left out: no two runs of one comparison."
    firsts: dict[str, dict[str, Record]] = {}
    for record in sorted(records, key=lambda r: -r.sample):
        firsts.setdefault(record.run, {})[record.item] = record
    a, b = (firsts[row.run] for row in rows)
    common = [item for item in dict.fromkeys(r.item for r in records) if item in a and item in b]
    if args.items:
        items = args.items.split(",")
        for item in items:
            if item not in common:
                raise ConfigError(f"items is {item!r:.80}; allowed: items of both {rows[0].name} and {rows[1].name}")
    else:
        items = [item for item in common if a[item].correct != b[item].correct][:1] or common[:1]
    if not items:
        return [], f"Left out: {rows[0].name} and {rows[1].name} have no item in common."
    model = load(args.model, threads=args.threads, progress=not args.quiet)
    full = firsts.get(rows[0].reference, {})
    pairs = []
    for item in items:
        text = full.get(item, a[item])
        replays = [
            model.replay(text.prompt_tokens + text.tokens, str(row.method), n_prompt=len(text.prompt_tokens),
                         sequence=(0, text.sample), trace="scores")
            for row in rows
        ]  # fmt: skip
        about = [f"{row.name}: {_verdict(of[item])}" for row, of in zip(rows, (a, b), strict=True)]
        pairs.append(Pair(item, f"{'; '.join(about)}. The text is that of {text.method}.",
                          tuple(replay.trace for replay in replays)))  # fmt: skip
    steered = " Steering, which a replay has no vector for, is left out." if any(row.steering for row in rows) else ""
    return pairs, f"A recorded text, replayed under two methods. The sliders move together.{steered}"


def _choose(pair: str | None, summary: Summary) -> list[RunSummary] | None:
    """The two runs of one comparison that are named, or the first and the last at the smallest budget."""
    names = [name.strip() for name in pair.split(";")] if pair else []
    if pair and len(names) != 2:
        raise ConfigError(f'pair is {pair!r:.80}; allowed: two names of the table, separated by ";"')
    for _, part in summary.comparisons():
        rows = part.rows
        if pair:
            found = [next((row for row in rows if row.name == name), None) for name in names]
            if all(found):
                return found
            continue
        dropping = [row for row in rows if row.method.name != "full" and not row.steering]
        least = min((row.budget for row in dropping if row.budget), default=None)
        alike = [row for row in dropping if row.budget == least]
        dropping = alike if len(alike) > 1 else dropping
        if len(dropping) > 1:
            return [dropping[0], dropping[-1]]
        if len(rows) > 1:
            return list(rows[:2])
    if pair:
        raise ConfigError(f"pair is {pair!r:.80}; allowed: {', '.join(row.name for row in summary.rows)}")
    return None


def _verdict(record: Record) -> str:
    found = record.grade and record.grade.found
    word = {True: "right", False: "wrong", None: "not graded"}[record.correct]
    return word + (f" ({found[:60]})" if found else "") + (", cut off" if record.truncated else "")
