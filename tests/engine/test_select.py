"""select on arrays against the reference, and the released code's deviations in it."""

from collections import Counter

import harness
import numpy as np
import pytest
import spec
from harness import ALL, EVICTING
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv import RKV, flag_repeats, methods, select
from skipkv.methods import COMPAT

pytestmark = pytest.mark.sanitize

SETTINGS = settings(max_examples=100, deadline=None, print_blob=True)
COUNTS = Counter()  # what became of every selection, by METHOD §9's rule


@pytest.fixture(scope="module", autouse=True)
def near_ties_are_rare():
    yield
    total = sum(COUNTS.values())
    assert COUNTS["near"] <= max(2, 0.001 * total), COUNTS  # of less than 2000, 2 say nothing


EXACT = ("signs", "same", "period")  # every cosine and logit is a multiple of a power of two: ties are exact
KINDS = ("normal", "common", "copies", "zero", "opposite", *EXACT)


def make_keys(kind, rng, n_kv, n_slots, dim):
    keys = rng.normal(size=(n_kv, n_slots, dim))
    if kind == "common":  # all keys alike: every cosine above 0.5
        keys += 3 * rng.normal(size=(n_kv, 1, dim))
    elif kind == "copies":  # a third are near-copies of earlier ones
        for j in range(1, n_slots, 3):
            keys[:, j] = keys[:, rng.integers(j)] + 0.05 * rng.normal(size=(n_kv, dim))
    elif kind == "zero":
        keys[:, rng.random(n_slots) < 0.2] = 0
    elif kind == "opposite":  # hardly a cosine above 0.5, many below -0.5
        keys = keys[:, :1] * rng.choice([-1, 1], (n_kv, n_slots, 1)) * np.where(np.arange(dim) % 2, 1, -1) + 0.5 * keys
    elif kind == "signs":
        keys = rng.choice([-1.0, 1.0], keys.shape)
    elif kind == "same":
        keys = np.repeat(rng.choice([-1.0, 1.0], (n_kv, 1, dim)), n_slots, axis=1)
    elif kind == "period":
        keys = np.resize(rng.choice([-1.0, 1.0], (n_kv, 12, dim)).swapaxes(0, 1), (n_slots, n_kv, dim)).swapaxes(0, 1)
    return keys.astype(np.float32)


