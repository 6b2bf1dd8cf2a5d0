"""What may not change a bit: batches, threads, the chunks of a prefill, forks, and replaying instead of decoding."""

import json
import threading
from dataclasses import asdict

import devices
import harness
import numpy as np
import pytest
import spec
from generations import PROBLEMS, VECTOR, alone, facts, make, recorded, run, same, same_compactions
from harness import (
    ALL,
    RUN,
    SHARING,
    SPLIT,
    STEERING,
    VARIANTS,
    assert_same_logits,
    assert_same_run,
    feed,
    outcome,
    tiny,
)

import skipkv
from skipkv import Steering, _skipkv

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.filterwarnings("ignore:.*never compacted", "ignore:.*steered no token"),
]

# ---------------------------------------------------------------------------------------------------------------------
# The model in the box without a method

TOKENS = np.random.default_rng(5).integers(0, 231, 150).astype(np.int32)
EVERY = devices.params([*VARIANTS, *devices.DEVICES, *devices.EXACT])
any_batch = pytest.mark.parametrize("backend", EVERY, indirect=True)


@pytest.fixture(scope="module", params=devices.params([*VARIANTS, *devices.EXACT]))
def backend(request):
    """Those that promise the same bits."""
    devices.where(request.param)  # or skips
    return request.param


@pytest.fixture(scope="module", params=["bf16", "q8"])
def core(request, backend):
    """Of each type of weights, but for f32, which is bf16's code."""
    if request.param == "q8" and backend in (*devices.DEVICES, *devices.EXACT):
        pytest.skip("the CPU's type")
    return tiny(backend, request.param)


@pytest.fixture(scope="module")
def whole(core):
    session = _skipkv.Session(core)
    return feed(session, session.open(200), TOKENS)


@any_batch
@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_and_threads_of_a_prefill(backend, core, whole, chunk, threads):
    session = _skipkv.Session(core, threads=threads)
    assert_same_logits(backend, feed(session, session.open(200), TOKENS, chunk), whole, SPLIT)


def test_a_long_row_decodes_the_same_on_any_number_of_threads(variant):
    tokens = np.resize(TOKENS, 700)  # more than 8 pages: a decode step then spreads the pages over the threads
    rows = []
    for threads in (1, 2, 3):
        session = _skipkv.Session(tiny(variant), tokens=700, threads=threads)
        row = session.open(800)
        rows.append(np.concatenate([feed(session, row, tokens, 700), feed(session, row, tokens[:40], 1)]))
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


@any_batch
def test_a_row_is_the_same_among_seven_others(backend, core, whole):
    lengths = [3, 150, 20, 1, 77, 64, 65, 128]
    session = _skipkv.Session(core, rows=8, tokens=600, threads=2)
    spans = np.array([[session.open(200), n] for n in lengths], np.int32)
    out = np.empty((sum(lengths), 231), np.float32)
    session.forward(spans, np.concatenate([TOKENS[:n] for n in lengths]), out, True)
    for n, first in zip(lengths, np.cumsum([0, *lengths]), strict=False):
        assert_same_logits(backend, out[first : first + n], whole[:n], SPLIT)
    last = np.empty((2, 231), np.float32)  # decode of one row beside prefill of another
    session.forward(np.array([[0, 1], [3, 149]], np.int32), np.concatenate([TOKENS[3:4], TOKENS[1:]]), last, False)
    assert_same_logits(backend, last, whole[[3, 149]], SPLIT)


# ---------------------------------------------------------------------------------------------------------------------
# Rows under every method, with sentences and steering


EACH = [*ALL, *SHARING]


def options(name, evict=True, **changes):
    return harness.make(name, budget=40, evict=evict, **(RUN | changes))


@pytest.fixture(scope="module")
def single(backend):
    """(outcome, trace) of a method's run on one thread, replayed in chunks: computed once."""
    known = {}

    def find(name, evict=True, n=170, n_prompt=50, seed=7, **where):
        key = name, evict, n, n_prompt, seed, *where.items()
        if key not in known:
            model, tokens = harness.build(variant=backend)[0], harness.sentences_text(n, seed)
            opened = {"trace": 2, "steering": STEERING} | where
            session, row, logits, alphas = harness.play(model, options(name, evict), tokens, n_prompt, **opened)
            assert alphas and session.state(row)["steered"] == len(alphas)
            known[key] = outcome(session, row, logits), session.trace(), alphas
        return known[key]

    return find


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("name", EACH)
def test_chunks_decoding_and_threads_change_no_bit(name, evict, single, backend):
    want, trace, alphas = single(name, evict)
    tokens = harness.sentences_text(170, 7)
    for threads, step in ((1, 1), (2, 7), (2, 512))[: 2 if backend in devices.EXACT else 3]:  # threads are the CPU's
        model, opened = harness.build(variant=backend)[0], {"trace": 2, "steering": STEERING, "threads": threads}
        session, row, logits, steered = harness.play(model, options(name, evict), tokens, 50, step, **opened)
        assert_same_run(backend, (want, trace), (outcome(session, row, logits), session.trace()))
        assert steered == alphas


