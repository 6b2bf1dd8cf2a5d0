"""How a text ends: lengths, stops, a stream that is closed, Ctrl-C, an error, the brake."""

import gc
import os
import re
import signal
import threading
import time
import weakref

import numpy as np
import pytest
from generations import PROBLEMS, VECTOR, like, make, run, same, stream
from harness import refused

import skipkv
from skipkv import Custom, Steering
from skipkv.run import Interrupt

pytestmark = pytest.mark.filterwarnings("ignore:.*never compacted", "ignore:.*steered no token")


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
    with refused("prompt 1 has 61 tokens; allowed: up to the context of 60"):
        run(small, [ids[:5], ids + [5]])


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


SPECIAL_STOPS = [["</s>"], ["<|user|>"], ["}</s>"], ["</s>X", "</s>\n"], ["</think>"], ["</"], ["/s"],
                 ["7}</s", "</s> "], ["boxed{5}</s>!", "s> "]]  # fmt: skip


@pytest.mark.parametrize("stops", SPECIAL_STOPS, ids=str)
def test_stop_strings_are_searched_among_special_tokens_too(model, stops):
    """Texts that run on behind their end, where special tokens follow."""
    options = {"max_new_tokens": 700, "stop_ids": (), "temperature": 1.5, "seed": 3}
    special = [t.content for t in model.tokenizer._added.values() if t.special]
    for problem in (4, 5):
        free = run(model, PROBLEMS[problem], **options)[0]
        n = len(free.tokens)
        whole = [model.tokenizer.decode(free.tokens[:i], skip_special_tokens=False) for i in range(n + 1)]
        n = next((i for i in range(n) if any(stop in whole[i] for stop in stops)), n)
        at = min((whole[n].find(stop) for stop in stops if stop in whole[n]), default=len(whole[n]))
        hidden = re.sub("|".join(map(re.escape, special)), lambda found: "\0" * len(found[0]), whole[n])
        text = hidden[:at].replace("\0", "")
        out = run(model, PROBLEMS[problem], stop=stops, **options)[0]
        assert (out.text, len(out.tokens)) == (text, n)
        assert out.finish_reason == ("stop" if any(stop in whole[n] for stop in stops) else "length")
        same([[e.generation for e in stream(model, PROBLEMS[problem], stop=stops, **options)][-1]], [out])


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


def test_closing_a_stream_frees_it_and_leaves_the_model_usable(model):
    expected = run(model, PROBLEMS[:3])
    before = signal.getsignal(signal.SIGINT)
    events = stream(model, PROBLEMS[:3], make("skipkv"), n=2, max_new_tokens=2000)
    work = weakref.ref(events.gi_frame.f_locals["self"])
    for _ in range(31):
        next(events)
    assert work() is not None and signal.getsignal(signal.SIGINT) == before
    events.close()
    del events
    gc.collect()
    assert work() is None and signal.getsignal(signal.SIGINT) == before
    same(run(model, PROBLEMS[:3]), expected)


def failing(at, what):
    """A custom score of the oldest first; at its call number `at` it does something else."""
    calls = []

    def score(c):
        calls.append(1)
        if len(calls) == at:
            return what(c)
        return -c.positions[: c.n_candidates]

    return Custom(score, budget=48, interval=32)


def interrupting(times, at=16):
    """Sends Ctrl-C to this process, `times` times."""

    def send(c):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return -c.positions[: c.n_candidates]

    return failing(at, send)


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


def test_an_interrupt_right_behind_the_last_text_has_them_all(model, monkeypatch):
    def leave(self, *error, original=Interrupt.__exit__):
        original(self, *error)
        signal.raise_signal(signal.SIGINT)

    whole = run(model, PROBLEMS[:2])
    monkeypatch.setattr(Interrupt, "__exit__", leave)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(model, PROBLEMS[:2])
    same(caught.value.outputs, whole)


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
def test_between_two_events_an_interrupt_is_the_callers(model, own_handler, order):
    handler, noted = own_handler
    free = [run(model, PROBLEMS[i])[0] for i in range(3)]
    streams = [stream(model, PROBLEMS[i]) for i in range(3)]
    for s in streams:
        next(s)
        assert signal.getsignal(signal.SIGINT) is handler
        signal.raise_signal(signal.SIGINT)
    same([[e.generation for e in streams[i]][-1] for i in order], [free[i] for i in order])
    assert noted == [1, 1, 1] and signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for _ in stream(model, PROBLEMS[0]):
            signal.raise_signal(signal.SIGINT)


def test_what_holds_the_signal_around_a_stream_ends_it(model, own_handler):
    """As the command line does, which prints between two events."""
    events = []
    with Interrupt() as interrupt:
        for event in stream(model, PROBLEMS[0], stop="never"):
            events.append(event)
            if len(events) == 9:
                signal.raise_signal(signal.SIGINT)
    assert interrupt.seen and own_handler[1] == [] and signal.getsignal(signal.SIGINT) is own_handler[0]
    last = events[-1].generation
    assert last.finish_reason == "interrupted" and last.text == model.tokenizer.decode(last.tokens)
    assert [e.token for e in events] == [*last.tokens, None] and len(last.tokens) == 9


def test_an_ignored_interrupt_stays_ignored(model, own_handler):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    outs = run(model, PROBLEMS[:2], interrupting(1), max_new_tokens=40)
    assert {out.finish_reason for out in outs} == {"length"} and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


class Boom(Exception):
    pass


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
    for way_out in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(way_out) as caught:
            run(model, PROBLEMS[:3], failing(17, raises(way_out())), rows=1)
        same(caught.value.outputs, whole[:1])
    for call in (run, lambda *args, **options: list(stream(*args, **options))):
        with refused("custom score raised StopIteration; allowed: any other exception"):
            call(model, PROBLEMS[:3], failing(17, raises(StopIteration(5))), rows=1)
    events = stream(model, PROBLEMS[:3], failing(17, raises(error)), rows=1)
    done = []
    with pytest.raises(Boom):
        for event in events:
            done += [event.generation] if event.generation else []
    same(done, whole[:1])
    same(run(model, PROBLEMS[:3], failing(0, None), rows=1), whole)


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
    [close] = model.encode("</think>")
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
