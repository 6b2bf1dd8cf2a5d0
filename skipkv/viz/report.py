"""The demo's report: accuracy against budget, the table, and what two methods kept of one problem.

runs → curve, table ─┐
traces → kept, kept ─┴→ one page; the kept tokens stand in frames of their own whose sliders move together
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from skipkv.eval.results import Run
from skipkv.trace import Trace
from skipkv.viz.curves import curve
from skipkv.viz.page import Page, asset, fill
from skipkv.viz.views import kept

TITLE = "skipkv demo: what a compressed cache costs"
TRAINED = ", and the model was trained with hidden slots, to live with an evicting cache"


def report(runs: Sequence[Run], problem: dict[str, str], number: int, a: Trace, b: Trace, which: str = "") -> Page:
    """The report of one demo.

    Parameters
    ----------
    runs : sequence of Run
        Of `skipkv.eval.demo`; the full cache first.
    problem : {"prompt", "answer"}
    number : int
        Which of the problems it is.
    a, b : Trace
        Of its text under two methods.
    which : str
        What all problems share.
    """
    first = runs[0].outcome
    model = str(a.settings.get("model", ""))
    values = {
        "style": asset("report.css"),
        "model": "The reasoning model in the box" if model == "tiny" else f"The model {html.escape(model)}",
        "trained": TRAINED if model == "tiny" else "",
        "which": html.escape(f" ({which})" if which else ""),
        "problems": f"{first.n}",
        "length": f"{first.length:.0f}",
        "common": html.escape(_common(runs)),
        "curve": curve(runs, title=f"Accuracy against budget, {first.n} problems").inline(),
        "table": _table(runs),
        "number": f"{number}",
        "prompt": html.escape(problem["prompt"]),
        "answer": html.escape(problem["answer"]),
        "frames": "".join(frame(trace, f"problem {number}") for trace in (a, b)),
    }
    # In one pass: a prompt that says [[frames]] is a prompt.
    body = re.sub(r"\[\[(\w+)\]\]", lambda match: values[match[1]], asset("report.html"))
    return Page(fill(TITLE, body, ("report.js",)), TITLE, 900)


def _common(runs: Sequence[Run]) -> str:
    method = runs[-1].method
    shared = f"interval={method.interval}, window={method.window}, tau={method.tau:g}, protect={method.protect}"
    steering = next((run.outcome.steering for run in runs if run.steered), None)
    return shared + (f"; steering: layer={steering.layer},alpha={steering.alpha:g}" if steering else "")


def frame(trace: Trace, what: str) -> str:
    """The kept tokens of a trace, in a frame of their own under the method's name."""
    title, page = html.escape(f"{trace.method}, {what}"), html.escape(kept(trace).html)
    inside = f'<iframe title="{title}" sandbox="allow-scripts" srcdoc="{page}"></iframe>'
    return f"<div><h3>{html.escape(trace.method.name)}</h3>{inside}</div>"


def _table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        o = run.outcome
        cells = [
            run.method.name + (" + steering" if run.steered else ""),
            "" if run.share is None else f"{run.method.budget} ({100 * run.share:.0f} %)",
            f"{100 * o.accuracy:.1f}", f"{100 * o.low:.1f}–{100 * o.high:.1f}", f"{o.length:.1f}",
            f"{o.peak_bytes / 1e3:.1f}", f"{o.tokens_per_second:.0f}", f"{o.truncated}",
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)
