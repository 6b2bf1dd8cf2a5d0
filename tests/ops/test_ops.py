"""Every op of csrc/backend.h against its formula, on every backend, at sizes that fill no vector and no page evenly."""

import devices
import numpy as np
import pytest
import spec
from harness import VARIANTS
from ops.library import ADD, CLOSE, EXTEND, NONE, TERMS

pytestmark = pytest.mark.sanitize

RTOL = 1e-5  # float32 sums of a few hundred terms against float64


def close(found, wanted, scale=None):
    wanted = np.asarray(wanted, np.float64)
    scale = np.abs(wanted).max(initial=1e-30) if scale is None else scale
    np.testing.assert_allclose(found, wanted, rtol=RTOL, atol=RTOL * scale)


def same(w, found, wanted):
    """Bit for bit; on CUDA to rounding, as cuBLAS sums by the size of the batch and the compiler fuses as it likes."""
    if w.exact:
        assert (found == wanted).all()
    else:
        close(found, wanted)


def rng(*seed):
    return np.random.default_rng(list(repr(seed).encode()))


@pytest.mark.parametrize("backend", devices.params([*VARIANTS, *devices.DEVICES, *devices.EXACT]), indirect=True)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("n_in", [1, 15, 64, 515])
@pytest.mark.parametrize("n_out", [1, 31, 32, 130])
def test_linear(world, dtype, n_in, n_out):
    r, w = rng(dtype, n_in, n_out), world(tokens=100)
    weights, bias = r.normal(size=(n_out, n_in)).astype(np.float32), r.normal(size=n_out).astype(np.float32)
    stored = spec.round_bf16(weights) if dtype == "bf16" else weights
    rows = []
    for n in (1, 2, 7, 13, 97):  # more tokens than a tile, than a block
        x = r.normal(size=(n, n_in)).astype(np.float32)
        wanted = x.astype(np.float64) @ stored.T.astype(np.float64)
        scale = np.sqrt(n_in) * 4
        close(w.linear(weights, x, bias, dtype), wanted + bias, scale)
        found = w.linear(weights, x, dtype=dtype, host=True)
        close(found, wanted, scale)
        rows.append((x[0], found[0]))
    for x, found in rows:  # a token's result does not depend on its batch
        same(w, w.linear(weights, x[None], dtype=dtype, host=True)[0], found)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("n_in", [15, 516, 576, 1544])  # less than a vector for each lane; more than one turn of a warp
def test_up_to_four_rows_are_each_as_if_alone(world, dtype, n_in):
    r, w = rng(dtype, n_in), world()
    weights, x = (r.normal(size=(n, n_in)).astype(np.float32) for n in (33, 4))
    wanted = np.concatenate([w.linear(weights, row, dtype=dtype) for row in x[:, None]])
    stored = spec.round_bf16(weights) if dtype == "bf16" else weights
    close(wanted, x.astype(np.float64) @ stored.T.astype(np.float64), np.sqrt(n_in) * 4)
    for n in (2, 3, 4):
        assert (w.linear(weights, x[:n], dtype=dtype) == wanted[:n]).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("n", [1, 6, 140])  # more rows than are made at a time
def test_the_best_output_is_the_lowest_of_the_largest(world, dtype, n):
    r, w = rng(dtype, n), world()
    weights, x = r.integers(-8, 9, (1500, 3)), r.integers(-4, 5, (n, 3))  # exact, with many ties
    assert (w.best(weights, x, dtype) == (x @ weights.T).argmax(1)).all()


