"""The demo: the model in the box on its problems under several methods, row by row.

problems × (method, steering) → Evaluation → one row a run
one problem's text → replay under two methods → traces
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from skipkv.checks import instance, many, number, text_of, wrong
from skipkv.errors import ConfigError
from skipkv.eval.results import Run
from skipkv.eval.table import Table
from skipkv.eval.tasks import Item
from skipkv.eval.work import Evaluation
from skipkv.model import Model
from skipkv.steering import Steering
from skipkv.trace import Trace

METHODS = ("streaming", "h2o", "snapkv", "rkv", "random", "skipkv")
STEERED = ("rkv", "skipkv")  # once more with steering, as full is
INTERVAL = 32  # of all methods: the traces are short
TAU = 0.8  # similarity that makes a sentence a repeat: this model's sentences are less alike than those of larger ones
ALPHA = 0.75  # of steering; it and TAU were chosen on problems of the stream "choose"
ROWS = 32  # in flight at once


def method(name: str, budget: str, protect: str, tau: float) -> str:
    # Only skipkv acts on tau; the others count repeated sentences by it.
    return f"{name}:budget={budget},interval={INTERVAL},tau={tau},protect={protect}"


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
    full = f"full:tau={number('tau', tau, -1, 2)}"
    instance("model", model, Model).check_steering(steering)
    asked = [(full, None)] + [(full, steering)] * (steering is not None)
    text_of("protect", protect)
    for share in many(shares):
        share = number("shares", share, 1e-6, 1, "shares above 0, up to 1")
        methods = {name: method(name, f"{100 * share:.12g}%", protect, tau) for name in METHODS}
        asked += [(text, None) for text in methods.values()]
        asked += [(methods[name], steering) for name in STEERED if steering]
    items = []
    for i, problem in enumerate(many(problems)):
        if not isinstance(problem, Mapping) or not {"prompt", "answer"} <= problem.keys():
            raise wrong("problems", problem, "objects with a prompt and an answer")
        items.append(Item(str(i), problem["prompt"], problem["answer"]))
    made = Evaluation("tiny", model, asked, items, progress=progress, rows=ROWS)
    for run in made.rows():
        yield Run(run.share, made.outcome(run), made.records(run))


def side_by_side(model: Model, runs: Sequence[Run]) -> tuple[int, Trace, Trace]:
    """One problem's full text, replayed under rkv and skipkv at the smallest budget.

    Returns
    -------
    problem : int
        The first that skipkv answers and rkv does not; the first of all where there is none.
    rkv, skipkv : Trace

    Raises
    ------
    ConfigError
        The runs are not those of `demo`.
    """
    runs = [instance("runs", run, Run) for run in many(runs)]
    least = min((run.share for run in runs if run.share is not None), default=None)
    pair = {run.method.name: run for run in runs if run.share == least and not run.steered}
    if not {"rkv", "skipkv"} <= pair.keys():
        raise ConfigError(f"runs: expected those of a demo, found {len(runs)} without rkv and skipkv")
    full = runs[0]
    texts = zip(pair["skipkv"].texts, pair["rkv"].texts, strict=True)
    problem = next((i for i, (skipkv, rkv) in enumerate(texts) if skipkv.correct and not rkv.correct), 0)
    ids = full.texts[problem].prompt_tokens + full.texts[problem].tokens
    traces = [
        model.replay(ids, pair[name].method, n_prompt=len(full.texts[problem].prompt_tokens), trace="scores").trace
        for name in ("rkv", "skipkv")
    ]
    return problem, traces[0], traces[1]


def table(runs: Iterable[Run] = ()) -> Table:
    """The demo's table."""
    columns = ("method", "budget", "accuracy, %", "length", "peak kB", "tokens/s", "cut")
    rows = [cells(instance("runs", run, Run)) for run in many(runs)]
    return Table(columns, rows, (20, 10, 20, 6, 7, 8, 3), "<>>>>>>")


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
