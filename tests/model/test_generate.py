"""Generation on the model in the box: what comes out, in which order, in how much memory, and how it ends."""

import gc
import os
import signal
import threading
import time
import warnings
import weakref
from collections import deque
from dataclasses import asdict, replace

import numpy as np
import pytest
from engine import ALL, EVICTING

import skipkv
from skipkv import Custom, Model, Sampling, Steering
from skipkv.generate import Run
from skipkv.methods import CLASSES, SUMS, TABLE
from skipkv.tiny.problems import draw

pytestmark = pytest.mark.filterwarnings("ignore:.*never compacted", "ignore:.*steered no token")

PROBLEMS = [problem["prompt"] for problem in draw(200)]
HEADS = 4 * 4
VECTOR = np.random.default_rng(8).standard_normal(256).astype(np.float32) * 0.05
CLOSE = "</think>"


@pytest.fixture(scope="module")
def model():
    return skipkv.load("tiny", threads=1, progress=False)


def like(model, tokenizer="same", **changes):
    """The same weights under a changed configuration."""
    kept = model.tokenizer if tokenizer == "same" else tokenizer
    return Model(model._core, replace(model.config, **changes), kept, model.name, model.generation, model.threads)


def run(model, prompts, method=None, steering=None, **options):
    return model.generate(prompts, method, steering, **({"max_new_tokens": 40, "progress": False} | options))


def stream(model, prompts, method=None, steering=None, **options):
    return model.stream(prompts, method, steering, **({"max_new_tokens": 40} | options))


def make(name, budget=48, interval=32, **parameters):
    """A method of this name that compacts within a few tokens; `custom` drops the redundant."""
    given = {"budget": budget, "interval": interval} | parameters
    if name == "custom":
        return Custom(lambda c: -c.redundancy[: c.n_candidates], ["redundancy"], **given)
    return CLASSES[name](**{key: value for key, value in given.items() if key in TABLE[name]["parameters"].split()})


def facts(out, trace=True):
    """All of a generation that may not depend on the machine or the batch."""
    stats = asdict(out.stats) if out.stats else {}
    for name in ("seconds", "pool_bytes", "pool_peak_bytes"):
        stats.pop(name, None)
    found = [out.text, out.tokens, out.finish_reason, out.prompt_tokens, out.prompt, out.sample, stats]
    if trace and out.trace:
        t = out.trace
        found += [t.tokens, t.sentences, t.alphas, t.bytes]
        found += [(c.step, c.layer, c.head, c.before, c.kept.tobytes()) for c in t.compactions]
        found += [a.tobytes() for c in t.compactions for _, a in sorted((c.scores or {}).items())]
    return found


def same(outs, others):
    assert len(outs) == len(others)
    for out, other in zip(outs, others, strict=True):
        assert facts(out) == facts(other), (out.prompt, out.sample)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and texts


def test_a_problem_is_solved_and_ends_at_the_stop_token(model):
    out = model.generate(PROBLEMS[0], progress=False)[0]
    assert out.finish_reason == "stop" and out.tokens[-1] == 2 and 2 not in out.tokens[:-1]
    assert out.text.endswith("</think>\n\n\\boxed{" + draw(1)[0]["answer"] + "}")
    assert out.text == model.tokenizer.decode(out.tokens) and "</s>" not in out.text
    assert "</s>" in model.tokenizer.decode(out.tokens, skip_special_tokens=False)
    assert out.prompt_tokens == model.encode(PROBLEMS[0])
    # Greedy is the best token of the logits of teacher forcing.
    logits = model.logits(out.prompt_tokens + out.tokens[:-1], cache="bf16")
    assert out.tokens == logits[len(out.prompt_tokens) - 1 :].argmax(1).tolist()


def test_every_form_of_a_prompt_gives_the_same(model):
    text, ids = PROBLEMS[0], model.encode(PROBLEMS[0])
    content = text.removeprefix("<s><|user|>").removesuffix("<|assistant|><think>\n")
    messages = [{"role": "user", "content": content}]
    forms = [text, ids, tuple(ids), np.array(ids), np.array(ids, np.uint8), messages, tuple(messages)]
    expected = run(model, [text])
    for form in forms:
        same(run(model, form), expected)
    outs = run(model, (form for form in forms))
    assert [out.prompt for out in outs] == list(range(7))
    assert len({tuple(out.tokens) for out in outs}) == 1 and {tuple(out.prompt_tokens) for out in outs} == {tuple(ids)}
    assert [out.prompt_tokens for out in run(model, np.array([ids, ids]), max_new_tokens=1)] == [ids, ids]
    assert run(model, []) == []


def test_results_come_in_order_of_prompt_and_sample(model):
    outs = run(model, PROBLEMS[:7], n=2, rows=3, stop="W", temperature=4.0)  # they end at different times
    assert [(out.prompt, out.sample) for out in outs] == [(p, s) for p in range(7) for s in range(2)]
    assert [out.prompt_tokens for out in outs[::2]] == [model.encode(text) for text in PROBLEMS[:7]]
    assert len({len(out.tokens) for out in outs}) > 3


@pytest.mark.parametrize("method", [None, "skipkv:budget=48,interval=32"])
def test_the_order_of_prompts_changes_no_text(model, method):
    outs = run(model, PROBLEMS[:6], method, rows=4)
    order = [3, 0, 5, 1, 4, 2]
    moved = run(model, [PROBLEMS[i] for i in order], method, rows=4)
    assert [out.tokens for out in moved] == [outs[i].tokens for i in order]