@pytest.mark.parametrize("logits, best", [
    ([3], 0), ([1, np.nan, 2], 2), ([np.nan, 1, 2], -1), ([1, np.inf, 2], -1), ([-np.inf, -np.inf], -1),
    ([-np.inf, np.nan, -5], 2),
])  # fmt: skip
def test_no_output_is_best_where_it_is_not_finite(world, logits, best):
    assert world().best(np.reshape(logits, (-1, 1)), [[1]]) == [best]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_embed(world, dtype):
    r, w = rng(dtype), world(hidden=37)
    table = r.normal(size=(70, 37)).astype(np.float32)
    ids = [0, 69, 31, 32, 33, 5, 5]
    w.begin([len(ids)], ids)
    stored = spec.round_bf16(table) if dtype == "bf16" else table
    x = np.zeros((len(ids), 37), np.float32)
    w.call("embed", {"f32": 0, "bf16": 1}[dtype], 70, table, x)
    assert (x == stored[ids]).all()


@pytest.mark.parametrize("dim", [1, 5, 16, 33, 64, 80, 96, 128, 576])
def test_rmsnorm_silu_and_add(world, dim):
    r, w = rng(dim), world()
    x, weight, up = (r.normal(size=(n, dim)).astype(np.float32) for n in (3, 1, 3))
    y = np.zeros_like(x)
    w.call("rmsnorm", x, weight, 1e-3, 3, dim, y)
    wide = x.astype(np.float64)
    close(y, wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-3) * weight)
    gate = x.copy() * 30  # both tails of the exponential
    w.call("silu_mul", gate, up, 3 * dim)
    wide = 30 * wide
    close(gate, wide / (1 + np.exp(-wide)) * up)
    total = x.copy()
    w.call("add", total, up, 3 * dim)
    assert (total == x + up).all()


@pytest.mark.parametrize("head_dim, heads", [(2, 3), (16, 1), (64, 8), (80, 5), (96, 7), (128, 4)])
def test_rope_turns_by_every_tokens_own_position(world, head_dim, heads):
    r, w = rng(head_dim), world(head_dim=head_dim, rows=2, tokens=64)
    w.begin([9, 4])
    w.begin([3, 1], rows=[1, 0])  # positions 4, 5, 6 of row 1 and 9 of row 0
    x = r.normal(size=(4, heads, head_dim)).astype(np.float32)
    config = {"head_dim": head_dim, "rope_type": "default", "rope_theta": 1e4}
    wanted = spec.rotate(x.astype(np.float64), np.array([4, 5, 6, 9]), spec.rope_frequencies(config))
    turned = x.copy()
    w.call("rope", turned, heads)
    # The angle is position × float32 frequency: a rounding of 6e-8 a radian.
    np.testing.assert_allclose(turned, wanted, rtol=1e-5, atol=1e-5)


def filled(w, counts, seed, layer=0):
    """Feeds every row its count in one batch; the queries, keys, values and attention of all tokens."""
    n = w.begin(counts)
    r = rng(seed)
    q, k, v = (r.normal(size=(n, h, w.dim)).astype(np.float32) for h in (w.n_kv * w.group, w.n_kv, w.n_kv))
    return q, k, v, w.attend(layer, q, k, v)


