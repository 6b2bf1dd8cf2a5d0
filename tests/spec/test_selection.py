"""§2, §3, §5, §6 by hand: scores, and which slots a method keeps, the specification's and the engine's."""

import itertools
import math

import numpy as np
import pytest

import skipkv
import spec


@pytest.fixture(params=[spec.select, skipkv.select], ids=["spec", "engine"])
def select(request):
    return request.param


def test_redundancy_zeroes_the_last_hit_of_every_row():
    keys = np.array([[1.0, 0], [2, 0], [0, 3], [3, 4]])  # cosines with the last key: 0.6, 0.6, 0.8
    # rows 0, 1, 2 lose column 3, row 3 loses column 2; what is left: S[0, 1], S[1, 0], S[3, 0], S[3, 1]
    c = np.array([1.6, 1.6, 0, 0]) / 4
    np.testing.assert_allclose(spec.redundancy(keys), np.exp(c) / np.exp(c).sum(), rtol=1e-7)


def test_redundancy_row_without_hit_loses_column_0():
    keys = np.array([[1.0, 0], [-3, 4]])  # S = [[0, -0.6], [-0.6, 0]]
    c = np.array([0, -0.6]) / 2  # row 1 loses S[1, 0]; row 0 loses only its zero diagonal and keeps S[0, 1]
    np.testing.assert_allclose(spec.redundancy(keys), np.exp(c) / np.exp(c).sum(), rtol=1e-7)


def test_redundancy_exactly_one_half_is_no_hit():
    keys = np.array([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, 1]])  # 0.5 or 0 in float32, just below in float64
    np.testing.assert_array_equal(spec.last_hits(spec.cosines(keys)), [0, 0, 0])


def test_redundancy_zero_key():
    np.testing.assert_allclose(spec.redundancy(np.zeros((3, 4))), np.full(3, 1 / 3))


def test_importance_takes_the_group_maximum_and_pools_with_clipped_ends():
    # d = 1: logits are products; head 0 looks at slot 0, head 1 at slot 4, the maximum at both
    keys = np.array([[2.0], [0], [0], [0], [-3], [100], [100]])  # the last two are the window
    queries = np.array([[[0.0], [1.0]], [[0.0], [-1.0]]])  # group of 2, W = 2; the older query is flat
    p = np.exp([2.0, 0, 0, 0, 3])
    m = (p / p.sum() + 0.2) / 2
    want = [m[0], m[0], m[1], m[4], m[4]]
    np.testing.assert_allclose(spec.importance(keys, queries, window=2, kernel=3), want)
    np.testing.assert_allclose(spec.importance(keys, queries, window=2, kernel=1), m)
    np.testing.assert_allclose(spec.importance(keys, queries, window=2, kernel=99), [m[4]] * 5)
    older = np.concatenate([np.full((2, 3, 1), 9.0), queries], axis=1)  # before the window: not looked at
    got = spec.select("snapkv", keys[None], older, budget=3, window=2, kernel=3)
    np.testing.assert_allclose(got.importance, [want])


