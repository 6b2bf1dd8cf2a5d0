"""The problems of the model in the box: grading, intervals, one row of the table."""

import pytest

import skipkv
from skipkv.demo import evaluate, grade, wilson
from skipkv.tiny.problems import draw


@pytest.mark.parametrize(
    "text, right",
    [("so \\boxed{3}", True), ("\\boxed{3} no, \\boxed{4}", False), ("\\boxed{ 3 }", True), ("3", False), ("", False)],
)
def test_the_last_box_counts(text, right):
    assert grade(text, "3") is right


def test_intervals():
    # Wilson's interval by hand: 8 of 10 is 0.4902 to 0.9433.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0) and wilson(10, 10)[1] == pytest.approx(1)


def test_one_row_of_the_table():
    model = skipkv.load("tiny", progress=False)
    problems = draw(3)
    problems[2] = problems[2] | {"answer": "none"}
    outcome, outs = evaluate(model, problems, skipkv.RKV(budget=200, protect="prompt"), progress=False)
    assert outcome.n == 3 and outcome.right == sum(
        f"\\boxed{{{p['answer']}}}" in o.text for o, p in zip(outs, problems, strict=True)
    )
    assert outcome.right < 3
    assert outcome.length == sum(len(o.prompt_tokens) + len(o.tokens) for o in outs) / 3
    assert outcome.peak_bytes == sum(o.stats.peak_bytes for o in outs) / 3
    assert outcome.run == "rkv:protect=prompt,budget=200" and outcome.steered == 0