def attention(q, k, v, before):
    """Probabilities [n, heads, slots] and mixes [n, heads, dim] of n tokens after `before` slots; k, v of all slots."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    p = np.zeros((n, heads, len(k)))
    for t in range(n):
        for h in range(heads):
            seen = before + t + 1
            p[t, h, :seen] = spec.softmax(k[:seen, h // group].astype(np.float64) @ q[t, h] / np.sqrt(dim))
    return p, np.einsum("thl,lhd->thd", p, np.repeat(v, group, axis=1).astype(np.float64))


@pytest.mark.parametrize("cache", [*spec.STORES])
@pytest.mark.parametrize(
    "head_dim, n_kv, group",
    [(64, 1, 1), (80, 2, 2), (96, 1, 4), (128, 1, 5), (16, 1, 7), (2, 3, 8), (512, 1, 1), (256, 1, 2)],
)
def test_attention_append_and_sums(world, cache, head_dim, n_kv, group):
    """Prefill, a chunk over a page's edge, and single steps; rows of one slot, of a page, of one more."""
    shape = {"n_layers": 2, "n_kv": n_kv, "group": group, "head_dim": head_dim, "rows": 3, "slots": 200, "window": 5}
    stored = spec.STORES[cache]
    with_sums, alone = (world(cache=cache, needs=needs, **shape) for needs in (("sums",), ()))
    past = [[np.zeros((0, n_kv, head_dim), np.float32)] * 2 for _ in range(3)]
    sums = [np.zeros((n_kv, 0))] * 3
    for step, counts in enumerate(([1, 63, 65], [1, 1, 1], [64, 2, 40], [40, 1, 1], [1, 1, 1])):
        q, k, v, out = filled(with_sums, counts, (head_dim, step), layer=1)
        first = 0
        for row, n in enumerate(counts):
            part = slice(first, first + n)
            before = len(past[row][0])
            keys, values = (np.concatenate([past[row][i], stored(new[part])]) for i, new in enumerate((k, v)))
            p, wanted = attention(q[part], keys, values, before)
            close(out[part], wanted)
            past[row] = [keys, values]
            grown = np.pad(sums[row], ((0, 0), (0, n)))
            sums[row] = grown + p.reshape(n, n_kv, group, -1).sum(axis=(0, 2))
            for h in range(n_kv):
                found = with_sums.cache(row, 1, h)
                assert (found[0] == keys[:, h]).all() and (found[1] == values[:, h]).all()
                assert (found[2] == np.arange(len(keys))).all()
                close(found[3], sums[row][h], scale=len(keys))
            first += n
        alone.begin(counts)
        assert (alone.attend(1, q, k, v) == out).all()


@pytest.mark.parametrize("cache", ["f32", "bf16"])
def test_attention_is_the_same_whatever_the_batch_and_the_cuts_of_a_prompt(world, cache):
    """Bit for bit, over the edges of tiles, pages and runs; a group of more rows than a tile has."""
    shape = {"n_kv": 1, "group": 17, "rows": 2, "tokens": 700, "slots": 700, "cache": cache}
    q, k, v, whole = filled(world(**shape), [600], 1)
    w, first = world(**shape), 0
    for n in (1, 1, 62, 3, 445, 1, 1, 85, 1):
        one = slice(first, first + n)
        w.begin([2, n])
        out = w.attend(0, *(np.concatenate([a[:2], a[one]]) for a in (q, k, v)))
        assert (out[2:] == whole[one]).all(), one
        first += n
    assert first == len(whole)


@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_every_shape_at_a_pages_edge(world, head_dim, group):
    """Attention, what it leaves in the cache, and scores: three rows of 62, 63 and 64 slots, and two steps of each."""
    cache, weights = ("f32", "bf16")[group % 2], {"sums": 0.25, "importance": 0.5, "redundancy": -0.5}
    shape = {"n_kv": 1, "group": group, "head_dim": head_dim, "rows": 3, "slots": 70}
    w = world(cache=cache, needs=(*weights, "queries"), **shape)
    stored, sums = spec.STORES[cache], [np.zeros(0)] * 3
    past = [[np.zeros((0, heads, head_dim), np.float32) for heads in (group, 1, 1)]] * 3
    for step, counts in enumerate(([62, 63, 64], [1, 1, 1], [1, 1, 1])):
        q, k, v, out = filled(w, counts, (head_dim, group, step))
        for row, end in enumerate(np.cumsum(counts)):
            part, before = slice(end - counts[row], end), len(sums[row])
            new = q[part], stored(k[part]), stored(v[part])
            past[row] = [np.concatenate(both) for both in zip(past[row], new, strict=True)]
            p, wanted = attention(q[part], *past[row][1:], before)
            close(out[part], wanted)
            sums[row] = np.pad(sums[row], (0, counts[row])) + p.sum(axis=(0, 1))
    held = [w.cache(row, 0, 0) for row in range(3)]
    terms, score, *_ = w.evict(weights, budgets=20, newest=4, kernel=3)
    for row, (queries, keys, values) in enumerate(past):
        assert (held[row][0] == keys[:, 0]).all() and (held[row][1] == values[:, 0]).all()
        assert (held[row][2] == np.arange(len(keys))).all()
        close(held[row][3], sums[row], scale=len(keys))
        wide, candidates = keys[:, 0].astype(np.float64), len(keys) - 4
        found = [terms[row, 0, 0, TERMS.index(name)] for name in weights]
        importance = spec.importance(wide, queries[-4:].transpose(1, 0, 2).astype(np.float64), window=4, kernel=3)
        for term, values in zip(found, (held[row][3][:candidates], importance, spec.redundancy(wide)), strict=True):
            close(term[: len(values)], values)
        total = np.float32(0)
        for term, weight in zip(found, weights.values(), strict=True):
            total = total + np.float32(weight) * term[:candidates]
        assert (score[row, 0, 0, :candidates] == total).all()


