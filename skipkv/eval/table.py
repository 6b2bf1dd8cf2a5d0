"""The one table writer: aligned text for people, Markdown, a table in Jupyter."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

GAP = "  "


@dataclass(eq=False)
class Table:
    """Rows of cells under the names of their columns.

    Parameters
    ----------
    columns : sequence of str
    rows : list of sequences
        Cells are written as they are (``str``).
    widths : sequence of int, optional
        Of the columns, for tables whose lines are printed as they come; by default as wide as the cells are.
    align : str
        ``<`` or ``>`` for each column; all to the left by default.
    """

    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    widths: Sequence[int] | None = None
    align: str = ""

    def line(self, cells: Iterable[Any]) -> str:
        """One row as text."""
        lines = [self.columns, *self.rows]
        widths = self.widths or [max(len(str(line[i])) for line in lines) for i in range(len(self.columns))]
        sides = self.align or "<" * len(self.columns)
        return GAP.join(f"{cell!s:{s}{w}}" for cell, s, w in zip(cells, sides, widths, strict=True)).rstrip()

    @property
    def head(self) -> str:
        """The names of the columns as text."""
        return self.line(self.columns)

    def __str__(self) -> str:
        return "\n".join(map(self.line, [self.columns, *self.rows]))

    __repr__ = __str__

    def markdown(self) -> str:
        """A table of Markdown; what a cell holds is no markup."""

        def row(cells: Iterable[Any]) -> str:
            texts = (re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(str(cell).split())) for cell in cells)
            return "| " + " | ".join(texts) + " |"

        sides = self.align or "<" * len(self.columns)
        return "\n".join([row(self.columns), "|" + "".join("---:|" if s == ">" else "---|" for s in sides),
                          *map(row, self.rows)])  # fmt: skip

    def _repr_html_(self) -> str:
        def row(cells: Iterable[Any], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return f"<table><thead>{row(self.columns, 'th')}</thead><tbody>{body}</tbody></table>"
