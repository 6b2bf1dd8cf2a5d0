"""Sentences and steering in whole runs against the reference, and the deviations of the released code one by one."""

import engine
import numpy as np
import pytest
import reference
from engine import ALL, ID, TEXTS, THINK, WORDS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import Steering

from skipkv import Custom, _skipkv

SETTINGS = settings(max_examples=60, deadline=None, print_blob=True)
OPEN, CLOSE, WAIT, BLANK, LINE = (ID[text] for text in ("<think>", "</think>", " Wait", ".\n\n", ".\n"))

# Random text: any token of the vocabulary, whole sentences that come back, think markers of one and of three tokens.
PIECES = [*[[i] for i in range(len(TEXTS))], *THINK[0], *THINK[1], *[[BLANK]] * 3, [*WORDS[:4], LINE],
          [*WORDS[4:7], BLANK], [WORDS[1], WAIT, WORDS[2], BLANK], [ID["Alter"], ID["natively"], *WORDS[8:10], BLANK],
          [ID["a"], ID["ga"], ID["in"], WORDS[3], LINE]]  # fmt: skip
STOCK = PIECES[len(TEXTS) :] * 4 + PIECES
TEXT = st.lists(st.sampled_from(STOCK), min_size=1, max_size=60).map(lambda parts: sum(parts, [])[:180])


def finished(row, method):
    """What the reference says of a row: sentences, their vectors, λ as of the last grid point, and the counts."""
    texts = [TEXTS[i] for i in row.ids]
    sentences = reference.segment(row.ids, texts)
    vectors = reference.sentence_vectors(row.cache.hidden, sentences)
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
    assert engine.close(columns[:, 4], flags, 1e-5) <= 1
    assert columns[:, 5].tolist() == repeats.tolist()
    state = session.state(row)
    assert state["sentences"] == len(flags) and state["flagged"] == (flags > 0).sum()
    assert state["thoughts"] == expected.thoughts()
    assert state["thinking_tokens"] == reference.inside_think(expected.ids, THINK).sum()
    assert state["repeating"] == repeating
    return state


@SETTINGS
@given(
    TEXT,
    st.integers(1, 60),
    st.sampled_from([5, 16, 200]),
    st.sampled_from([0.9, 0.95, 0.5]),
    st.sampled_from([1, 9, 512]),
)
def test_sentences_of_a_run_equal_the_reference(tokens, n_prompt, interval, tau, step):
    n_prompt = min(n_prompt, len(tokens))
    model, decoder = engine.build("qwen3")
    method = engine.make("full", interval=interval, tau=tau)
    session = engine.open_session(model, method)
    row = session.open(len(tokens), n_prompt=n_prompt)
    engine.replay(session, row, tokens, step)
    _, expected = engine.reference_run(decoder, method, tokens, n_prompt)
    assume(min(expected.margins.values()) > 1e-5)  # §9: such a similarity may fall either way
    check_sentences(session, row, expected, method)


@pytest.mark.parametrize("name", ALL)
def test_virtual_sets_leave_all_sentences(name):
    """With evict=False nothing is ever freed: every method says of the text what full says."""
    tokens = [*engine.sentences_text(40, 3), OPEN, *engine.sentences_text(100, 4), CLOSE, *engine.sentences_text(20, 4)]
    model, decoder = engine.build()
    method = engine.make(name, budget=24, interval=16, window=4, tau=0.9, evict=False)
    session = engine.open_session(model, method)
    row = session.open(len(tokens), n_prompt=30)
    engine.replay(session, row, tokens)
    _, expected = engine.reference_run(decoder, method, tokens, 30)
    state = check_sentences(session, row, expected, method)
    assert state["thoughts"] > 0 and state["thinking_tokens"] == 100 and state["flagged"] > 3


def test_a_long_prompt_of_delimiters_fed_token_by_token():
    """Sentences by the hundred before the first grid point: room is made as they come."""
    tokens = [WORDS[0], LINE] * 600
    session = engine.open_session(engine.build()[0], engine.make("full", interval=16))
    row = session.open(1200, n_prompt=1200)
    engine.replay(session, row, tokens, 1)
    assert session.state(row)["sentences"] == 600


def test_without_a_vocabulary_no_sentence_ever_ends():
    model, _ = engine.build()
    session = _skipkv.Session(model, method=engine.make("skipkv", budget=24).as_dict((2, 2)))
    row = session.open(100, n_prompt=30, steering=(np.ones(32, np.float32), 1, 1.0, 0.0, 2.0, "all"))
    _, alphas = engine.replay(session, row, engine.sentences_text(100, 3))
    state = session.state(row)
    assert not alphas and {state[key] for key in ("sentences", "thoughts", "thinking_tokens", "steered")} == {0}


