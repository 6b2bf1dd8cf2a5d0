"""§1 of the specification on a small random model: schedule, compaction, steering, replay."""

import numpy as np
import pytest
from harness import ID, OPEN, TEXTS, build, sentences_text

import spec
from spec import Cache, Method, Row, Steering

WEIGHTS = {"importance": 0.1, "key_norm": -0.01, "noise": 0.02}
EVICTING = [m for m in spec.METHODS if m != "full"]
DECODER = build("qwen3", qkv_bias=True)[1]
WORD, BLANK, WAIT = ID[" a"], ID[".\n\n"], ID[" Wait"]
VECTOR = np.linspace(-1, 1, 32)


def method_of(name, **parameters):
    return Method(name, weights=WEIGHTS if name == "blend" else None, **parameters)


def run(tokens, n_prompt, method=None, steering=None, **row):
    return spec.replay(DECODER, tokens, n_prompt, method, steering, **({"texts": TEXTS} | row))


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("store", [*spec.STORES])
def test_compaction_equals_masking(name, store):
    tokens = sentences_text(100, 1)
    method = method_of(name, budget=24, interval=16, sinks=3, tau=0.9)
    got, row = run(tokens, 30, method, sequence=(4, 2), seed=9, store=store)
    # the prompt of 30 is at least the budget; then t ≡ 1 (mod 16), both layers, both heads
    assert [(c.step, c.layer, c.head) for c in row.trace] == [
        (t, layer, head) for t in (30, 33, 49, 65, 81, 97) for layer in range(2) for head in range(2)
    ]
    assert all(len(c.kept) == 24 for c in row.trace) and row.peak == 24 + 16  # after t = 33 the rows grow by Δ
    if name not in ("streaming", "h2o-last", "tova"):  # heads of one layer keep different positions
        assert not np.array_equal(row.trace[0].kept, row.trace[1].kept)
    if name == "skipkv":
        assert (row.flags > 0).any() and any(c.penalty.any() for c in row.trace)
    visible = spec.visibility(row.trace, 2, 2, len(tokens))
    want = DECODER.logits(tokens, visible=visible, store=store)
    # with bf16 a key on a rounding boundary may fall either way when float64 differs in its last bit
    np.testing.assert_allclose(got, want, atol=1e-10 if store == "f32" else 1e-2)
    assert np.abs(got - DECODER.logits(tokens, store=store)).max() > 1e-3  # eviction does change the logits


@pytest.mark.parametrize("name", ["h2o", "skipkv"])
def test_chunks_steps_and_replay_agree(name):
    tokens = sentences_text(90, 1)
    method = method_of(name, budget=20, interval=16, tau=0.9)
    steering = Steering(VECTOR, layer=1, scope="all")
    whole, row = run(tokens, 30, method, steering)
    single = Row(DECODER, method, steering, TEXTS)
    parts = [single.prefill(tokens[:30], chunk=7), *(single.feed([token]) for token in tokens[30:])]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-10)
    assert len(row.trace) == len(single.trace) > 0
    for a, b in zip(row.trace, single.trace, strict=True):
        np.testing.assert_array_equal(a.kept, b.kept)
    assert row.alphas == single.alphas and len(row.alphas) > 0


def test_prompt_below_the_budget_waits_for_the_grid():
    row = run(sentences_text(70, 1), 20, Method("rkv", budget=30, interval=16))[1]
    assert sorted({c.step for c in row.trace}) == [33, 49, 65]  # not 17: that is prompt; L = 33 >= 30 at t = 33
    row = run(sentences_text(70, 1), 20, Method("rkv", budget=34, interval=16))[1]
    assert sorted({c.step for c in row.trace}) == [49, 65]


def test_a_full_row_of_exactly_the_budget_is_considered():
    row = run(sentences_text(40, 1), 20, Method("rkv", budget=33, interval=16))[1]
    assert {c.step for c in row.trace} == {33}
    assert all(np.array_equal(c.kept, np.arange(33)) for c in row.trace)


@pytest.mark.parametrize("name", EVICTING)
def test_rows_hand_their_parameters_to_select(name):
    """The first compaction of a row is what `select` says of a cache filled without it, all parameters unusual."""
    prompt = sentences_text(60, 1)
    parameters = {"window": 5, "mix": 0.7, "kernel": 3, "sinks": 6, "protect": "prompt" if name == "rkv" else "sinks:2"}
    budget, n_prompt = 32, 20
    method = method_of(name, budget=budget, interval=59, tau=0.9, **parameters)  # so at t = 60, the end
    row = run(prompt, n_prompt, method, seed=11, sequence=(4, 2))[1]
    cache = Cache(DECODER.config, ring=12)
    DECODER.forward(cache, prompt)
    assert [(c.step, c.layer, c.head) for c in row.trace] == [(60, layer, head) for layer in (0, 1) for head in (0, 1)]
    for c in row.trace:
        want = spec.select(
            name, cache.keys[c.layer], cache.queries[c.layer], penalties=row.penalties(), budget=budget,
            prompt=n_prompt, seed=11, sequence=(4, 2), layer=c.layer, sums=cache.sums[c.layer],
            weights=method.weights, **parameters,
        )  # fmt: skip
        np.testing.assert_array_equal(c.kept, want.kept[c.head])
        np.testing.assert_allclose(c.score, want.score[c.head], rtol=1e-9)


