"""Sequences that are not admitted: the others are as if they had run. And a context shorter than the model's."""

import pytest
from generations import PROBLEMS, facts, make, run, stream

from skipkv import ConfigError

MANY = PROBLEMS[:5]


def refusing(refused, asked):
    def admit(prompt, sample):
        assert (prompt, sample) not in asked
        asked.append((prompt, sample))
        return (prompt, sample) not in refused

    return admit


@pytest.mark.parametrize("refused", [
    [(0, 0)], [(0, 2), (1, 1)], [(3, s) for s in range(3)], [(4, 2)], [(p, s) for p in range(5) for s in (0, 1)],
    [(p, s) for p in range(5) for s in range(3)],
])  # fmt: skip
@pytest.mark.parametrize("options", [
    {"rows": 2}, {"rows": 4, "grouping": True, "padding": "reserve"}, {"rows": 1, "padding": "reserve"},
])  # fmt: skip
def test_the_others_are_what_they_are_without_it(model, refused, options):
    method, asked = make("random", budget=64, interval=16), []
    settings = {"n": 3, "temperature": 1.0, "seed": 3, "max_new_tokens": 60} | options
    all_of_them = run(model, MANY, method, **settings)
    outs = run(model, MANY, method, admit=refusing(refused, asked), **settings)
    assert sorted(asked) == [(p, s) for p in range(5) for s in range(3)]
    assert [facts(o) for o in outs] == [facts(o) for o in all_of_them if (o.prompt, o.sample) not in refused]


def test_it_is_asked_right_before_the_prompt_begins(model):
    asked, ended = [], []
    for event in stream(model, MANY, rows=1, max_new_tokens=3, admit=refusing([(2, 0)], asked)):
        ended += [event.prompt] if event.generation else []
        assert asked[-1] == (event.prompt, 0)
    assert ended == [0, 1, 3, 4]


def test_what_is_no_function_is_refused(model):
    with pytest.raises(ConfigError, match="admit is 3; allowed: a function"):
        run(model, MANY, admit=3)


def test_a_context_counts_the_prompt(model):
    n = len(model.encode(MANY[0]))
    [full] = run(model, MANY[0], max_new_tokens=9)
    [out] = run(model, MANY[0], max_new_tokens=9, context=n + 4)
    assert out.tokens == full.tokens[:4] and out.finish_reason == "context"
    [out] = run(model, MANY[0], max_new_tokens=4, context=n + 4)
    assert out.tokens == full.tokens[:4] and out.finish_reason == "length"
    with pytest.raises(ConfigError, match=rf"prompt 0 has {n} tokens; allowed: up to {n - 1}"):
        run(model, MANY[0], context=n)
