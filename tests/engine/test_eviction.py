"""Whole runs: every method of the core's table against the reference, and what holds on every compaction."""

from collections import Counter, defaultdict

import engine
import numpy as np
import pytest
import reference
from engine import ALL, EVICTING, VARIANTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_methods import newest_kept

from skipkv import ConfigError, Custom

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
COUNTS = Counter()  # what became of every selection of this file, by METHOD §9's rule
# f32: a forward of two layers in float32 against float64, keys and queries to about 3e-6, and scores are exponentials
# of their products. bf16: a key or value beside a rounding boundary may fall to its other side, 2^-8 of it.
SCORES = {"f32": 1e-4, "bf16": 5e-2}
LOGITS = {"f32": 1e-4, "bf16": 2e-2}
SHAPES = [(2, 1), (2, 2), (1, 3), (1, 7), (2, 3)]  # KV heads, query heads of each


def reference_name(name):
    return "skipkv" if name == "custom" else name


@st.composite
def cases(draw, name):
    """A method with budgets that its protection fits into, and a row for it."""
    n_kv, group = draw(st.sampled_from(SHAPES))
    window = draw(st.integers(1, 6))
    base = draw(st.sampled_from([24, 33, 12, 40, window + 2]))
    budgets = st.sampled_from([window + 2, 12, 17, 24, 33, 40])
    form = draw(st.sampled_from(["number", "layer", "layer" if name == "h2o-last" else "head"]))
    budget = {
        "number": st.just(base),
        "layer": st.tuples(budgets, budgets),
        "head": st.tuples(*[st.tuples(*[budgets] * n_kv)] * 2),
    }[form]
    budget = draw(budget)
    window_of = {int(b): newest_kept(reference_name(name), int(b), window) for b in np.ravel(budget)}
    room = min(b - newest - (newest == 0) for b, newest in window_of.items())  # slots that may be protected besides
    n_prompt = draw(st.sampled_from([1, max(1, base - 3), base, base + 1, base + 30]))
    protect = draw(st.sampled_from(["none", f"sinks:{min(room, 3)}", "prompt", f"sinks:{room}"]))
    if protect == "prompt":
        n_prompt = max(1, min(n_prompt, room))
    n = n_prompt + draw(st.sampled_from([110, 77, 50, 30, 9, 1, 0]))
    method = engine.make(
        name, budget=budget, interval=draw(st.sampled_from([4, 7, 11, 16, 24])), window=window,
        mix=draw(st.sampled_from([0.0, 0.1, 0.6, 1.0])), kernel=draw(st.sampled_from([1, 3, 7, 9])),
        sinks=draw(st.integers(0, min(4, room))), tau=0.9, seed=draw(st.integers(0, 2**53 - 1)), protect=protect,
        evict=draw(st.booleans()),
    )  # fmt: skip
    return {
        "method": method, "family": draw(st.sampled_from(["llama", "qwen2", "qwen3"])), "n_kv": n_kv, "group": group,
        "variant": draw(st.sampled_from(VARIANTS)), "cache": draw(st.sampled_from(["f32", "bf16"])),
        "n_prompt": n_prompt, "tokens": engine.sentences_text(n, draw(st.integers(0, 2**32))),
        "sequence": (draw(st.integers(0, 2**40)), draw(st.integers(0, 5))),
    }  # fmt: skip


def run(case, trace=2, step=512, **options):
    """(session, row, logits, records) of a case."""
    model, _ = engine.build(case["family"], case["n_kv"], case["group"], case["variant"])
    session = engine.open_session(model, case["method"], cache=case["cache"], trace=trace, **options)
    prompt, sample = case["sequence"]
    row = session.open(len(case["tokens"]), n_prompt=case["n_prompt"], prompt=prompt, sample=sample)
    logits, _ = engine.replay(session, row, case["tokens"], step)
    return session, row, logits, session.trace()