@pytest.mark.parametrize("cache", [*spec.STORES])
@pytest.mark.parametrize("lengths", [[801], [801, 5, 640, 577], [1, 130]])
def test_pages_are_spread_over_threads_bit_for_bit(library, backend, lengths, cache):
    """Rows of any lengths that decode, beside one that is fed a prompt; each as if it were alone."""
    from ops.library import World

    shape = {"slots": 900, "tokens": sum(lengths) + 9, "n_kv": 3, "group": 3, "cache": cache}
    before, steps, outs = sum(lengths), [1] * (len(lengths) - 1) + [1 if len(lengths) == 1 else 9], []
    r, stored = rng(lengths), spec.STORES[cache]
    past, now = ([r.normal(size=(n, heads, 16)).astype(np.float32) for heads in (9, 3, 3)]
                 for n in (before, sum(steps)))  # fmt: skip
    for threads in (1, 2, 3, 7):
        with World(library, backend, rows=len(lengths), threads=threads, **shape) as w:
            for counts, arrays in ((lengths, past), (steps, now)):
                w.begin(counts)
                out = w.attend(0, *arrays)
            outs.append(out)
        if not w.exact:
            break  # threads are the CPU's
    assert all((out == outs[0]).all() for out in outs)
    for row, n in enumerate(lengths):
        old = slice(sum(lengths[:row]), sum(lengths[:row]) + n)
        new = slice(sum(steps[:row]), sum(steps[: row + 1]))
        keys, values = (stored(np.concatenate([past[i][old], now[i][new]])) for i in (1, 2))
        close(outs[0][new], attention(now[0][new], keys, values, n)[1])
        with World(library, backend, threads=1, **shape) as w:
            for part, arrays in ((old, past), (new, now)):
                w.begin([part.stop - part.start])
                alone = w.attend(0, *(a[part] for a in arrays))
        same(w, outs[0][new], alone)


def test_a_q8_vector_is_127ths_of_its_largest_number(world):
    """Nothing but zeros, numbers too small to divide by, the largest there are, ties, and what is not finite."""
    w = world(n_kv=1, head_dim=4, slots=9, cache="q8")
    k = np.float32([[0, 0, 0, 0], [1e-40, 0, 0, -1e-41], [3.4e38, -3.4e38, 1e38, 1], [127, 0.5, 1.5, -2.5],
                    [1, -1, 0, 0], [1, np.nan, 2, 3], [np.inf, 1, 0, 0]])[:, None]  # fmt: skip
    w.begin([len(k)])
    w.attend(0, np.zeros((len(k), 2, 4)), k, -k)
    keys, values, *_ = w.cache(0, 0, 0)
    assert (keys[:5] == spec.round_q8(k[:5, 0])).all() and (values[:5] == spec.round_q8(-k[:5, 0])).all()
    assert keys[3].tolist() == [127, 0, 2, -2] and not keys[:2].any() and np.isnan(keys[5:]).all()


