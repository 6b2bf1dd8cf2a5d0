"""The deviations of the released code, one by one, in whole runs."""

import harness
import numpy as np
import pytest
import spec
from harness import BLANK, CLOSE, LINE, OPEN, TEXTS, VECTOR, WAIT, WORDS, steered_run, thinking_text
from spec import Steering

from skipkv import Custom

pytestmark = pytest.mark.sanitize


def compat_alphas(backend, tokens, n_prompt, compat, scope="all", interval=16, name="full"):
    method = harness.make(name, interval=interval, budget=24, compat=compat)
    return steered_run(backend, tokens, n_prompt, Steering(VECTOR, 1, 1.0, 0.125, 9.0, scope), method)[1]


def test_compat_thoughts_anywhere_counts_outside_think(backend):
    tokens = [WAIT, BLANK, WORDS[0], OPEN, WAIT, BLANK, WORDS[1], BLANK, CLOSE, WAIT, BLANK]
    assert compat_alphas(backend, tokens, 2, None) == {1: 1.0, 5: 1.125, 7: 1.125, 10: 1.125}
    assert compat_alphas(backend, tokens, 2, "thoughts-anywhere") == {1: 1.125, 5: 1.25, 7: 1.25, 10: 1.375}
    assert compat_alphas(backend, tokens, 2, "thoughts-anywhere", scope="think") == {5: 1.25, 7: 1.25}


@pytest.mark.parametrize("name", ["full", "skipkv"])
def test_compat_thoughts_on_grid_lags(name, backend):
    tokens, n_prompt, interval = thinking_text(150, 6), 40, 16
    alphas, at_once = (
        compat_alphas(backend, tokens, n_prompt, compat, interval=interval, name=name)
        for compat in ("thoughts-on-grid", None)
    )
    texts = [TEXTS[i] for i in tokens]
    grid = [0, n_prompt, *(t for t in range(n_prompt + 1, len(tokens)) if t % interval == 1)]
    lagging = 0
    for position, alpha in alphas.items():
        last = max(t for t in grid if t <= position)  # N_o is that of tokens 0 … last − 1
        assert alpha == 1 + 0.125 * spec.count_thoughts(tokens[:last], texts[:last])
        lagging += alpha != at_once[position]
    assert len(alphas) > 10 and lagging > 3


def test_compat_steer_prompt_end_steers_the_prompts_last_token_only(backend):
    tokens = [OPEN, WORDS[0], BLANK, WORDS[1], BLANK, WORDS[2], BLANK, WORDS[3], BLANK]
    for n_prompt, expected in ((5, [4, 6, 8]), (6, [6, 8]), (9, [8]), (1, [2, 4, 6, 8])):
        for scope in ("think", "all"):
            assert [*compat_alphas(backend, tokens, n_prompt, "steer-prompt-end", scope)] == expected
        assert [*compat_alphas(backend, tokens, n_prompt, None)] == [2, 4, 6, 8]
    assert [*compat_alphas(backend, tokens, 5, "steer-prompt-end", "generation")] == [6, 8]


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("compat", [None, "lost-heads"])
def test_compat_lost_heads_are_never_penalised_again(compat, evict, backend):
    """At the first compaction the heads 0 keep the newest slots, all of an open sentence; the heads 1 the oldest."""
    copy = [*WORDS[:7], LINE]
    tokens = [*copy, *WORDS[7:12], LINE, *np.resize(WORDS[12:16], 40).tolist(), LINE, *copy * 5]
    penalised = {0: [], 1: []}

    def score(c):
        penalised[c.head].append(bool((c.penalties > 0).any()))
        ages = c.positions[: c.n_candidates].astype(float)
        return ages if c.head == 0 else -ages

    method = Custom(score, ["penalties"], budget=24, interval=16, tau=0.9, compat=compat, evict=evict)
    session, row, _, _ = harness.play(harness.build(damp=0.02, variant=backend)[0], method, tokens, 50)
    assert session.state(row)["flagged"] == 3 and len(penalised[0]) == len(penalised[1]) == 2 * 3
    assert any(penalised[1]) and any(penalised[0]) == (compat is None)
    assert evict or not np.isnan(session.sentences(row, True)[1]).any()  # virtual sets free no vector