@pytest.mark.parametrize("name", EACH)
def test_a_row_is_the_same_in_a_batch(name, single, backend):
    rows = [(170, 50, 7), (60, 60, 8), (130, 1, 9), (170, 20, 10), (90, 39, 11)]  # n, n_prompt, seed of the text
    session = harness.open_session(harness.build(variant=backend)[0], options(name), rows=5, threads=2, trace=2)
    opened = [
        session.open(n, n_prompt=n_prompt, steering=STEERING, prompt=i, sample=9 - i)
        for i, (n, n_prompt, _) in enumerate(rows)
    ]
    texts = [harness.sentences_text(n, seed) for n, _, seed in rows]
    got, _ = harness.replay_together(session, opened, texts, steps=[3, 13, 5, 64, 2])
    records = session.trace()
    for i, (n, n_prompt, seed) in enumerate(rows):
        want, trace, _ = single(name, n=n, n_prompt=n_prompt, seed=seed, prompt=i, sample=9 - i)
        assert_same_run(backend, (want, trace), (outcome(session, opened[i], got[i]), records), opened[i])


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("name", EACH)
def test_a_fork_equals_a_fresh_row(name, evict, single, backend):
    want, trace, _ = single(name, evict)
    tokens = harness.sentences_text(170, 7)
    session = harness.open_session(harness.build(variant=backend)[0], options(name, evict), rows=3, trace=2)
    for at in (20, 50, 51, 97, 111):  # inside the prompt, at its end, after, on the grid, less than W before it
        parent = session.open(200, n_prompt=50, steering=STEERING)
        begin, _ = harness.replay(session, parent, tokens[:at])
        before = session.trace()
        child = session.fork(parent, 170, 0)
        harness.replay(session, parent, tokens[at : at + 40][::-1])  # what the parent does next is its own
        session.close(parent)
        session.trace()
        rest, _ = harness.replay(session, child, tokens[at:])
        after = [(parent, *record[1:]) for record in session.trace()]
        forked = outcome(session, child, np.concatenate([begin, rest])), before + after
        assert_same_run(backend, (want, trace), forked, parent)
        session.close(child)
    assert session.ledger()["live_bytes"] == 0


def test_noise_follows_the_sequence_and_not_the_row(backend):
    tokens = harness.sentences_text(60, 12)
    kept = []
    for where in ({}, {"prompt": 1}, {"sample": 1}, {"prompt": 1, "sample": 1}, {"prompt": 2**40}):
        session, *_ = harness.play(harness.build(variant=backend)[0], options("random"), tokens, 50, trace=1, **where)
        kept += [tuple(record[5]) for record in session.trace()]
    assert len(kept) == 20 and len(set(kept)) == 20  # five sequences, two layers, two heads: all different


def test_the_padding_reserve_shrinks_every_budget(backend):
    tokens = harness.sentences_text(120, 13)
    model, _ = harness.build(variant=backend)
    outcomes = []
    for budget, reserve in ((40, 0), (52, 12), (52, 0)):
        method = harness.make("rkv", budget=budget, **RUN)
        session, row, logits, _ = harness.play(model, method, tokens, 30, trace=2, reserve=reserve)
        outcomes.append((outcome(session, row, logits), session.trace()))
    assert_same_run(backend, outcomes[0], outcomes[1])
    assert not np.array_equal(outcomes[0][0][0], outcomes[2][0][0])


# ---------------------------------------------------------------------------------------------------------------------
# Generations: samples, prompts and other runs beside them


@pytest.fixture(scope="module")
def model(variant):
    return skipkv.load("tiny", threads=1, progress=False)


@pytest.mark.parametrize("method", [None, "skipkv:budget=48,interval=32"])
def test_the_order_of_prompts_changes_no_text(model, method):
    outs = run(model, PROBLEMS[:6], method, rows=4)
    order = [3, 0, 5, 1, 4, 2]
    moved = run(model, [PROBLEMS[i] for i in order], method, rows=4)
    assert [out.tokens for out in moved] == [outs[i].tokens for i in order]


