"""The demo: the model in the box on its problems under several methods, row by row.

problems × (method, steering) → evaluate → one row a run
one problem's text → replay under two methods → traces
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from skipkv.eval.accuracy import evaluate
from skipkv.eval.grading import grade
from skipkv.eval.results import Run
from skipkv.eval.table import Table
from skipkv.methods import CLASSES, Full, Method
from skipkv.model import Model
from skipkv.steering import Steering
from skipkv.trace import Trace

METHODS = ("streaming", "h2o", "snapkv", "rkv", "random", "skipkv")
STEERED = ("rkv", "skipkv")  # once more with steering, as full is
INTERVAL = 32  # of all methods: the traces are short
TAU = 0.8  # similarity that makes a sentence a repeat: this model's sentences are less alike than those of larger ones
ALPHA = 0.75  # of steering; it and TAU were chosen on problems of the stream "choose"
ROWS = 32  # in flight at once


def make_method(name: str, budget: int, protect: str, tau: float) -> Method:
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
            return Run(share, outcome, texts)

        first = go(Full(tau=tau), None, None)
        longest = max(len(out.tokens) for out in first.texts)
        prompt = max(len(out.prompt_tokens) for out in first.texts)
        made = {}
        for share in shares:
            budget = max(1, round(share * first.outcome.length))
            made[share] = {name: make_method(name, budget, protect, tau) for name in METHODS}
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


def table(runs: Iterable[Run] = ()) -> Table:
    """The demo's table."""
    columns = ("method", "budget", "accuracy, %", "length", "peak kB", "tokens/s", "cut")
    return Table(columns, [cells(run) for run in runs], (20, 10, 20, 6, 7, 8, 3), "<>>>>>>")


def cells(run: Run) -> tuple[str, ...]:
    o = run.outcome
    return (
        run.method.name + (" + steering" if run.steered else ""),
        "" if run.share is None else f"{run.method.budget} ({100 * run.share:.0f} %)",
        f"{100 * o.accuracy:.1f} ({100 * o.low:.1f}–{100 * o.high:.1f})",
        f"{o.length:.1f}", f"{o.peak_bytes / 1e3:.1f}", f"{o.tokens_per_second:.0f}", f"{o.truncated}",
    )  # fmt: skip


NOTE = (
    "accuracy: with its 95 % interval (Wilson); length: mean tokens, prompt included; peak: the most cache bytes, mean "
    "over problems;\ntokens/s depends on the machine; cut: texts that ran to the limit. "
    "A test bench whose texts repeat themselves by construction, not a benchmark result."
)
