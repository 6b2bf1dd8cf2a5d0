"""Accuracy, length or fidelity against budget, drawn by matplotlib.

results → series: runs alike but for their budget → points (x, y, low, high) → line, markers, 95 % intervals
"""

from __future__ import annotations

import html
import io
import math
import os
import re
import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from skipkv.checks import many, one_of, path_of, text_of, wrong
from skipkv.errors import ConfigError
from skipkv.eval.figures import RunSummary
from skipkv.eval.results import Fidelity, Outcome, Run
from skipkv.run import Interrupt
from skipkv.steering import Steering
from skipkv.viz.page import asset
from skipkv.writing import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key = tuple[str, tuple[tuple[str, Any], ...], str]  # of runs joined by a line: method, all but its budget, steering
WIDTH, HEIGHT = 7.6, 4.0  # of the drawing without its legend, in inches
NAME = 90  # characters of a name that fit beside the legend's lines
DODGE = 3.5  # points between the intervals of different series at one budget
MARKERS = "osD^vPX*<>"
DASHES = ("-", "--", ":", "-.")
# Metadata that would differ from one file to the next, or name addresses, is left out.
FORMATS: dict[str, dict[str, None]] = {
    ".png": {"Software": None}, ".pdf": {"CreationDate": None},
    ".svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),
}  # fmt: skip
STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"], "font.size": 9.5,
    "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "axes.spines.left": False, "axes.spines.right": False,
    "axes.spines.top": False, "ytick.major.size": 0, "lines.markersize": 5.5, "errorbar.capsize": 2.5,
    "legend.frameon": False, "legend.fontsize": 9, "text.parse_math": False, "svg.fonttype": "none",
    "svg.hashsalt": "skipkv", "savefig.dpi": 150, "figure.constrained_layout.h_pad": 0.07,
}  # fmt: skip
# By kind of result: what can be drawn, its label and its factor; a share in % ends at 100.
MEMORY = "peak cache, MB"
BOTH = {"peak_bytes": (MEMORY, 1e-6), "flagged": ("sentences that a later one repeats, %", 100.0)}
TASK = {"accuracy": ("accuracy, %", 100.0), "length": ("mean length, tokens", 1.0)}
AXES: dict[type, dict[str, tuple[str, float]]] = {
    Outcome: {**TASK, **BOTH},
    RunSummary: {**TASK, "peak_bytes": BOTH["peak_bytes"]},
    Fidelity: {
        "kl": ("KL divergence from the full cache, nats a token", 1.0),
        "nll": ("negative log-likelihood, nats a token", 1.0),
        "delta_nll": ("nll less that of the full cache, nats a token", 1.0),
        "same": ("same best token as the full cache, %", 100.0),
        **BOTH,
    },
}


@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """A drawing that shows itself in Jupyter.

    Attributes
    ----------
    figure : matplotlib.figure.Figure
    title : str
    """

    figure: Figure
    title: str

    def __repr__(self) -> str:
        return f"<Picture {self.title!r}; save(path) writes it>"

    def _repr_svg_(self) -> str:
        return self._drawn(".svg").decode()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture as what the name ends in: .png, .pdf or .svg; anything else is a `ConfigError`."""
        write_whole(path, self._drawn(suffix_of("path", path)))

    def inline(self) -> str:
        """The SVG as part of a page, in that page's colours, whether light or dark."""
        names = {colour: name for name, colour in palette().items()}
        svg = re.sub("|".join(names), lambda match: f"var(--{names[match[0]]})", self._repr_svg_())
        return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(self.title)}"', 1)

    def _drawn(self, suffix: str) -> bytes:
        file = io.BytesIO()
        with _drawing(STYLE):
            self.figure.savefig(file, format=suffix[1:], metadata=FORMATS[suffix])
        return file.getvalue()


def suffix_of(name: str, path: str | os.PathLike[str]) -> str:
    """What a picture's file name ends in; `ConfigError`, which names the parameter, if pictures are not written so."""
    suffix = path_of(name, path).suffix.lower()
    if suffix not in FORMATS:
        raise wrong(name, str(path), f"names that end in {', '.join(FORMATS)}")
    return suffix