@pytest.mark.parametrize("method", [None, "rkv:budget=64"])
def test_text_is_the_decoding_of_the_tokens_and_of_the_stream(model, method):
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3, "n": 2}
    outs = run(model, PROBLEMS[:4], method, **options)
    pieces, tokens, last = {}, {}, {}
    for event in stream(model, PROBLEMS[:4], method, **options):
        key = event.prompt, event.sample
        assert key not in last  # nothing follows the last one
        pieces[key] = pieces.get(key, "") + event.text
        tokens.setdefault(key, []).append(event.token)
        if event.generation:
            last[key] = event.generation
    for out in outs:
        key = out.prompt, out.sample
        assert out.text == pieces[key] == model.tokenizer.decode(out.tokens) and out.tokens == tokens[key]
        assert facts(last[key]) == facts(out)


def test_settings_of_sampling_reach_the_sampler(model):
    plain = run(model, PROBLEMS[:3])
    hot = {"temperature": 30.0, "seed": 1}
    assert [o.tokens for o in run(model, PROBLEMS[:3], **hot)] != [o.tokens for o in plain]
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert [o.tokens for o in run(model, PROBLEMS[:3], **hot, **narrow)] == [o.tokens for o in plain]
    seeds = [run(model, PROBLEMS[:1], temperature=1.5, seed=seed)[0].tokens for seed in (0, 0, 1, np.int64(1))]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


# ---------------------------------------------------------------------------------------------------------------------
# Samples, rows, batches


def alone(model, prompts, method, steering, prompt, sample, **options):
    """This one sequence, with nothing shared or beside it: its row prefills its own prompt."""
    defaults = {"max_new_tokens": 40, "stop": (), "stop_ids": None, "n": sample + 1, "rows": 1, "memory_limit": None,
                "trace": False, "cache": "bf16", "grouping": False, "padding": "none", "full_length": None,
                "brake": 0}  # fmt: skip
    sampling = Sampling(**{k: options.pop(k) for k in ("temperature", "top_p", "seed") if k in options})
    one = Run(model, model._request(prompts, method, steering, sampling=sampling, **(defaults | options)))
    one.queue = deque([(prompt, sample)])
    list(one.events())
    return one.outputs[prompt, sample]


@pytest.mark.parametrize("name", ALL)
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


@pytest.mark.parametrize("name", ALL)
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
    if name in EVICTING:
        assert all(out.stats.compactions for out in together)
    # Steering is felt, and by its rows alone.
    plain = run(model, prompts, method, rows=8, **options)
    assert [facts(a) == facts(b) for a, b in zip(plain, together, strict=True)] == [False, True, False, True, True]


def test_threads_change_no_bit(model):
    other = skipkv.load("tiny", threads=3, progress=False)
    options = {"temperature": 1.0, "trace": "scores", "n": 2, "max_new_tokens": 30}
    method = make("skipkv")
    same(run(other, PROBLEMS[:3], method, **options), run(model, PROBLEMS[:3], method, **options))


@pytest.mark.parametrize("name", EVICTING)
def test_a_budget_beyond_the_length_is_full(model, name):
    full = run(model, PROBLEMS[:3], temperature=1.0, max_new_tokens=100)
    outs = run(model, PROBLEMS[:3], make(name, budget=150), temperature=1.0, max_new_tokens=100)
    assert [out.tokens for out in outs] == [out.tokens for out in full]
    tight = run(model, PROBLEMS[:3], make(name, budget=30), temperature=1.0, max_new_tokens=100)
    assert [out.tokens for out in tight] != [out.tokens for out in full]


def running(events):
    """After each event: the sequences that have begun and not ended."""
    open_now = set()
    for event in events:
        open_now.add((event.prompt, event.sample))
        yield event, set(open_now)
        if event.generation:
            open_now.discard((event.prompt, event.sample))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_finished_rows_place_is_taken_at_once(model, rows, n):
    events = list(running(stream(model, PROBLEMS[:6], rows=rows, n=n, stop="W", temperature=2.0)))
    assert max(len(open_now) for _, open_now in events) == rows
    begun = set()
    ended = 0
    for i, (event, _) in enumerate(events):
        begun.add((event.prompt, event.sample))
        ended += event.generation is not None
        if event.generation and len(begun) < 6 * n:
            # The others give what is left of this step. The next one's prompt is fed in the step after it or, where
            # it waits to be shared, in one more.
            ahead = events[i + 1 : i + 1 + (2 + (n > 1)) * rows]
            assert any((e.prompt, e.sample) not in begun for e, _ in ahead)
    assert ended == 6 * n


def test_samples_share_one_prefill(model):
    prompt = PROBLEMS[4] * 14
    length, seen = len(model.encode(prompt)), []
    request = model._request(
        [prompt], None, None, sampling=Sampling(temperature=1.0), max_new_tokens=5, stop=(), stop_ids=(), n=4, rows=4,
        memory_limit=None, trace=False, cache="bf16", grouping=False, padding="none", full_length=None, brake=0,
    )  # fmt: skip
    work = Run(model, request)
    session, work.session = work.session, None

    class Counting:
        def __getattr__(self, name):
            return getattr(session, name)

        def forward(self, spans, tokens, *rest):
            seen.append(len(tokens))
            return session.forward(spans, tokens, *rest)

    work.session = Counting()
    list(work.events())
    # The prompt but for its last token, once; then that token and four more of each sample, the last one not fed.
    assert sum(seen) == length - 1 + 4 * 5 and max(seen) == 512


