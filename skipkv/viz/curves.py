"""Accuracy, length or fidelity against budget, as an SVG drawn here.

results → series: runs alike but for their budget → points (x, y, low, high)
series → scales, ticks → SVG (line, marker, interval) and a table of the numbers
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from skipkv.errors import ConfigError
from skipkv.eval.results import Fidelity, Outcome
from skipkv.viz.page import Picture, asset, fill

WIDTH, HEIGHT = 760, 400  # of the drawing without its legend, in CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 40, 52
NAME = 90  # characters of a name that fit beside the legend's lines
DODGE = 5  # pixels between the intervals of different series at one budget
DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4", "4 4", "1 5")
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "M-4 -4h8v8h-8z", "M0 -5L5 4H-5z", "M0 -5.5L5.5 0L0 5.5L-5.5 0z",
    "M0 5L5 -4H-5z", "M-2 -5h4v3h3v4h-3v3h-4v-3h-3v-4h3z", "M-5 0L-2 -4H2L5 0L2 4H-2z",
    "M-4.5 -4.5H4.5L-4.5 4.5H4.5z", "M-4.5 -4.5V4.5L4.5 -4.5V4.5z",
    "M0 -6L1.6 -2H5.7L2.4 .6L3.6 4.9L0 2.4L-3.6 4.9L-2.4 .6L-5.7 -2H-1.6z",
)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """What a field of the results means: its label, how to read and to write it."""

    label: str
    read: Callable[[Any], tuple[float, float, float]]  # value, low, high
    scale: float = 1.0
    digits: int = 0
    most: float | None = None  # where the axis ends at the latest, after scaling


def _bare(name: str) -> Callable[[Any], tuple[float, float, float]]:
    return lambda r: (getattr(r, name),) * 3


MEMORY = Axis("peak cache, MB", _bare("peak_bytes"), 1e-6, 3)
FLAGGED = Axis("sentences that a later one repeats, %", _bare("flagged"), 100, 1, 100)
AXES: dict[type, dict[str, Axis]] = {
    Outcome: {
        "accuracy": Axis("accuracy, %", lambda r: (r.accuracy, r.low, r.high), 100, 1, 100),
        "length": Axis("mean length, tokens", _bare("length"), 1, 1),
        "peak_bytes": MEMORY,
        "flagged": FLAGGED,
    },
    Fidelity: {
        "kl": Axis("KL divergence from the full cache, nats a token", lambda r: r.kl, 1, 4),
        "nll": Axis("negative log-likelihood, nats a token", lambda r: r.nll, 1, 3),
        "delta_nll": Axis("nll less that of the full cache, nats a token", lambda r: r.delta_nll, 1, 4),
        "same": Axis("same best token as the full cache, %", lambda r: r.same, 100, 1, 100),
        "peak_bytes": MEMORY,
        "flagged": FLAGGED,
    },
}


@dataclass(frozen=True)
class Point:
    """One result; x is None where it has no budget."""

    x: float | None
    y: float
    low: float
    high: float
    of: Any


def curve(
    results: Sequence[Outcome] | Sequence[Fidelity],
    y: str | None = None,
    *,
    x: str = "budget",
    title: str | None = None,
) -> Picture:
    """A figure of results against the budget; runs that differ in nothing else are joined by a line.

    Parameters
    ----------
    results : sequence of Outcome, or of Fidelity
        As `skipkv.demo.evaluate` and `skipkv.compare.compare` give them. A run without a budget (``full``) is drawn
        as a level line with its interval as a band.
    y : str, optional
        For outcomes ``"accuracy"`` (default), ``"length"``, ``"peak_bytes"`` or ``"flagged"``; for fidelities ``"kl"``
        (default), ``"nll"``, ``"delta_nll"``, ``"same"``, ``"peak_bytes"`` or ``"flagged"``. Intervals are drawn where
        the results have them: 95 %, of accuracy by Wilson, of kl, the nlls and same by bootstrap over texts.
    x : "budget" or "peak_bytes"
        Slots a head (the mean where heads differ), or the most cache bytes.
    title : str, optional

    Returns
    -------
    Picture

    Raises
    ------
    ConfigError
        There is nothing to draw, results are of different kinds, or a name is unknown.
    """
    results = list(results)
    kind = type(results[0]) if results else None
    if kind not in AXES or any(type(r) is not kind for r in results):
        found = ", ".join(dict.fromkeys(type(r).__name__ for r in results)) or "none"
        raise ConfigError(f"results hold {found}; allowed: at least one Outcome, or at least one Fidelity")
    axes = AXES[kind]
    y = next(iter(axes)) if y is None else y
    if y not in axes:
        raise ConfigError(f"y is {y!r}; allowed: {', '.join(axes)}")
    if x not in ("budget", "peak_bytes"):
        raise ConfigError(f"x is {x!r}; allowed: budget, peak_bytes")
    series = _series(results, axes[y], x)
    if not series:
        raise ConfigError(f"results have no finite {y}; allowed: at least one")
    what = axes[y].label.split(",")[0]
    title = title or f"{what[0].upper()}{what[1:]} against {'budget' if x == 'budget' else 'peak cache'}"
    svg = _draw(series, axes[y], x, title)
    body = f'<main class="figure">{svg}{_table(series, axes[y], x)}</main>'
    return Picture(fill(title, body, ()), title, 560 + 20 * len(series), svg)


def split_budget(run: str) -> tuple[str, float | None]:
    """A run's name without its budget, and the budget: the mean over layers of the mean over their heads."""
    found = re.search(r"budget=(\d+(?:[/+]\d+)*)", run)
    if not found:
        return run, None
    rows = [[int(v) for v in row.split("+")] for row in found[1].split("/")]
    means = [sum(row) / len(row) for row in rows]
    rest = run[: found.start()] + run[found.end() :].removeprefix(",")
    return re.sub(r"[:,](?=\+|$)", "", rest), sum(means) / len(means)