@pytest.mark.parametrize("name", EVICTING)
@SETTINGS
@given(data=st.data())
def test_matrix_selections_equal_the_reference(name, data):
    """Each selection of a run, from the keys, queries and sums that the core itself had: METHOD §9's rule."""
    case = data.draw(cases(name))
    method, tokens = case["method"], case["tokens"]
    model, _ = engine.build(case["family"], case["n_kv"], case["group"], case["variant"])
    _, _, logits, records = run(case)
    prompt, sample = case["sequence"]
    row = {"n_prompt": case["n_prompt"], "prompt": prompt, "sample": sample}
    seen, again = engine.captured(model, method, records, tokens, row=row, cache=case["cache"])
    assert np.array_equal(again, logits) and len(seen) == len(records)
    layers = defaultdict(dict)
    for record, c in zip(records, seen, strict=True):
        layers[record[1:3]][record[3]] = c, record
    for (_, layer), heads in layers.items():
        arrays = {h: c for h, (c, _) in heads.items()}
        want = engine.select_captured(
            method, layer, arrays, engine.SHAPES[model], n_prompt=case["n_prompt"], sequence=case["sequence"]
        )
        for h, (c, record) in heads.items():
            scores = {key: None if value is None else value[h] for key, value in vars(want).items()}
            same = engine.same_scores(record[6], scores, c.keys, 1e-5)
            verdict = engine.judge(want, h, np.searchsorted(c.positions, record[5]), c.keys)
            assert verdict != "different"
            COUNTS[verdict if same else "near"] += 1


@pytest.mark.parametrize("name", ALL)
@SETTINGS
@given(data=st.data())
def test_matrix_runs_equal_the_reference(name, data):
    """Schedule, trace, positions, flags and logits of a run, up to the first selection that differs."""
    case = data.draw(cases(name)) if name != "full" else data.draw(cases("random")) | {"method": engine.make("full")}
    tokens, kind = case["tokens"], case["cache"]
    session, row, logits, records = run(case)
    _, decoder = engine.build(case["family"], case["n_kv"], case["group"], case["variant"])
    want, expected = engine.reference_run(
        decoder, case["method"], tokens, case["n_prompt"], sequence=case["sequence"], store=kind
    )
    end = len(tokens)
    for record, c in zip(records, expected.trace, strict=True):
        if c.step > end:
            break
        assert record[:5] == (row, c.step, c.layer, c.head, len(c.positions))
        keys = expected.before[c.step, c.layer, c.head]
        if not engine.same_scores(record[6], vars(c), keys, SCORES[kind], SCORES[kind] / 10):
            COUNTS[f"run {kind} near"] += 1
        if not np.array_equal(record[5], c.kept):
            slots = [np.searchsorted(c.positions, kept) for kept in (c.kept, record[5])]
            whole = reference.Selection([slots[0]], [c.importance], [c.redundancy], [c.penalty], [c.score])
            if c.redundancy is None:
                whole.redundancy = None
            verdict = engine.judge(whole, 0, slots[1], keys, margin=SCORES[kind] / 10, rtol=SCORES[kind])
            assert verdict != "different" or expected.margins[c.step] < SCORES[kind] / 10
            COUNTS[f"run {kind} {verdict}"] += 1
            end = c.step
        else:
            COUNTS[f"run {kind} equal"] += 1
    assert np.abs(logits - want)[:end].max() <= LOGITS[kind] * np.abs(want).max()
    if end == len(tokens):
        assert len(records) == len(expected.trace)
        for layer in range(2):
            for h in range(case["n_kv"]):
                assert np.array_equal(session.positions(row, layer, h), expected.cache.positions[layer][h])


@pytest.fixture(scope="module", autouse=True)
def near_ties_are_rare():
    yield
    for kind in ("", "run f32 "):  # in a bf16 run the inputs differ, see SCORES
        total = sum(COUNTS[kind + verdict] for verdict in ("equal", "tie", "near"))
        assert COUNTS[kind + "near"] <= max(2, 0.001 * total), COUNTS  # of less than 2000, 2 say nothing


# ---------------------------------------------------------------------------------------------------------------------
# What holds on every compaction

# A block's worth of everything: several pages a head, flagged sentences, steering.
STEERING = (np.linspace(-0.5, 0.5, 32, dtype=np.float32), 1, 1.0, 0.05, 1.2, "all")
RUN = {"window": 4, "interval": 16, "kernel": 3, "mix": 0.3, "tau": 0.9, "sinks": 3, "seed": 5}


def slots(session, row, n_kv=2):
    return [session.positions(row, layer, head) for layer in range(2) for head in range(n_kv)]