def test_two_threads_may_generate_at_once(model):
    options = {"temperature": 1.0, "max_new_tokens": 60, "n": 2}
    expected = [run(model, PROBLEMS[i : i + 2], make("skipkv"), seed=i, **options) for i in (0, 2)]
    found = {}

    def work(i):
        found[i] = run(model, PROBLEMS[i : i + 2], make("skipkv"), seed=i, **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(found[0], expected[0])
    same(found[2], expected[1])


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def page_bytes(name, cache):
    return 64 * (2 * 32 * {"bf16": 2, "f32": 4}[cache] + 4 + 4 * bool(TABLE[name]["needs"] & SUMS))


def worst_case(name, cache, n_prompt, new, budget=48, interval=32):
    """Bytes of a row at most: every head's pages for max(prompt, B + Δ) slots, or all tokens fed if those are fewer."""
    fed = n_prompt + new - 1
    slots = fed if name == "full" else min(fed, max(n_prompt, budget + interval))
    return -(-slots // 64) * HEADS * page_bytes(name, cache)


@pytest.mark.parametrize("name, cache", [("full", "bf16"), ("skipkv", "f32"), ("h2o", "bf16"), ("streaming", "f32")])
@pytest.mark.parametrize("n", [1, 3])
def test_the_memory_limit_holds_and_changes_no_text(model, name, n, cache):
    method = make(name)
    prompts = [PROBLEMS[0], PROBLEMS[3] * 4, PROBLEMS[1] * 2, PROBLEMS[7]]
    options = {"n": n, "cache": cache, "temperature": 2.0, "max_new_tokens": 30}
    free = run(model, prompts, method, rows=12, **options)
    largest = max(worst_case(name, cache, len(model.encode(p)), 30) for p in prompts)
    assert max(out.stats.pool_peak_bytes for out in free) > 2 * largest
    for rows, share in ((1, 1), (8, 1), (8, 1.4), (3, 2), (12, 2.5)):
        limit = int(share * largest)
        outs = run(model, prompts, method, rows=rows, memory_limit=limit, **options)
        assert [facts(a) for a in outs] == [facts(b) for b in free], (rows, share)
        peaks = [(out.stats.pool_peak_bytes, out.stats.pool_bytes, out.stats.peak_bytes) for out in outs]
        assert all(0 < peak <= pool_peak <= pool <= limit for pool_peak, pool, peak in peaks), (rows, share)


def test_rows_wait_for_memory(model):
    prompts = PROBLEMS[:5]
    need = worst_case("full", "bf16", len(model.encode(prompts[0])), 40)
    for fit in (1, 2, 3):
        limit = fit * need + need // 2
        counts = [len(now) for _, now in running(stream(model, prompts, rows=16, memory_limit=limit))]
        assert max(counts) == fit


def test_a_row_that_never_fits_is_refused_before_anything_runs(model):
    prompts = [PROBLEMS[0], PROBLEMS[3] * 4]
    need = worst_case("full", "bf16", len(model.encode(prompts[1])), 40)
    for call in (run, stream):  # a stream refuses when it is made, not when it is read
        with pytest.raises(skipkv.CapacityError) as error:
            call(model, prompts, memory_limit=need - 1)
        assert str(error.value) == f"prompt 1 needs {need} bytes of cache; memory_limit is {need - 1}"
        assert isinstance(error.value, MemoryError)
    assert len(run(model, prompts, memory_limit=need)) == 2
    long = {"max_new_tokens": 1000, "stop_ids": [model.encode("Wait")[0]]}
    limit = worst_case("rkv", "bf16", 43, 1000)
    with pytest.raises(skipkv.CapacityError):
        run(model, PROBLEMS[0], memory_limit=limit, **long)
    assert run(model, PROBLEMS[0], make("rkv"), memory_limit=limit, **long)[0].finish_reason == "stop"


def test_more_rows_than_sequences_cost_nothing(model):
    assert len(run(model, PROBLEMS[0], rows=2**31 - 1, n=2, max_new_tokens=3)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# How a text ends


def test_length(model):
    free = run(model, PROBLEMS[0])[0]
    for new in (1, 2, 7):
        out = run(model, PROBLEMS[0], max_new_tokens=new)[0]
        assert out.tokens == free.tokens[:new] and out.finish_reason == "length"
        assert (out.stats.new_tokens, out.stats.prompt_tokens) == (new, 43)


def test_context(model):
    small = like(model, context=60)
    free = run(model, PROBLEMS[0])[0]
    out = run(small, PROBLEMS[0])[0]
    # 60 tokens can be fed, the last new one need not be.
    assert out.finish_reason == "context" and out.tokens == free.tokens[: 60 - 43 + 1]
    assert run(small, PROBLEMS[0], max_new_tokens=18)[0].finish_reason == "length"
    assert run(small, PROBLEMS[0], max_new_tokens=19)[0].finish_reason == "context"
    ids = (model.encode(PROBLEMS[0]) * 2)[:60]
    outs = run(small, [ids, ids[:59]], n=2)
    assert [(len(o.tokens), o.finish_reason) for o in outs] == [(1, "context")] * 2 + [(2, "context")] * 2
    with pytest.raises(skipkv.ConfigError) as error:
        run(small, [ids[:5], ids + [5]])
    assert str(error.value) == "prompt 1 has 61 tokens; allowed: up to the context of 60"


def test_stop_ids(model):
    free = run(model, PROBLEMS[0], max_new_tokens=100)[0]
    wait = model.encode("Wait")
    assert len(wait) == 1 and wait[0] in free.tokens
    at = free.tokens.index(wait[0])
    for ids in (wait, tuple(wait), np.array(wait), iter(wait), {*wait, 2}):
        out = run(model, PROBLEMS[0], stop_ids=ids)[0]
        assert out.tokens == free.tokens[: at + 1] and out.finish_reason == "stop"
        assert out.text == model.tokenizer.decode(out.tokens) and out.text.endswith("Wait")
    # Without stop ids the text runs on behind </s>.
    whole = run(model, PROBLEMS[4], max_new_tokens=900)[0]
    on = run(model, PROBLEMS[4], max_new_tokens=len(whole.tokens) + 5, stop_ids=[])[0]
    assert whole.finish_reason == "stop" and on.finish_reason == "length"
    assert on.tokens[: len(whole.tokens)] == whole.tokens and len(on.tokens) == len(whole.tokens) + 5


def cut(model, tokens, stops):
    """Text, number of tokens: up to the first prefix of tokens that holds a stop string, without it."""
    for n in range(1, len(tokens) + 1):
        text = model.tokenizer.decode(tokens[:n])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], n
    return model.tokenizer.decode(tokens), len(tokens)


def held(text, stops):
    """How much of the end of a text may begin a stop string."""
    return max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))