def _series(results: Sequence[Any], axis: Axis, x: str) -> dict[str, list[Point]]:
    """Points by name of the run, in order of appearance, ascending in x."""
    found: dict[str, list[Point]] = {}
    for r in results:
        name, budget = split_budget(r.run)
        where = budget if x == "budget" else r.peak_bytes * MEMORY.scale
        value, low, high = (v * axis.scale for v in axis.read(r))
        if math.isfinite(value + low + high):
            found.setdefault(name, []).append(Point(where, value, low, high, r))
    return {name: sorted(points, key=lambda p: p.x or 0.0) for name, points in found.items()}


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``."""
    rough = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= rough * 0.999)
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [i * gap for i in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}"


def _span(point: Point, axis: Axis) -> str:
    text = f"{point.y:.{axis.digits}f}"
    return text if point.low == point.high else f"{text} [{point.low:.{axis.digits}f}, {point.high:.{axis.digits}f}]"


def _draw(series: dict[str, list[Point]], axis: Axis, x: str, title: str) -> str:
    points = [p for of in series.values() for p in of]
    xs = sorted({p.x for p in points if p.x is not None}) or [1.0]
    logarithmic = xs[0] > 0 and xs[-1] >= 4 * xs[0]
    warp: Callable[[float], float] = math.log2 if logarithmic else float
    first, last = warp(xs[0]), warp(xs[-1])
    pad = (last - first) * 0.08 or 1.0
    low, high = min(p.low for p in points), max(p.high for p in points)
    ticks = _ticks(min(low, 0.0) if low < 0.4 * high else low, high)
    if axis.most is not None and ticks[-1] > axis.most:
        gap, ticks = ticks[1] - ticks[0], [t for t in ticks if t <= axis.most]
        ticks = ticks if len(ticks) > 1 else [ticks[0] - gap, *ticks]
    bottom, top = min(ticks[0], low), max(ticks[-1], high)

    def at_x(value: float) -> float:
        return LEFT + (warp(value) - first + pad) / (last - first + 2 * pad) * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    out = [f'<text x="{LEFT}" y="20" class="title">{html.escape(title)}</text>']
    for t in ticks:
        out.append(f'<path class="rule" d="M{LEFT} {at_y(t):.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{at_y(t) + 4:.1f}" class="right">{_number(t)}</text>')
    base, free = HEIGHT - BOTTOM, -math.inf
    for t in xs if x == "budget" else (xs if logarithmic else _ticks(xs[0], xs[-1])):
        if not LEFT <= at_x(t) <= WIDTH - RIGHT or at_x(t) - free < 44:
            continue
        free = at_x(t)
        out.append(f'<path class="axis" d="M{free:.1f} {base}v5"/>')
        shown = _number(t if x == "budget" else float(f"{t:.3g}"))
        out.append(f'<text x="{free:.1f}" y="{base + 19}" class="middle">{shown}</text>')
    unit = ("budget, slots a head" if x == "budget" else MEMORY.label) + (" (logarithmic)" if logarithmic else "")
    out.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{base + 40}" class="middle">{unit}</text>')
    middle = (TOP + base) / 2
    out.append(f'<text transform="translate(16 {middle}) rotate(-90)" class="middle">{html.escape(axis.label)}</text>')
    placed = [name for name, of in series.items() if of[-1].x is not None]
    for i, (name, of) in enumerate(series.items()):
        shift = (placed.index(name) - (len(placed) - 1) / 2) * DODGE if x == "budget" and name in placed else 0.0
        out.append(_one_series(i, name, of, axis, lambda v, shift=shift: at_x(v) + shift, at_y))
    for i, name in enumerate(series):
        y = HEIGHT + 12 + 20 * i
        out.append(
            f'<g class="{_kind(i)}"><path class="line" {_dash(i)} d="M{LEFT} {y}h36"/>{_marker(i, LEFT + 18, y)}</g>'
        )
        short = name if len(name) <= NAME else name[: NAME - 1] + "…"
        out.append(f'<text x="{LEFT + 46}" y="{y + 4}">{html.escape(short)}</text>')
    note = "bars and bands: 95 % intervals" if any(p.low != p.high for p in points) else "no intervals recorded"
    height = HEIGHT + 20 * len(series) + 26
    out.append(f'<text x="{LEFT + 46}" y="{height - 12}" class="faint">{note}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="skipkv-curve" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(title)}"><style>{asset("curve.css")}</style>{"".join(out)}</svg>'
    )


def _kind(i: int) -> str:
    return f"s{i % len(MARKERS)}"


def _dash(i: int) -> str:
    # The second ten differ from the first in dashes, so that no two of 70 are alike.
    dash = DASHES[(i + i // len(MARKERS)) % len(DASHES)]
    return f'stroke-dasharray="{dash}"' if dash else ""


def _marker(i: int, x: float, y: float) -> str:
    return f'<path class="marker" transform="translate({x:.1f} {y:.1f})" d="{MARKERS[i % len(MARKERS)]}"/>'


def _one_series(i: int, name: str, points: Sequence[Point], axis: Axis, at_x: Callable, at_y: Callable) -> str:
    out = []
    for p in points:
        if p.x is None:  # no budget: a level line, its interval a band
            wide, top, tall = WIDTH - LEFT - RIGHT, at_y(p.high), at_y(p.low) - at_y(p.high)
            out.append(f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{wide}" height="{tall:.1f}"/>')
            out.append(f'<path class="line" {_dash(i)} d="M{LEFT} {at_y(p.y):.1f}H{WIDTH - RIGHT}"/>')
    placed = [(at_x(p.x), p) for p in points if p.x is not None]
    if len(placed) > 1:
        line = "L".join(f"{x:.1f} {at_y(p.y):.1f}" for x, p in placed)
        out.append(f'<path class="line" {_dash(i)} d="M{line}"/>')
    level = [(WIDTH - RIGHT - 8.0, p) for p in points if p.x is None]
    for x, p in [*placed, *level]:
        bar = "" if p.low == p.high or p.x is None else (
            f'<path class="bar" d="M{x:.1f} {at_y(p.low):.1f}V{at_y(p.high):.1f}'
            f'M{x - 3:.1f} {at_y(p.low):.1f}h6M{x - 3:.1f} {at_y(p.high):.1f}h6"/>'
        )  # fmt: skip
        says = html.escape(f"{p.of.run}: {axis.label} {_span(p, axis)}")
        out.append(f"<g>{bar}{_marker(i, x, at_y(p.y))}<title>{says}</title></g>")
    return f'<g class="{_kind(i)}" role="list" aria-label="{html.escape(name)}">{"".join(out)}</g>'


def _table(series: dict[str, list[Point]], axis: Axis, x: str) -> str:
    """The numbers, for those who cannot see the picture or want to copy them."""
    unit = "budget" if x == "budget" else MEMORY.label
    cells = [
        (html.escape(p.of.run), "" if p.x is None else _number(p.x), _span(p, axis))
        for points in series.values()
        for p in points
    ]
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    head = f'<tr><th scope="col">run</th><th scope="col">{unit}</th><th scope="col">{html.escape(axis.label)}</th></tr>'
    return f"<details><summary>Numbers</summary><table>{head}{rows}</table></details>"
