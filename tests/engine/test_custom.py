"""A score in Python: what it sees, what it may say, and how its failure ends a row."""

import harness
import numpy as np
import pytest
from harness import STEERING, assert_same, assert_same_run, outcome, refused

import skipkv
from skipkv import ConfigError, Custom, _skipkv

pytestmark = pytest.mark.sanitize


def test_custom_with_the_same_score_equals_skipkv_and_rkv(backend):
    tokens = harness.sentences_text(170, 7)
    model, _ = harness.build(variant=backend)

    def like_rkv(c):
        mix, rest = np.float32(0.1), np.float32(1 - 0.1)
        return mix * c.importance - rest * c.redundancy[: c.n_candidates]

    plain = {"budget": 40, "interval": 16, "tau": 0.9}
    pairs = [
        ("skipkv", harness.make("custom", **plain)),
        ("rkv", Custom(like_rkv, ["importance", "redundancy"], **plain)),
    ]
    for name, custom in pairs:
        results = []
        for method in (harness.make(name, **plain), custom):
            session, row, logits, _ = harness.play(model, method, tokens, 50, trace=1)
            results.append((outcome(session, row, logits)[:5], session.trace()))
        assert_same(results[0][0], results[1][0])
        assert [record[5].tolist() for record in results[0][1]] == [record[5].tolist() for record in results[1][1]]


