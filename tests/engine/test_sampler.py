"""The sampler against NumPy: which tokens may be drawn, exactly, and how often, within what chance allows."""

import numpy as np
import pytest

import skipkv
from skipkv import _skipkv
from skipkv.run import penalise

VOCAB = 231
DRAWS = 40_000


@pytest.fixture(scope="module")
def session():
    return _skipkv.Session(skipkv.load("tiny", threads=1, progress=False)._core)


def draw(session, logits, n=DRAWS, *, seed=0, prompt=0, sample=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Tokens at positions 0 … n − 1, all from the same logits."""
    many = np.tile(np.asarray(logits, np.float32), (n, 1))
    sequences = np.array([(prompt, sample, position) for position in range(n)], np.int64)
    return session.sample(many, sequences, seed, temperature, top_k, top_p, min_p)


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities as transformers' warpers give them, in its order; the lower id comes first among equals.

    Also how near the nearest decision was, as a share of probability: float32 sums may decide nearer ones otherwise.
    """
    logits = np.asarray(logits, np.float64) / temperature
    order = np.lexsort((np.arange(len(logits)), -logits))
    keep, margin = np.ones(len(logits), bool), np.inf

    def probabilities():
        p = np.where(keep, np.exp(logits - logits.max()), 0)
        return p / p.sum()

    if top_k:
        keep[order[top_k:]] = False
    if top_p < 1:
        total = np.cumsum(probabilities()[order])
        n = int(np.searchsorted(total, top_p)) + 1
        margin = np.abs(total - top_p).min()
        keep[order[max(1, n) :]] = False
    if min_p:
        p = probabilities()
        margin = min(margin, np.abs(p / p.max() - min_p).min())
        keep &= p >= min_p * p.max()
    return probabilities(), margin


@pytest.mark.oracle
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 1.0, 0.0), (30, 1.0, 0.0), (50, 0.8, 0.0), (40, 0.9, 0.15)])
def test_what_may_be_drawn_is_what_transformers_leaves(session, penalty, top_k, top_p, min_p):
    """Its processors one behind the other against the specification, and the specification against the draws below."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rng = np.random.default_rng(4)
    logits, ids = rng.standard_normal(VOCAB).astype(np.float32) * 2, rng.integers(0, VOCAB, 90)
    chain = [transformers.RepetitionPenaltyLogitsProcessor(penalty), transformers.TemperatureLogitsWarper(1.4)]
    chain += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    chain += [transformers.TopPLogitsWarper(top_p), transformers.MinPLogitsWarper(min_p)]
    want = transformers.LogitsProcessorList(chain)(torch.tensor(ids[None]), torch.tensor(logits[None]))
    want = want[0].double().softmax(0).numpy()
    penalise(logits, ids.tolist(), penalty)
    got, margin = distribution(logits, 1.4, top_k, top_p, min_p)
    assert margin > 1e-6
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)  # float32 logits of up to 6
    drawn = draw(session, logits, temperature=1.4, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(np.flatnonzero(got * DRAWS > 20)) <= set(drawn.tolist()) <= set(np.flatnonzero(want))


def test_a_repetition_penalty_takes_every_id_once():
    logits = np.array([2.0, -2.0, 0.0, 3.0, -np.inf], np.float32)
    penalise(logits, [0, 1, 1, 1, 2, 0, 4], 2.0)
    assert logits.tolist() == [1.0, -4.0, 0.0, 3.0, -np.inf]


LOGITS = np.random.default_rng(11).standard_normal(VOCAB).astype(np.float32)
SETTINGS = [
    {},
    {"temperature": 1.7},
    {"temperature": 0.7, "top_k": 20},
    {"top_k": VOCAB + 300},
    {"top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.2},
    {"top_p": 0.9, "min_p": 0.15},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.3},
    {"top_p": 0.0},
    {"min_p": 1.0},
    {"top_k": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_tokens_allowed_and_their_frequencies_are_those_of_the_specification(session, settings):
    expected, margin = distribution(LOGITS, **settings)
    # Nothing here hangs on a rounding; where only the best token stays, that margin is 0 by definition.
    assert margin > 1e-6 or (expected > 0).sum() == 1
    counts = np.bincount(draw(session, LOGITS, seed=3, **settings), minlength=VOCAB)
    allowed = expected > 0
    # 40 000 draws: a token of the least probability here misses out with a chance below e^-9.
    assert DRAWS * expected[allowed].min() > 9
    assert np.array_equal(counts > 0, allowed)
    degrees = allowed.sum() - 1
    chi = ((counts[allowed] - DRAWS * expected[allowed]) ** 2 / (DRAWS * expected[allowed])).sum()
    # Mean k − 1, variance 2 (k − 1): five standard deviations either way (too even would be wrong, too).
    assert abs(chi - degrees) <= 5 * np.sqrt(2 * degrees)


def test_top_p_counts_from_what_top_k_left():
    both = distribution(LOGITS, 1.3, 40, 0.7)[0] > 0
    apart = (distribution(LOGITS, 1.3, 40)[0] > 0) & (distribution(LOGITS, 1.3, 0, 0.7)[0] > 0)
    assert both.sum() < apart.sum()  # so the setting above would notice another order


def tied(*best):
    logits = np.full(VOCAB, -1e4)  # e^-10000 is 0: it takes part in no sum
    logits[list(best)] = 2.0
    return logits


def test_greedy_takes_the_lower_id_among_equals(session):
    logits = np.round(np.random.default_rng(0).standard_normal((500, VOCAB)) * 2).astype(np.float32)
    assert (logits == logits.max(1, keepdims=True)).sum(1).max() > 1
    got = session.sample(logits, np.zeros((500, 3), np.int64), 0, 0.0, 0, 1.0, 0.0)
    assert np.array_equal(got, logits.argmax(1))


@pytest.mark.parametrize(
    "settings, allowed",
    [
        ({"top_k": 2}, {7, 40}),
        ({"top_k": 3}, {7, 40, 41}),
        ({"top_p": 0.5}, {7, 40}),  # two of four hold exactly half
        ({"top_p": 0.51}, {7, 40, 41}),
        ({"top_k": 3, "top_p": 0.6}, {7, 40}),
        ({"min_p": 1.0}, {7, 40, 41, 199}),  # as likely as the most likely one
    ],
    ids=str,
)
def test_ties_fall_to_the_lower_ids(session, settings, allowed):
    got = draw(session, tied(199, 41, 7, 40), 2000, **settings)
    assert set(got.tolist()) == allowed


def test_top_k_of_one_is_greedy(session):
    logits = np.random.default_rng(1).standard_normal((400, VOCAB)).astype(np.float32)
    sequences = np.array([(i % 3, i % 5, i) for i in range(400)], np.int64)
    assert np.array_equal(session.sample(logits, sequences, 5, 1.9, 1, 1.0, 0.0), logits.argmax(1))
    free = session.sample(logits, sequences, 5, 1.9, 0, 1.0, 0.0)
    assert (free == logits.argmax(1)).mean() < 0.2


def test_a_draw_depends_on_seed_prompt_sample_and_position_and_on_nothing_else(session):
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((600, VOCAB)).astype(np.float32)
    sequences = rng.integers(0, 5, (600, 3))
    settings = (1.2, 0, 0.95, 0.0)
    together = session.sample(logits, sequences, 9, *settings)
    order = rng.permutation(600)
    assert np.array_equal(session.sample(logits[order], sequences[order], 9, *settings), together[order])
    alone = [session.sample(logits[i : i + 1], sequences[i : i + 1], 9, *settings)[0] for i in range(50)]
    assert np.array_equal(alone, together[:50])
    flat = np.zeros(VOCAB)
    one = draw(session, flat, 3000)
    assert np.array_equal(draw(session, flat, 3000), one)
    for other in ({"seed": 1}, {"prompt": 1}, {"sample": 1}):
        # Independent draws agree once in 231: 13 of 3000, give or take 3.6.
        assert (draw(session, flat, 3000, **other) == one).sum() < 40
    # Sample 1 of prompt 0 and sample 0 of prompt 1 are two sequences.
    assert (draw(session, flat, 3000, sample=1) == draw(session, flat, 3000, prompt=1)).sum() < 40


def test_the_largest_seed_and_negative_indices_are_taken(session):
    assert len(set(draw(session, np.zeros(VOCAB), 500, seed=2**64 - 1, prompt=-1, sample=2**62).tolist())) > 150


def test_infinite_and_huge_logits_are_no_trap(session):
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[3, 9]] = 1e30
    for settings in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.01}):
        assert set(draw(session, logits, 300, **settings).tolist()) == {3, 9}
    # Next to nothing as temperature: greedy, in effect.
    assert set(draw(session, LOGITS, 300, temperature=1e-30).tolist()) == {int(LOGITS.argmax())}


def test_wrong_shapes_are_refused(session):
    for logits, sequences, name in (
        (np.zeros((2, VOCAB - 1), np.float32), np.zeros((2, 3), np.int64), "logits"),
        (np.zeros((2, VOCAB), np.float32), np.zeros((3, 3), np.int64), "sequences"),
    ):
        with pytest.raises(skipkv.ConfigError, match=f"{name}: expected shape"):
            session.sample(logits, sequences, 0, 1.0, 0, 1.0, 0.0)
