"""Log-likelihoods of many continuations at once are those of a replay of each."""

import numpy as np
import pytest

import skipkv
from skipkv.eval import likelihood
from skipkv.eval.likelihood import likelihoods

METHODS = ["full", "streaming:budget=64", "h2o:budget=64,interval=16", "skipkv:budget=64,interval=16,tau=0.8",
           "random:budget=64,interval=16"]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(model):
    """Continuations of few contexts, in no order: of one token and of many, also the model's own."""
    draw = np.random.default_rng(3)
    text = model.encode("<s><|user|> Dot = 9. Leo = Dot + plums. plums = 4.Find Leo.<|assistant|><think>\n")
    text += model.generate([text], progress=False)[0].tokens
    cuts = [1, 40, 41, 90, len(text) - 2]
    found = [(text[:cut], text[cut : cut + n]) for cut in cuts for n in (1, 2, 40)]
    contexts = [text[:40], text[:90], *(draw.integers(0, model.config.vocab, n).tolist() for n in (1, 130, 600))]
    for _ in range(24):
        n = draw.choice([1, 3, 90])
        found.append((contexts[draw.integers(5)], draw.integers(0, model.config.vocab, n).tolist()))
    found += [found[4], (contexts[2], text[:300])]
    return [found[i] for i in draw.permutation(len(found))]


@pytest.fixture(scope="module", params=METHODS)
def expected(request, model, pairs):
    steering = skipkv.Steering.load("tiny", alpha=1, scope="all") if "skipkv" in request.param else None
    results = []
    for context, text in pairs:
        ids, first = context + text, len(context) - 1
        replay = model.replay(ids, request.param, steering, n_prompt=len(context), logits=True)
        best = replay.logits[first:-1].argmax(1)
        results.append((replay.logprobs[first:].sum(), best.tolist() == text))
    assert {greedy for _, greedy in results} == {True, False}
    return skipkv.parse_method(request.param), steering, results


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_as_replayed_one_by_one(model, pairs, expected, rows):
    method, steering, want = expected
    got = dict(likelihoods(model, pairs, method, steering, rows=rows))
    assert sorted(got) == list(range(len(pairs)))
    for i, (logprob, greedy) in enumerate(want):
        assert got[i] == (pytest.approx(logprob, abs=1e-9), greedy), f"pair {i}"


def test_as_little_memory_as_the_longest_needs(model, pairs, expected):
    method, steering, want = expected
    longest = max((len(context) + len(text) - 1, len(context)) for context, text in pairs)
    limit = model._session(method, "bf16").row_bytes(*longest)
    got = dict(likelihoods(model, pairs, method, steering, memory_limit=limit))
    assert [got[i] for i in range(len(pairs))] == [(pytest.approx(logprob, abs=1e-9), same) for logprob, same in want]
    with pytest.raises(skipkv.CapacityError, match="memory_limit"):
        dict(likelihoods(model, pairs, method, steering, memory_limit=limit // 2))


def test_a_shared_context_is_prefilled_once(model, pairs, monkeypatch):
    context, texts, fed = pairs[0][0], [[5], [6], [5, 6], [7, 8, 9]], []
    feed = likelihood._feed
    monkeypatch.setattr(likelihood, "_feed", lambda *args, **more: fed.extend(args[2].values()) or feed(*args, **more))
    assert len(dict(likelihoods(model, [(context, text) for text in texts], skipkv.Full()))) == 4
    assert fed[0] == tuple(context) and sorted(fed[1:]) == [[5], [7, 8]]