def test_steering_touches_its_tokens_of_its_layer(world):
    r, w = rng(3), world(hidden=19, rows=2)
    vector, x = r.normal(size=19).astype(np.float32), r.normal(size=(5, 19)).astype(np.float32)
    alphas = [np.nan, 0.5, np.nan, 1.5, 0]
    w.begin([3, 2], alphas=alphas)
    assert (w.inplace("steer", x, 0, 1, vector) == x).all()
    wanted = x + np.nan_to_num(np.float32(alphas))[:, None] * vector
    same(w, w.inplace("steer", x, 1, 1, vector), wanted)


def test_last_takes_the_last_token_of_every_part(world):
    w = world(hidden=5, rows=3)
    w.begin([1, 4, 2])
    x, y = np.arange(35, dtype=np.float32).reshape(7, 5), np.zeros((3, 5), np.float32)
    w.call("last", x, y)
    assert (y == x[[0, 4, 6]]).all()


@pytest.mark.parametrize("hidden", [1, 16, 37])
def test_sentence_vectors_and_similarities(world, hidden):
    r, w = rng(hidden), world(hidden=hidden, rows=2)
    x = r.normal(size=(14, hidden)).astype(np.float32)
    # Row 0 closes after three tokens and again after two, row 1 in two batches; what extends is left out.
    marks = [ADD, ADD, CLOSE, EXTEND, ADD, CLOSE, ADD, NONE]
    w.begin([6, 2], marks=marks, lengths=[0, 0, 3, 0, 0, 2, 0, 0])
    vectors = np.zeros((16, w.width), np.float32)
    assert w.call("sum_sentences", x[:8].copy(), vectors) == 2
    w.begin([2, 3], marks=[ADD, CLOSE, ADD, EXTEND, CLOSE], lengths=[0, 2, 0, 0, 3])
    assert w.call("sum_sentences", x[8:13].copy(), vectors) == 4
    means = [x[[0, 1, 2]], x[[4, 5]], x[[8, 9]], x[[6, 10, 12]]]
    wanted = np.array([m.astype(np.float64).mean(axis=0) for m in means])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    close(vectors[:4, :hidden], wanted)
    assert not vectors[:4, hidden:].any()
    out = np.zeros((2, 4), np.float32)
    w.call("similarities", 2, 1, out)  # without the second vector, which is not there to be read
    products = wanted @ wanted.T
    close(out[[0, 1, 1], [0, 0, 2]], products[[2, 3, 3], [0, 0, 2]], scale=1)


PENALTIES = [(2, 5, 0.25), (9, 9, 0.5), (20, 31, 0.75), (60, 66, 0.9)]
SENTENCES = [(0, 1), (2, 5), (6, 8), (9, 9), (10, 19), (20, 31), (40, 59), (60, 66), (67, 67), (300, 310)]
WEIGHTS = {"importance": 0.25, "redundancy": -0.75, "penalty": -1}


def scored(w, weights=WEIGHTS, **options):
    """Rows of different lengths, and what an eviction gives."""
    lengths = [65, 128, 7][: w.rows]
    return lengths, filled(w, lengths, 5), w.evict(weights, **options)


def layer_inputs(w, row, lengths, q, k):
    """(keys [n_kv, L, d], queries [heads, W, d]) of a row of `filled`."""
    first = sum(lengths[:row])
    part = slice(first, first + lengths[row])
    return k[part].transpose(1, 0, 2).astype(np.float64), q[part][-w.window :].transpose(1, 0, 2).astype(np.float64)