STOPS = [
    ["find"], [" so"], ["a"], [",", "."], ["\n\nWait"], ["ida + cups", "Bea = Ida + cups"],
    ["Bea = Ida", "= Ida +", "Ida + cu"], ["ups, so find Ida.\n\nWait a"], ["First find Bea!", "First find Bea.\n\nX"],
    ["so find Idb", "so find Ida.\n\nWait again!"], ["zzz"], ["Wait again Bea", "t again"], ["\n", "\n\n"],
]  # fmt: skip


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_stop_strings(model, stops):
    free = run(model, PROBLEMS[0], max_new_tokens=60)[0]
    text, n = cut(model, free.tokens, stops)
    out = run(model, PROBLEMS[0], max_new_tokens=60, stop=stops if len(stops) > 1 else stops[0])[0]
    assert (out.text, out.tokens) == (text, free.tokens[:n])
    assert out.finish_reason == ("stop" if any(s in free.text for s in stops) else "length")
    shown, tokens = "", []
    for event in stream(model, PROBLEMS[0], max_new_tokens=60, stop=stops):
        shown += event.text
        tokens.append(event.token)
        if not event.generation:  # all is shown but what could still become a stop string
            so_far = model.tokenizer.decode(tokens)
            assert shown == so_far[: len(so_far) - held(so_far, stops)]
    assert (shown, tokens) == (text, out.tokens)


def test_stop_strings_cut_from_anywhere_in_the_text(model):
    free = run(model, PROBLEMS[1], max_new_tokens=60)[0]
    rng = np.random.default_rng(1)
    outs, wanted = [], []
    for _ in range(40):
        first = rng.integers(len(free.text) - 12)
        stops = [free.text[first : first + rng.integers(1, 12)], free.text[first + 5 : first + 9]]
        outs += run(model, PROBLEMS[1], max_new_tokens=60, stop=stops)
        wanted.append(cut(model, free.tokens, stops))
    assert [(out.text, len(out.tokens)) for out in outs] == wanted
    assert len({n for _, n in wanted}) > 10


def test_a_stop_string_on_the_last_token_is_a_stop(model):
    free = run(model, PROBLEMS[0], max_new_tokens=9)[0]
    last = model.tokenizer.decode(free.tokens[-1:])
    out = run(model, PROBLEMS[0], max_new_tokens=9, stop=model.tokenizer.decode(free.tokens[-3:]))[0]
    assert out.finish_reason == "stop" and out.tokens == free.tokens and not out.text.endswith(last)
    out = run(model, PROBLEMS[0], max_new_tokens=9, stop=last + "never")[0]
    assert out.finish_reason == "length" and out.text == free.text  # what was held back is released


# ---------------------------------------------------------------------------------------------------------------------
# Streams that end early, interruptions, errors


def test_closing_a_stream_frees_it_and_leaves_the_model_usable(model):
    expected = run(model, PROBLEMS[:3])
    before = signal.getsignal(signal.SIGINT)
    events = stream(model, PROBLEMS[:3], make("skipkv"), n=2, max_new_tokens=2000)
    work = weakref.ref(events.gi_frame.f_locals["self"])
    for _ in range(31):
        next(events)
    assert work() is not None and signal.getsignal(signal.SIGINT) != before
    events.close()
    del events
    gc.collect()
    assert work() is None and signal.getsignal(signal.SIGINT) == before
    same(run(model, PROBLEMS[:3]), expected)


def interrupting(times, at=16):
    """A custom score that sends Ctrl-C to this process, `times` times, at its call number `at`."""
    calls = []

    def score(c):
        calls.append(c.layer)
        if len(calls) == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return -c.positions[: c.n_candidates]

    return Custom(score, budget=48, interval=32)


@pytest.fixture
def own_handler():
    """A SIGINT handler that pytest's own is spared; what it noted."""
    noted = []
    before = signal.signal(signal.SIGINT, lambda *_: noted.append(1))
    handler = signal.getsignal(signal.SIGINT)
    yield handler, noted
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_between_steps_and_returns_what_is_done(model, own_handler):
    prompts = [PROBLEMS[i] for i in (0, 3, 2, 4)]
    free = run(model, prompts, interrupting(0), max_new_tokens=80)
    # The first two have 43 tokens and are compacted at 65, 16 calls each; Ctrl-C comes within that step.
    outs = run(model, prompts, interrupting(1), max_new_tokens=80, rows=2)
    assert [out.finish_reason for out in outs] == ["interrupted"] * 4
    assert signal.getsignal(signal.SIGINT) is own_handler[0] and own_handler[1] == []
    for out, whole in zip(outs[:2], free, strict=False):
        assert out.tokens == whole.tokens[: 65 - 43 + 1] and out.text == model.tokenizer.decode(out.tokens)
        assert out.stats.new_tokens == 23 and out.stats.compactions == 1
    for out, text in zip(outs[2:], prompts[2:], strict=True):
        assert (out.tokens, out.text, out.stats, out.prompt_tokens) == ([], "", None, model.encode(text))
    # What was finished before stays finished: the second row's compaction interrupts, the first row is done.
    outs = run(model, PROBLEMS[:3], interrupting(1, at=17), max_new_tokens=40, rows=1)
    assert [out.finish_reason for out in outs] == ["length", "interrupted", "interrupted"]
    assert len(outs[0].tokens) == 40


