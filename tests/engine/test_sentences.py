"""Sentences of whole runs against the reference, and what skipkv makes of them."""

import harness
import numpy as np
import pytest
import spec
from harness import ALL, BLANK, CLOSE, ID, LINE, OPEN, TEXTS, THINK, WAIT, WORDS
from hypothesis import assume, given
from hypothesis import strategies as st

from skipkv import _skipkv

pytestmark = pytest.mark.sanitize

# Random text: any token of the vocabulary, whole sentences that come back, think markers of one and of three tokens.
PIECES = [*[[i] for i in range(len(TEXTS))], *THINK[0], *THINK[1], *[[BLANK]] * 3, [*WORDS[:4], LINE],
          [*WORDS[4:7], BLANK], [WORDS[1], WAIT, WORDS[2], BLANK], [ID["Alter"], ID["natively"], *WORDS[8:10], BLANK],
          [ID["a"], ID["ga"], ID["in"], WORDS[3], LINE]]  # fmt: skip
STOCK = PIECES[len(TEXTS) :] * 4 + PIECES
TEXT = st.lists(st.sampled_from(STOCK), min_size=1, max_size=60).map(lambda parts: sum(parts, [])[:180])


def finished(row, method):
    """What the reference says of a row: sentences, their vectors, λ as of the last grid point, and the counts."""
    texts = [TEXTS[i] for i in row.ids]
    sentences = spec.segment(row.ids, texts)
    vectors = spec.sentence_vectors(row.cache.hidden, sentences)
    flags = np.zeros(len(vectors))
    flags[: len(row.flags)] = row.flags
    repeats = [bool((vectors[:j] @ vectors[j] > method.tau).any()) for j in range(len(row.flags))]
    repeating = len(repeats) if all(repeats) else repeats[::-1].index(False)
    repeats += [False] * (len(vectors) - len(repeats))
    return sentences, vectors, flags, np.array(repeats, bool), repeating


def check_sentences(session, row, expected, method):
    sentences, vectors, flags, repeats, repeating = finished(expected, method)
    spans, got = session.sentences(row, True)
    columns = np.array(spans, np.float64).reshape(-1, 6)
    assert columns[:, :2].tolist() == sentences.spans.tolist()
    assert columns[:, 2].tolist() == sentences.closed.tolist()
    assert columns[:, 3].tolist() == sentences.labels.tolist()
    assert np.abs(got - vectors).max(initial=0) <= 1e-5  # entries of a unit vector, from float32 states
    assert harness.close(columns[:, 4], flags, 1e-5) <= 1
    assert columns[:, 5].tolist() == repeats.tolist()
    state = session.state(row)
    assert state["sentences"] == len(flags) and state["flagged"] == (flags > 0).sum()
    assert state["thoughts"] == expected.thoughts()
    states = spec.think_states([TEXTS[i] for i in expected.ids])
    for name, where in (("thinking_tokens", "inside"), ("answer_tokens", "after")):
        assert state[name] == (states == where).sum()
    assert state["repeating"] == repeating
    return state


@given(
    TEXT,
    st.integers(1, 60),
    st.sampled_from([5, 16, 200]),
    st.sampled_from([0.9, 0.95, 0.5]),
    st.sampled_from([1, 9, 512]),
)
def test_sentences_of_a_run_equal_the_reference(backend, tokens, n_prompt, interval, tau, step):
    n_prompt = min(n_prompt, len(tokens))
    model, decoder = harness.build("qwen3", variant=backend)
    method = harness.make("full", interval=interval, tau=tau)
    session, row, _, _ = harness.play(model, method, tokens, n_prompt, step)
    _, expected = harness.reference_run(decoder, method, tokens, n_prompt)
    assume(min(expected.margins.values()) > 1e-5)  # §9: such a similarity may fall either way
    check_sentences(session, row, expected, method)


@pytest.mark.parametrize("name", ALL)
def test_virtual_sets_leave_all_sentences(name, backend):
    """With evict=False nothing is ever freed: every method says of the text what full says."""
    first, thought, last = (harness.sentences_text(n, seed) for n, seed in ((40, 3), (100, 4), (20, 4)))
    tokens = [*first, OPEN, *thought, CLOSE, *last]
    model, decoder = harness.build(variant=backend)
    method = harness.make(name, budget=24, interval=16, window=4, tau=0.9, evict=False)
    session, row, _, _ = harness.play(model, method, tokens, 30)
    _, expected = harness.reference_run(decoder, method, tokens, 30)
    state = check_sentences(session, row, expected, method)
    assert state["thoughts"] > 0 and state["thinking_tokens"] == 100 and state["flagged"] > 3


def test_a_long_prompt_of_delimiters_fed_token_by_token(backend):
    """Sentences by the hundred before the first grid point: room is made as they come."""
    tokens = [WORDS[0], LINE] * 200
    model, _ = harness.build(variant=backend)
    session, row, _, _ = harness.play(model, harness.make("full", interval=16), tokens, 400, 1)
    assert session.state(row)["sentences"] == 200


