"""Intervals: Wilson's of a share, the bootstrap's over texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def bootstrap(sums: Sequence[tuple[float, int]], resamples: int, seed: int) -> tuple[float, float, float]:
    """Mean over positions and its 95 % percentile interval, texts drawn with replacement. sums: (total, positions)."""
    array = np.array(sums, np.float64).reshape(-1, 2)
    array = array[array[:, 1] > 0]
    if not len(array):
        return (float("nan"),) * 3
    mean = array[:, 0].sum() / array[:, 1].sum()
    draws = np.random.default_rng(seed).integers(0, len(array), (max(1, resamples), len(array)))
    means = array[draws, 0].sum(1) / array[draws, 1].sum(1)
    return float(mean), *map(float, np.percentile(means, [2.5, 97.5]))