def test_custom_sees_the_head_it_scores(backend):
    seen = []

    def score(c):
        seen.append(c)
        return -c.positions[: c.n_candidates]

    method = Custom(
        score, ["queries", "penalties", "sums", "importance", "redundancy"], budget=20, window=5, interval=16
    )
    model, _ = harness.build("qwen2", 2, 3, backend)
    session, row, _, _ = harness.play(model, method, harness.sentences_text(33, 14), 33, trace=1)
    assert [(c.layer, c.head) for c in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for c in seen:
        assert c.keys.shape == (33, 16) and c.queries.shape == (3, 5, 16) and c.n_candidates == 28
        assert np.array_equal(c.positions, np.arange(33)) and len(c.importance) == 28
        assert len(c.penalties) == len(c.sums) == len(c.redundancy) == 33
        assert c.sums.sum() == pytest.approx(3 * 33, rel=1e-5)  # each of 33 queries of 3 heads gives away 1
        assert c.redundancy.sum() == pytest.approx(1, rel=1e-5)
    for record in session.trace():
        assert record[5].tolist() == [*range(15), *range(28, 33)]


class Stop(Exception):
    """What the failing scores below raise."""


@pytest.mark.parametrize("trace", [0, 2])
def test_a_failing_custom_score_ends_its_row_alone(trace, backend):
    """Three rows compact in one forward; the score of the second fails in its second layer, the first is compacted."""
    model, _ = harness.build(variant=backend)
    texts = [harness.sentences_text(100, seed) for seed in (21, 22, 23)]
    prompts = [41, 42, 43]  # tells the rows' first compactions apart: those are at the end of the prompt

    def score(c):
        if len(c.positions) == 42 and (c.layer, c.head) == (1, 1) and armed:
            raise Stop("no more")
        return c.importance

    parameters = {"budget": 30, "interval": 16}
    method = Custom(score, ["importance"], **parameters)
    armed, want = False, []
    for tokens, n_prompt in zip(texts, prompts, strict=True):
        session, row, logits, _ = harness.play(model, method, tokens, n_prompt, trace=trace, steering=STEERING)
        want.append((outcome(session, row, logits), session.trace()))
    armed = True
    session = harness.open_session(model, method, rows=4, trace=trace, threads=2)
    rows = [session.open(100, n_prompt=n, steering=STEERING) for n in prompts]
    first = [tokens[:n] for tokens, n in zip(texts, prompts, strict=True)]
    logits = np.empty((sum(prompts), harness.VOCAB), np.float32)
    spans = np.array(list(zip(rows, prompts, strict=True)), np.int32)
    with pytest.raises(Stop, match="no more"):
        session.forward(spans, np.concatenate(first).astype(np.int32), logits, True)
    records = session.trace()
    assert {record[0] for record in records} == ({rows[0], rows[2]} if trace else set())
    with refused("span 0: row 1 ended when its custom score failed"):
        session.forward(np.array([[rows[1], 1]], np.int32), np.zeros(1, np.int32))
    fork = session.fork(rows[1], 100, 0)
    with pytest.raises(ConfigError, match="row 3 ended when its custom score failed"):
        session.forward(np.array([[fork, 1]], np.int32), np.zeros(1, np.int32))
    session.close(fork)
    session.close(rows[1])
    begins = np.split(logits, np.cumsum(prompts)[:-1])
    for i in (0, 2):
        rest, _ = harness.replay(session, rows[i], texts[i][prompts[i] :])
        records += session.trace()
        got = outcome(session, rows[i], np.concatenate([begins[i], rest]))
        assert_same_run(backend, want[i], (got, records), rows[i])
        session.close(rows[i])
    assert session.ledger()["live_bytes"] == session.ledger()["reserved_bytes"] == 0


def test_the_first_of_two_failing_rows_is_told(backend):
    def score(c):
        raise Stop(len(c.positions))

    session = harness.open_session(harness.build(variant=backend)[0], Custom(score, budget=30), rows=2)
    rows = [session.open(60, n_prompt=n) for n in (41, 42)]
    with pytest.raises(Stop, match="^41$"):
        session.forward(np.array([[rows[0], 41], [rows[1], 42]], np.int32), np.zeros(83, np.int32))


def test_what_the_caller_writes_later_changes_nothing(backend):
    """Arrays are copied before they are checked: a score, or another thread, may write to the caller's in between."""
    rng = np.random.default_rng(5)
    arrays = {"keys": rng.normal(size=(2, 50, 8)).astype(np.float32), "positions": np.tile(np.arange(50), (2, 1))}
    arrays["queries"], arrays["positions"] = arrays["keys"][:, -8:].copy(), arrays["positions"].astype(np.int32)
    arrays["penalties"] = np.array([[3, 9, 0.9], [12, 20, 0.8]], np.float32)

    def select(spoils):
        given = {name: array.copy() for name, array in arrays.items()}

        def score(c):
            for array in given.values() if spoils else ():
                array.fill(-(1 << 30))
            return c.importance - c.penalties[: c.n_candidates]

        method = Custom(score, ["importance", "penalties"], budget=20)
        return skipkv.select(method, **given)

    spoilt, whole = select(True), select(False)
    assert np.array_equal(spoilt.kept, whole.kept) and np.array_equal(spoilt.score, whole.score)

    model, tokens = harness.build(variant=backend)[0], harness.sentences_text(90, 7)
    outcomes = []
    for spoils in (False, True):
        words = [np.array(array) for array in harness.vocabulary()]
        method = harness.make("skipkv", budget=40, interval=16).as_dict(harness.SHAPES[model])
        session = _skipkv.Session(model, method=method, vocabulary=tuple(words))
        for array in words if spoils else ():
            array.fill(1 << 7)
        row = session.open(90)
        outcomes.append(outcome(session, row, harness.replay(session, row, tokens)[0]))
    assert_same(*outcomes)


@pytest.mark.parametrize("value, message", [
    (lambda c: np.zeros(5), "custom score: expected shape [34], found [5]"),
    (lambda c: np.zeros((34, 1)), "custom score: expected shape [34], found [34, 1]"),
    (lambda c: "high", "custom score: expected an array of type numpy.float32, found str"),
    (lambda c: 1.0, "custom score: expected shape [34], found []"),
    *((lambda c, s=s: s, "custom score: expected an array of type numpy.float32, found list")
      for s in (["1"] * 34, [1j] * 34, [None] * 34)),
    *((lambda c, s=s: s, "custom score: expected an array of type numpy.float32, found numpy.ndarray")
      for s in (np.ones(34) * 1j, np.array(["1"] * 34), np.ones(34, "m8[s]"))),
    (
        lambda c: np.where((c.positions[:34] == 33) & (c.head == 1), np.nan, 0.0),
        "custom score of candidate 33 (layer 0, head 1) is nan; allowed: numbers",
    ),
])  # fmt: skip
def test_a_custom_score_is_checked(value, message, backend):
    session = harness.open_session(harness.build(variant=backend)[0], Custom(value, budget=30))
    row = session.open(60, n_prompt=42)
    with refused(message):
        harness.replay(session, row, harness.sentences_text(42, 24))


def test_infinite_custom_scores_are_numbers(backend):
    """-inf everywhere is a tie like any other; +inf is kept."""
    tokens = harness.sentences_text(42, 24)
    scores = [
        (lambda c: np.full(c.n_candidates, -np.inf), range(22)),
        (lambda c: np.where(c.positions[: c.n_candidates] > 30, np.inf, -np.inf), [*range(19), 31, 32, 33]),
    ]
    for score, kept in scores:
        session, *_ = harness.play(harness.build(variant=backend)[0], Custom(score, budget=30), tokens, 42, trace=1)
        assert all(record[5].tolist() == [*kept, *range(34, 42)] for record in session.trace())
