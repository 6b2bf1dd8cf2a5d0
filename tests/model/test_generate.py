"""Generation on the model in the box: what comes out, in which order, in how much memory, and its numbers."""

import warnings
from collections import deque

import numpy as np
import pytest
from generations import PROBLEMS, VECTOR, facts, like, make, page_bytes, run, running, same, stream, work_of
from harness import ALL, SHARING, refused

import skipkv
from skipkv import Steering
from skipkv.methods import NEEDS
from skipkv.tiny.problems import draw

pytestmark = pytest.mark.filterwarnings("ignore:.*never compacted", "ignore:.*steered no token")

HEADS = 4 * 4


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
    bare = model.encode(messages, {"add_generation_prompt": False, "bos_token": "Dot", "unknown": [None]})
    assert bare == model.encode("Dot" + text.removeprefix("<s>").removesuffix("<|assistant|><think>\n"))


def test_results_come_in_order_of_prompt_and_sample(model):
    outs = run(model, PROBLEMS[:7], n=2, rows=3, stop="W", temperature=4.0)  # they end at different times
    assert [(out.prompt, out.sample) for out in outs] == [(p, s) for p in range(7) for s in range(2)]
    assert [out.prompt_tokens for out in outs[::2]] == [model.encode(text) for text in PROBLEMS[:7]]
    assert len({len(out.tokens) for out in outs}) > 3


@pytest.mark.parametrize("method", [None, "rkv:budget=64"])
def test_text_is_the_decoding_of_the_tokens_and_of_the_stream(model, method):
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3, "n": 2}
    outs = run(model, PROBLEMS[:4], method, **options)
    pieces, tokens, last = {}, {}, {}
    for event in stream(model, PROBLEMS[:4], method, progress=True, **options):
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
    work = work_of(model, [prompt], temperature=1.0, max_new_tokens=5, stop_ids=(), n=4, rows=4)
    session, work.session = work.session, None

    class Counting:
        def __getattr__(self, name):
            return getattr(session, name)

        def forward(self, spans, tokens, *rest, **named):
            seen.append(len(tokens))
            return session.forward(spans, tokens, *rest, **named)

    work.session = Counting()
    list(work.events())
    # The prompt but for its last token, once; then that token and four more of each sample, the last one not fed.
    assert sum(seen) == length - 1 + 4 * 5 and max(seen) == 512