def curve(
    results: Sequence[Outcome] | Sequence[Run] | Sequence[RunSummary] | Sequence[Fidelity],
    y: str | None = None,
    *,
    x: str = "budget",
    title: str | None = None,
) -> Picture:
    """A figure of results against the budget; runs that differ in nothing else are joined by a line.

    Parameters
    ----------
    results : sequence of Outcome, of Run, of RunSummary, or of Fidelity
        As `evaluate`, `demo`, `summarise` and `compare` of `skipkv.eval` give them. A run without a budget
        (``full``) is drawn as a level line with its interval as a band.
    y : str, optional
        For outcomes and runs accuracy (default), length, peak_bytes or flagged; for summaries accuracy (default),
        length or peak_bytes; for fidelities kl (default), nll, delta_nll, same, peak_bytes or flagged. Intervals
        (95 %) are drawn where the results have them: Wilson's of an outcome's accuracy, else of a bootstrap.
    x : "budget" or "peak_bytes"
        Slots a head (the mean where heads differ), or the most cache bytes.

    Raises
    ------
    ConfigError
        There is nothing to draw, results are of different kinds, or a name is unknown.
    """
    results = [r.outcome if isinstance(r, Run) else r for r in many(results)]
    kinds = {type(r) for r in results}
    axes = AXES.get(kinds.pop()) if len(kinds) == 1 else None
    if axes is None:
        found = ", ".join(dict.fromkeys(type(r).__name__ for r in results)) or "none"
        raise ConfigError(f"results hold {found}; allowed: at least one Outcome, or at least one Fidelity")
    y = next(iter(axes)) if y is None else y
    one_of("y", y, axes, str)
    one_of("x", x, ("budget", "peak_bytes"), str)
    if title is not None:
        text_of("title", title)
    series = group(results, y, x)
    if not series:
        raise ConfigError(f"results have no finite {y}; allowed: at least one")
    what = axes[y][0].split(",")[0]
    title = _printable(title or f"{what[0].upper()}{what[1:]} against {'budget' if x == 'budget' else 'peak cache'}")
    return Picture(_draw(series, axes[y][0], x, title), title)


def group(results: Sequence[Any], y: str, x: str) -> dict[Key, np.ndarray]:
    """Points [n, 4] of each series: x (NaN where there is no budget), y, low, high; those that are finite."""
    found: dict[Key, list[tuple[float, ...]]] = {}
    for r in results:
        method, steering = r.method, r.steering
        if isinstance(steering, Steering):
            steering = f"layer={steering.layer},alpha={steering.alpha:g}"
        value = (r.accuracy, r.low, r.high) if y == "accuracy" and isinstance(r, Outcome) else getattr(r, y)
        span = AXES[type(r)][y][1] * _span(value)
        where = np.mean(getattr(method, "budget", math.nan)) if x == "budget" else _span(r.peak_bytes)[0] * 1e-6
        if np.isfinite(span).all():
            settings = tuple((f.name, getattr(method, f.name)) for f in fields(method) if f.name != "budget")
            found.setdefault((method.name, settings, steering or ""), []).append((where, *span))
    return {key: np.array(sorted(points)) for key, points in found.items()}


def _span(value: Any) -> np.ndarray:
    """Value, low, high; what has no interval is its own."""
    value, low, high = value if isinstance(value, tuple) else (value, None, None)
    return np.array([value, *(value if end is None else end for end in (low, high))], np.float64)


def name_of(key: Key, among: Collection[Key]) -> str:
    """The method, and what tells this series from others of that method."""
    text, settings, steering = key
    alike = [dict(other) for method, other, _ in among if method == text]
    told = [
        f"{name}={getattr(value, '__name__', value)}" for name, value in settings
        if callable(value) or any(other[name] != value for other in alike)
    ]  # fmt: skip
    text += f" ({', '.join(told)})" if told else ""
    if steering:
        text += " + steering" if len({other for *_, other in among} - {""}) == 1 else f" + steering ({steering})"
    return _printable(text if len(text) <= NAME else text[: NAME - 1] + "…")


def palette() -> dict[str, str]:
    """Names and colours of the pages' style, those for light paper, of which pictures are made."""
    light = asset("page.css").partition("@media")[0]
    return dict(re.findall(r"--(ink|dim|line|paper|s\d): (#[0-9a-f]{6})", light))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


@contextmanager
def _drawing(style: dict[str, Any]) -> Iterator[None]:
    """matplotlib in this style; Ctrl-C waits until it is done, as its C code makes other exceptions of one."""
    from matplotlib import rc_context

    with Interrupt() as interrupt, rc_context(style):
        before = interrupt.seen
        yield
    if interrupt.seen and not before:
        signal.raise_signal(signal.SIGINT)