# ---------------------------------------------------------------------------------------------------------------------
# skipkv


@pytest.mark.parametrize("cache", ["f32", "bf16"])
def test_skipkv_without_flags_is_rkv(cache):
    tokens, found = engine.sentences_text(170, 7), []
    for name, tau in (("skipkv", 1.01), ("rkv", 0.9), ("skipkv", 0.9)):
        method = engine.make(name, budget=40, interval=16, tau=tau)
        session = engine.open_session(engine.build()[0], method, cache=cache, trace=2)
        logits, _ = engine.replay(session, session.open(170, n_prompt=50), tokens)
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
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_earlier_copies_of_a_sentence_go_first_and_whole(family, protect):
    tokens, in_prompt, after = repeated_text()
    n, n_prompt, tau = len(tokens), 24, 0.96
    dropped = {}
    for name in ("skipkv", "rkv"):
        # one compaction, at the last token; without the copies 88 slots are left: less than half of them must go
        method = engine.make(name, budget=70, interval=n - 1, tau=tau, protect=protect)
        session = engine.open_session(engine.build(family, damp=0.02)[0], method, trace=2)
        row = session.open(n, n_prompt=n_prompt)
        engine.replay(session, row, tokens)
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


def test_a_sentence_without_slots_loses_its_vector_and_nothing_else():
    tokens = engine.sentences_text(170, 7)
    model, decoder = engine.build()
    method = engine.make("streaming", budget=24, interval=16, tau=0.9, sinks=0)
    session = engine.open_session(model, method)
    row = session.open(170, n_prompt=50)
    engine.replay(session, row, tokens)
    _, expected = engine.reference_run(decoder, method, tokens, 50)
    sentences, vectors, *_ = finished(expected, method)
    rows, got = session.sentences(row, True)
    held = np.concatenate([session.positions(row, layer, h) for layer in (0, 1) for h in (0, 1)])
    alive = np.array([((held >= first) & (held <= last)).any() for first, last in sentences.spans])
    assert np.array_equal(~np.isnan(got[:, 0]), alive) and 2 < alive.sum() < len(alive) - 5
    assert np.abs(got - vectors)[alive].max() <= 1e-5
    assert [r[:2] for r in rows] == [tuple(s) for s in sentences.spans.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Steering

PARTED = []  # whether each steered run left the reference at a near tie
VECTOR = np.linspace(-0.6, 0.9, 32, dtype=np.float32)


def steered_run(tokens, n_prompt, steering, method=None, step=512, **options):
    """(logits, {position: α}, state and trace) of a run; steering: a reference.Steering, or None."""
    session = engine.open_session(engine.build(**options)[0], method or engine.make("full", interval=16), trace=1)
    s = steering
    values = None if s is None else (s.vector, s.layer, s.alpha, s.gamma, s.alpha_max, s.scope)
    row = session.open(len(tokens), n_prompt=n_prompt, steering=values)
    logits, alphas = engine.replay(session, row, tokens, step)
    state = session.state(row)
    assert state["steered"] == len(alphas)
    return logits, alphas, state | {"trace": session.trace()}


def thinking_text(n, seed):
    """A prompt's line, then a thought: blank lines outside and inside, the marker of three tokens where seed is odd."""
    opening = THINK[0][seed % 2]
    inside = [*opening, WORDS[0], WAIT, BLANK, *engine.sentences_text(n, seed)]
    after = [WORDS[2], WAIT, BLANK, WORDS[3], ID["\n\n"], WORDS[4], BLANK]
    return [WORDS[1], BLANK, *inside, BLANK, *THINK[1][seed % 2], *after]


@pytest.mark.parametrize("name", ALL)
@SETTINGS
@given(data=st.data())
def test_steering_equals_the_reference(name, data):
    tokens = thinking_text(data.draw(st.integers(10, 120)), data.draw(st.integers(0, 2**32)))
    n = len(tokens)
    alpha, gamma = data.draw(st.sampled_from([(1.0, 0.05), (0.5, 0.3), (-1.0, 0.1), (1.25, 0.0), (0.0, 0.2)]))
    steering = Steering(
        VECTOR, data.draw(st.integers(0, 1)), alpha, gamma, data.draw(st.sampled_from([2.0, alpha + 0.25, alpha])),
        data.draw(st.sampled_from(["think", "generation", "all"])),
    )  # fmt: skip
    n_prompt = data.draw(st.sampled_from([1, 2, n // 3, n - 7, n - 1]))
    family = data.draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    method = engine.make(name, budget=data.draw(st.sampled_from([200, 24])), interval=16, window=4, tau=0.9, seed=3)
    step = data.draw(st.sampled_from([1, 512]))
    logits, alphas, state = steered_run(tokens, n_prompt, steering, method, step, family=family)
    want, row = engine.reference_run(engine.build(family)[1], method, tokens, n_prompt, steering)
    assert len(alphas) > 0 and [*alphas] == [*row.alphas]
    assert engine.close([*alphas.values()], [*row.alphas.values()], 1e-6, 1e-6) <= 1  # float32 α + γN
    # Where a selection is a near tie, which test_eviction.py judges and counts, the runs part.
    pairs = zip(state["trace"], row.trace, strict=True)
    end = next((c.step for record, c in pairs if not np.array_equal(record[5], c.kept)), len(tokens))
    PARTED.append(end < len(tokens))
    assert sum(PARTED) <= max(2, 0.01 * len(PARTED))
    assert np.abs(logits - want)[:end].max() <= 1e-4 * np.abs(want).max()
    plain, _, _ = steered_run(tokens, n_prompt, None, method, family=family)
    first = min(alphas)
    assert np.array_equal(logits[:first], plain[:first])
    moved = np.abs(logits - plain)[first:].max() > 1e-3 * np.abs(want).max()
    assert moved == any(alphas.values())


def test_every_scope_by_hand():
    x, header = WORDS[0], ID[":\n\n"]
    #         0  1      2     3     4  5  6      7     8       9  10     11    12    13     14 15
    tokens = [x, BLANK, OPEN, WAIT, x, x, BLANK, WAIT, header, x, BLANK, WAIT, LINE, CLOSE, x, BLANK]
    # ":\n\n" closes nothing, but is a blank line; N_o counts the sentence that this very token closes
    thought = {6: 1.5, 8: 1.5, 10: 1.75}
    for scope, n_prompt, expected in (
        ("think", 3, thought),
        ("think", 16, thought),
        ("generation", 8, {8: 1.5, 10: 1.75, 15: 1.75}),
        ("generation", 9, {10: 1.75, 15: 1.75}),
        ("all", 9, {1: 1.0, **thought, 15: 1.75}),
    ):
        for step in (1, 512):
            _, alphas, state = steered_run(tokens, n_prompt, Steering(VECTOR, 1, 1.0, 0.5, 1.75, scope), step=step)
            assert alphas == expected and state["thoughts"] == 3


@pytest.mark.parametrize("name", ALL)
def test_a_strength_of_zero_changes_no_bit(name):
    tokens = thinking_text(120, 5)
    method = engine.make(name, budget=24, interval=16, window=4, tau=0.9)
    plain, _, _ = steered_run(tokens, 40, None, method)
    for scope in ("think", "generation", "all"):
        logits, alphas, _ = steered_run(tokens, 40, Steering(VECTOR, 0, 0.0, 0.0, 2.0, scope), method)
        assert np.array_equal(logits, plain) and len(alphas) > 5 and set(alphas.values()) == {0.0}


@pytest.mark.parametrize("scope, first", [("think", 1.125), ("generation", 1.25), ("all", 1.0)])
def test_strength_moves_by_gamma_alone_up_to_its_cap(scope, first):
    tokens = thinking_text(160, 6)
    still = steered_run(tokens, 20, Steering(VECTOR, 1, 1.25, 0.0, 2.0, scope))[1]
    assert len(still) > 5 and set(still.values()) == {1.25}
    _, moving, state = steered_run(tokens, 20, Steering(VECTOR, 1, 1.0, 0.125, 1.5, scope))
    values = [*moving.values()]
    assert values == sorted(values) and {*values} == {*np.arange(first, 1.5625, 0.125)} and state["thoughts"] > 5
    lowered = steered_run(tokens, 20, Steering(VECTOR, 1, 1.0, 0.0, 0.75, scope))[1]
    assert len(lowered) > 5 and set(lowered.values()) == {0.75}


def test_a_token_that_closes_a_sentence_and_a_marker_is_outside():
    x, end = WORDS[0], [ID["ink"], ID[">\n"]]
    for tokens, thoughts, thinking in (
        ([WAIT, ID["<th"], *end, x, WAIT, LINE], 1, 3),  # the line that ends with <think> is no thought
        ([OPEN, x, WAIT, ID["</th"], *end, x, WAIT, LINE], 0, 4),  # nor the one that ends with </think>
    ):
        state = steered_run(tokens, 1, None)[2]
        assert (state["sentences"], state["thoughts"], state["thinking_tokens"]) == (2, thoughts, thinking)


def test_brake_raises_the_strength_to_its_cap():
    tokens = [OPEN, *[WORDS[0], BLANK] * 6]
    session = engine.open_session(engine.build()[0], engine.make("full"), rows=2)
    rows = [session.open(20, n_prompt=1, steering=(VECTOR, 1, 1.0, 0.0, 1.75, "think")) for _ in range(2)]
    alphas = [engine.replay(session, row, tokens[:7])[1] for row in rows]
    session.brake(rows[0])
    alphas = [a | engine.replay(session, row, tokens[7:])[1] for a, row in zip(alphas, rows, strict=True)]
    assert alphas == [{2: 1.0, 4: 1.0, 6: 1.0, 8: 1.75, 10: 1.75, 12: 1.75}, dict.fromkeys(range(2, 13, 2), 1.0)]


# ---------------------------------------------------------------------------------------------------------------------
# Deviations of the released code in runs


def compat_alphas(tokens, n_prompt, compat, scope="all", interval=16, name="full"):
    method = engine.make(name, interval=interval, budget=24, compat=compat)
    return steered_run(tokens, n_prompt, Steering(VECTOR, 1, 1.0, 0.125, 9.0, scope), method)[1]


def test_compat_thoughts_anywhere_counts_outside_think():
    tokens = [WAIT, BLANK, WORDS[0], OPEN, WAIT, BLANK, WORDS[1], BLANK, CLOSE, WAIT, BLANK]
    assert compat_alphas(tokens, 2, None) == {1: 1.0, 5: 1.125, 7: 1.125, 10: 1.125}
    assert compat_alphas(tokens, 2, "thoughts-anywhere") == {1: 1.125, 5: 1.25, 7: 1.25, 10: 1.375}
    assert compat_alphas(tokens, 2, "thoughts-anywhere", scope="think") == {5: 1.25, 7: 1.25}


@pytest.mark.parametrize("name", ["full", "skipkv"])
def test_compat_thoughts_on_grid_lags(name):
    tokens, n_prompt, interval = thinking_text(150, 6), 40, 16
    alphas = compat_alphas(tokens, n_prompt, "thoughts-on-grid", interval=interval, name=name)
    texts = [TEXTS[i] for i in tokens]
    grid = [0, n_prompt, *(t for t in range(n_prompt + 1, len(tokens)) if t % interval == 1)]
    lagging = 0
    for position, alpha in alphas.items():
        last = max(t for t in grid if t <= position)  # N_o is that of tokens 0 … last − 1
        assert alpha == 1 + 0.125 * reference.count_thoughts(tokens[:last], texts[:last], THINK)
        lagging += alpha != compat_alphas(tokens, n_prompt, None, interval=interval, name=name)[position]
    assert len(alphas) > 10 and lagging > 3


def test_compat_steer_prompt_end_steers_the_prompts_last_token_only():
    tokens = [OPEN, WORDS[0], BLANK, WORDS[1], BLANK, WORDS[2], BLANK, WORDS[3], BLANK]
    for n_prompt, expected in ((5, [4, 6, 8]), (6, [6, 8]), (9, [8]), (1, [2, 4, 6, 8])):
        for scope in ("think", "all"):
            assert [*compat_alphas(tokens, n_prompt, "steer-prompt-end", scope)] == expected
        assert [*compat_alphas(tokens, n_prompt, None)] == [2, 4, 6, 8]
    assert [*compat_alphas(tokens, 5, "steer-prompt-end", "generation")] == [6, 8]


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("compat", [None, "lost-heads"])
def test_compat_lost_heads_are_never_penalised_again(compat, evict):
    """At the first compaction the heads 0 keep the newest slots, all of an open sentence; the heads 1 the oldest."""
    copy = [*WORDS[:7], LINE]
    tokens = [*copy, *WORDS[7:12], LINE, *np.resize(WORDS[12:16], 40).tolist(), LINE, *copy * 5]
    penalised = {0: [], 1: []}

    def score(c):
        penalised[c.head].append(bool((c.penalties > 0).any()))
        ages = c.positions[: c.n_candidates].astype(float)
        return ages if c.head == 0 else -ages

    method = Custom(score, ["penalties"], budget=24, interval=16, tau=0.9, compat=compat, evict=evict)
    session = engine.open_session(engine.build(damp=0.02)[0], method)
    row = session.open(len(tokens), n_prompt=50)
    engine.replay(session, row, tokens)
    assert session.state(row)["flagged"] == 3 and len(penalised[0]) == len(penalised[1]) == 2 * 3
    assert any(penalised[1]) and any(penalised[0]) == (compat is None)
    assert evict or not np.isnan(session.sentences(row, True)[1]).any()  # virtual sets free no vector


def test_compat_pairs_in_a_run():
    """Of the same run without it, only penalties of sentences of which a head holds a single slot are gone."""
    tokens, model = engine.sentences_text(220, 9), engine.build(damp=0.1)[0]
    lone = others = 0
    method = engine.make("skipkv", budget=24, interval=16, window=4, tau=0.9, compat="pairs")
    session = engine.open_session(model, method, trace=2)
    engine.replay(session, session.open(220, n_prompt=50), tokens)
    records = session.trace()
    plain, _ = engine.captured(model, method.with_(compat=None), records, tokens, row={"n_prompt": 50})
    texts = [TEXTS[i] for i in tokens]
    for record, c in zip(records, plain, strict=True):
        want = c.penalties.copy()
        for first, last in reference.segment(tokens[: record[1]], texts[: record[1]]).spans:
            members = (c.positions >= first) & (c.positions <= last)
            if members.sum() == 1:
                lone += int((want[members] > 0).sum())
                want[members] = 0
        assert np.array_equal(record[6]["penalty"], want[: c.n_candidates])
        others += int((want > 0).sum())
    assert lone > 0 and others > 0


def test_compat_latest_flag_in_a_run():
    tokens = engine.sentences_text(170, 7)
    model, decoder = engine.build()
    _, expected = engine.reference_run(decoder, engine.make("full", interval=16, tau=0.8), tokens, 50)
    vectors = reference.sentence_vectors(expected.cache.hidden, expected.sentences)
    found = []
    for compat, official in ((None, None), ("latest-flag", "official")):
        session = engine.open_session(model, engine.make("full", interval=16, tau=0.8, compat=compat))
        row = session.open(170, n_prompt=50)
        engine.replay(session, row, tokens)
        flags = np.array([sentence[4] for sentence in session.sentences(row)[0]])[: len(vectors)]
        assert engine.close(flags, reference.flag_repeats(vectors, 0.8, compat=official), 1e-5) <= 1
        found.append(flags)
    assert (found[0] >= found[1]).all() and (found[0] > found[1]).any()


@pytest.mark.parametrize("name", ["rkv", "snapkv", "skipkv", "h2o", "h2o-last"])
def test_compat_score_order_in_a_run(name):
    """The first compaction keeps the sorted one's set; the next score slots in the order in which they now stand."""
    tokens, model = engine.sentences_text(150, 10), engine.build()[0]
    first, counts = [], {"equal": 0, "tie": 0, "near": 0}
    for compat in (None, "score-order"):
        method = engine.make(name, budget=32, interval=16, window=4, kernel=3, mix=0.3, tau=0.9, compat=compat)
        session = engine.open_session(model, method, trace=2)
        row = session.open(150, n_prompt=50)
        logits, _ = engine.replay(session, row, tokens)
        records = session.trace()
        first.append([sorted(record[5].tolist()) for record in records[:4]])
    assert first[0] == first[1] and len(records) == 4 * 7
    positions = session.positions(row, 0, 1)
    assert np.array_equal(positions[:32], records[-3][5]) and (np.diff(positions[:28]) < 0).any()
    seen, again = engine.captured(model, method, records, tokens, row={"n_prompt": 50})
    assert np.array_equal(again, logits)
    for i in range(0, len(records), 2):
        heads = {record[3]: c for record, c in zip(records[i : i + 2], seen[i : i + 2], strict=True)}
        want = engine.select_captured(method, records[i][2], heads, (2, 2), n_prompt=50, sequence=(0, 0))
        for record in records[i : i + 2]:
            c = heads[record[3]]
            slots = [c.positions.tolist().index(p) for p in record[5]]
            n_newest = len(c.positions) - len(record[6]["score"])
            assert slots[-n_newest:] == [*range(len(record[6]["score"]), len(c.positions))]
            assert (np.diff(record[6]["score"][slots[:-n_newest]]) <= 0).all()
            verdict = engine.judge(want, record[3], np.sort(slots), c.keys)
            assert verdict in counts
            counts[verdict] += 1
    assert counts["near"] <= 1
