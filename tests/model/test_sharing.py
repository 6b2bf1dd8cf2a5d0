"""allocate="layer" and blends, as their users see them. Batches, replay and forks: engine/test_invariance.py."""

from collections import defaultdict

import numpy as np
import pytest
import spec
from generations import PROBLEMS, facts, make, page_bytes, recorded, run, same
from harness import SHARING, reference_name

import skipkv
from skipkv import RKV, Blend, Full, SkipKV, Trace

POOLED = 4 * 48  # slots of a layer: its heads' budgets
WINDOW = 8


@pytest.fixture(scope="module")
def shared(model):
    """{protect: a generation} of a method whose heads share, with scores: computed once."""
    known = {}

    def find(name, protect="none"):
        if (name, protect) not in known:
            method = make(name, protect=protect)
            known[name, protect] = recorded(model, method, PROBLEMS[0], trace="scores", cache="f32")[0]
        return known[name, protect]

    return find


def layers(trace):
    """{(step, layer): the compactions of its heads}."""
    found = defaultdict(list)
    for c in trace.compactions:
        found[c.step, c.layer].append(c)
    return found


@pytest.mark.parametrize("protect", ["none", "sinks:5"])
@pytest.mark.parametrize("name", SHARING)
def test_a_layer_keeps_the_best_of_all_its_heads(shared, name, protect):
    trace = shared(name, protect).trace
    newest = spec.newest_kept(reference_name(name), 48, WINDOW)
    sinks = max(5 if protect == "sinks:5" else 0, 4 if name.startswith("streaming") else 0)
    assert trace.steps == [step for step in range(49, len(trace.tokens)) if step % 32 == 1]
    for (step, layer), heads in layers(trace).items():
        assert [c.head for c in heads] == [0, 1, 2, 3] and sum(len(c.kept) for c in heads) == POOLED
        slots = [np.append(trace.held(step - 1, layer, c.head), step - 1) for c in heads]
        protected = [(s < sinks) | (np.arange(len(s)) >= len(s) - newest) for s in slots]
        scores = [np.append(c.scores["score"], np.zeros(newest, np.float32)) for c in heads]
        for c, s, mine, kept in zip(heads, slots, protected, spec.keep_layer(scores, protected, [48] * 4), strict=True):
            assert c.kept.tolist() == s[kept].tolist()
            assert set(s[mine]) <= set(c.kept) and len(c.kept) >= max(10, mine.sum())  # 10: a fifth of 48


@pytest.mark.parametrize("name", [name for name in SHARING if not name.startswith("streaming")])
def test_heads_differ_in_what_they_get(shared, name):
    """Of `streaming` they do not: all heads score alike."""
    counts = {len(c.kept) for c in shared(name).trace.compactions}
    assert min(counts) < 48 < max(counts)


@pytest.mark.parametrize("name", SHARING)
def test_the_prompt_is_protected_in_every_head(model, name):
    n_prompt = len(model.encode(PROBLEMS[0]))
    method = make(name, budget=n_prompt + 61, protect="prompt")  # h2o keeps half of it besides
    out = recorded(model, method, PROBLEMS[0])[0]
    assert out.trace.compactions and {sum(len(c.kept) for c in heads) for heads in layers(out.trace).values()} == {
        4 * (n_prompt + 61)
    }
    assert all(c.kept[:n_prompt].tolist() == list(range(n_prompt)) for c in out.trace.compactions)


@pytest.mark.parametrize("name", ["rkv:allocate=layer", "h2o:allocate=layer"])
def test_a_memory_limit_is_kept_whatever_the_heads_get(model, name):
    prompts, options = PROBLEMS[:4], {"max_new_tokens": 120, "stop_ids": (), "cache": "f32"}
    free = run(model, prompts, make(name), rows=4, **options)
    need = 4 * (POOLED + 4 * 32) // 64 * page_bytes(name, "f32")  # what the layers hold at most, were all pages full
    assert max(out.stats.pool_peak_bytes for out in free) > 3 * need
    for limit in (2 * need, 3 * need):
        outs = run(model, prompts, make(name), rows=4, memory_limit=limit, **options)
        assert [facts(a) for a in outs] == [facts(b) for b in free]
        assert max(out.stats.pool_peak_bytes for out in outs) <= max(out.stats.pool_bytes for out in outs) <= limit


def test_full_has_nothing_to_share(model):
    outs = recorded(model, Full(allocate="layer"))
    same(outs, recorded(model, Full()))
    assert str(outs[0].method) == "full:allocate=layer" and outs[0].trace.compactions == []


def test_a_string_a_trace_and_its_file_say_who_shares(model, shared, tmp_path):
    out = shared("rkv:allocate=layer")
    text = "rkv:budget=48,interval=32,tau=0.9,allocate=layer"
    same(recorded(model, text, PROBLEMS[0], trace="scores", cache="f32"), [out])
    out.trace.save(tmp_path / "t.npz")
    assert Trace.load(tmp_path / "t.npz").method == out.method == RKV(48, interval=32, tau=0.9, allocate="layer")


# ---------------------------------------------------------------------------------------------------------------------
# Blends

BLENDS = [
    (RKV, {"importance": 0.1, "redundancy": -0.9}),
    (SkipKV, {"importance": 0.1, "redundancy": -0.9, "penalty": -1}),
]


@pytest.mark.parametrize("allocate", ["head", "layer"])
@pytest.mark.parametrize("method, weights", BLENDS, ids=["rkv", "skipkv"])
def test_a_blend_of_the_same_terms_is_the_method_bit_for_bit(model, method, weights, allocate):
    parameters = {"budget": 48, "interval": 32, "tau": 0.9, "allocate": allocate}
    options = {"trace": "scores", "temperature": 0.8, "n": 2}
    same(recorded(model, Blend(**weights, **parameters), **options), recorded(model, method(**parameters), **options))


@pytest.mark.parametrize("method, weights", BLENDS, ids=["rkv", "skipkv"])
def test_select_of_a_blend_is_that_of_the_method(method, weights):
    rng = np.random.default_rng(0)
    keys, queries = rng.standard_normal((2, 90, 16)), rng.standard_normal((4, 8, 16))
    more = {"penalties": [[10, 30, 0.96]]}
    got = skipkv.select(Blend(40, **weights), keys, queries, **more)
    want = skipkv.select(method(40), keys, queries, **more)
    for name in ("kept", "score", "importance", "redundancy", "penalty"):
        assert np.array_equal(getattr(got, name), getattr(want, name)), name