@pytest.mark.parametrize("head_dim, group", [(16, 1), (64, 3), (80, 5), (128, 7), (6, 8), (96, 4), (256, 2), (512, 1)])
@pytest.mark.parametrize("cache", [*spec.STORES])
def test_terms_and_their_sum(world, cache, head_dim, group):
    terms = ("position", "sums", "importance", "redundancy", "penalty", "noise", "key_norm", "key_likeness")
    w = world(head_dim=head_dim, group=group, rows=3, slots=160, cache=cache, window=9, needs=(*terms, "queries"))
    weights = {name: 0.5 - 0.25 * i for i, name in enumerate(terms)}
    lengths, (q, k, v, _), found = scored(w, weights, budgets=20, newest=4, kernel=3, penalties=PENALTIES, seed=11)
    stored = spec.STORES[cache]
    for row, n in enumerate(lengths):
        keys, queries = layer_inputs(w, row, lengths, q, stored(k))
        for h in range(w.n_kv):
            of, c = slice(h * group, (h + 1) * group), max(0, n - 4)
            positions = np.arange(n)
            wanted = {
                "position": positions, "importance": spec.importance(keys[h], queries[of], window=4, kernel=3),
                "redundancy": spec.redundancy(keys[h]), "penalty": spec.penalty(positions, PENALTIES),
                "noise": [spec.noise(11, (row, 7), 0, h, p) for p in positions], "key_norm": spec.key_norm(keys[h]),
                "key_likeness": spec.key_likeness(keys[h]),
            }  # fmt: skip
            for name, values in wanted.items():
                close(found[0][row, 0, h, terms.index(name)][: len(values)], values)
            total = np.zeros(c, np.float32)
            for i, name in enumerate(terms):
                total = total + np.float32(weights[name]) * found[0][row, 0, h, i, :c]
            assert (found[1][row, 0, h, :c] == total).all()
            assert (found[2][row, 0, h, :n] == stored(k)[sum(lengths[:row]) :][:n, h]).all()
            assert (found[3][row, 0, h].ravel()[: queries[of].size] == queries[of].astype(np.float32).ravel()).all()


def test_query_heads_count_one_by_one(world):
    w = world(group=3, needs=("importance", "queries", "query_heads"), slots=80)
    lengths, (q, k, _, _), found = scored(w, {"importance": 1}, budgets=20, newest=4, kernel=1)
    keys, queries = layer_inputs(w, 0, lengths, q, k)
    for h in range(w.n_kv):
        each = [spec.importance(keys[h], queries[[head]], window=4, kernel=1) for head in range(3 * h, 3 * h + 3)]
        close(found[1][0, 0, h, : lengths[0] - 4], np.mean(each, axis=0))


def test_shared_scores_are_the_mean_of_the_heads(world):
    w = world(n_kv=3, needs=("key_norm", "shared"), slots=80)
    lengths, (_, k, _, _), found = scored(w, {"key_norm": 1}, budgets=20, newest=4)
    mean = np.mean([spec.key_norm(k[:, h].astype(np.float64)) for h in range(3)], axis=0)[: lengths[0] - 4]
    for h in range(3):
        close(found[1][0, 0, h, : lengths[0] - 4], mean)
        assert (found[4][0, 0, h] == found[4][0, 0, 0]).all()


def test_a_weight_of_nothing_scores_nothing(world):
    """What float32 rounds to 0 is a weight still: the score is 0, not what stood in the workspace before."""
    w = world(needs=("key_norm",), slots=80)
    filled(w, [50], 9)
    assert w.evict({"key_norm": 1}, 60, 4)[1][0, 0, :, :46].all()
    assert not w.evict({"key_norm": 1e-60}, 60, 4)[1].any()


