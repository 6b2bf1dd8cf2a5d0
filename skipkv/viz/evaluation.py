"""The report of a store: tables, accuracy and length against budget, what two methods kept of chosen items.

Summary → comparisons: tables, curves, settings, commands ─┐
traces of an item → kept, kept ────────────────────────────┴→ one page
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skipkv.eval.figures import NOTE, Summary
from skipkv.trace import Trace
from skipkv.viz.curves import NAME, Picture, curve
from skipkv.viz.page import Page, asset, fill
from skipkv.viz.report import frame


@dataclass(frozen=True)
class Pair:
    """One item under two methods.

    Attributes
    ----------
    item : str
    about : str
        What became of it.
    traces : (Trace, Trace)
        Of the same text.
    """

    item: str
    about: str
    traces: tuple[Trace, Trace]


def pictures(summary: Summary) -> dict[str, Picture]:
    """Accuracy and length of one comparison's runs against their budgets; what nothing is known of is left out."""
    names = [name for name in ("accuracy", "length") if any(getattr(row, name) for row in summary.rows)]
    titles = {name: f"{name.capitalize()} against budget: {summary.heading}" for name in names}
    return {name: curve(summary.rows, name, title=title[:NAME]) for name, title in titles.items()}


def evaluation(title: str, summary: Summary, pairs: Sequence[Pair] = (), note: str = "") -> Page:
    """The page.

    Parameters
    ----------
    title : str
    summary : Summary
    pairs : sequence of Pair
    note : str
        Stands above them, or says why there are none.
    """
    values = {
        "style": asset("report.css"), "title": html.escape(title), "note": html.escape(note),
        "comparisons": "".join(_comparison(shared, part) for shared, part in summary.comparisons()),
        "pairs": "".join(_pair(pair) for pair in pairs),
    }  # fmt: skip
    # In one pass: what is put in is not looked at again.
    body = re.sub(r"\[\[(\w+)\]\]", lambda match: values[match[1]], asset("evaluation.html"))
    return Page(fill(title, body, ("report.js",)), title, 900)


def _comparison(shared: Mapping[str, Any], part: Summary) -> str:
    tables = "".join(f'<div class="wide">{t._repr_html_()}</div>' for t in (part.table(), part.behaviour()))
    drawn = "".join(f'<div class="wide">{picture.inline()}</div>' for picture in pictures(part).values())
    settings = html.escape(json.dumps(shared, indent=1, ensure_ascii=False, default=str))
    commands = html.escape("\n".join(f"{row.name}\n    {row.command or 'not recorded'}" for row in part.rows))
    return (
        f"<section><h2>{html.escape(part.heading)}</h2>{tables}<p><small>{html.escape(NOTE)}</small></p>"
        f'<div class="pair">{drawn}</div><h3>Each row again</h3><pre>{commands}</pre>'
        f"<details><summary>What all of them share</summary><pre>{settings}</pre></details></section>"
    )


def _pair(pair: Pair) -> str:
    frames = "".join(frame(trace, pair.item) for trace in pair.traces)
    return (
        f"<h3>{html.escape(pair.item)}</h3><p>{html.escape(pair.about)}</p>"
        f'<div class="pair">{frames}</div>'
    )  # fmt: skip
