"""Statistics against brute force, known cases and simulation."""

import math
import time
from itertools import combinations, product

import numpy as np
import pytest

from skipkv.eval.statistics import Figure, difference, mcnemar, mean, pass_at_k, ratio


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one():
    for n in range(1, 8):
        for c, k in product(range(n + 1), range(1, n + 1)):
            draws = [any(i < c for i in chosen) for chosen in combinations(range(n), k)]
            assert pass_at_k([n], [c], k)[0] == pytest.approx(sum(draws) / len(draws), abs=1e-15)


def test_pass_at_k_of_many_samples_is_finite():
    found = pass_at_k([10_000, 10_000, 10_000], [0, 1, 9_999], 5_000)
    np.testing.assert_allclose(found, [0, 0.5, 1], atol=1e-12)


def test_mcnemar_is_the_binomial_test():
    for n in range(9):
        chances = [math.comb(n, i) / 2**n for i in range(n + 1)]
        for b in range(n + 1):
            expected = sum(p for i, p in enumerate(chances) if abs(i - n / 2) >= abs(b - n / 2))
            assert mcnemar(b, n - b) == pytest.approx(expected)
    assert mcnemar(700, 700) == 1 and 0 < mcnemar(600, 700) < 0.01 and mcnemar(0, 1300) < 1e-300  # no overflow


# Cells: items, accuracy, samples of an item, how alike an item's samples are (a + b of a beta distribution).
CELLS = list(product((20, 50, 200), (0.05, 0.3, 0.5, 0.9, 0.98), ((1, 1.0), (4, 0.5), (4, 2.0), (4, 1e6))))


@pytest.mark.parametrize("n", [20, 50, 200])
def test_intervals_of_accuracy_cover(n):
    """95 % intervals hold the truth in 93 % of 1000 simulations: 2.9 standard errors below 95 %."""
    for seed, (items, p, (samples, alike)) in enumerate(CELLS):
        if items == n:
            rng = np.random.default_rng([n, seed])
            chances = rng.beta(p * alike, (1 - p) * alike, (1000, n))
            found = [mean(x, (0, 1)) for x in rng.binomial(samples, chances) / samples]
            assert all(0 <= f.low <= f.high <= 1 for f in found)
            assert np.mean([f.low <= p <= f.high for f in found]) >= 0.93, (n, p, samples, alike)


@pytest.mark.parametrize("apart", [0.0, 0.04, 0.3])  # how many items tell two methods apart
def test_intervals_of_paired_differences_cover(apart):
    rng, n, truth = np.random.default_rng(7), 50, 0.5 * apart
    chances = [1 - apart, 0.75 * apart, 0.25 * apart]
    found = [mean(rng.choice([0.0, 1.0, -1.0], n, p=chances), (-1, 1)) for _ in range(1000)]
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.93


def test_intervals_of_lengths_cover():
    """Ratios and their differences, of few items with skewed lengths and uneven numbers of texts."""
    rng, hits = np.random.default_rng(3), []
    for _ in range(1000):
        n = rng.integers(0, 4, (25, 2)) + (rng.random((25, 2)) < 0.5)
        totals = np.stack([rng.gamma(4 * n[:, 0]) * 25.0, rng.gamma(4 * n[:, 1]) * 50.0], axis=1)
        one, two = ratio(totals[:, 0], n[:, 0]), difference(totals, n)
        hits.append((one.low <= 100 <= one.high, two.low <= -100 <= two.high))
    assert np.mean(hits, axis=0).min() >= 0.93


def test_shares_of_little():
    assert mean([]) is None and mean([], (0, 1)) is None
    assert mean([3.0]) == (3, None, None)
    for value in (0.0, 1.0):
        one, many = mean([value], (0, 1)), mean([value] * 100, (0, 1))
        assert one.value == many.value == value
        assert (one.low, one.high) == (0, 1)
        assert many.low <= value <= many.high and 0.01 < many.high - many.low < 0.08
    same = mean([0.0] * 100, (-1, 1))
    assert same.value == 0 and -0.06 < same.low < 0 < same.high < 0.06  # alike on 100 items is not the same for ever


def test_ratios_of_little():
    assert ratio([0.0, 0.0], [0, 0]) is None
    assert ratio([30.0, 0.0], [2, 0]) == (15, None, None)
    assert difference([[30.0, 0.0], [10.0, 0.0]], [[2, 0], [1, 0]]) is None
    assert difference([[30.0, 8.0], [10.0, 0.0]], [[2, 1], [1, 0]]) == (40 / 3 - 8, None, None)
    assert ratio([30.0, 15.0], [2, 1]) == Figure(15, 15, 15)


def test_a_paired_difference_is_sharper_than_two_intervals():
    rng = np.random.default_rng(2)
    b = rng.integers(0, 2, 300).astype(float)
    a = b.copy()
    a[np.flatnonzero(b == 0)[:20]] = 1  # 20 items more, none less
    found = mean(a - b, (-1, 1))
    assert found.value == pytest.approx(20 / 300) and found.low > 0.03
    apart = [mean(x, (0, 1)) for x in (a, b)]
    assert apart[0].low < apart[1].high  # unpaired, they overlap


def test_samples_of_one_item_are_no_items():
    rng = np.random.default_rng(4)
    solved = rng.integers(0, 2, 30).astype(float)  # all samples of an item agree
    alone, repeated = mean(solved, (0, 1)), ratio(solved * 8, np.full(30, 8))
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_1319_items_take_no_time():
    rng, begin = np.random.default_rng(0), time.perf_counter()
    for _ in range(10):
        values, n = rng.random((1319, 2)), np.ones((1319, 2))
        mean(values[:, 0], (0, 1)), difference(values, n), [ratio(values[:, 0], n[:, 0]) for _ in range(12)]
    assert time.perf_counter() - begin < 10