def check_invariants(session, row, method, budget, peak, protected):
    """After one forward: the records of the compaction and what the cache holds agree; the ledger is a recount."""
    held = slots(session, row)
    for positions in held:
        assert (np.diff(positions) > 0).all() and len(positions) <= peak
    pages = sum(-(-len(positions) // 64) for positions in held)
    ledger = session.ledger()
    assert ledger["live_bytes"] == pages * ledger["page_bytes"] == session.state(row)["live_bytes"]
    records = session.trace()
    step = session.state(row)["n_tokens"]
    for _, at, layer, head, n_before, kept, _ in records:
        assert at == step and len(kept) <= budget and n_before <= peak and (np.diff(kept) > 0).all()
        assert set(range(min(protected, step))) <= set(kept.tolist())
        newest = 0 if method.name == "streaming" else 1 if method.name == "h2o-last" else method.window
        assert set(range(step - newest, step)) <= set(kept.tolist())
        if method.evict:
            assert np.array_equal(kept, held[layer * 2 + head])
    return records


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("protect, n_prompt", [("none", 100), ("prompt", 30), ("sinks:9", 20), ("sinks:5+prompt", 3)])
@pytest.mark.parametrize("name", EVICTING)
def test_invariants_hold_on_every_compaction(name, protect, n_prompt, evict):
    budget, tokens = 60, engine.sentences_text(250, 3)  # so that every compaction frees a page of each head
    method = engine.make(name, budget=budget, protect=protect, evict=evict, **RUN)
    session = engine.open_session(engine.build()[0], method, trace=2)
    row = session.open(len(tokens), n_prompt=n_prompt, steering=STEERING)
    peak = max(n_prompt, budget + 16) if evict else len(tokens)
    protected = {"none": 0, "prompt": n_prompt, "sinks:9": 9, "sinks:5+prompt": 5}[protect]
    if name == "streaming":
        protected = max(protected, 3)
    steps = []
    for token in tokens:
        engine.replay(session, row, [token])
        steps += {record[1] for record in check_invariants(session, row, method, budget, peak, protected)}
    # from METHOD §1: after a prompt of at least B tokens, then where t ≡ 1 (mod 16) and L ≥ B; below B nothing happens
    assert steps == [100] * (n_prompt == 100) + [t for t in range(60, 251) if t % 16 == 1 and t > n_prompt]
    state = session.state(row)
    assert state["compactions"] == len(steps) and (state["evicted"] > 0)
    session.close(row)
    assert session.ledger()["live_bytes"] == session.ledger()["reserved_bytes"] == 0


@pytest.mark.parametrize("cache", ["f32", "bf16"])
@pytest.mark.parametrize("name", EVICTING)
def test_evicted_pages_come_back_and_steps_allocate_nothing(name, cache):
    budget = 60
    tokens = engine.sentences_text(20 * budget, 4)
    session = engine.open_session(engine.build()[0], engine.make(name, budget=budget, **RUN), cache=cache)
    row = session.open(len(tokens), n_prompt=100, steering=STEERING)
    engine.replay(session, row, tokens[:100])
    first, grid = session.ledger(), 0
    # 4 heads of two pages: the worst of 100 slots of the prompt, or B + Δ = 76
    assert first["pool_bytes"] == 4 * 2 * first["page_bytes"]
    for t in range(101, len(tokens) + 1):
        before = session.ledger()["n_allocator_calls"]
        engine.replay(session, row, tokens[t - 1 : t])
        ledger = session.ledger()
        assert ledger["pool_bytes"] == first["pool_bytes"]
        if t % 16 == 1:
            grid += 1
            assert ledger["live_bytes"] == first["pool_bytes"] / 2
        else:
            assert ledger["n_allocator_calls"] == before
    assert session.state(row)["compactions"] == grid + 1 > 60


@pytest.mark.parametrize("name", EVICTING)
def test_a_budget_of_at_least_the_length_equals_full(name):
    tokens = engine.sentences_text(150, 5)
    model, _ = engine.build()
    full = engine.open_session(model, engine.make("full", tau=0.9))
    want, _ = engine.replay(full, full.open(150, n_prompt=40, steering=STEERING), tokens)
    for budget, compactions in ((150, 0), (145, 1), (151, 0)):  # at t = 145 all 145 slots fit
        session = engine.open_session(model, engine.make(name, budget=budget, **RUN))
        row = session.open(150, n_prompt=40, steering=STEERING)
        assert np.array_equal(engine.replay(session, row, tokens)[0], want)
        assert session.state(row)["compactions"] == compactions and session.state(row)["evicted"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", EVICTING)
def test_compaction_equals_masking(name, family):
    """Positions survive a compaction: the row equals a full cache in which the dropped positions are hidden."""
    tokens = engine.sentences_text(140, 6)
    model, decoder = engine.build(family)
    session = engine.open_session(model, engine.make(name, budget=24, **RUN), trace=1)
    got, _ = engine.replay(session, session.open(140, n_prompt=30), tokens)
    trace = [
        reference.Compaction(step, layer, head, None, kept, None, None, None, None)
        for _, step, layer, head, _, kept, scores in session.trace()
        if scores is None
    ]
    assert len(trace) == 4 * len([30, *range(33, 141, 16)])
    want = decoder.forward_masked(tokens, reference.visibility(trace, 2, 2, 140))
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()  # float32 against float64
    assert np.abs(got - decoder.logits(tokens)).max() > 1e-2 * np.abs(want).max()  # what was dropped counts


# ---------------------------------------------------------------------------------------------------------------------
# The same row in another way: bit for bit, with sentences and steering


def outcome(session, row, logits):
    """All that a run leaves behind."""
    state = session.state(row)
    del state["peak_bytes"]  # of the pages that this very row has had: a fork starts with fewer
    spans, vectors = session.sentences(row, True)
    return [logits, *slots(session, row), np.array([[*state.values()]]), np.array(spans), vectors]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x, y, equal_nan=x.dtype.kind == "f")


def options(name, evict=True, **changes):
    return engine.make(name, budget=40, evict=evict, **(RUN | changes))


@pytest.fixture(scope="module")
def alone():
    """(outcome, trace) of a method's run on one thread, replayed in chunks: computed once."""
    known = {}

    def find(name, evict=True, n=170, n_prompt=50, seed=7, **where):
        key = name, evict, n, n_prompt, seed, *where.items()
        if key not in known:
            session = engine.open_session(engine.build()[0], options(name, evict), trace=2)
            row = session.open(n, n_prompt=n_prompt, steering=STEERING, **where)
            logits, alphas = engine.replay(session, row, engine.sentences_text(n, seed))
            assert alphas and session.state(row)["steered"] == len(alphas)
            known[key] = outcome(session, row, logits), session.trace(), alphas
        return known[key]

    return find


def assert_same_trace(a, b, row=0):
    """row: the second trace's, of which other rows' records are left out."""
    b = [record for record in b if record[0] == row]
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x[1:5] == y[1:5] and np.array_equal(x[5], y[5]) and x[6].keys() == y[6].keys()
        assert all(np.array_equal(x[6][key], y[6][key]) for key in x[6])


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_chunks_decoding_and_threads_change_no_bit(name, evict, alone):
    want, trace, alphas = alone(name, evict)
    tokens = engine.sentences_text(170, 7)
    for threads, step in ((1, 1), (2, 512), (2, 7)):
        session = engine.open_session(engine.build()[0], options(name, evict), trace=2, threads=threads)
        row = session.open(170, n_prompt=50, steering=STEERING)
        logits, steered = engine.replay(session, row, tokens, step)
        assert_same(want, outcome(session, row, logits))
        assert_same_trace(trace, session.trace())
        assert steered == alphas


@pytest.mark.parametrize("name", ALL)
def test_a_row_is_the_same_in_a_batch(name, alone):
    rows = [(170, 50, 7), (60, 60, 8), (130, 1, 9), (170, 20, 10), (90, 39, 11)]  # n, n_prompt, seed of the text
    session = engine.open_session(engine.build()[0], options(name), rows=5, threads=2, trace=2)
    opened = [
        session.open(n, n_prompt=n_prompt, steering=STEERING, prompt=i, sample=9 - i)
        for i, (n, n_prompt, _) in enumerate(rows)
    ]
    texts = [engine.sentences_text(n, seed) for n, _, seed in rows]
    got = engine.replay_together(session, opened, texts, steps=[3, 13, 5, 64, 2])
    records = session.trace()
    for i, (n, n_prompt, seed) in enumerate(rows):
        want, trace, _ = alone(name, n=n, n_prompt=n_prompt, seed=seed, prompt=i, sample=9 - i)
        assert_same(want, outcome(session, opened[i], got[i]))
        assert_same_trace(trace, records, opened[i])


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_a_fork_equals_a_fresh_row(name, evict, alone):
    want, trace, _ = alone(name, evict)
    tokens = engine.sentences_text(170, 7)
    session = engine.open_session(engine.build()[0], options(name, evict), rows=3, trace=2)
    for at in (20, 50, 51, 97, 111):  # inside the prompt, at its end, after, on the grid, less than W before it
        parent = session.open(200, n_prompt=50, steering=STEERING)
        begin, _ = engine.replay(session, parent, tokens[:at])
        before = session.trace()
        child = session.fork(parent, 170, 0)
        engine.replay(session, parent, tokens[at : at + 40][::-1])  # what the parent does next is its own
        session.close(parent)
        session.trace()
        rest, _ = engine.replay(session, child, tokens[at:])
        assert_same(want, outcome(session, child, np.concatenate([begin, rest])))
        after = [(parent, *record[1:]) for record in session.trace()]
        assert_same_trace(trace, before + after, parent)
        session.close(child)
    assert session.ledger()["live_bytes"] == 0


def test_noise_follows_the_sequence_and_not_the_row():
    tokens = engine.sentences_text(60, 12)
    kept = []
    for where in ({}, {"prompt": 1}, {"sample": 1}, {"prompt": 1, "sample": 1}, {"prompt": 2**40}):
        session = engine.open_session(engine.build()[0], options("random"), trace=1)
        engine.replay(session, session.open(60, n_prompt=50, **where), tokens)
        kept += [tuple(record[5]) for record in session.trace()]
    assert len(kept) == 20 and len(set(kept)) == 20  # five sequences, two layers, two heads: all different


def test_the_padding_reserve_shrinks_every_budget():
    tokens = engine.sentences_text(120, 13)
    model, _ = engine.build()
    outcomes = []
    for budget, reserve in ((40, 0), (52, 12), (52, 0)):
        session = engine.open_session(model, engine.make("rkv", budget=budget, **RUN), trace=2)
        row = session.open(120, n_prompt=30, reserve=reserve)
        logits, _ = engine.replay(session, row, tokens)
        outcomes.append((outcome(session, row, logits), session.trace()))
    assert_same(outcomes[0][0], outcomes[1][0])
    assert_same_trace(outcomes[0][1], outcomes[1][1])
    assert not np.array_equal(outcomes[0][0][0], outcomes[2][0][0])


# ---------------------------------------------------------------------------------------------------------------------
# A score in Python


def test_custom_with_the_same_score_equals_skipkv_and_rkv():
    tokens = engine.sentences_text(170, 7)
    model, _ = engine.build()

    def like_rkv(c):
        mix, rest = np.float32(0.1), np.float32(1 - 0.1)
        return mix * c.importance - rest * c.redundancy[: c.n_candidates]

    plain = {"budget": 40, "interval": 16, "tau": 0.9}
    pairs = [
        ("skipkv", engine.make("custom", **plain)),
        ("rkv", Custom(like_rkv, ["importance", "redundancy"], **plain)),
    ]
    for name, custom in pairs:
        results = []
        for method in (engine.make(name, **plain), custom):
            session = engine.open_session(model, method, trace=1)
            row = session.open(170, n_prompt=50)
            results.append((outcome(session, row, engine.replay(session, row, tokens)[0])[:5], session.trace()))
        assert_same(results[0][0], results[1][0])
        assert [record[5].tolist() for record in results[0][1]] == [record[5].tolist() for record in results[1][1]]


def test_custom_sees_the_head_it_scores():
    seen = []

    def score(c):
        seen.append(c)
        return -c.positions[: c.n_candidates]

    method = Custom(
        score, ["queries", "penalties", "sums", "importance", "redundancy"], budget=20, window=5, interval=16
    )
    model, _ = engine.build("qwen2", 2, 3)
    session = engine.open_session(model, method, trace=1)
    row = session.open(60, n_prompt=33)
    engine.replay(session, row, engine.sentences_text(33, 14))
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
def test_a_failing_custom_score_ends_its_row_alone(trace):
    """Three rows compact in one forward; the score of the second fails in its second layer, the first is compacted."""
    model, _ = engine.build()
    texts = [engine.sentences_text(100, seed) for seed in (21, 22, 23)]
    prompts = [41, 42, 43]  # tells the rows' first compactions apart: those are at the end of the prompt

    def score(c):
        if len(c.positions) == 42 and (c.layer, c.head) == (1, 1) and armed:
            raise Stop("no more")
        return c.importance

    parameters = {"budget": 30, "interval": 16}
    method = Custom(score, ["importance"], **parameters)
    armed, want = False, []
    for tokens, n_prompt in zip(texts, prompts, strict=True):
        session = engine.open_session(model, method, trace=trace)
        row = session.open(100, n_prompt=n_prompt, steering=STEERING)
        want.append((outcome(session, row, engine.replay(session, row, tokens)[0]), session.trace()))
    armed = True
    session = engine.open_session(model, method, rows=4, trace=trace, threads=2)
    rows = [session.open(100, n_prompt=n, steering=STEERING) for n in prompts]
    first = [tokens[:n] for tokens, n in zip(texts, prompts, strict=True)]
    logits = np.empty((sum(prompts), engine.VOCAB), np.float32)
    spans = np.array(list(zip(rows, prompts, strict=True)), np.int32)
    with pytest.raises(Stop, match="no more"):
        session.forward(spans, np.concatenate(first).astype(np.int32), logits, True)
    records = session.trace()
    assert {record[0] for record in records} == ({rows[0], rows[2]} if trace else set())
    with pytest.raises(ConfigError) as error:
        session.forward(np.array([[rows[1], 1]], np.int32), np.zeros(1, np.int32))
    assert str(error.value) == "span 0: row 1 ended when its custom score failed"
    fork = session.fork(rows[1], 100, 0)
    with pytest.raises(ConfigError, match="row 3 ended when its custom score failed"):
        session.forward(np.array([[fork, 1]], np.int32), np.zeros(1, np.int32))
    session.close(fork)
    session.close(rows[1])
    begins = np.split(logits, np.cumsum(prompts)[:-1])
    for i in (0, 2):
        rest, _ = engine.replay(session, rows[i], texts[i][prompts[i] :])
        records += session.trace()
        assert_same(want[i][0], outcome(session, rows[i], np.concatenate([begins[i], rest])))
        assert_same_trace(want[i][1], records, rows[i])
        session.close(rows[i])
    assert session.ledger()["live_bytes"] == session.ledger()["reserved_bytes"] == 0


def test_the_first_of_two_failing_rows_is_told():
    def score(c):
        raise Stop(len(c.positions))

    session = engine.open_session(engine.build()[0], Custom(score, budget=30), rows=2)
    rows = [session.open(60, n_prompt=n) for n in (41, 42)]
    with pytest.raises(Stop, match="^41$"):
        session.forward(np.array([[rows[0], 41], [rows[1], 42]], np.int32), np.zeros(83, np.int32))


@pytest.mark.parametrize(
    "value, message",
    [
        (lambda c: np.zeros(5), "custom score: expected shape [34], found [5]"),
        (lambda c: np.zeros((34, 1)), "custom score: expected shape [34], found [34, 1]"),
        (lambda c: "high", "custom score: expected an array of type numpy.float32, found str"),
        (lambda c: None, "custom score: expected shape [34], found []"),
        (
            lambda c: np.where((c.positions[:34] == 33) & (c.head == 1), np.nan, 0.0),
            "custom score of candidate 33 (layer 0, head 1) is nan; allowed: numbers",
        ),
    ],
)
def test_a_custom_score_is_checked(value, message):
    session = engine.open_session(engine.build()[0], Custom(value, budget=30))
    row = session.open(60, n_prompt=42)
    with pytest.raises(ConfigError) as error:
        engine.replay(session, row, engine.sentences_text(42, 24))
    assert str(error.value) == message


def test_infinite_custom_scores_are_numbers():
    """-inf everywhere is a tie like any other; +inf is kept."""
    tokens = engine.sentences_text(42, 24)
    scores = [
        (lambda c: np.full(c.n_candidates, -np.inf), range(22)),
        (lambda c: np.where(c.positions[: c.n_candidates] > 30, np.inf, -np.inf), [*range(19), 31, 32, 33]),
    ]
    for score, kept in scores:
        session = engine.open_session(engine.build()[0], Custom(score, budget=30), trace=1)
        engine.replay(session, session.open(60, n_prompt=42), tokens)
        assert all(record[5].tolist() == [*kept, *range(34, 42)] for record in session.trace())