@pytest.mark.parametrize("name", EACH)
def test_samples_equal_separate_runs_whatever_the_rows(model, name):
    method = make(name)
    # One that is steered, one longer than the budget, one with nothing to share.
    prompts = [PROBLEMS[2] + "First\n\nNow", PROBLEMS[3] * 2, [5]]
    options = {"temperature": 4.0, "top_p": 0.9, "seed": 2, "trace": "scores", "stop": "W"}
    steering = Steering(VECTOR, 2, scope="all")
    expected = [alone(model, prompts, method, steering, p, s, **options) for p in range(3) for s in range(3)]
    assert len({tuple(out.tokens) for out in expected}) == 9 and len({len(out.tokens) for out in expected}) > 3
    assert min(expected[0].trace.alphas) < expected[0].trace.n_prompt - 1
    for rows in (1, 2, 4, 32):
        same(run(model, prompts, method, steering, n=3, rows=rows, **options), expected)
    same(run(model, prompts, method, steering, **options), expected[::3])


@pytest.mark.parametrize("name", EACH)
def test_a_batch_changes_no_bit(model, name):
    method = make(name)
    prompts = [*PROBLEMS[:4], PROBLEMS[4] * 14]  # the last takes two forwards of prefill while others decode
    assert len(model.encode(prompts[-1])) > 512
    options = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 50, "trace": "scores", "stop_ids": ()}
    steering = [Steering(VECTOR, 1, scope="generation"), None, Steering(-VECTOR, 3, scope="all"), None, None]
    together = run(model, prompts, method, steering, rows=8, **options)
    same(together, [alone(model, prompts, method, steering, p, 0, **options) for p in range(5)])
    same(together, run(model, prompts, method, steering, rows=2, **options))
    assert together[0].stats.steered and together[2].stats.steered and not together[1].stats.steered
    if name != "full":
        assert all(out.stats.compactions for out in together)
    # Steering is felt, and by its rows alone.
    plain = run(model, prompts, method, rows=8, **options)
    assert [facts(a) == facts(b) for a, b in zip(plain, together, strict=True)] == [False, True, False, True, True]


BESIDE = [
    dict(max_new_tokens=60, rows=4, stop_ids=()),
    dict(max_new_tokens=90, rows=2, stop_ids=(), method="skipkv:budget=64,interval=16"),
    dict(max_new_tokens=50, rows=3, stop_ids=(), temperature=0.8, seed=3, method="snapkv:budget=48,interval=16", n=2),
]
PROMPTS = [np.random.default_rng(i).integers(3, 231, 20 + 17 * i).tolist() for i in range(6)]