def _draw(series: dict[Key, np.ndarray], label: str, x: str, title: str) -> Figure:
    from matplotlib.figure import Figure

    colours = palette()
    theme = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), colours["ink"]),
        **dict.fromkeys(("axes.edgecolor", "xtick.color"), colours["dim"]), "grid.color": colours["line"],
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), colours["paper"]),
    }  # fmt: skip
    names = [name_of(key, series) for key in series]
    columns = max(1, min(4, len(names), 105 // (max(map(len, names)) + 7)))
    points = np.concatenate(list(series.values()))
    placed = [key for key, of in series.items() if x == "budget" and np.isfinite(of[-1, 0])]
    methods = list(dict.fromkeys(key[:2] for key in series))
    with _drawing(STYLE | theme):
        figure = Figure((WIDTH, HEIGHT + 0.19 * math.ceil(len(names) / columns)), layout="constrained")
        axes = figure.add_subplot(title=title, ylabel=label)
        for (key, of), name in zip(series.items(), names, strict=True):
            # One method with and without steering has one colour and marker; a round further, other dashes.
            around, i = divmod(methods.index(key[:2]), len(MARKERS))
            variant = [other for other in series if other[:2] == key[:2]].index(key)
            shift = (placed.index(key) - (len(placed) - 1) / 2) * DODGE if key in placed else 0.0
            _draw_series(axes, of, shift, {
                "label": name, "color": colours[f"s{i}"], "marker": MARKERS[i], "markeredgecolor": colours["paper"],
                "linestyle": DASHES[(variant + around) % len(DASHES)], "markeredgewidth": 0.7,
            })  # fmt: skip
        _scale_x(axes, np.unique(points[np.isfinite(points[:, 0]), 0]), x)
        _scale_y(axes, points[:, 2].min(), points[:, 3].max(), 100.0 if label.endswith("%") else math.inf)
        note = "bars and bands: 95 % intervals" if (points[:, 2] != points[:, 3]).any() else "no intervals recorded"
        legend = figure.legend(loc="outside lower left", ncols=columns, title=note, alignment="left", handlelength=3.2)
        legend.get_title().set(color=colours["dim"], fontsize=8.5)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # placed once, so that every file of it is the same
    return figure


def _scale_x(axes: Axes, xs: np.ndarray, x: str) -> None:
    """Logarithmic from a factor of 4 on; a tick at every budget as long as they are few."""
    xs = xs if len(xs) else np.ones(1)
    logarithmic = 0 < 4 * xs[0] <= xs[-1]
    at = np.log2(xs) if logarithmic else xs
    limits = at[[0, -1]] + np.array([-1, 1]) * (0.08 * (at[-1] - at[0]) or 1.0)
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.set_xlim(*(2.0**limits if logarithmic else limits))
    if x == "budget":
        axes.set_xticks(xs[:: math.ceil(len(xs) / 12)])
        axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(("budget, slots a head" if x == "budget" else MEMORY) + (" (logarithmic)" if logarithmic else ""))


def _scale_y(axes: Axes, low: float, high: float, most: float) -> None:
    """Limits around all intervals, from 0 where that is not far; no tick beyond what there can be."""
    low = min(low, 0.0) if low < 0.4 * high else low
    low, high = (low - 1.0, high + 1.0) if low == high else (low, high)
    pad = 0.03 * (min(high, most) - low)
    axes.set_ylim(low - pad, min(high, most) + pad)
    axes.set_yticks([tick for tick in axes.get_yticks() if low - pad <= tick <= min(high + pad, most)])


def _draw_series(axes: Axes, points: np.ndarray, shift: float, look: dict[str, Any]) -> None:
    from matplotlib.transforms import ScaledTranslation

    level = np.isnan(points[:, 0])
    for _, value, low, high in points[level]:  # no budget: a level line, its interval a band
        axes.axhspan(low, high, color=look["color"], alpha=0.13, linewidth=0)
        axes.axhline(value, markevery=[1], clip_on=False, **look)
    if not level.all():
        x, y, low, high = points[~level].T
        moved = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
        axes.plot(x, y, transform=moved, **look)
        if (low != high).any():  # around the middle, as a bootstrap's interval need not hold the mean
            bars = {"ecolor": look["color"], "elinewidth": 1.1, "label": "_" + look["label"], "transform": moved}
            axes.errorbar(x, (low + high) / 2, (high - low) / 2, fmt="none", **bars)
