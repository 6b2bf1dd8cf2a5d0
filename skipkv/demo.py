"""The demo: the model in the box on its problems under several methods, as a table and as a report.

problems × (method, steering) → generate → graded → one row a run ─┐
one problem's text → replay under two methods → kept tokens ───────┴→ report (skipkv.viz.report)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from skipkv.errors import ConfigError
from skipkv.generate import Generation
from skipkv.methods import CLASSES, Full, Method
from skipkv.model import Model, load
from skipkv.steering import Steering
from skipkv.tiny import problems as tiny
from skipkv.trace import Trace

METHODS = ("streaming", "h2o", "snapkv", "rkv", "random", "skipkv")
STEERED = ("rkv", "skipkv")  # once more with steering, as full is
INTERVAL = 32  # of all methods: the traces are short
TAU = 0.8  # similarity that makes a sentence a repeat: this model's sentences are less alike than those of larger ones
ALPHA = 0.75  # of steering; it and TAU were chosen on problems of the stream "choose"
ROWS = 32  # in flight at once

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def grade(text: str, answer: str) -> bool:
    """Whether the last ``\\boxed{…}`` holds the answer."""
    found = BOXED.findall(text)
    return bool(found) and found[-1].strip() == answer


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@dataclass(frozen=True)
class Outcome:
    """One run over all problems.

    Attributes
    ----------
    run : str
    right, n : int
    low, high : float
        95 % interval (Wilson) of the accuracy right / n.
    length : float
        Mean tokens, prompt included.
    truncated : int
        Texts that ran into the limit.
    peak_bytes : float
        Mean over problems of the most cache bytes.
    flagged : float
        Share of sentences that a later one repeats.
    steered : int
    tokens_per_second : float
    """

    run: str
    right: int
    n: int
    low: float
    high: float
    length: float
    truncated: int
    peak_bytes: float
    flagged: float
    steered: int
    tokens_per_second: float

    @property
    def accuracy(self) -> float:
        return self.right / self.n


def evaluate(
    model: Model,
    problems: Sequence[dict[str, str]],
    method: str | Method,
    steering: Steering | None = None,
    *,
    done: Callable[[], object] | None = None,
    **options: Any,
) -> tuple[Outcome, list[Generation]]:
    """Run all problems under one method.

    Parameters
    ----------
    model : Model
    problems : sequence of {"prompt", "answer"}
    method : str or Method
    steering : Steering, optional
    done : callable, optional
        Called when a text has ended.
    options
        As for `Model.stream`.

    Raises
    ------
    ConfigError
        There is no problem, or as for `Model.stream`.
    KeyboardInterrupt
        Ctrl-C was pressed before all texts had ended.
    """
    if not problems:
        raise ConfigError("problems hold none; allowed: at least one")
    begin = time.perf_counter()
    outs = []
    for event in model.stream([p["prompt"] for p in problems], method, steering, **options):
        if event.generation:
            outs.append(event.generation)
            if done:
                done()
    seconds = time.perf_counter() - begin
    if any(out.finish_reason == "interrupted" for out in outs):
        raise KeyboardInterrupt
    outs.sort(key=lambda out: out.prompt)
    right = sum(grade(out.text, p["answer"]) for out, p in zip(outs, problems, strict=True))
    n = len(outs)
    sentences = sum(out.stats.sentences for out in outs)
    name = str(method) + (f"+steer:layer={steering.layer},alpha={steering.alpha:g}" if steering else "")
    outcome = Outcome(
        name, right, n, *wilson(right, n),
        length=sum(len(out.prompt_tokens) + len(out.tokens) for out in outs) / n,
        truncated=sum(out.finish_reason in ("length", "context") for out in outs),
        peak_bytes=sum(out.stats.peak_bytes for out in outs) / n,
        flagged=sum(out.stats.flagged for out in outs) / max(1, sentences),
        steered=sum(out.stats.steered for out in outs),
        tokens_per_second=sum(len(out.tokens) for out in outs) / seconds,
    )  # fmt: skip
    return outcome, outs


@dataclass(frozen=True)
class Run:
    """One row of the demo's table.

    Attributes
    ----------
    method : Method
    share : float or None
        Its budget as a share of the full cache's mean length.
    steered : bool
    outcome : Outcome
    texts : list of Generation
        In the order of the problems.
    """

    method: Method
    share: float | None
    steered: bool
    outcome: Outcome
    texts: list[Generation]

    @property
    def label(self) -> str:
        """Method, budget and steering, without what all runs share."""
        budget = f":budget={self.method.budget}" if self.share is not None else ""
        return self.method.name + budget + ("+steering" if self.steered else "")

    def as_dict(self) -> dict[str, Any]:
        budget = self.method.budget if self.share is not None else None
        row = {"method": self.method.name, "budget": budget, "share": self.share, "steering": self.steered}
        return row | dataclasses.asdict(self.outcome) | {"accuracy": self.outcome.accuracy}


def _method(name: str, budget: int, protect: str, tau: float) -> Method:
    # Only skipkv acts on tau; the others count repeated sentences by it.
    return CLASSES[name](budget=budget, interval=INTERVAL, tau=tau, protect=protect)


def demo(
    model: Model,
    problems: Sequence[dict[str, str]],
    shares: Sequence[float] = (0.25, 0.5),
    steering: Steering | None = None,
    *,
    protect: str = "none",
    tau: float = TAU,
    progress: bool = True,
) -> Iterator[Run]:
    """The same problems under seven methods, row by row.

    The full cache runs first; budgets are shares of the mean length that it gives.

    Parameters
    ----------
    model : Model
    problems : sequence of {"prompt", "answer"}
    shares : sequence of float
    steering : Steering, optional
        With it full, rkv and skipkv run once more.
    protect, tau
        As for the methods.
    progress : bool
        Show a bar on a terminal.

    Yields
    ------
    Run

    Raises
    ------
    ConfigError
        A budget cannot hold what is protected; before anything but the full cache has run.
    """
    per_share = len(METHODS) + (len(STEERED) if steering else 0)
    total = (1 + bool(steering) + per_share * len(shares)) * len(problems)
    longest = 0
    with tqdm(total=total, unit="text", leave=False, disable=None if progress else True) as bar:

        def go(method: Method, share: float | None, vector: Steering | None) -> Run:
            bar.set_description(method.name + (" + steering" if vector else ""))
            # A text that loops ends at twice the longest of the full cache.
            options = {"rows": ROWS, "max_new_tokens": 2 * longest or 4096}
            outcome, texts = evaluate(model, problems, method, vector, done=bar.update, **options)
            return Run(method, share, vector is not None, outcome, texts)

        first = go(Full(tau=tau), None, None)
        longest = max(len(out.tokens) for out in first.texts)
        prompt = max(len(out.prompt_tokens) for out in first.texts)
        made = {}
        for share in shares:
            budget = max(1, round(share * first.outcome.length))
            made[share] = {name: _method(name, budget, protect, tau) for name in METHODS}
            for method in made[share].values():
                method.check_prompt(prompt)  # refused now rather than after half of the table
        yield first
        if steering:
            yield go(Full(tau=tau), None, steering)
        for share in shares:
            for name in METHODS:
                yield go(made[share][name], share, None)
            for name in STEERED if steering else ():
                yield go(made[share][name], share, steering)


def side_by_side(model: Model, problems: Sequence[dict[str, str]], runs: Sequence[Run]) -> tuple[int, Trace, Trace]:
    """One problem's full text, replayed under rkv and skipkv at the smallest budget.

    Returns
    -------
    problem : int
        The first that skipkv answers and rkv does not; the first of all where there is none.
    rkv, skipkv : Trace
    """
    full = runs[0]
    least = min(run.share for run in runs if run.share is not None)
    pair = {run.method.name: run for run in runs if run.share == least and not run.steered}
    right = {
        name: [grade(out.text, p["answer"]) for out, p in zip(pair[name].texts, problems, strict=True)]
        for name in ("rkv", "skipkv")
    }
    found = (i for i in range(len(problems)) if right["skipkv"][i] and not right["rkv"][i])
    problem = next(found, 0)
    ids = full.texts[problem].prompt_tokens + full.texts[problem].tokens
    traces = [
        model.replay(ids, pair[name].method, n_prompt=len(full.texts[problem].prompt_tokens), trace="scores").trace
        for name in ("rkv", "skipkv")
    ]
    return problem, traces[0], traces[1]


HEAD = f"{'method':<20}{'budget':>12}{'accuracy, %':>22}{'length':>8}{'peak kB':>9}{'tokens/s':>10}{'cut':>5}"


def row(run: Run) -> str:
    """A row under `HEAD`."""
    o = run.outcome
    budget = "" if run.share is None else f"{run.method.budget} ({100 * run.share:.0f} %)"
    accuracy = f"{100 * o.accuracy:.1f} ({100 * o.low:.1f}–{100 * o.high:.1f})"
    name = run.method.name + (" + steering" if run.steered else "")
    return (
        f"{name:<20}{budget:>12}{accuracy:>22}{o.length:>8.1f}{o.peak_bytes / 1e3:>9.1f}"
        f"{o.tokens_per_second:>10.0f}{o.truncated:>5}"
    )


NOTE = (
    "accuracy: with its 95 % interval (Wilson); length: mean tokens, prompt included; peak: the most cache bytes, mean "
    "over problems;\ntokens/s depends on the machine; cut: texts that ran to the limit. "
    "A test bench whose texts repeat themselves by construction, not a benchmark result."
)


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The command line of the demo."""
    d = command("demo", main, "The model in the box under seven methods: a table, and a report to look at.")
    d.add_argument("--problems", type=int, default=100, metavar="N", help="held-out problems (default 100)")
    d.add_argument("--budgets", default="0.25,0.5", help="shares of the full cache's mean length, comma-separated")
    d.add_argument("--steps", default="4-8", help="of the problems: fewest-most (default 4-8)")
    d.add_argument("--brief", action="store_true", help="problems that ask for fewer re-checks")
    d.add_argument("--protect", default="none", help="none, prompt, sinks:N")
    d.add_argument("--tau", type=float, default=TAU, help="similarity from which on a sentence is a repeat")
    d.add_argument("--model", default="tiny", metavar="DIR", help="another checkpoint of skipkv.tiny.train")
    d.add_argument("--steering", metavar="FILE", help="the steering vector; by default that of the model in the box")
    d.add_argument("--threads", type=int)
    d.add_argument("-o", "--out", default="skipkv-demo.html", metavar="FILE.html", help="the report")
    d.add_argument("--open", action="store_true", help="open the report in a browser")
    d.add_argument("--json", action="store_true", help="for machines")
    d.add_argument("--quiet", action="store_true", help="no progress")


