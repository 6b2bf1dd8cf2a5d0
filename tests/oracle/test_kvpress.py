"""knorm, keydiff and tova, specification and engine, against kvpress's own classes (0.5.5), to the last kept slot."""

import numpy as np
import pytest
import spec

import skipkv

torch = pytest.importorskip("torch")
kvpress = pytest.importorskip("kvpress", reason="needs kvpress: pip install --no-deps kvpress cachetools datasets fire")

pytestmark = pytest.mark.oracle

SHAPES = [(1, 1, 40, 16), (2, 3, 150, 64), (3, 2, 400, 32), (2, 7, 90, 128)]  # KV heads, query heads of each, L, d


def layer(shape, seed=0):
    """keys [n_kv, L, d], a third of them near-copies; the last query of every head [n_heads, 1, d]."""
    n_kv, group, n_slots, d = shape
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(n_kv, n_slots, d)) + rng.normal(size=(n_kv, 1, d))
    keys[:, 1::3] = keys[:, :1] + 0.1 * rng.normal(size=keys[:, 1::3].shape)
    return keys.astype(np.float32), rng.normal(size=(n_kv * group, 1, d)).astype(np.float32)


def kept_by(scores, budget, newest):
    """What a press keeps of [n_kv, L] scores, the newest slots beside: kvpress leaves the window to another press."""
    scores[:, scores.shape[1] - newest :] = torch.inf
    return scores.topk(budget, -1).indices.sort(-1).values.numpy()


def pressed(press, keys, **more):
    return press.score(None, None, torch.from_numpy(keys)[None], None, more.pop("attentions", None), more)[0].clone()


@pytest.mark.parametrize("name, press", [("knorm", "KnormPress"), ("keydiff", "KeyDiffPress")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_of_the_keys_alone(name, press, shape):
    keys, queries = layer(shape)
    scores = pressed(getattr(kvpress, press)(), keys)
    for budget in (12, shape[2] // 2, shape[2] - 1):
        for select in (spec.select, skipkv.select):
            got = select(name, keys, queries, budget=budget)
            np.testing.assert_allclose(got.score, scores[:, :-8], rtol=2e-5, atol=2e-6)  # float32 sums over 400 keys
            np.testing.assert_array_equal(got.kept, kept_by(scores.clone(), budget, 8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tova(shape):
    """There the newest token takes part in the softmax, here it is no candidate: so it gets no attention in these."""
    n_kv, group, n_slots, d = shape
    keys, queries = layer(shape)
    heads = queries.reshape(n_kv, group, d).astype(np.float64)
    keys[:, -1] = [-500 * np.linalg.pinv(head).sum(1) for head in heads]  # q·k = -500 for every query of the group
    repeated = np.repeat(keys, group, 0)
    attentions = torch.softmax(torch.from_numpy(queries) @ torch.from_numpy(repeated).mT / d**0.5, -1)
    assert attentions[..., -1].max() < 1e-12
    scores = pressed(kvpress.TOVAPress(), keys, attentions=attentions[None])
    for budget in (12, n_slots // 2, n_slots - 1):
        for select in (spec.select, skipkv.select):
            got = select("tova", keys, queries, budget=budget)
            np.testing.assert_allclose(np.broadcast_to(got.score, (n_kv, n_slots - 1)), scores[:, :-1], rtol=2e-5,
                                       atol=1e-9)  # fmt: skip
            np.testing.assert_array_equal(got.kept, kept_by(scores.clone(), budget, 1))