def worst_case(name, cache, n_prompt, new, budget=48, interval=32):
    """Bytes of a row at most: every head's pages for max(prompt, B + Δ) slots, or all tokens fed if those are fewer."""
    fed = n_prompt + new - 1
    slots = fed if name == "full" else min(fed, max(n_prompt, budget + interval))
    return -(-slots // 64) * HEADS * page_bytes(name, cache)


@pytest.mark.parametrize("name, cache", [("full", "bf16"), ("skipkv", "f32"), ("h2o", "bf16"), ("streaming", "f32"),
                                         ("rkv", "q8")])  # fmt: skip
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


def test_a_shared_prompt_takes_no_rows_memory(model):
    """Where it would, it is prefilled once for each sample; where that is dear, it waits."""
    options = {"n": 5, "temperature": 1.0, "max_new_tokens": 50, "stop_ids": ()}
    need = worst_case("full", "bf16", len(model.encode(PROBLEMS[0])), 50)
    free = run(model, PROBLEMS[:1], **options)
    for fit in (1, 1.5, 2, 3.5):
        work = work_of(model, PROBLEMS[:1], rows=16, memory_limit=int(fit * need), **options)
        assert max(len(now) for _, now in running(work.events())) == int(fit)
        same(work.results(), free)
    long = PROBLEMS[0] * 4
    limit = 2 * worst_case("full", "bf16", len(model.encode(long)), 5)
    events = stream(model, [long], n=3, memory_limit=limit, max_new_tokens=5)
    assert max(len(now) for _, now in running(events)) == 1


def test_samples_that_wait_cost_nothing(model):
    """A step's cost is that of its rows: what waits is not looked at."""
    seen = []

    class Queue(deque):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

        def __iter__(self):
            raise AssertionError("all that waits is looked at")

        remove = __contains__ = __iter__

    work = work_of(model, PROBLEMS[:2], n=3000, rows=8, max_new_tokens=2, stop_ids=())
    work.queue = Queue(work.queue)
    events = work.events()
    for _ in range(400):
        next(events)
    assert max(seen) <= 1 and len(seen) < 3000


def test_a_row_that_never_fits_is_refused_before_anything_runs(model):
    prompts = [PROBLEMS[0], PROBLEMS[3] * 4]
    need = worst_case("full", "bf16", len(model.encode(prompts[1])), 40)
    for call in (run, stream):  # a stream refuses when it is made, not when it is read
        message = f"prompt 1 needs {need} bytes of cache; memory_limit is {need - 1}"
        with refused(message, skipkv.CapacityError) as error:
            call(model, prompts, memory_limit=need - 1)
        assert isinstance(error.value, MemoryError)
    assert len(run(model, prompts, memory_limit=need)) == 2
    long = {"max_new_tokens": 1000, "stop_ids": [model.encode("Wait")[0]]}
    limit = worst_case("rkv", "bf16", 43, 1000)
    with pytest.raises(skipkv.CapacityError):
        run(model, PROBLEMS[0], memory_limit=limit, **long)
    assert run(model, PROBLEMS[0], make("rkv"), memory_limit=limit, **long)[0].finish_reason == "stop"


def test_more_rows_than_sequences_cost_nothing(model):
    assert len(run(model, PROBLEMS[0], rows=2**31 - 1, n=2, max_new_tokens=3)) == 2


@pytest.mark.parametrize("name", [*ALL, *SHARING])
@pytest.mark.parametrize("cache", ["bf16", "f32", "q8"])
def test_the_counts_follow_from_the_trace(model, name, cache):
    prompts = [PROBLEMS[0], PROBLEMS[3] * 2]
    options = {"trace": True, "cache": cache, "max_new_tokens": 90, "stop_ids": (), "full_length": 200}
    page = page_bytes(name, cache)
    for out in run(model, prompts, make(name), rows=2, **options):
        fed, stats = len(out.prompt_tokens) + 89, out.stats
        slots, peak, kept = {}, 0, {}
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
            slots, kept[step] = held, sum(-(-n // 64) for n in held.values()) * page
        assert stats.peak_bytes == peak * page
        assert stats.live_bytes == kept[fed] and out.trace.bytes == [(step, kept[step]) for step in out.trace.steps]
        assert stats.evicted == sum(c.before - len(c.kept) for c in out.trace.compactions)
        # A full cache has no sums of attention to keep.
        assert stats.full_bytes == -(-fed // 64) * HEADS * page_bytes("full", cache)
        assert stats.compression == sum(slots.values()) / (fed * HEADS)
        assert stats.compression_of_full == sum(slots.values()) / (200 * HEADS)
        assert stats.thinking_tokens > 50 and stats.prompt_tokens == len(out.prompt_tokens)
        assert (stats.compression < 0.7) == (stats.live_bytes < stats.full_bytes) == (name != "full")
        assert (stats.pairs > 0) == bool(make(name).needs & NEEDS["redundancy"])
    single = run(model, PROBLEMS[0], make(name), **options)[0].stats
    assert single.pool_peak_bytes == single.peak_bytes <= single.pool_bytes


def test_thinking_is_counted(model):
    out = model.generate(PROBLEMS[4], progress=False, trace=True)[0]
    ids, [open_id], [close_id] = out.trace.tokens, model.encode("<think>"), model.encode("</think>")
    assert out.stats.thinking_tokens == ids.index(close_id) - ids.index(open_id) - 1
    texts = model.tokenizer.token_texts
    closed = skipkv.segment(ids[:-1], [texts[i] for i in ids[:-1]])
    inside = (closed.closed > ids.index(open_id)) & (closed.closed < ids.index(close_id))
    assert out.stats.sentences == len(closed) and out.stats.thoughts == closed.labels[inside].sum() > 5


def test_without_a_tokenizer(model):
    ids = model.encode(PROBLEMS[0])
    out = run(like(model, tokenizer=None), ids, make("skipkv"), trace=True)[0]
    assert out.tokens == run(model, ids, make("rkv"))[0].tokens  # without sentences, skipkv scores as rkv
    assert out.text == "" and out.trace.texts[:3] == [str(i) for i in ids[:3]] and out.trace.sentences == []


def test_a_run_that_never_compacts_says_so(model):
    with pytest.warns(UserWarning) as caught:
        model.generate(PROBLEMS[:2], "rkv:budget=500", max_new_tokens=40, progress=False)
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