def test_without_a_vocabulary_no_sentence_ever_ends(backend):
    model, _ = harness.build(variant=backend)
    session = _skipkv.Session(model, method=harness.make("skipkv", budget=24).as_dict((2, 2)))
    row = session.open(100, n_prompt=30, steering=(np.ones(32, np.float32), 1, 1.0, 0.0, 2.0, "all"))
    _, alphas = harness.replay(session, row, harness.sentences_text(100, 3))
    state = session.state(row)
    assert not alphas and {state[key] for key in ("sentences", "thoughts", "thinking_tokens", "steered")} == {0}


@pytest.mark.parametrize("cache", ["f32", "bf16", "q8"])
def test_skipkv_without_flags_is_rkv(cache, backend):
    tokens, found = harness.sentences_text(170, 7), []
    for name, tau in (("skipkv", 1.01), ("rkv", 0.9), ("skipkv", 0.9)):
        method = harness.make(name, budget=40, interval=16, tau=tau)
        model, _ = harness.build(variant=backend)
        session, _, logits, _ = harness.play(model, method, tokens, 50, cache=cache, trace=2)
        found.append((logits, session.trace()))
    (logits, trace), (other, others), (flagged, flags) = found
    assert np.array_equal(logits, other) and len(trace) == len(others) == 4 * 8
    for a, b in zip(trace, others, strict=True):
        assert a[:5] == b[:5] and np.array_equal(a[5], b[5]) and np.array_equal(a[6]["score"], b[6]["score"])
    assert not np.array_equal(logits, flagged) and any(record[6]["penalty"].any() for record in flags)


def repeated_text():
    """(tokens, spans of the earlier copies in the prompt, and after it): one sentence four times among ten others."""
    rng = np.random.default_rng(8)
    copy = [*WORDS[:7], LINE]
    others = [[*rng.choice(WORDS[7:], 7).tolist(), LINE] for _ in range(10)]
    parts = [others[0], copy, others[1], others[2], copy, others[3], others[4], copy, *others[5:9], copy, others[9]]
    starts = np.cumsum([0, *map(len, parts)])
    copies = [(starts[i], starts[i + 1] - 1) for i, part in enumerate(parts) if part is copy]
    return [i for part in parts for i in part], copies[:1], copies[1:-1]


@pytest.mark.parametrize("protect", ["none", "prompt"])
@pytest.mark.parametrize("family", harness.FAMILIES)
def test_earlier_copies_of_a_sentence_go_first_and_whole(family, protect, backend):
    tokens, in_prompt, after = repeated_text()
    n, n_prompt, tau = len(tokens), 24, 0.96
    dropped = {}
    for name in ("skipkv", "rkv"):
        # one compaction, at the last token; without the copies 88 slots are left: less than half of them must go
        method = harness.make(name, budget=70, interval=n - 1, tau=tau, protect=protect)
        model, _ = harness.build(family, damp=0.02, variant=backend)
        session, row, _, _ = harness.play(model, method, tokens, n_prompt, trace=2)
        records = session.trace()
        assert [record[1:4] for record in records] == [(n, layer, head) for layer in (0, 1) for head in (0, 1)]
        sentences, _ = session.sentences(row)
        flagged = [(first, last) for first, last, _, _, value, _ in sentences if value > 0]
        assert flagged == in_prompt + after
        gone = {p for first, last in after + (in_prompt if protect == "none" else []) for p in range(first, last + 1)}
        dropped[name] = [gone.isdisjoint(record[5].tolist()) for record in records]
        if protect == "prompt":
            assert all(set(range(n_prompt)) <= set(record[5].tolist()) for record in records)
    assert all(dropped["skipkv"]) and not all(dropped["rkv"])


def test_a_sentence_without_slots_loses_its_vector_and_nothing_else(backend):
    tokens = harness.sentences_text(170, 7)
    model, decoder = harness.build(variant=backend)
    method = harness.make("streaming", budget=24, interval=16, tau=0.9, sinks=0)
    session, row, _, _ = harness.play(model, method, tokens, 50)
    _, expected = harness.reference_run(decoder, method, tokens, 50)
    sentences, vectors, *_ = finished(expected, method)
    rows, got = session.sentences(row, True)
    held = np.concatenate([session.positions(row, layer, h) for layer in (0, 1) for h in (0, 1)])
    alive = np.array([((held >= first) & (held <= last)).any() for first, last in sentences.spans])
    assert np.array_equal(~np.isnan(got[:, 0]), alive) and 2 < alive.sum() < len(alive) - 5
    assert np.abs(got - vectors)[alive].max() <= 1e-5
    assert [r[:2] for r in rows] == [tuple(s) for s in sentences.spans.tolist()]