def test_compat_pairs_in_a_run(backend):
    """Of the same run without it, only penalties of sentences of which a head holds a single slot are gone."""
    tokens, model = harness.sentences_text(220, 9), harness.build(damp=0.1, variant=backend)[0]
    lone = others = 0
    method = harness.make("skipkv", budget=24, interval=16, window=4, tau=0.9, compat="pairs")
    session, *_ = harness.play(model, method, tokens, 50, trace=2)
    records = session.trace()
    plain, _ = harness.captured(model, method.with_(compat=None), records, tokens, row={"n_prompt": 50})
    texts = [TEXTS[i] for i in tokens]
    for record, c in zip(records, plain, strict=True):
        want = c.penalties.copy()
        for first, last in spec.segment(tokens[: record[1]], texts[: record[1]]).spans:
            members = (c.positions >= first) & (c.positions <= last)
            if members.sum() == 1:
                lone += int((want[members] > 0).sum())
                want[members] = 0
        assert np.array_equal(record[6]["penalty"], want[: c.n_candidates])
        others += int((want > 0).sum())
    assert lone > 0 and others > 0


def test_compat_latest_flag_in_a_run(backend):
    tokens = harness.sentences_text(170, 7)
    model, decoder = harness.build(variant=backend)
    _, expected = harness.reference_run(decoder, harness.make("full", interval=16, tau=0.8), tokens, 50)
    vectors = spec.sentence_vectors(expected.cache.hidden, expected.sentences)
    found = []
    for compat, official in ((None, None), ("latest-flag", "official")):
        session, row, _, _ = harness.play(model, harness.make("full", interval=16, tau=0.8, compat=compat), tokens, 50)
        flags = np.array([sentence[4] for sentence in session.sentences(row)[0]])[: len(vectors)]
        assert harness.close(flags, spec.flag_repeats(vectors, 0.8, compat=official), 1e-5) <= 1
        found.append(flags)
    assert (found[0] >= found[1]).all() and (found[0] > found[1]).any()


@pytest.mark.parametrize("name", ["rkv", "snapkv", "skipkv", "h2o", "h2o-last"])
def test_compat_score_order_in_a_run(name, backend):
    """The first compaction keeps the sorted one's set; the next score slots in the order in which they now stand."""
    tokens, model = harness.sentences_text(150, 10), harness.build(variant=backend)[0]
    first, counts = [], {"equal": 0, "tie": 0, "near": 0}
    for compat in (None, "score-order"):
        method = harness.make(name, budget=32, interval=16, window=4, kernel=3, mix=0.3, tau=0.9, compat=compat)
        session, row, logits, _ = harness.play(model, method, tokens, 50, trace=2)
        records = session.trace()
        first.append([sorted(record[5].tolist()) for record in records[:4]])
    assert first[0] == first[1] and len(records) == 4 * 7
    positions = session.positions(row, 0, 1)
    assert np.array_equal(positions[:32], records[-3][5]) and (np.diff(positions[:28]) < 0).any()
    seen, again = harness.captured(model, method, records, tokens, row={"n_prompt": 50})
    assert np.array_equal(again, logits)
    for i in range(0, len(records), 2):
        heads = {record[3]: c for record, c in zip(records[i : i + 2], seen[i : i + 2], strict=True)}
        want = harness.select_captured(method, records[i][2], heads, (2, 2), n_prompt=50, sequence=(0, 0))
        for record in records[i : i + 2]:
            c = heads[record[3]]
            slots = [c.positions.tolist().index(p) for p in record[5]]
            n_newest = len(c.positions) - len(record[6]["score"])
            assert slots[-n_newest:] == [*range(len(record[6]["score"]), len(c.positions))]
            assert (np.diff(record[6]["score"][slots[:-n_newest]]) <= 0).all()
            verdict = harness.judge(want, record[3], np.sort(slots), c.keys)
            assert verdict in counts
            counts[verdict] += 1
    assert counts["near"] <= 1