def test_virtual_sets_leave_the_logits_alone():
    tokens = sentences_text(80, 1)
    method = {"budget": 24, "interval": 16, "evict": False}
    got, row = run(tokens, 30, Method("snapkv", **method))
    np.testing.assert_allclose(got, DECODER.logits(tokens), atol=1e-10)
    for before, after in zip(row.trace, row.trace[4:], strict=False):
        fresh = np.arange(before.step, after.step)
        np.testing.assert_array_equal(after.positions, np.concatenate([before.kept, fresh]))


def test_budget_per_head():
    row = run(sentences_text(60, 1), 30, Method("rkv", budget=[[16, 40], [20, 24]], interval=16))[1]
    held = [[len(row.cache.keys[layer][h]) for h in range(2)] for layer in range(2)]
    assert held == [[16 + 11, 40 + 11], [20 + 11, 24 + 11]]  # the last grid point is t = 49
    assert [(c.step, c.head) for c in row.trace if c.layer == 0] == [(30, 0), (33, 0), (49, 0), (49, 1)]


@pytest.mark.parametrize("name", ["rkv", "skipkv", "h2o", "keydiff", "blend"])
def test_a_layers_heads_share_a_budget(name):
    """Due when the heads together hold P slots: here at the prompt's end, then on the grid; never more than P after."""
    method = method_of(name, budget=[[16, 24], [20, 20]], interval=16, tau=0.9, allocate="layer")
    tokens = sentences_text(100, 1)
    got, row = run(tokens, 30, method)
    steps = [(c.step, c.layer, c.head) for c in row.trace]
    assert steps == [(t, layer, head) for t in (30, 33, 49, 65, 81, 97) for layer in range(2) for head in range(2)]
    held = np.array([len(c.kept) for c in row.trace]).reshape(-1, 2)
    assert (held.sum(1) == 40).all() and (held.min(0) >= 8).all() and (held != held[0]).any()
    want = DECODER.logits(tokens, visible=spec.visibility(row.trace, 2, 2, 100))
    np.testing.assert_allclose(got, want, atol=1e-10)


def test_h2o_sums_are_attention_columns():
    tokens = sentences_text(12, 1)
    cache = Cache(DECODER.config)
    DECODER.forward(cache, tokens)
    for layer in cache.sums:
        for sums in layer:
            assert sums.sum() == pytest.approx(2 * 12)  # each of 12 queries of 2 heads gives away 1
            assert sums[0] > 2  # the first token sees only itself, and others see it too


def test_steering_adds_before_the_block_at_that_token_only():
    tokens = [WORD, WAIT, WORD, BLANK, WORD, WORD, BLANK, WORD]  # blank lines at 3 and 6
    tokens[0] = OPEN
    got, row = run(tokens, 4, None, Steering(VECTOR, layer=1, alpha=1.0, gamma=0.1, scope="all"))
    assert row.alphas == {3: 1.1, 6: 1.1} and row.thoughts() == 1
    add = np.zeros((8, 32))
    add[[3, 6]] = 1.1 * VECTOR
    np.testing.assert_allclose(got, DECODER.forward(Cache(DECODER.config), tokens, steer=(1, add)), atol=1e-10)
    assert run(tokens, 4, None, Steering(VECTOR, layer=1, scope="generation"))[1].alphas == {6: 1.02}
    plain = DECODER.logits(tokens)
    np.testing.assert_allclose(got[:3], plain[:3], atol=1e-10)
    assert np.abs(got[3:] - plain[3:]).max(axis=1).min() > 1e-3


def test_generate_is_greedy_and_does_not_feed_the_last_token():
    prompt = sentences_text(20, 1)
    new, row = spec.generate(DECODER, prompt, 6)
    full = DECODER.logits(prompt + new)
    assert new == [int(np.argmax(full[19 + i])) for i in range(6)] and len(row.ids) == 25
    assert spec.generate(DECODER, prompt, 6, stop={new[2]})[0] == new[: new.index(new[2]) + 1]


def test_a_budget_below_the_protected_slots_is_refused_at_once():
    with pytest.raises(ValueError, match="budget is 30, but 8 newest and 25 first slots"):
        Row(DECODER, Method("rkv", budget=30, protect="prompt")).prefill(sentences_text(25, 1))
    with pytest.raises(ValueError, match="budget is 8"):
        Row(DECODER, Method("random", budget=8)).prefill(sentences_text(5, 1))
    with pytest.raises(ValueError, match="needs a budget"):
        Row(DECODER, Method("rkv"))
