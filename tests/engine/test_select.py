"""select, segment and flag_repeats on arrays against the reference; parameters, their errors and their strings."""

import importlib.util
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

import harness
import numpy as np
import pytest
import spec
from harness import ALL, EVICTING, TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_methods import keep_highest, newest_kept, protected_below

import skipkv
from skipkv import H2O, RKV, Custom, H2OLast, Random, SkipKV, SnapKV, Streaming, methods, parse_method, select
from skipkv.methods import CLASSES, COMPAT, PARAMETERS, TABLE

SETTINGS = settings(max_examples=100, deadline=None, print_blob=True)
COUNTS = Counter()  # what became of every selection, by METHOD §9's rule


@pytest.fixture(scope="module", autouse=True)
def near_ties_are_rare():
    yield
    total = sum(COUNTS.values())
    assert COUNTS["near"] <= max(2, 0.001 * total), COUNTS  # of less than 2000, 2 say nothing


# ---------------------------------------------------------------------------------------------------------------------
# select

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
    if name == "h2o-last":  # its heads hold the same positions
        positions = positions[0]
    positions = draw(st.sampled_from([None, positions]))
    budgets = st.sampled_from([b for b in (12, 20, 31, 59, 60, 61, window + 2) if b > window])
    budget = draw(budgets if name == "h2o-last" else st.one_of(budgets, st.tuples(*[budgets] * n_kv)))
    reference_name = "skipkv" if name == "custom" else name
    newest = {b: newest_kept(reference_name, b, window) for b in np.ravel(budget).tolist()}
    room = min(b - n - (n == 0) for b, n in newest.items())
    protect = draw(st.sampled_from(["none", f"sinks:{min(room, 3)}", f"sinks:{room}", "prompt"]))
    cuts = np.sort(rng.choice(4 * n_slots + 1, min(8, 4 * n_slots), replace=False))
    spans = np.column_stack([cuts[:-1:2], cuts[1::2] - 1, rng.uniform(0.8, 1, len(cuts) // 2)])
    parameters = {
        "budget": budget, "window": window, "mix": draw(st.sampled_from([0.1, 0.0, 0.07, 0.5, 1.0])),
        "kernel": draw(st.sampled_from([7, 1, 3, 5, 99])), "sinks": min(room, draw(st.integers(0, 5))),
        "protect": protect, "seed": draw(st.integers(0, 2**53 - 1)),
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
    known = ("window", "mix", "kernel", "sinks", "protect", "seed")
    m = {key: value for key, value in vars(method).items() if key in known}
    want = spec.select("skipkv" if name == "custom" else name, keys, queries, budget=method.budget, **m, **more)
    budgets = np.broadcast_to(method.budget, n_kv)
    for h in range(n_kv):
        mine, other = ({k: v[h] for k, v in vars(s).items() if k != "kept" and v is not None} for s in (got, want))
        if name != "custom":
            assert mine.keys() == other.keys()
        exact = keys[h].astype(np.float64)
        same = harness.same_scores(mine, other, exact, 1e-5, margin=0 if kind in EXACT else 1e-6)
        if "penalty" in mine:  # looked up, not computed
            assert np.array_equal(mine["penalty"], other["penalty"].astype(np.float32))
        score = mine["score"]
        # The rule of the choice itself, on the core's own float32 scores: exact.
        where = np.arange(n_slots) if more["positions"] is None else more["positions"]
        where = np.broadcast_to(where, (n_kv, n_slots))[h]
        below = max(protected_below(method.protect, more["prompt"]), getattr(method, "sinks", 0))
        protected = (where < below) | (np.arange(n_slots) >= len(score))
        everywhere = np.concatenate([score, np.zeros(n_slots - len(score))]).astype(np.float64)
        assert np.array_equal(got.kept[h], keep_highest(everywhere, protected, int(budgets[h])))
        verdict = harness.judge(want, h, got.kept[h], exact)
        assert verdict in ("equal", "tie") or verdict == "near" and kind not in EXACT
        COUNTS[verdict if same else "near"] += 1


@pytest.mark.parametrize("name", ["snapkv", "rkv", "skipkv"])
def test_ties_go_to_the_lower_slot(name):
    keys, queries = np.ones((1, 40, 16), np.float32), np.ones((2, 8, 16), np.float32)
    assert select(name, keys, queries, budget=20).kept.tolist() == [[*range(12), *range(32, 40)]]
    flagged = [[0, 4, 0.9]]
    kept = select(name, keys, queries, budget=20, penalties=flagged).kept.tolist()
    first = range(5, 17) if name == "skipkv" else range(12)
    assert kept == [[*first, *range(32, 40)]]


def test_plateaus_of_the_pooling_keep_their_lower_end():
    """One key stands out: pooling lifts its whole neighbourhood to the same importance."""
    keys, queries = np.zeros((1, 60, 16), np.float32), np.ones((1, 8, 16), np.float32)
    keys[0, 30] = 1
    for kernel, lifted in ((7, range(27, 34)), (3, range(29, 32)), (1, [30])):
        got = select("snapkv", keys, queries, budget=13, kernel=kernel)
        others = [j for j in range(52) if j not in lifted]
        chosen = sorted([*lifted[:5], *others[: max(0, 5 - len(lifted))]])
        assert got.kept.tolist() == [[*chosen, *range(52, 60)]]
        assert len(set(got.importance[0, list(lifted)])) == 1


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


def test_more_noise_when_more_is_random():
    """The numbers of METHOD §6, from a C program of five lines (tests/test_spec.py)."""
    got = select("random", np.zeros((1, 12, 2)), np.zeros((1, 8, 2)), budget=9, seed=7, sequence=(3, 1), layer=2,
                 positions=np.arange(12) * 5)  # fmt: skip
    want = [spec.noise(7, (3, 1), 2, 0, 5 * j) for j in range(4)]
    assert got.score.tolist() == [want]


# ---------------------------------------------------------------------------------------------------------------------
# segment and flag_repeats

IDS = st.lists(st.integers(0, len(TEXTS) - 1), max_size=60)
PIECES = ["alt", "ernat", "ively", "Alternat", " ", "  ", "Wai", "t", "aga", "in", "i", "n", "\n", ".\n\n", ":\n",
          ": \n", "x", "Wait", " Again", "again "]  # fmt: skip


def assert_same_sentences(got, want):
    assert got.spans.tolist() == want.spans.tolist()
    assert got.labels.tolist() == want.labels.tolist()
    assert got.closed.tolist() == want.closed.tolist()


@settings(SETTINGS, max_examples=300)
@given(IDS)
def test_segment_equals_the_reference(ids):
    texts = [TEXTS[i] for i in ids]
    assert_same_sentences(skipkv.segment(ids, texts), spec.segment(ids, texts))


@settings(SETTINGS, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_markers_in_pieces_equal_the_reference(texts):
    ids = [PIECES.index(text) for text in texts]
    assert_same_sentences(skipkv.segment(ids, texts), spec.segment(ids, texts))


@SETTINGS
@given(
    IDS, st.sets(st.sampled_from(range(len(TEXTS)))), st.sets(st.sampled_from(range(len(TEXTS)))), st.integers(0, 60)
)
def test_segment_by_ids_and_the_official_rules(ids, delimiters, markers, n_prompt):
    texts, chosen = [TEXTS[i] for i in ids], {"delimiters": delimiters, "markers": markers}
    for some in (chosen, {"delimiters": delimiters}, {"markers": markers}):
        assert_same_sentences(skipkv.segment(ids, texts, **some), spec.segment(ids, texts, **some))
    official = chosen | {"n_prompt": min(n_prompt, len(ids)), "compat": "official"}
    assert_same_sentences(skipkv.segment(ids, texts, **official), spec.segment(ids, texts, **official))


@pytest.mark.parametrize(
    "text, delimiters, labels",
    [
        ("Alter|natively|.", [2], [1]),
        ("Alter|natively|.", [0, 2], [0, 0]),
        ("a|ga|in|.", [3], [1]),
        ("a|ga|in|.", [0, 3], [0, 0]),
        ("a|ga|in|.", [1, 3], [0, 0]),
        ("x|a|ga|in", [0, 3], [0, 1]),
    ],
)
def test_a_marker_does_not_span_sentences(text, delimiters, labels):
    texts = text.split("|")
    assert skipkv.segment(range(len(texts)), texts, delimiters=delimiters).labels.tolist() == labels


def test_compat_empty_sentences_and_prompt_marker_one_by_one():
    texts = ["a", " Wait", ".\n", "\n", " Wait", ".\n", "b", "\n"]
    chosen = {"delimiters": [2, 3, 5, 7], "markers": [1, 4], "n_prompt": 6}

    def found(compat):
        got = skipkv.segment(range(8), texts, compat=compat, **chosen)
        return got.spans.tolist(), got.labels.tolist()

    assert found(None) == ([[0, 3], [4, 5], [6, 7]], [1, 1, 0])
    assert found("empty-sentences") == ([[0, 2], [3, 3], [4, 5], [6, 7]], [1, 0, 1, 0])
    assert found("prompt-marker") == ([[0, 3], [4, 5], [6, 7]], [1, 0, 0])
    both = ([[0, 2], [3, 3], [4, 5], [6, 7]], [1, 0, 0, 0])
    assert found(["prompt-marker", "empty-sentences"]) == found("official") == both


@SETTINGS
@given(
    st.integers(0, 2**32),
    st.integers(0, 30),
    st.sampled_from([1, 3, 32, 70]),
    st.sampled_from([0.95, 0.5, 0.0, -1.0, 1.01]),
)
def test_flags_equal_the_reference(seed, n, dim, tau):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, dim))
    for j in range(1, n):
        if rng.random() < 0.5:
            vectors[j] = vectors[rng.integers(j)] + rng.choice([0, 0.1, 0.3]) * rng.normal(size=dim)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float32)
    pairs = (vectors.astype(np.float64) @ vectors.T.astype(np.float64))[np.triu_indices(n, 1)]
    if np.abs(pairs - tau).min(initial=1) < 1e-6:
        return  # §9: such a cosine may fall either way (dimension 1 at τ = ±1)
    for compat, official in ((None, None), ("latest-flag", "official"), ("official", "official")):
        got = skipkv.flag_repeats(vectors, tau, compat=compat)
        want = spec.flag_repeats(vectors, tau, compat=official)
        assert got.dtype == np.float32
        # λ to 1e-5 relative; a sum of up to 70 products near 0 has an absolute error instead
        assert harness.close(got, want, 1e-5, 1e-6) <= 1, compat


# ---------------------------------------------------------------------------------------------------------------------
# Deviations of the released code in select


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


# ---------------------------------------------------------------------------------------------------------------------
# Golden cases

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"
FILES = sorted(GOLDENS.glob("*.npz")) if (GOLDENS / "check.py").exists() else []


@pytest.mark.parametrize("path", FILES or [None], ids=lambda path: path.stem if path else "none")
def test_golden(path):
    if path is None:
        pytest.skip(f"no golden cases at {GOLDENS}")
    spec = importlib.util.spec_from_file_location("goldens_check", GOLDENS / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    case = dict(np.load(path))
    meta = json.loads(str(case["meta"]))
    function = {"select": select, "segment": skipkv.segment, "flags": skipkv.flag_repeats}[meta["kind"]]
    verdict = getattr(check, f"check_{meta['kind']}")(case, meta, function)
    assert verdict == "exact" or verdict == "near tie" and not meta["exact"]


# ---------------------------------------------------------------------------------------------------------------------
# Parameters, their errors, their strings

KEYS, QUERIES = np.zeros((2, 40, 16), np.float32), np.zeros((4, 8, 16), np.float32)
EMPTY = "none may be empty, head_dim at most 512, query heads a multiple of KV heads"
WHOLE = "an integer, or integers [n_layers] or [n_layers, n_kv_heads]"
NAMES = "full, streaming, h2o, h2o-last, snapkv, rkv, skipkv, random"
NEEDS = "allowed: some of queries, sums, penalties, importance, redundancy"
RKV_TAKES = "budget, interval, window, mix, kernel, tau, protect, evict, compat"
DEVIATIONS = ("None, 'official' or some of pairs, lost-heads, score-order, latest-flag, empty-sentences, "
              "prompt-marker, thoughts-anywhere, thoughts-on-grid, steer-prompt-end")  # fmt: skip


def at_open(method, n_prompt=1, **options):
    session = harness.open_session(harness.build()[0], method)
    return session.open(200, n_prompt=n_prompt, **options)


def vector(n=32):
    return np.zeros(n, np.float32)


@pytest.mark.parametrize(
    "act, message",
    [
        # budgets
        (lambda: RKV(budget=8), "budget is 8; allowed: more than the 8 newest slots that rkv always keeps"),
        (lambda: RKV(30, window=30), "budget is 30; allowed: more than the 30 newest slots that rkv always keeps"),
        (lambda: H2O(8), "budget is 8; allowed: more than the 8 newest slots that h2o always keeps"),
        (lambda: H2OLast(1), "budget is 1; allowed: more than the 1 newest slots that h2o-last always keeps"),
        (
            lambda: Streaming(4),
            "budget is 4; allowed: at least 5, as the first 4 positions and the 0 newest slots are protected",
        ),
        (
            lambda: RKV(30, protect="sinks:23"),
            "budget is 30; allowed: at least 31, as the first 23 positions and the 8 newest slots are protected",
        ),
        (lambda: RKV(0), "budget is 0; allowed: integers from 1 to 16777216"),
        (lambda: RKV(1 << 25), "budget is 33554432; allowed: integers from 1 to 16777216"),
        (lambda: RKV(2.5), f"budget is 2.5; allowed: {WHOLE}"),
        (lambda: RKV("x"), f"budget is 'x'; allowed: {WHOLE}"),
        (lambda: RKV(None), f"budget is None; allowed: {WHOLE}"),
        (lambda: RKV(True), f"budget is True; allowed: {WHOLE}"),
        (lambda: RKV([]), f"budget is []; allowed: {WHOLE}"),
        (lambda: RKV([[[9]]]), f"budget is [[[9]]]; allowed: {WHOLE}"),
        (
            lambda: H2OLast([[30, 31], [30, 30]]),
            "budget differs between the KV heads of layer 0; "
            "allowed: one number a layer, as h2o-last keeps one set for all heads",
        ),
        (lambda: at_open(RKV([30, 30, 30])), "budget: expected a number, [2] or [2, 2], found shape [3]"),
        (lambda: at_open(RKV([[30, 30, 30]])), "budget: expected a number, [2] or [2, 2], found shape [1, 3]"),
        (
            lambda: at_open(RKV(30, protect="prompt"), 23),
            "budget is 30; allowed: at least 31, as the first 23 positions and the 8 newest slots are protected",
        ),
        (
            lambda: at_open(RKV([[30, 40], [29, 50]], protect="prompt"), 22),
            "budget is 29; allowed: at least 30, as the first 22 positions and the 8 newest slots are protected",
        ),
        (
            lambda: at_open(H2O(40, protect="prompt"), 21),
            "budget is 40; allowed: at least 41, as the first 21 positions and the 20 newest slots are protected",
        ),
        (
            lambda: at_open(RKV(30), reserve=22),
            "budget is 8 after the padding reserve; "
            "allowed: at least 9, as the first 0 positions and the 8 newest slots are protected",
        ),
        # other parameters
        (lambda: RKV(30, mix=-0.1), "mix is -0.1; allowed: numbers from 0 to 1"),
        (lambda: RKV(30, mix=1.5), "mix is 1.5; allowed: numbers from 0 to 1"),
        (lambda: RKV(30, mix=float("nan")), "mix is nan; allowed: numbers from 0 to 1"),
        (lambda: RKV(30, mix="a"), "mix is 'a'; allowed: a number"),
        (lambda: RKV(30, kernel=4), "kernel is 4; allowed: odd integers from 1 to 255"),
        (lambda: RKV(30, kernel=257), "kernel is 257; allowed: odd integers from 1 to 255"),
        (lambda: RKV(30, window=0), "window is 0; allowed: integers from 1 to 256"),
        (lambda: RKV(30, window=2.5), "window is 2.5; allowed: integers from 1 to 256"),
        (lambda: RKV(30, interval=0), "interval is 0; allowed: integers from 1 to 1048576"),
        (lambda: SkipKV(30, tau=2.5), "tau is 2.5; allowed: numbers from -1 to 2"),
        (lambda: Streaming(30, sinks=-1), "sinks is -1; allowed: integers from 0 to 1048576"),
        (lambda: Random(30, seed=-1), "seed is -1; allowed: integers from 0 to 9007199254740991"),
        (lambda: Random(30, seed=2**53), "seed is 9007199254740992; allowed: integers from 0 to 9007199254740991"),
        (lambda: RKV(30, protect="first"), "protect is 'first'; allowed: none, prompt, sinks:N"),
        (lambda: RKV(30, protect="sinks:-1"), "protect is 'sinks:-1'; allowed: none, prompt, sinks:N"),
        (lambda: RKV(30, evict="no"), "evict is 'no'; allowed: True, False"),
        (lambda: RKV(30, compat="pear"), f"compat is 'pear'; allowed: {DEVIATIONS}"),
        (lambda: RKV(30, compat=["pairs", "pear"]), f"compat is 'pear'; allowed: {DEVIATIONS}"),
        (lambda: RKV(30, compat=7), f"compat is 7; allowed: {DEVIATIONS}"),
        # strings
        (lambda: parse_method("rvk:budget=30"), f"method is 'rvk'; allowed: {NAMES}"),
        (lambda: parse_method("custom:budget=30"), f"method is 'custom'; allowed: {NAMES}"),
        (lambda: parse_method(7), "method is 7; allowed: a method or its string"),
        (lambda: parse_method("rkv"), "method 'rkv': rkv needs a budget"),
        (
            lambda: parse_method("rkv:budget=30,depth=3"),
            f"method 'rkv:budget=30,depth=3': 'depth' is no parameter of it; allowed: {RKV_TAKES}",
        ),
        (
            lambda: parse_method("rkv:budget=30,budget=40"),
            f"method 'rkv:budget=30,budget=40': 'budget' is given twice; allowed: {RKV_TAKES}",
        ),
        (lambda: parse_method("rkv:budget"), f"method 'rkv:budget': 'budget' has no value; allowed: {RKV_TAKES}"),
        (lambda: parse_method("rkv:budget=x"), "budget is 'x'; allowed: a number"),
        (lambda: parse_method("rkv:budget=9/x"), "budget is '9/x'; allowed: a number"),
        (
            lambda: parse_method("rkv:budget=40+30/50"),
            "budget is ((40, 30), 50); allowed: an integer, or integers [n_layers] or [n_layers, n_kv_heads]",
        ),
        (lambda: parse_method("rkv:budget=30,evict=maybe"), "evict is 'maybe'; allowed: True, False"),
        (
            lambda: parse_method("full:budget=30"),
            "method 'full:budget=30': 'budget' is no parameter of it; allowed: interval, tau, protect, evict, compat",
        ),
        # custom
        (lambda: Custom(3, budget=30), "score is 3; allowed: a function"),
        (lambda: Custom(len, ["query"], budget=30), f"needs is 'query'; {NEEDS}"),
        (lambda: Custom(len, "sums", budget=30), f"needs is 'sums'; {NEEDS}"),
        (
            lambda: Custom(len, budget=30, mix=0.1),
            "custom has no parameter 'mix'; allowed: budget, interval, window, tau",
        ),
        (lambda: Custom(len, budget=8), "budget is 8; allowed: more than the 8 newest slots that custom always keeps"),
        # select
        (lambda: select("rvk", KEYS, QUERIES, budget=20), f"method is 'rvk'; allowed: {NAMES}"),
        (lambda: select("rkv", KEYS, QUERIES), "rkv needs a budget"),
        (
            lambda: select("rkv", KEYS, QUERIES, budget=20, depth=3),
            "rkv has no parameter 'depth'; allowed: budget, interval, window, mix, kernel, tau",
        ),
        (
            lambda: select("rkv", KEYS[0], QUERIES, budget=20),
            "keys: expected [n_kv_heads, L, head_dim], found shape [40, 16]",
        ),
        (lambda: select("rkv", "x", QUERIES, budget=20), "keys: expected numbers [n_kv_heads, L, head_dim], found str"),
        (
            lambda: select("rkv", KEYS, QUERIES[0], budget=20),
            "queries: expected [n_heads, W, head_dim], found shape [8, 16]",
        ),
        (
            lambda: select("rkv", KEYS, QUERIES[..., :8], budget=20),
            "queries: expected shape [n, n, 16], found [4, 8, 8]",
        ),
        (lambda: select("rkv", KEYS, QUERIES[:3], budget=20), f"keys [2, 40, 16] and queries [3, 8, 16]: {EMPTY}"),
        (lambda: select("rkv", KEYS[:, :0], QUERIES, budget=20), f"keys [2, 0, 16] and queries [4, 8, 16]: {EMPTY}"),
        (lambda: select("rkv", KEYS, QUERIES[:, :0], budget=20), f"keys [2, 40, 16] and queries [4, 0, 16]: {EMPTY}"),
        (
            lambda: select("rkv", np.zeros((2, 4, 520)), np.zeros((4, 8, 520)), budget=20),
            f"keys [2, 4, 520] and queries [4, 8, 520]: {EMPTY}",
        ),
        (
            lambda: select("rkv", KEYS, QUERIES, budget=20, positions=range(39)),
            "positions: expected [40] or [2, 40], found shape [39]",
        ),
        (
            lambda: select("rkv", KEYS, QUERIES, budget=20, positions=np.zeros((3, 40))),
            "positions: expected [40] or [2, 40], found shape [3, 40]",
        ),
        (
            lambda: select("skipkv", KEYS, QUERIES, budget=20, penalties=np.zeros((3, 2))),
            "penalties: expected [n, 3], found shape [3, 2]",
        ),
        (lambda: select("h2o", KEYS, QUERIES, budget=20), "h2o needs sums, the attention received by every slot"),
        (
            lambda: select("h2o", KEYS, QUERIES, budget=20, sums=np.zeros((2, 39))),
            "sums: expected shape [2, 40], found [2, 39]",
        ),
        (lambda: select("rkv", KEYS, QUERIES, budget=[20] * 3), "budget: expected a number or [2], found shape [3]"),
        (
            lambda: select("h2o-last", KEYS, QUERIES, budget=[20, 21]),
            "budget differs between the KV heads of layer 0; "
            "allowed: one number a layer, as h2o-last keeps one set for all heads",
        ),
        (
            lambda: select("rkv", KEYS, QUERIES, budget=20, protect="prompt", prompt=13),
            "budget is 20; allowed: at least 21, as the first 13 positions and the 8 newest slots are protected",
        ),
        # sentences
        (lambda: skipkv.segment([1, 2], ["a"]), "texts: expected 2 as there are ids, found 1"),
        (
            lambda: skipkv.segment([1], ["a"], delimiters="official"),
            "delimiters and markers: 'official' is not known here; allowed: 'auto' or ids",
        ),
        (lambda: skipkv.flag_repeats(np.zeros(3)), "vectors: expected shape [n, n], found [3]"),
        (lambda: skipkv.flag_repeats([["a"]]), "vectors: expected numbers [n, D], found list"),
        (lambda: skipkv.flag_repeats(np.zeros((3, 4)), compat="x"), f"compat is 'x'; allowed: {DEVIATIONS}"),
        # steering
        (
            lambda: at_open(harness.make("full"), steering=(vector(31), 1, 1, 0, 2, "all")),
            "steering vector: expected shape [32], found [31]",
        ),
        (
            lambda: at_open(harness.make("full"), steering=(vector(), 2, 1, 0, 2, "all")),
            "steering layer is 2; allowed: 0 to 1",
        ),
        (
            lambda: at_open(harness.make("full"), steering=(vector(), 1, 1, 0, 2, "some")),
            'scope is "some"; allowed: think, generation, all',
        ),
    ],
)
def test_bad_parameters_are_refused_by_name(act, message):
    with pytest.raises(skipkv.ConfigError) as error:
        act()
    assert str(error.value) == message


@pytest.mark.parametrize("name", EVICTING)
def test_the_core_itself_refuses_a_method_without_a_budget(name):
    score = {"score": len} if name == "custom" else {}
    with pytest.raises(skipkv.ConfigError) as error:
        skipkv._skipkv.Session(harness.build()[0], method={"name": name} | score)
    assert str(error.value) == f"{name} needs a budget"


def test_the_least_budgets_run():
    """One less is refused above."""
    assert at_open(RKV(9)) == at_open(H2OLast(2)) == at_open(Streaming(5)) == at_open(RKV(30, protect="sinks:22")) == 0
    assert (
        at_open(RKV(30, protect="prompt"), 22)
        == at_open(RKV(30), reserve=21)
        == at_open(H2O(40, protect="prompt"), 20)
        == 0
    )


@st.composite
def chosen_methods(draw):
    name = draw(st.sampled_from(list(CLASSES)))
    values = {}
    for key in TABLE[name]["parameters"].split():
        p = PARAMETERS[key]
        if key == "budget":
            number = st.integers(600, 2000)
            row = st.lists(number, min_size=1, max_size=3)
            head = row if name != "h2o-last" else number.map(lambda x: [x, x])
            array = st.lists(head, min_size=1, max_size=3).filter(lambda a: len({*map(len, a)}) == 1)
            values[key] = draw(st.one_of(number, row, array))
        elif draw(st.booleans()):
            low, high = int(p["low"]), min(int(p["high"]), 500 if key != "seed" else 2**53)
            number = st.floats(low, high) if p["kind"] == "f" else st.integers(low, high - 1)
            values[key] = draw(number.map(lambda x, odd=p["kind"] == "o": x | 1 if odd else x))
    if draw(st.booleans()):
        values["protect"] = draw(st.sampled_from(["none", "prompt", "sinks:3", "sinks:2+prompt"]))
    if draw(st.booleans()):
        values["evict"] = draw(st.booleans())
    names = st.lists(st.sampled_from(["official", *COMPAT]), max_size=3)
    values["compat"] = draw(st.one_of(st.none(), st.sampled_from(["official", *COMPAT]), names))
    window = values.get("window", 8)
    if name == "h2o":
        values["budget"] = 2000
    return CLASSES[name](**values), window


@settings(SETTINGS, max_examples=200)
@given(chosen_methods())
def test_strings_name_the_method_again(chosen):
    method, _ = chosen
    assert parse_method(str(method)) == method
    assert hash(parse_method(str(method))) == hash(method)
    assert parse_method(method) is method


def test_strings_by_example():
    assert str(RKV(1024)) == "rkv:budget=1024" and str(skipkv.Full()) == "full"
    assert str(RKV([512, 256], mix=0.07, evict=False)) == "rkv:evict=False,budget=512/256,mix=0.07"
    heads = SkipKV([[64, 32], [32, 16]], protect="sinks:2+prompt")
    assert str(heads) == "skipkv:protect=sinks:2+prompt,budget=64+32/32+16"
    assert str(SnapKV(64, compat=["pairs", "lost-heads"])) == "snapkv:compat=pairs/lost-heads,budget=64"
    assert parse_method(None) == skipkv.Full()
    assert parse_method("rkv:budget=64+32/32+16").budget == ((64, 32), (32, 16))
    assert parse_method("rkv:budget=+64") == RKV([64]) == RKV([[64]]) == RKV(64.0)
    assert RKV([[64], [32]]) == RKV((64, 32)) and RKV(64, compat=()) == RKV(64) == RKV(64, compat=None)
    assert RKV(64, compat="pairs") == RKV(64, compat=["pairs"]) and RKV(64, compat=["official"]).compat == "official"


def test_classes_come_from_the_cores_table():
    assert {*CLASSES, "custom"} == {*TABLE} == {*ALL}
    for name, cls in CLASSES.items():
        own = [f.name for f in fields(cls) if f.name not in ("protect", "evict", "compat")]
        assert sorted(own) == sorted(TABLE[name]["parameters"].split())
        for f in fields(cls):
            if f.name in PARAMETERS and f.name != "budget":
                assert f.default == PARAMETERS[f.name]["default"]
    # METHOD §0
    assert {key: p["default"] for key, p in PARAMETERS.items()} == {
        "budget": None, "interval": 128, "window": 8, "mix": 0.1, "kernel": 7, "sinks": 4, "tau": 0.95, "seed": 0,
    }  # fmt: skip


def test_with_changes_one_parameter():
    assert RKV(64, mix=0.3).with_(budget=32) == RKV(32, mix=0.3)
    custom = Custom(len, ["sums"], budget=64).with_(budget=32, protect="prompt")
    assert (custom.budget, custom.protect, custom.score, custom.needs_) == (32, "prompt", len, ("sums",))