def test_h2o_last_means_over_heads_and_reads_the_last_query(select):
    keys = np.array([[[1.0], [0], [5]], [[0.0], [3], [5]]])  # two KV heads, two candidates
    queries = np.array([[[9.0], [1.0]], [[-9.0], [1.0]]])
    first = (math.e / (math.e + 1) + 1 / (math.e**3 + 1)) / 2
    got = select("h2o-last", keys, queries, budget=2, window=8)
    np.testing.assert_allclose(got.score, [[first, 1 - first]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(got.kept, [[1, 2], [1, 2]])  # head 0 alone would keep slot 0


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel is 4"):
        spec.importance(np.zeros((9, 2)), np.zeros((1, 8, 2)), kernel=4)


def test_ties_go_to_the_lower_slot():
    score = np.array([0.0, 2, 1, 2, 2, 5, 0])
    nothing = np.zeros(7, dtype=bool)
    np.testing.assert_array_equal(spec.keep_highest(score, nothing, 3), [1, 3, 5])
    last = np.arange(7) == 6
    np.testing.assert_array_equal(spec.keep_highest(score, last, 3), [1, 5, 6])


def test_equal_keys_keep_the_oldest_that_no_penalty_takes(select):
    keys, queries, newest = np.full((1, 20, 8), 0.25), np.ones((2, 4, 8)), [16, 17, 18, 19]
    for method in ("snapkv", "rkv", "skipkv"):
        kept = select(method, keys, queries, budget=9, window=4).kept
        np.testing.assert_array_equal(kept, [[0, 1, 2, 3, 4, *newest]], err_msg=method)
        kept = select(method, keys, queries, budget=9, window=4, penalties=[[0, 2, 0.9]]).kept
        first = [3, 4, 5, 6, 7] if method == "skipkv" else [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(kept, [[*first, *newest]], err_msg=method)


def test_penalty_wants_two_held_tokens_only_under_the_official_rule():
    positions, penalties = np.array([0, 5, 6, 9, 12]), [[4, 8, 0.97], [9, 11, 0.99]]
    np.testing.assert_array_equal(spec.penalty(positions, penalties), [0, 0.97, 0.97, 0.99, 0])
    np.testing.assert_array_equal(spec.penalty(positions, penalties, compat="official"), [0, 0.97, 0.97, 0, 0])


def test_h2o_keeps_half_by_recency_and_half_by_sum(select):
    keys, queries = np.zeros((2, 12, 4)), np.zeros((2, 8, 4))
    sums = np.array([[1.0, 9, 1, 8, 2, 7, 0, 0, 99, 0, 0, 0], np.zeros(12)])
    kept = select("h2o", keys, queries, budget=8, window=2, sums=sums).kept
    np.testing.assert_array_equal(kept, [[1, 3, 4, 5, 8, 9, 10, 11], [0, 1, 2, 3, 8, 9, 10, 11]])


def test_streaming_with_sinks_and_prompt(select):
    keys, queries = np.zeros((1, 12, 4)), np.zeros((1, 8, 4))
    kept = select("streaming", keys, queries, budget=6, sinks=2).kept
    np.testing.assert_array_equal(kept, [[0, 1, 8, 9, 10, 11]])
    kept = select("streaming", keys, queries, budget=6, sinks=2, protect="prompt", prompt=5).kept
    np.testing.assert_array_equal(kept, [[0, 1, 2, 3, 4, 11]])


def test_protection_and_budget_per_head():
    rng = np.random.default_rng(3)
    keys, queries = rng.normal(size=(2, 40, 8)), rng.normal(size=(4, 8, 8))
    chosen = spec.select("rkv", keys, queries, budget=[20, 14], protect="sinks:3")
    assert [len(k) for k in chosen.kept] == [20, 14]
    for kept in chosen.kept:
        assert list(kept[:3]) == [0, 1, 2] and list(kept[-8:]) == list(range(32, 40)) and (np.diff(kept) > 0).all()
    with pytest.raises(ValueError, match="budget is 8"):
        spec.select("rkv", keys, queries, budget=8)
    with pytest.raises(ValueError, match="18 protected slots do not fit into a budget of 14"):
        spec.select("rkv", keys, queries, budget=14, protect="prompt", prompt=10)


def test_random_numbers(select):
    assert spec.splitmix64(0) == 0xE220A8397B1DCDAF  # published first outputs of SplitMix64
    assert spec.splitmix64(1234567) == 6457827717110365317
    # from a C program of five lines
    assert spec.noise(0, (0, 0), 0, 0, 0) == 13357946 / 2**24
    assert spec.noise(7, (3, 1), 2, 5, 1000) == 2293795 / 2**24
    assert spec.noise(2**64 - 1, (1, 0), 27, 7, 16383) == 7282266 / 2**24
    where = {"seed": 7, "sequence": (3, 1), "layer": 2, "positions": np.arange(12) * 5}
    score = select("random", np.zeros((1, 12, 2)), np.zeros((1, 8, 2)), budget=9, **where).score
    assert score[0, 3] == spec.noise(7, (3, 1), 2, 0, 15)


def test_bf16_rounds_to_nearest_even():
    one = 2.0**-7  # spacing above 1
    x = np.array([1 + one / 2, 1 + 3 * one / 2, 1 + 0.51 * one, -1 - one / 2, 0.0, 3.0])
    np.testing.assert_array_equal(spec.round_bf16(x), [1, 1 + 2 * one, 1 + one, -1, 0, 3])


def layer_of(seed, n_kv=2, n_slots=40, group=2):
    rng = np.random.default_rng(seed)
    keys, queries = rng.normal(size=(n_kv, n_slots, 8)), rng.normal(size=(n_kv * group, 8, 8))
    return keys, queries, {"penalties": [[3, 6, 0.9], [20, 22, 0.97]], "sums": rng.random((n_kv, n_slots)), "seed": 4}


def test_key_norms_and_likenesses_by_hand():
    keys = np.array([[[3.0, 4], [0, 2], [0, 0], [5, 12]]])  # the last one is the window
    got = spec.select("knorm", keys, np.zeros((1, 1, 2)), budget=2, window=1)
    np.testing.assert_allclose(got.score, [[-5, -2, 0]])
    assert got.kept.tolist() == [[2, 3]]  # the smallest key stays
    s = np.array([3 / 5 + 5 / 13, 4 / 5 + 1 + 12 / 13])
    got = spec.select("keydiff", keys, np.zeros((1, 1, 2)), budget=2, window=1)
    likeness = np.array([[0.6, 0.8], [0, 1], [0, 0]]) @ s / np.linalg.norm(s)
    np.testing.assert_allclose(got.score, [-likeness], atol=1e-7)
    assert got.kept.tolist() == [[2, 3]]
    assert spec.key_likeness(np.zeros((3, 2))).tolist() == [0, 0, 0]


def test_tova_means_over_query_heads():
    keys = np.array([[[1.0], [0], [9]], [[0.0], [3], [9]]])
    queries = np.array([[[1.0]], [[-1.0]], [[1.0]], [[2.0]]])  # two a KV head
    one, other = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    first = (one + other + 1 / (1 + math.exp(3)) + 1 / (1 + math.exp(6))) / 4
    got = spec.select("tova", keys, queries, budget=2)
    np.testing.assert_allclose(got.score, [[first, 1 - first]] * 2)
    assert got.kept.tolist() == [[1, 2]] * 2


@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv", "rkv", "skipkv", "random", "knorm", "keydiff"])
def test_a_blend_of_a_methods_weights_is_the_method(name):
    keys, queries, more = layer_of(1)
    weights = spec.weights_of(name, mix=0.3)
    want = spec.select(name, keys, queries, budget=20, mix=0.3, sinks=0, window=10, **more)
    got = spec.select("blend", keys, queries, budget=20, weights=weights, window=10, **more)
    n = len(got.score[0])  # streaming has candidates in the window, too
    np.testing.assert_array_equal(got.score, want.score[:, :n])
    np.testing.assert_array_equal(got.kept, want.kept)


def test_a_blend_adds_its_terms():
    keys, queries, more = layer_of(2)
    weights = {"key_norm": 0.25, "importance": 2.0, "position": -0.01}
    got = spec.select("blend", keys, queries, budget=20, weights=weights, **more)
    parts = [spec.select(name, keys, queries, budget=20, **more).score for name in ("snapkv", "knorm")]
    np.testing.assert_allclose(got.score, 2 * parts[0] - 0.25 * parts[1] - 0.01 * np.arange(32), rtol=1e-12)
    for bad in ({}, {"age": 1}):
        with pytest.raises(ValueError, match="allowed are some of position, sums, importance"):
            spec.select("blend", keys, queries, budget=20, weights=bad)


def best_choice(scores, protected, budgets):
    """Every choice of P slots that keeps what each head is sure of; of the best ones the first by head and slot."""
    pairs = [(h, j) for h, score in enumerate(scores) for j in range(len(score))]
    least = [min(len(m), max(int(m.sum()), math.ceil(b / 5))) for m, b in zip(protected, budgets, strict=True)]
    best = None
    for chosen in itertools.combinations(pairs, min(sum(budgets), len(pairs))):
        counts = [sum(h == head for h, _ in chosen) for head in range(len(scores))]
        sure = all(not mine[j] or (h, j) in chosen for h, mine in enumerate(protected) for j in range(len(mine)))
        if sure and all(n >= m for n, m in zip(counts, least, strict=True)):
            total = sum(scores[h][j] for h, j in chosen if not protected[h][j])
            if best is None or total > best[0]:  # combinations come in order of head and slot
                best = total, chosen
    return [[j for h, j in best[1] if h == head] for head in range(len(scores))]


@pytest.mark.parametrize("seed", range(40))
def test_a_layers_budget_goes_where_brute_force_puts_it(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 6, 3)
    budgets = [int(rng.integers(1, min(n, 4) + 1)) for n in lengths]
    scores = [rng.integers(0, 4, n).astype(float) for n in lengths]  # many ties
    protected = [rng.random(n) < 0.25 for n in lengths]
    protected = [m & (np.cumsum(m) <= b) for m, b in zip(protected, budgets, strict=True)]
    got = spec.keep_layer(scores, protected, budgets)
    assert [kept.tolist() for kept in got] == best_choice(scores, protected, budgets)


@pytest.mark.parametrize("name", ["rkv", "h2o", "skipkv", "knorm"])
def test_a_layer_keeps_the_sum_of_its_budgets(name):
    keys, queries, more = layer_of(5, n_kv=3)
    keys[0] *= 0.01  # no logit, no norm: a head that has little to say
    budgets = [10, 25, 15]
    got = spec.select(name, keys, queries, budget=budgets, window=4, allocate="layer", protect="sinks:2", **more)
    each = spec.select(name, keys, queries, budget=budgets, window=4, protect="sinks:2", **more)
    counts = [len(kept) for kept in got.kept]
    assert sum(counts) == 50 and counts != budgets and np.all(np.array(counts) >= np.ceil(np.array(budgets) / 5))
    for h in range(3):
        np.testing.assert_array_equal(got.score[h], each.score[h])
        assert {0, 1, 36, 37, 38, 39} <= set(got.kept[h].tolist()) and (np.diff(got.kept[h]) > 0).all()
    with pytest.raises(ValueError, match="allocate is 'layer'; allowed is 'head'"):
        spec.select("tova", keys, queries, budget=20, allocate="layer")