@st.composite
def layers(draw, name):
    """(kind, method, keys, queries, what else select takes) of one layer."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(KINDS))
    n_kv, group = draw(st.sampled_from([(1, 1), (3, 1), (2, 2), (1, 3), (2, 3), (1, 7)]))
    dim = draw(st.sampled_from([16, 64] if kind in EXACT else [16, 64, 8, 20, 2, 128]))
    n_slots = draw(st.sampled_from([60, 33, 90, 17, 8, 1]))
    window = draw(st.integers(1, 8))
    keys = make_keys(kind, rng, n_kv, n_slots, dim)
    queries = rng.normal(size=(n_kv * group, draw(st.sampled_from([window, window + 3, 1])), dim))
    if kind in EXACT:
        queries = np.sign(queries)
    positions = np.sort([rng.choice(4 * n_slots, n_slots, replace=False) for _ in range(n_kv)])  # with gaps, per head
    if name in spec.SHARED:  # its heads hold the same positions
        positions = positions[0]
    positions = draw(st.sampled_from([None, positions]))
    budgets = st.sampled_from([b for b in (12, 20, 31, 59, 60, 61, window + 2) if b > window])
    budget = draw(budgets if name in spec.SHARED else st.one_of(budgets, st.tuples(*[budgets] * n_kv)))
    room = harness.room_of(name, budget, window)
    protect = draw(st.sampled_from(["none", f"sinks:{min(room, 3)}", f"sinks:{room}", "prompt"]))
    cuts = np.sort(rng.choice(4 * n_slots + 1, min(8, 4 * n_slots), replace=False))
    spans = np.column_stack([cuts[:-1:2], cuts[1::2] - 1, rng.uniform(0.8, 1, len(cuts) // 2)])
    parameters = {
        "budget": budget, "window": window, "mix": draw(st.sampled_from([0.1, 0.0, 0.07, 0.5, 1.0])),
        "kernel": draw(st.sampled_from([7, 1, 3, 5, 99])), "sinks": min(room, draw(st.integers(0, 5))),
        "protect": protect, "seed": draw(st.integers(0, 2**53 - 1)),
        "allocate": draw(st.sampled_from(["head", "head" if name in spec.SHARED else "layer"])),
    }  # fmt: skip
    return kind, harness.make(name, **parameters), keys, queries.astype(np.float32), {
        "positions": positions, "penalties": draw(st.sampled_from([None, spans])), "prompt": draw(st.integers(0, room)),
        "sums": rng.random((n_kv, n_slots)).astype(np.float32), "layer": draw(st.integers(0, 40)),
        "sequence": (draw(st.integers(0, 2**40)), draw(st.integers(0, 9))),
    }  # fmt: skip


@pytest.mark.parametrize("name", EVICTING)
@SETTINGS
@given(data=st.data())
def test_matrix_select_equals_the_reference(name, data):
    kind, method, keys, queries, more = data.draw(layers(name))
    n_kv, n_slots = keys.shape[:2]
    got = select(method, keys, queries, **more)
    known = ("window", "mix", "kernel", "sinks", "protect", "seed", "allocate")
    m = {key: value for key, value in vars(method).items() if key in known} | {"weights": harness.weights_of(method)}
    want = spec.select(harness.reference_name(name), keys, queries, budget=method.budget, **m, **more)
    budgets = np.broadcast_to(method.budget, n_kv)
    scores, protected, size = [], [], harness.SIZE.get(name, 0)
    for h in range(n_kv):
        mine, other = ({k: v[h] for k, v in vars(s).items() if k != "kept" and v is not None} for s in (got, want))
        if name != "custom":
            assert mine.keys() == other.keys()
        exact = keys[h].astype(np.float64)
        same = harness.same_scores(mine, other, exact, 1e-5, margin=0 if kind in EXACT else 1e-6)
        if "penalty" in mine:  # looked up, not computed
            assert np.array_equal(mine["penalty"], other["penalty"].astype(np.float32))
        score = mine["score"]
        where = np.arange(n_slots) if more["positions"] is None else more["positions"]
        where = np.broadcast_to(where, (n_kv, n_slots))[h]
        below = max(spec.protected_below(method.protect, more["prompt"]), getattr(method, "sinks", 0))
        protected.append((where < below) | (np.arange(n_slots) >= len(score)))
        scores.append(np.concatenate([score, np.zeros(n_slots - len(score))]).astype(np.float64))
        # A head of its own; what a layer's heads are given depends on all of them, and is looked at below.
        verdict = "equal" if method.allocate == "layer" else harness.judge(want, h, got.kept[h], exact, size=size)
        assert verdict in ("equal", "tie") or verdict == "near" and kind not in EXACT
        COUNTS[verdict if same else "near"] += 1
    # The rule of the choice itself, on the core's own float32 scores: exact.
    if method.allocate == "layer":
        kept = spec.keep_layer(scores, protected, budgets)
        assert sum(map(len, kept)) == min(sum(budgets), n_kv * n_slots)
    else:
        kept = [spec.keep_highest(*head) for head in zip(scores, protected, budgets, strict=True)]
    assert all(np.array_equal(mine, other) for mine, other in zip(got.kept, kept, strict=True))


def test_select_full_keeps_all_and_scores_nothing():
    got = select("full", np.ones((2, 5, 16)), np.ones((2, 1, 16)))
    assert got.kept.tolist() == [[*range(5)]] * 2
    assert got.importance is got.redundancy is got.penalty is got.score is None


def test_select_takes_a_name_a_string_or_a_method():
    rng = np.random.default_rng(1)
    keys, queries = rng.normal(size=(2, 50, 16)), rng.normal(size=(4, 8, 16))
    want = select(RKV(budget=20, mix=0.5), keys, queries).kept
    assert np.array_equal(select("rkv", keys, queries, budget=20, mix=0.5).kept, want)
    assert np.array_equal(select("rkv:budget=20,mix=0.5", keys, queries).kept, want)
    assert np.array_equal(select("rkv:budget=30", keys, queries, budget=20, mix=0.5).kept, want)
    # what a comparison hands to every method, those take that know it
    assert select("streaming", keys, queries, budget=20, mix=0.5, kernel=3).kept.shape == (2, 20)
    assert select("full", keys, queries, budget=20, mix=0.5).kept.shape == (2, 50)


def test_compat_pairs_asks_for_two_tokens_of_a_sentence():
    rng = np.random.default_rng(2)
    keys, queries, seen = rng.normal(size=(2, 40, 16)), rng.normal(size=(4, 8, 16)), 0
    positions = np.sort([rng.choice(80, 40, replace=False) for _ in range(2)])
    spans = [[i, i + 3, 0.9 + i / 1000] for i in range(0, 80, 4)]
    more = {"positions": positions, "penalties": spans, "budget": 20}
    want = spec.select("skipkv", keys.astype(np.float32), queries.astype(np.float32), compat="official", **more)
    for compat in ("pairs", "official"):
        got = select("skipkv", keys, queries, compat=compat, **more)
        assert np.array_equal(got.kept, want.kept) and harness.close(got.penalty, want.penalty, 1e-7) <= 1
        seen += (got.penalty == 0).sum()
    assert 0 < seen / 2 < 64
    plain = select("skipkv", keys, queries, **more)
    assert (plain.penalty > 0).all()


@pytest.mark.parametrize("name", ["rkv", "snapkv", "skipkv"])
def test_compat_score_order_keeps_the_same_set_in_order_of_score(name):
    rng = np.random.default_rng(3)
    keys, queries = rng.normal(size=(2, 50, 16)), rng.normal(size=(4, 8, 16))
    moved = 0
    for budget in (20, 50):  # at the budget, too: the released code sorts whenever it looks
        plain = select(name, keys, queries, budget=budget)
        ordered = select(name, keys, queries, budget=budget, compat="score-order")
        for h in range(2):
            assert np.array_equal(np.sort(ordered.kept[h]), plain.kept[h])
            moved += not np.array_equal(ordered.kept[h], plain.kept[h])
            chosen, newest = ordered.kept[h][:-8], ordered.kept[h][-8:]
            assert newest.tolist() == [*range(42, 50)]
            score = ordered.score[h][chosen]
            assert (np.diff(score) <= 0).all() and (np.diff(chosen)[np.diff(score) == 0] > 0).all()
    assert moved >= 3
    below = select(name, keys, queries, budget=60, compat="score-order")
    assert below.kept.tolist() == [[*range(50)]] * 2


@pytest.mark.parametrize("compat", ["score-order", ["score-order", "pairs"]])
def test_penalties_find_slots_in_any_order(compat):
    """After a compaction in order of score, positions do not ascend; sentences are found all the same."""
    rng = np.random.default_rng(4)
    keys, queries, positions = rng.normal(size=(1, 40, 16)), rng.normal(size=(1, 8, 16)), rng.permutation(80)[:40]
    spans = np.array([[i, i + 3, 0.9 + i / 1000] for i in range(0, 80, 8)])
    got = select("skipkv", keys, queries, positions=positions, penalties=spans, budget=20, compat=compat)
    want = spec.penalty(positions, spans, compat="official" if "pairs" in compat else None)[:32]
    assert harness.close(got.penalty[0], want, 1e-7) <= 1 and 0 < (want > 0).sum() < 32


def test_official_means_what_each_methods_own_code_does():
    sentences = {*COMPAT} - {"pairs", "lost-heads", "score-order"}
    own = {"skipkv": {"pairs", "lost-heads"}} | dict.fromkeys(("rkv", "snapkv", "h2o-last"), {"score-order"})
    for name in ALL:
        assert set(methods.compat_names(name, "official")) == sentences | own.get(name, set())
    assert sorted(COMPAT.values()) == [1 << i for i in range(9)]
    assert methods.compat_bits("full", ["pairs", "latest-flag"]) == COMPAT["pairs"] | COMPAT["latest-flag"]


@pytest.mark.parametrize("name", [name for name in harness.EVICTING if name not in ("custom", "knorm", "blend")])
def test_select_does_not_depend_on_the_keys_length(name):
    """As long as their products stay the same; by powers of two, which round nothing."""
    rng = np.random.default_rng(5)
    keys, queries = rng.standard_normal((2, 60, 16)), rng.standard_normal((4, 8, 16))
    more = {"budget": 20, "sums": rng.random((2, 60)), "penalties": [(3, 9, 0.9)]}
    want = select(name, keys, queries, **more)
    got = select(name, keys * 2.0**54, queries * 2.0**-54, **more)
    for part in ("kept", "importance", "redundancy", "score"):
        assert np.array_equal(getattr(got, part), getattr(want, part))


def test_the_longest_keys_have_their_norm():
    keys = np.full((1, 5, 512), 1e17) * np.linspace(0.2, 1, 5)[:, None]
    found = select("blend", keys, keys[:, :1], budget=4, window=1, key_norm=1.0)
    assert np.allclose(found.score, 1e17 * 512**0.5 * np.linspace(0.2, 1, 5)[:4])


@pytest.mark.parametrize("power", [-110, -60, 40, 62, 64, 100, 125])
def test_repeats_do_not_depend_on_the_vectors_length(power):
    vectors = np.random.default_rng(6).standard_normal((12, 30)).astype(np.float32)
    vectors[7] = vectors[2] * 1.5
    want = flag_repeats(vectors, 0.3)
    assert want[2] > 0.99 and np.count_nonzero(want) > 1
    assert np.array_equal(flag_repeats(vectors * np.float32(2.0**power), 0.3), want)