@pytest.mark.parametrize("allocate", ["head", "layer"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize("cache", ["bf16", "q8"])
def test_select_and_compact(world, backend, allocate, ties, first, cache):
    """Any scores, ties among them: what stays is the specification's, and moves as it is, sums and all."""
    needs = ("sums", *(["by_layer"] if allocate == "layer" else []))
    w = world(n_layers=2, n_kv=3, rows=3, slots=160, needs=needs, cache=cache)
    budgets, newest = np.array([[20, 30, 12], [70, 70, 70]]), np.array([[3, 4, 0], [5, 0, 7]])
    if allocate == "head":
        budgets[1] = (140, 70, 14)  # above what some rows hold
    lengths = [64, 129, 1]
    q, k, v, _ = filled(w, lengths, 8)
    w.attend(1, q[::-1], k[::-1], v[::-1])
    r = rng(allocate, ties, first)
    put = r.choice([0.0, -0.0, 1.0], (3, 2, 3, 160)) if ties else r.normal(size=(3, 2, 3, 160))
    before = {key: w.cache(*key) for key in np.ndindex(3, 2, 3)}
    found = w.evict({"sums": 1}, budgets, newest, first=first, put=put, sentences=SENTENCES)
    alive = np.zeros((3, len(SENTENCES)), bool)
    for row, n in enumerate(lengths):
        for layer in range(2):
            scores, protected = [], []
            for h in range(3):
                mine = (np.arange(n) < first) | (np.arange(n) >= n - newest[layer, h])
                protected.append(mine)
                scores.append(np.where(mine, 0, put[row, layer, h, :n]))
            if allocate == "layer":
                kept = spec.keep_layer(scores, protected, budgets[layer])
            else:
                kept = [spec.keep_highest(*two, b) for *two, b in zip(scores, protected, budgets[layer], strict=True)]
            for h in range(3):
                key = (row, layer, h)
                assert (found[4][key][: found[5][key]] == kept[h]).all(), key
                for old, new in zip(before[key], w.cache(*key), strict=True):
                    assert (old[kept[h]] == new).all(), key
                for i, (a, b) in enumerate(SENTENCES):
                    alive[row, i] |= bool(((kept[h] >= a) & (kept[h] <= b)).any())
    assert (found[6].astype(bool) == alive).all()


@pytest.mark.parametrize("cache", ["f32", "q8"])
def test_order_of_score_and_a_second_compaction(world, cache):
    """compat score-order: candidates from the best down, the newest behind them; penalties still find their slots."""
    w = world(needs=("penalty",), slots=80, cache=cache)
    _, k, v, _ = filled(w, [67], 3)
    put = rng(4).permutation(160).reshape(1, 1, 2, 80) / 7.0
    found = w.evict({"penalty": 1}, 20, 4, put=put, compat=4)
    orders = [np.concatenate([np.argsort(-put[0, 0, h, :63])[:16], np.arange(63, 67)]) for h in range(2)]
    for h, order in enumerate(orders):
        assert (w.cache(0, 0, h)[2] == order).all() and (found[4][0, 0, h, :20] == order).all()
        for found_there, all_of in zip(w.cache(0, 0, h), (k, v), strict=False):
            assert (found_there == spec.STORES[cache](all_of[order, h])).all()
    again = w.evict({"penalty": 1}, 20, 4, penalties=PENALTIES, compat=4)
    for h, order in enumerate(orders):
        close(again[0][0, 0, h, 4, :20], spec.penalty(order, PENALTIES))


def test_virtual_sets_stay_where_they_are(world):
    w = world(needs=("key_norm",), slots=80)
    _, k, _, _ = filled(w, [50], 6)
    held = np.array([0, 3, 4, 10, 11, 12, 20])
    slots = np.concatenate([held, np.arange(30, 50)])  # all from 30 on are held too
    before = w.cache(0, 0, 1)
    found = w.evict({"key_norm": 1}, 9, 4, held=held, end=30)
    for h in range(2):
        norms = spec.key_norm(k[slots, h].astype(np.float64))
        close(found[0][0, 0, h, 6, : len(slots)], norms)
        kept = spec.keep_highest(norms, np.arange(len(slots)) >= len(slots) - 4, 9)
        assert (found[7][0, 0, h, :9] == slots[kept]).all()
    assert all((old == new).all() for old, new in zip(before, w.cache(0, 0, 1), strict=True))