def test_calls_in_several_python_threads_give_what_each_gives_alone(variant):
    """Two models of two threads each, three calls on each of them at once."""
    models = [skipkv.load("tiny", dtype=dtype, threads=2, progress=False) for dtype in ("bf16", "q8")]
    jobs = [(model, options) for model in models for options in BESIDE]
    apart = [run(model, PROMPTS, **options) for model, options in jobs]
    together, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(i):
        barrier.wait()
        together[i] = run(jobs[i][0], PROMPTS, **jobs[i][1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(together, apart, strict=True):
        same(got, want)
    # one that got another's tokens would show
    assert len({json.dumps([out.tokens for out in outs]) for outs in apart[:3]}) == len(BESIDE)


@pytest.mark.parametrize("dtype", spec.ROUNDED)
def test_rows_with_rounded_inputs_are_the_same_alone_in_a_batch_and_replayed(variant, dtype):
    model = skipkv.load("tiny", dtype=dtype, threads=2, progress=False)
    options = {"max_new_tokens": 80, "stop_ids": (), "trace": True}
    for i, out in enumerate(run(model, PROMPTS, make("skipkv"), rows=6, **options)):
        same([out], [alone(model, PROMPTS, make("skipkv"), None, i, 0, **options)])
        text, n_prompt = out.prompt_tokens + out.tokens, len(out.prompt_tokens)
        replay = model.replay(text, make("skipkv"), n_prompt=n_prompt, sequence=(i, 0), logits=True, trace=True)
        assert replay.logits[n_prompt - 1 : -1].argmax(1).tolist() == out.tokens
        same_compactions(replay.trace.compactions, out.trace.compactions)


def test_streams_of_models_with_more_threads_may_be_interleaved(model):
    other = skipkv.load("tiny", threads=3, progress=False)
    apart = [run(model, PROMPTS, trace="scores", **options) for options in BESIDE]
    streams = [m.stream(PROMPTS, trace="scores", **options) for m in (model, other) for options in BESIDE]
    seen, open_streams = [{} for _ in streams], dict(enumerate(streams))
    while open_streams:
        for i, stream in list(open_streams.items()):
            event = next(stream, None)
            if event is None:
                del open_streams[i]
            elif event.generation:
                seen[i][event.prompt, event.sample] = event.generation
    for found, want in zip(seen, apart + apart, strict=True):
        same([found[key] for key in sorted(found)], want)


def test_a_session_outlives_the_name_of_its_model(model):
    stream = skipkv.load("tiny", threads=1, progress=False).stream(PROMPTS, **BESIDE[0])
    found = {event.prompt: event.generation for event in stream if event.generation}
    same([found[p] for p in range(len(PROMPTS))], run(model, PROMPTS, **BESIDE[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Replay is decoding


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("cache", ["bf16", "f32", "q8"])
def test_replay_repeats_decoding_bit_for_bit(model, name, cache):
    method = make(name)
    steering = Steering(np.random.default_rng(0).standard_normal(256) * 0.03, 1, scope="generation")
    outs = recorded(model, method, [PROBLEMS[0], PROBLEMS[3] * 2], steering=steering, cache=cache, trace="scores",
                    n=2, temperature=0.8, seed=4)  # fmt: skip
    assert len(outs[2].prompt_tokens) > 64  # a prompt beyond the budget is compacted, too
    for out in (outs[1], outs[2]):
        fed = out.trace.tokens[:-1]
        sequence = (out.prompt, out.sample)
        replay = model.replay(fed, method, steering, n_prompt=out.trace.n_prompt, sequence=sequence, cache=cache,
                              trace="scores", logits=True)  # fmt: skip
        same_compactions(replay.trace.compactions, out.trace.compactions)
        assert (replay.trace.alphas, replay.trace.sentences) == (out.trace.alphas, out.trace.sentences)
        assert replay.trace.bytes == out.trace.bytes and replay.trace.tokens == fed
        same = asdict(replay.stats) | {"new_tokens": out.stats.new_tokens}  # the last of them is not fed
        for field in ("seconds", "pool_bytes", "pool_peak_bytes"):  # of one row, here
            same[field] = getattr(out.stats, field)
        assert same == asdict(out.stats) and replay.stats.new_tokens == out.stats.new_tokens - 1
        # The logits are those that were drawn from: the same draws give the same tokens.
        first = out.trace.n_prompt
        sequences = np.array([(*sequence, t) for t in range(first, len(fed) + 1)])
        sampler = model._session(method, cache).sample
        drawn = sampler(replay.logits[first - 1 :], sequences, 4, 0.8, 0, 1.0, 0.0)
        assert drawn.tolist() == out.tokens


def test_replay_under_random_repeats_the_noise_of_its_sequence(model):
    method = make("random")
    out = recorded(model, method, n=2, temperature=1.0)[3]
    assert (out.prompt, out.sample) == (1, 1)
    kept = [c.kept.tolist() for c in out.trace.compactions]
    for sequence, equal in (((1, 1), True), ((0, 1), False), ((1, 0), False)):
        options = {"n_prompt": out.trace.n_prompt, "sequence": sequence, "trace": True}
        again = model.replay(out.trace.tokens[:-1], method, **options)
        assert ([c.kept.tolist() for c in again.trace.compactions] == kept) == equal


@pytest.mark.parametrize("name", EACH)
def test_replay_gives_the_logits_of_single_steps_and_their_log_softmax(model, name):
    ids = model.encode(PROBLEMS[5])
    text = ids + recorded(model, None, [ids])[0].tokens
    replay = model.replay(text, make(name), n_prompt=len(ids), logits=True)
    session = model._session(make(name), "bf16")
    row = session.open(len(text), n_prompt=len(ids))
    steps = [feed(session, row, ids), feed(session, row, text[len(ids) :], 1)]
    assert np.array_equal(replay.logits, np.concatenate(steps))
    wide = replay.logits.astype(np.float64)
    want = wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1, keepdims=True)
    want = want[np.arange(len(text) - 1), text[1:]]
    assert replay.logprobs.shape == (len(text) - 1,) and replay.logprobs.dtype == np.float64
    # float32 logits of up to some tens, subtracted in float32.
    assert np.abs(replay.logprobs - want).max() < 1e-5
    without = model.replay(text, make(name), n_prompt=len(ids))
    assert without.logits is None and without.trace is None and np.array_equal(without.logprobs, replay.logprobs)


def test_full_replay_equals_logits(model):
    text = model.encode(PROBLEMS[6]) * 4
    assert len(text) > 128  # more than one forward of replay
    assert np.array_equal(model.replay(text, cache="f32", logits=True).logits, model.logits(text))
    assert np.array_equal(model.replay(text, logits=True).logits, model.logits(text, cache="bf16"))
    assert not np.array_equal(model.logits(text), model.logits(text, cache="bf16"))