def test_an_interrupted_stream_ends_every_sequence(model, own_handler):
    events = list(stream(model, PROBLEMS[:3], interrupting(1), n=2, rows=2, max_new_tokens=80, stop=" again Q"))
    last = {(e.prompt, e.sample): e.generation for e in events if e.generation}
    assert len(last) == 6 and {g.finish_reason for g in last.values()} == {"interrupted"}
    for key, generation in last.items():
        assert "".join(e.text for e in events if (e.prompt, e.sample) == key) == generation.text
        assert generation.text == model.tokenizer.decode(generation.tokens)


def test_a_second_interrupt_raises_at_once(model, own_handler):
    with pytest.raises(KeyboardInterrupt):
        run(model, PROBLEMS[:2], interrupting(2), max_new_tokens=80)
    assert signal.getsignal(signal.SIGINT) is own_handler[0]


def test_an_interrupt_from_outside(model, own_handler):
    def send():
        while signal.getsignal(signal.SIGINT) is own_handler[0]:
            time.sleep(0.01)  # until the run listens
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    outs = run(model, PROBLEMS[:20], rows=16, max_new_tokens=4000, stop_ids=[])
    sender.join()
    assert [out.finish_reason for out in outs] == ["interrupted"] * 20 and own_handler[1] == []
    free = run(model, PROBLEMS[:1], max_new_tokens=8)[0].tokens
    assert outs[0].tokens[:8] == free[: len(outs[0].tokens)] and [out.stats for out in outs[16:]] == [None] * 4


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_streams_that_end_in_any_order_restore_the_handler(model, own_handler, order):
    handler, noted = own_handler
    streams = [stream(model, PROBLEMS[i]) for i in range(3)]
    for s in streams:
        next(s)
    for i in order[:2]:
        streams[i].close()
    signal.raise_signal(signal.SIGINT)  # the one that goes on takes it
    left = [event.generation for event in streams[order[2]]]
    assert noted == [] and [g.finish_reason for g in left if g] == ["interrupted"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_stream_that_is_closed_elsewhere_hands_the_signal_on(model, own_handler):
    s = stream(model, PROBLEMS[0])
    next(s)
    thread = threading.Thread(target=s.close)
    thread.start()
    thread.join()
    signal.raise_signal(signal.SIGINT)
    assert own_handler[1] == [1]


def test_an_ignored_interrupt_stays_ignored(model, own_handler):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    outs = run(model, PROBLEMS[:2], interrupting(1), max_new_tokens=40)
    assert {out.finish_reason for out in outs} == {"length"} and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


class Boom(Exception):
    pass


def failing(at, what):
    calls = []

    def score(c):
        calls.append(1)
        if len(calls) == at:
            return what(c)
        return -c.positions[: c.n_candidates]

    return Custom(score, budget=48, interval=32)


def raises(error):
    def what(c):
        raise error

    return what


def test_what_a_custom_score_raises_passes_through_with_what_was_finished(model):
    whole = run(model, PROBLEMS[:3], failing(0, None), rows=1)
    error = Boom("no such luck")
    with pytest.raises(Boom) as caught:
        run(model, PROBLEMS[:3], failing(17, raises(error)), rows=1)  # the first call of the second row
    assert caught.value is error
    same(caught.value.outputs, whole[:1])
    with pytest.raises(Boom) as caught:
        run(model, PROBLEMS[:3], failing(1, raises(Boom())), rows=3)
    assert caught.value.outputs == []
    with pytest.raises(KeyboardInterrupt):
        run(model, PROBLEMS[:3], failing(1, raises(KeyboardInterrupt())), rows=3)
    events = stream(model, PROBLEMS[:3], failing(17, raises(error)), rows=1)
    done = []
    with pytest.raises(Boom):
        for event in events:
            done += [event.generation] if event.generation else []
    same(done, whole[:1])
    same(run(model, PROBLEMS[:3], failing(0, None), rows=1), whole)


@pytest.mark.parametrize(
    "what, message",
    [
        (lambda c: np.zeros(c.n_candidates - 1), "custom score: expected shape [57], found [56]"),
        (
            lambda c: np.full(c.n_candidates, np.nan),
            "custom score of candidate 0 (layer 0, head 0) is nan; allowed: numbers",
        ),
    ],
)
def test_a_bad_custom_score_is_refused(model, what, message):
    with pytest.raises(skipkv.ConfigError) as error:
        run(model, PROBLEMS[0], failing(1, what))
    assert str(error.value) == message and error.value.outputs == []


BAD = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed: integers from 1 to 2147483647"),
    ({"max_new_tokens": 1.0}, "max_new_tokens is 1.0; allowed: integers from 1 to 2147483647"),
    ({"n": 0}, "n is 0; allowed: integers from 1 to 2147483647"),
    ({"n": True}, "n is True; allowed: integers from 1 to 2147483647"),
    ({"rows": -1}, "rows is -1; allowed: integers from 1 to 2147483647"),
    ({"rows": 2**31}, "rows is 2147483648; allowed: integers from 1 to 2147483647"),
    ({"brake": -1}, "brake is -1; allowed: integers from 0 to 2147483647"),
    ({"memory_limit": 0}, "memory_limit is 0; allowed: integers from 1 to 4611686018427387904"),
    ({"memory_limit": "1GB"}, "memory_limit is '1GB'; allowed: integers from 1 to 4611686018427387904"),
    ({"cache": "f16"}, "cache is 'f16'; allowed: 'bf16', 'f32'"),
    ({"padding": "left"}, "padding is 'left'; allowed: 'none', 'reserve'"),
    ({"grouping": 1}, "grouping is 1; allowed: False, True"),
    ({"trace": "all"}, "trace is 'all'; allowed: False, True, 'scores'"),
    ({"trace": 2}, "trace is 2; allowed: False, True, 'scores'"),
    ({"full_length": 0}, "full_length is 0; allowed: numbers above 0"),
    ({"full_length": "long"}, "full_length is 'long'; allowed: numbers above 0"),
    ({"full_length": float("nan")}, "full_length is nan; allowed: numbers above 0"),
    ({"stop": ""}, "stop is ''; allowed: texts that are not empty"),
    ({"stop": ["a", ""]}, "stop is ['a', '']; allowed: texts that are not empty"),
    ({"stop": 5}, "stop is 5; allowed: texts that are not empty"),
    ({"stop": None}, "stop is None; allowed: texts that are not empty"),
    ({"stop_ids": [231]}, "stop_ids is 231; allowed: integers from 0 to 230"),
    ({"stop_ids": 2.5}, "stop_ids is 2.5; allowed: integers from 0 to 230"),
    ({"stop_ids": ["a"]}, "stop_ids is 'a'; allowed: integers from 0 to 230"),
    ({"temperature": -0.1}, "temperature is -0.1; allowed: numbers from 0 to 1000"),
    ({"temperature": float("nan")}, "temperature is nan; allowed: numbers from 0 to 1000"),
    ({"temperature": "hot"}, "temperature is 'hot'; allowed: numbers from 0 to 1000"),
    ({"temperature": None}, "temperature is None; allowed: numbers from 0 to 1000"),
    ({"top_k": -1}, "top_k is -1; allowed: integers from 0 to 2147483647"),
    ({"top_k": 0.5}, "top_k is 0.5; allowed: integers from 0 to 2147483647"),
    ({"top_p": 1.01}, "top_p is 1.01; allowed: numbers from 0 to 1"),
    ({"min_p": -1}, "min_p is -1; allowed: numbers from 0 to 1"),
    ({"seed": -1}, "seed is -1; allowed: integers from 0 to 18446744073709551615"),
    ({"seed": 2**64}, "seed is 18446744073709551616; allowed: integers from 0 to 18446744073709551615"),
    ({"method": 5}, "method is 5; allowed: a method or its string"),
    ({"method": "rkv"}, "method 'rkv': rkv needs a budget"),
    ({"method": "rkv:budget=many"}, "budget is 'many'; allowed: a number"),
    ({"method": skipkv.RKV([48, 48, 48])}, "budget: expected a number, [4] or [4, 4], found shape [3]"),
    ({"method": "rkv:budget=30,protect=prompt"}, "budget is 30; allowed: at least 51, as the first 43 positions and the 8 newest slots are protected"),  # noqa: E501
    ({"steering": "v"}, "steering: expected a Steering, or one or None for each of 1 prompts"),
    ({"steering": 5}, "steering: expected a Steering, or one or None for each of 1 prompts"),
    ({"steering": [None, None]}, "steering: expected a Steering, or one or None for each of 1 prompts"),
    ({"steering": Steering(np.ones(255), 0)}, "steering vector: expected shape [256], found [255]"),
    ({"steering": [Steering(np.ones(256), 4)]}, "steering layer is 4; allowed: 0 to 3"),
    ({"prompts": ""}, "prompt 0 is empty; allowed: at least one token"),
    ({"prompts": [np.array([], int)]}, "prompt 0 is empty; allowed: at least one token"),
    ({"prompts": [[]]}, "prompt is []; allowed: a text, token ids, or a list of messages"),
    ({"prompts": ["a", 5]}, "prompt is 5; allowed: a text, token ids, or a list of messages"),
    ({"prompts": [[1, 2.5]]}, "prompt is [1, 2.5]; allowed: a text, token ids, or a list of messages"),
    ({"prompts": ["a", [5, 231]]}, "prompt 1 holds token 231; allowed: 0 to 230"),
    ({"prompts": [[-1]]}, "prompt 0 holds token -1; allowed: 0 to 230"),
    ({"prompts": [[5] * 4097]}, "prompt 0 has 4097 tokens; allowed: up to the context of 4096"),
    ({"prompts": 5}, "prompts is 5; allowed: a text, token ids, messages, or many of them"),
    ({"prompts": None}, "prompts is None; allowed: a text, token ids, messages, or many of them"),
    ({"prompts": {"a": "b"}}, "prompts is {'a': 'b'}; allowed: a text, token ids, messages, or many of them"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD, ids=lambda value: str(value)[:60] if isinstance(value, dict) else "")
def test_bad_parameters_are_refused(model, changes, message):
    options = {"prompts": PROBLEMS[0]} | changes
    prompts, method, steering = options.pop("prompts"), options.pop("method", None), options.pop("steering", None)
    for call in (model.generate, model.stream):  # a stream, too, when it is made
        with pytest.raises(skipkv.ConfigError) as error:
            call(prompts, method, steering, **options)
        assert str(error.value) == message


def test_an_unknown_option_of_a_stream_is_refused(model):
    with pytest.raises(skipkv.ConfigError) as error:
        model.stream("a", max_tokens=5)
    assert str(error.value) == (
        "option 'max_tokens' is unknown; allowed: max_new_tokens, stop, stop_ids, n, rows, memory_limit, trace, cache, "
        "grouping, padding, full_length, brake, temperature, top_k, top_p, min_p, seed"
    )
    assert len(list(model.stream("a", max_new_tokens=2, stop_ids=[], progress=True))) == 2


def test_a_steering_that_does_not_fit_is_refused_before_the_first_prompt_runs(model):
    with pytest.raises(skipkv.ConfigError, match="steering layer is 9"):
        stream(model, PROBLEMS[:3], None, [None, None, Steering(VECTOR, 9)], rows=1)


def test_without_a_tokenizer(model):
    bare = like(model, tokenizer=None)
    ids = model.encode(PROBLEMS[0])
    out = run(bare, ids, make("skipkv"), trace=True)[0]
    assert out.tokens == run(model, ids, make("rkv"))[0].tokens  # without sentences, skipkv scores as rkv
    assert out.text == "" and out.trace.texts[:3] == [str(i) for i in ids[:3]] and out.trace.sentences == []
    for prompts, options, message in (
        ("a", {}, "tiny has no tokenizer; allowed: prompts as token ids"),
        ([{"role": "user", "content": "a"}], {}, "tiny has no tokenizer; allowed: prompts as token ids"),
        (ids, {"stop": "a"}, "stop needs a tokenizer, which this model has not"),
        (ids, {"brake": 2}, "brake needs a tokenizer, which this model has not"),
    ):
        with pytest.raises(skipkv.ConfigError) as error:
            run(bare, prompts, **options)
        assert str(error.value) == message


def test_hidden_states_and_logits_refuse_what_they_cannot_do(model):
    for call, message in (
        (lambda: model.hidden("abc", [5]), "layers is 5; allowed: integers from 0 to 4"),
        (lambda: model.logits("abc", cache="f16"), "cache is 'f16'; allowed: 'bf16', 'f32'"),
        (lambda: model.logits([5, -1]), "text holds token -1; allowed: 0 to 230"),
    ):
        with pytest.raises(skipkv.ConfigError) as error:
            call()
        assert str(error.value) == message


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and warnings


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cache", ["bf16", "f32"])
def test_the_counts_follow_from_the_trace(model, name, cache):
    prompts = [PROBLEMS[0], PROBLEMS[3] * 2]
    options = {"trace": True, "cache": cache, "max_new_tokens": 90, "stop_ids": (), "full_length": 200}
    page = page_bytes(name, cache)
    for out in run(model, prompts, make(name), rows=2, **options):
        fed, stats = len(out.prompt_tokens) + 89, out.stats
        slots, peak = {}, 0
        for step in range(1, fed + 1):
            if step < len(out.prompt_tokens):
                continue  # a prompt is fed at once
            held = {}
            for layer in range(4):
                for head in range(4):
                    held[layer, head] = len(out.trace.held(step, layer, head))
                    before = len(out.trace.held(step - 1, layer, head)) + 1
                    slots[layer, head] = before if slots else step
            peak = max(peak, sum(-(-n // 64) for n in slots.values()))
            slots = held
        assert stats.peak_bytes == peak * page
        assert stats.live_bytes == sum(-(-n // 64) for n in slots.values()) * page
        # A full cache has no sums of attention to keep.
        assert stats.full_bytes == -(-fed // 64) * HEADS * page_bytes("full", cache)
        assert stats.compression == sum(slots.values()) / (fed * HEADS)
        assert stats.compression_of_full == sum(slots.values()) / (200 * HEADS)
        assert stats.thinking_tokens > 50 and stats.prompt_tokens == len(out.prompt_tokens)
        assert (stats.compression < 0.7) == (stats.live_bytes < stats.full_bytes) == (name != "full")
        assert (stats.pairs > 0) == (name in ("rkv", "skipkv", "custom"))
    single = run(model, PROBLEMS[0], make(name), **options)[0].stats
    assert single.pool_peak_bytes == single.peak_bytes <= single.pool_bytes


def test_thinking_is_counted(model):
    out = model.generate(PROBLEMS[4], progress=False, trace=True)[0]
    ids, [open_id], [close_id] = out.trace.tokens, model.encode("<think>"), model.encode(CLOSE)
    assert out.stats.thinking_tokens == ids.index(close_id) - ids.index(open_id) - 1
    texts = model.tokenizer.token_texts
    closed = skipkv.segment(ids[:-1], [texts[i] for i in ids[:-1]])
    inside = (closed.closed > ids.index(open_id)) & (closed.closed < ids.index(close_id))
    assert out.stats.sentences == len(closed) and out.stats.thoughts == closed.labels[inside].sum() > 5


def test_a_run_that_never_compacts_says_so(model):
    with pytest.warns(UserWarning) as caught:
        run(model, PROBLEMS[:2], "rkv:budget=500")
    assert [str(w.message) for w in caught] == ["rkv:budget=500 never compacted: the longest of 2 rows has 87 tokens"]
    assert caught[0].filename == __file__  # the caller's line, not one of skipkv
    with pytest.warns(UserWarning, match="never compacted") as caught:
        list(model.stream(PROBLEMS[0], "rkv:budget=500", max_new_tokens=2))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, PROBLEMS[:2])  # full never does
        run(model, [PROBLEMS[0], PROBLEMS[3] * 2], "rkv:budget=70")  # one of two does
        run(model, PROBLEMS[0], "rkv:budget=48,interval=32,evict=false")


def test_a_steering_that_steers_nothing_says_so(model):
    nothing = "steering steered no token: none in scope 'think' holds a blank line"
    with pytest.warns(UserWarning) as caught:
        run(model, "Dot = 9.", None, Steering(VECTOR, 1), stop_ids=[], max_new_tokens=5)
    assert [str(w.message) for w in caught] == [nothing]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, [PROBLEMS[0], "Dot = 9."], None, Steering(VECTOR, 1))
        run(model, [PROBLEMS[0], "Dot = 9."], None, [Steering(VECTOR, 1), None])
    with pytest.warns(UserWarning):
        run(model, [PROBLEMS[0], "Dot = 9."], None, [None, Steering(VECTOR, 1)], max_new_tokens=5)


# ---------------------------------------------------------------------------------------------------------------------
# The brake


def looping(model, k, prompt=PROBLEMS[0], **options):
    """τ = −1: every sentence but the first repeats one. Looked at every 16 tokens."""
    method = skipkv.SkipKV(2000, tau=-1.0, interval=16)
    return run(model, prompt, method, brake=k, trace=True, **({"max_new_tokens": 250} | options))[0]


def expected_steps(out, k):
    """Tokens fed at the first look of the brake that finds k repeating sentences, from the sentences of the trace."""
    closed = np.array([s[2] for s in out.trace.sentences])
    n_prompt = out.trace.n_prompt
    looks = [t for t in range(n_prompt + 1, len(out.trace.tokens)) if t % 16 == 1]
    return next((t for t in looks if (closed < t).sum() - 1 >= k), None)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_brake_steers_to_the_utmost_and_then_ends_the_thinking(model, k):
    steering = Steering(VECTOR * 0.1, 1, alpha=0.25, gamma=0.0, alpha_max=1.5)
    free = looping(model, 0, steering=steering)
    out = looping(model, k, steering=steering)
    [close] = model.encode(CLOSE)
    raised, forced = expected_steps(out, k), expected_steps(out, 2 * k)
    assert out.trace.n_prompt < raised < forced and out.stats.braked == raised and free.stats.braked == 0
    assert set(free.trace.alphas.values()) == {0.25}
    assert {a for t, a in out.trace.alphas.items() if t < raised} in ({0.25}, set())
    after = {a for t, a in out.trace.alphas.items() if t >= raised}
    assert after == {1.5}
    assert out.trace.tokens.index(close) == forced and out.trace.tokens.count(close) == 1
    assert close not in free.trace.tokens[: forced + 1]
    assert out.trace.tokens[:raised] == free.trace.tokens[:raised]


def test_the_brake_forces_nothing_outside_of_thinking(model):
    prompt = PROBLEMS[0].removesuffix("<think>\n") + "First find Bea.\n\n"
    out = looping(model, 2, prompt, stop_ids=[], max_new_tokens=150)
    free = looping(model, 0, prompt, stop_ids=[], max_new_tokens=150)
    assert free.stats.thinking_tokens == 0 and expected_steps(out, 4) is not None
    assert out.tokens == free.tokens and out.stats.braked == expected_steps(out, 2)


def test_a_prompt_that_repeats_itself_is_no_loop(model):
    prompt = PROBLEMS[0] + "Now, Bea = Ida + cups, so find Ida.\n\n" * 5
    out = looping(model, 2, prompt)
    assert sum(s[2] < out.trace.n_prompt for s in out.trace.sentences) > 4
    first = next(s[2] for s in out.trace.sentences if s[2] >= out.trace.n_prompt)  # the first one generated
    assert out.stats.braked == next(t for t in range(first + 1, 400) if t % 16 == 1)


@pytest.mark.parametrize("method", ["full", "skipkv:budget=48,interval=32", "h2o:budget=48,interval=32"])
def test_a_brake_that_does_not_step_in_changes_nothing(model, method):
    options = {"max_new_tokens": 120, "temperature": 1.0, "n": 2, "trace": True}
    free = run(model, PROBLEMS[:2], method, **options)
    same(run(model, PROBLEMS[:2], method, brake=100, **options), free)
    assert all(out.stats.braked == 0 for out in free)


# ---------------------------------------------------------------------------------------------------------------------
# Groups as padded batches would have them


def padded(model, lengths):
    """Prompts of these lengths."""
    ids = model.encode(PROBLEMS[0])
    return [(ids * 4)[:n] for n in lengths]


def test_grouping_runs_static_groups_of_similar_length(model):
    lengths = [60, 44, 90, 50, 46]
    prompts = padded(model, lengths)
    events = list(running(stream(model, prompts, rows=2, grouping=True, stop=" so", max_new_tokens=30)))
    groups = [{1, 4}, {3, 0}, {2}]
    for event, open_now in events:
        group = next(g for g in groups if event.prompt in g)
        assert {prompt for prompt, _ in open_now} <= group
    order = list(dict.fromkeys(next(i for i, g in enumerate(groups) if e.prompt in g) for e, _ in events))
    assert order == [0, 1, 2]
    outs = run(model, prompts, rows=2, grouping=True, max_new_tokens=30)
    same(outs, run(model, prompts, rows=16, max_new_tokens=30))


@pytest.mark.parametrize("name", ["skipkv", "h2o", "streaming"])
@pytest.mark.parametrize("grouping", [True, False])
def test_padding_takes_its_slots_off_the_budget(model, name, grouping):
    lengths = [60, 44, 90, 50, 46]
    prompts = padded(model, lengths)
    groups = [[1, 4], [3, 0], [2]] if grouping else [[0, 1], [2, 3], [4]]
    options = {"rows": 2, "trace": True, "max_new_tokens": 60, "stop_ids": ()}
    outs = run(model, prompts, make(name, budget=58), grouping=grouping, padding="reserve", **options)
    assert [len(out.prompt_tokens) for out in outs] == lengths
    for group in groups:
        for i in group:
            budget = 58 - (max(lengths[j] for j in group) - lengths[i])
            assert {len(c.kept) for c in outs[i].trace.compactions} == {budget}, i
            # The row is the one that this budget gives to it alone.
            if name != "skipkv" or not grouping:
                continue
            own = run(model, [prompts[i]], make(name, budget=budget), **options)[0]
            assert own.tokens == outs[i].tokens


def test_padding_without_effect(model):
    prompts = padded(model, [50, 50, 60])
    options = {"rows": 2, "max_new_tokens": 40, "trace": True}
    same(run(model, prompts, make("rkv"), padding="reserve", **options), run(model, prompts, make("rkv"), **options))


def test_padding_that_leaves_nothing_of_a_budget_is_refused(model):
    prompts = padded(model, [60, 10])
    # 48 − 50 slots.
    with pytest.raises(skipkv.ConfigError) as error:
        run(model, prompts, make("rkv"), padding="reserve")
    assert str(error.value) == (
        "budget is -2 after the padding reserve; allowed: at least 9, as the first 0 positions and the 8 newest slots "
        "are protected"
    )
    assert len(run(model, prompts, make("rkv"), padding="reserve", rows=1)) == 2
    assert len(run(model, prompts, make("rkv", budget=59), padding="reserve")) == 2
    with pytest.raises(skipkv.ConfigError, match="budget is 8 after the padding reserve"):
        run(model, prompts, make("rkv", budget=58), padding="reserve")