def main(args: argparse.Namespace) -> int:
    from skipkv.viz.report import report

    shares = _shares(args.budgets)
    level = dataclasses.replace(tiny.Level(), steps=_steps(args.steps), brief=float(args.brief))
    if args.problems < 1:
        raise ConfigError(f"problems is {args.problems}; allowed: integers from 1")
    _method("skipkv", 1 << 20, args.protect, args.tau)  # refuses what could not run later
    problems = tiny.draw(args.problems, level=level)
    begin = time.perf_counter()
    model = load(args.model, threads=args.threads, progress=False)
    vector = args.steering or ("tiny" if args.model == "tiny" else None)
    steering = Steering.load(vector, alpha=ALPHA) if vector else None
    runs = []
    if not args.json:
        print(f"{len(problems)} held-out problems, the same prompts for every run\n\n{HEAD}", flush=True)
    for run in demo(model, problems, shares, steering, protect=args.protect, tau=args.tau, progress=not args.quiet):
        runs.append(run)
        if not args.json:
            tqdm.write(row(run), file=sys.stdout)
    problem, *traces = side_by_side(model, problems, runs)
    which = f"{args.steps} steps{', asked for few re-checks' if args.brief else ''}"
    page = report(runs, problems[problem], problem, *traces, which=which)
    page.save(args.out)
    path = Path(args.out).resolve()
    if args.json:
        print(json.dumps({"problems": len(problems), "runs": [run.as_dict() for run in runs], "report": str(path)}))
    else:
        print(f"\n{NOTE}\n\nreport: {path} ({time.perf_counter() - begin:.0f} s)")
    if args.open:
        webbrowser.open(path.as_uri())
    return 0


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
    most = len(tiny.NAMES) - 1
    if not 1 <= low <= high <= most:
        raise ConfigError(f"steps is {text!r}; allowed: fewest-most from 1 to {most}")
    return low, high
