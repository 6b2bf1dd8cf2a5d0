"""Groups as padded batches would have them."""

import pytest
from generations import PROBLEMS, make, run, running, same, stream
from harness import refused

pytestmark = pytest.mark.filterwarnings("ignore:.*never compacted", "ignore:.*steered no token")


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
    allowed = "allowed: at least 9, as the first 0 positions and the 8 newest slots are protected"
    with refused(f"budget is -2 after the padding reserve; {allowed}"):  # 48 − 50 slots
        run(model, prompts, make("rkv"), padding="reserve")
    assert len(run(model, prompts, make("rkv"), padding="reserve", rows=1)) == 2
    assert len(run(model, prompts, make("rkv", budget=59), padding="reserve")) == 2
    with refused(f"budget is 8 after the padding reserve; {allowed}"):
        run(model, prompts, make("rkv", budget=58), padding="reserve")
