"""Figures with 95 % intervals: items, or texts, are drawn with replacement, and all samples of one stay together.

A percentile bootstrap of few items is too narrow, and of a share at 0 or 1 it has no width at all. So percentiles are
widened as Student's t asks (Hesterberg 2015, "expanded"), and what has bounds is drawn from the items and two more, one
at either bound: a right and a wrong one, or one that each of two methods wins. The figure itself is that of the items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from skipkv.checks import array_of, integer, wrong

RESAMPLES, MOST_RESAMPLES = 2000, 1_000_000
COUNT = 100_000  # of items, or of samples of one: at most
Z = NormalDist().inv_cdf(0.975)


class Figure(NamedTuple):
    """A figure and its interval; without one (of a single item) both ends are None."""

    value: float
    low: float | None
    high: float | None


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    integer("right", right, 0, integer("n", n))
    if n == 0:
        return 0.0, 1.0
    p = right / n
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + Z * Z / n)), min(1.0, (middle + half) / (1 + Z * Z / n))


def bootstrap(sums: Sequence[tuple[float, int]], resamples: int, seed: int) -> tuple[float, float, float]:
    """Mean over positions and its 95 % percentile interval, texts drawn with replacement. sums: (total, positions)."""
    integer("resamples", resamples, 1, MOST_RESAMPLES)
    integer("seed", seed)
    array = array_of(sums)
    if array is None or (array.size and (array.ndim != 2 or array.shape[1] != 2)):
        raise wrong("sums", sums, "numbers [n, 2]")
    array = array.reshape(-1, 2)
    array = array[array[:, 1] > 0]
    if not len(array):
        return (float("nan"),) * 3
    totals = _draw(len(array), resamples, seed) @ array
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(array[:, 0].sum() / array[:, 1].sum()), float(low), float(high)


def mean(values: ArrayLike, bounds: tuple[float, float] | None = None) -> Figure | None:
    """Mean over items; None without any.

    Parameters
    ----------
    values : float [n_items]
        Means over an item's samples.
    bounds : (lowest, highest), optional
        That a value can have: (0, 1) of shares, (-1, 1) of differences of shares.
    """
    if not len(values):
        return None
    drawn = np.append(values, bounds) if bounds else np.asarray(values, np.float64)
    return Figure(float(np.mean(values)), *_interval(_draw(len(drawn)) @ drawn / len(drawn), len(drawn)))


def ratio(totals: ArrayLike, counts: ArrayLike) -> Figure | None:
    """Mean over texts, sum(totals) / sum(counts), each float [n_items]; None where no item has such a text."""
    return _of_sums(np.stack([totals, counts], axis=1), lambda t, n: t / n)


def difference(totals: ArrayLike, counts: ArrayLike) -> Figure | None:
    """Mean over texts of one kind less that of another, each float [n_items, 2]; None where either has no text."""
    return _of_sums(np.concatenate([totals, counts], axis=1), lambda t, u, n, m: t / n - u / m)


def _of_sums(sums: np.ndarray, statistic: Callable[..., np.ndarray]) -> Figure | None:
    kinds = sums.shape[1] // 2
    sums = sums[sums[:, kinds:].any(axis=1)]
    least = int((sums[:, kinds:] > 0).sum(axis=0).min())  # items that have a text of the rarer kind
    if least == 0:
        return None
    drawn = _draw(len(sums)) @ sums
    drawn = drawn[drawn[:, kinds:].all(axis=1)]  # draws without a text of some kind say nothing
    return Figure(float(statistic(*sums.sum(axis=0))), *_interval(statistic(*drawn.T), least))


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> np.ndarray:
    """1 − C(n − c, k) / C(n, k): that one of k samples is right, unbiased, of c right ones among n ≥ k.

    It is a product of k factors below 1, so nothing overflows.
    """
    for name, value in (("n", n), ("c", c)):
        array = array_of(value)
        if array is None or not ((array >= 0) & (array <= COUNT)).all():
            raise wrong(name, value, f"numbers from 0 to {COUNT}")
    n, c = np.asarray(n, np.float64), np.asarray(c, np.float64)
    if n.shape != c.shape or (c > n).any():
        raise wrong("c", c, "as many numbers as n, none above that of n")
    integer("k", k, 1, int(n.min(initial=COUNT)))
    return 1 - np.prod([np.maximum(n - c - i, 0) / (n - i) for i in range(k)], axis=0)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of b items that only one method solves against c that only the other does."""
    b, c = integer("b", b, 0, COUNT), integer("c", c, 0, COUNT)
    term = tail = 1
    for i in range(min(b, c)):
        term = term * (b + c - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2 ** (b + c))  # of integers, so that it is exact whatever their size


@lru_cache(maxsize=4)
def _draw(n: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of n items is drawn, float64 [resamples, n]."""
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _interval(drawn: np.ndarray, n: int) -> tuple[float | None, float | None]:
    """Ends of the interval, from what was drawn of n items."""
    if n < 2:
        return None, None
    v = n - 1
    t = Z + (Z**3 + Z) / (4 * v) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * v * v)  # Student's, Cornish-Fisher
    outside = NormalDist().cdf(-t * math.sqrt(n / v))
    low, high = np.quantile(drawn, [outside, 1 - outside])
    return float(low), float(high)
