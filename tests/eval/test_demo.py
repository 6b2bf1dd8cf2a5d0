"""The demo: grading, intervals, the rows of the table, the report, the command line."""

import json
import re
import webbrowser
from dataclasses import fields

import pytest

import skipkv
from skipkv.cli import main
from skipkv.commands.demo import _shares
from skipkv.eval import Item, Outcome, evaluate, grade, tiny, wilson
from skipkv.tiny.problems import Level, draw


@pytest.mark.parametrize(
    "text, right",
    [("so \\boxed{3}", True), ("\\boxed{3} no, \\boxed{4}", False), ("\\boxed{ 3 }", True), ("3", False), ("", False)],
)
def test_the_last_box_counts(text, right):
    assert grade("boxed", text, "3").correct is right


def test_intervals():
    # Wilson's interval by hand: 8 of 10 is 0.4902 to 0.9433.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0) and wilson(10, 10)[1] == pytest.approx(1)


def outcome_of(model, problems, method, **options):
    items = [Item(str(i), p["prompt"], p["answer"]) for i, p in enumerate(problems)]
    results = evaluate("tiny", model, method, data=items, progress=False, **options)
    return Outcome.of(results.records, method, None), results.records


def test_one_row_of_the_table(model):
    problems = draw(3)
    problems[2] = problems[2] | {"answer": "none"}
    outcome, outs = outcome_of(model, problems, skipkv.RKV(budget=200, protect="prompt"), max_new_tokens=4096)
    assert outcome.n == 3 and outcome.right == sum(
        f"\\boxed{{{p['answer']}}}" in o.text for o, p in zip(outs, problems, strict=True)
    )
    assert outcome.right < 3
    assert outcome.length == sum(len(o.prompt_tokens) + len(o.tokens) for o in outs) / 3
    assert outcome.peak_bytes == sum(o.stats["peak_bytes"] for o in outs) / 3
    assert outcome.run == "rkv:protect=prompt,budget=200" and outcome.steered == 0


SMALL = ["demo", "--problems", "3", "--steps", "2-3", "--quiet", "--threads", "1"]
ROWS = [("full", None, False), ("full", None, True)] + [
    (name, share, steered)
    for share in (0.25, 0.5)
    for names, steered in ((tiny.METHODS, False), (tiny.STEERED, True))
    for name in names
]


@pytest.fixture
def small(tmp_path, capsys):
    """The demo on three short problems: its JSON and the report's text."""

    def run(*more):
        path = tmp_path / "report.html"
        assert main([*SMALL, "--out", str(path), "--json", *more]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out), path.read_text(encoding="utf-8")

    return run


def test_the_demo_twice_gives_the_same_table_but_for_timings(small):
    found, page = small()
    again, other = small()
    assert found["problems"] == 3 and found["report"].endswith("report.html")
    assert [(r["method"], r["share"], r["steering"]) for r in found["runs"]] == ROWS
    for a, b in zip(found["runs"], again["runs"], strict=True):
        a.pop("tokens_per_second"), b.pop("tokens_per_second")
        assert a == b
    numbers = [re.findall(r"<td>(.*?)</td>", text) for text in (page, other)]
    assert len(numbers[0]) == len(numbers[1]) == 8 * len(ROWS)
    # Budgets are shares of what the full cache wrote.
    full = found["runs"][0]
    for r in found["runs"]:
        assert r["budget"] == (round(r["share"] * full["length"]) if r["share"] else None)
        assert r["n"] == 3 and r["accuracy"] == r["right"] / 3 and (r["steered"] > 0) == r["steering"]
        assert r["peak_bytes"] <= full["peak_bytes"] * 1.04  # h2o keeps sums beside its slots


def test_rows_are_what_evaluate_gives(small, model):
    problems = draw(3, level=Level(steps=(2, 3)))
    found, page = small("--budgets", "0.5", "--protect", "prompt")
    row = next(r for r in found["runs"] if r["method"] == "skipkv" and not r["steering"])
    method = skipkv.SkipKV(budget=row["budget"], interval=tiny.INTERVAL, tau=tiny.TAU, protect="prompt")
    assert row["run"] == str(method)
    outcome, _ = outcome_of(model, problems, method, max_new_tokens=4096)
    for field in fields(outcome):
        if field.name not in ("method", "steering", "tokens_per_second"):
            assert getattr(outcome, field.name) == row[field.name]
    assert problems[0]["prompt"].split(".")[0].split("|>")[1] in page and "tau=0.8, protect=prompt" in page


def test_eval_gives_the_rows_of_the_demo(model):
    steering = skipkv.Steering.load("tiny", alpha=tiny.ALPHA)
    runs = list(tiny.demo(model, draw(2), (0.5,), steering, progress=False))
    full, method, steer = "full:tau=0.8", "skipkv:budget=50%,interval=32,tau=0.8", "+steer:tiny,alpha=0.75"
    methods = [full, full + steer, method, method + steer]
    results = evaluate("tiny", model, methods, limit=2, progress=False)
    rows = [row for row in runs if row.method.name in ("full", "skipkv")]
    assert [r.tokens for r in results.records] == [r.tokens for row in rows for r in row.texts]
    assert [r.correct for r in results.records] == [r.correct for row in rows for r in row.texts]


def test_the_table_for_people(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    path = tmp_path / "my report.html"
    assert main([*SMALL, "--budgets", "0.5", "--brief", "--open", "-o", str(path)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "3 held-out problems, the same prompts for every run" and lines[2] == tiny.table().head
    rows = [line for line in lines if re.match(r"[a-z0-9]+( \+ steering)? +(\d+ \(50 %\) +)?\d+\.\d \(", line)]
    assert len(rows) == 2 + len(tiny.METHODS) + len(tiny.STEERED)
    assert f"report: {path} (" in lines[-1] and "not a benchmark result" in out
    assert opened == [path.as_uri()] and path.exists() and err == ""


def test_side_by_side_shows_a_problem_that_tells_them_apart(model):
    problems = draw(6)
    runs = list(tiny.demo(model, problems, (0.25,), progress=False))
    problem, a, b = tiny.side_by_side(model, runs)
    texts = {run.method.name: run.texts for run in runs}
    right = {
        n: [grade("boxed", o.text, p["answer"]).correct for o, p in zip(texts[n], problems, strict=True)]
        for n in ("rkv", "skipkv")
    }
    apart = [i for i in range(6) if right["skipkv"][i] and not right["rkv"][i]]
    assert problem == (apart[0] if apart else 0)
    full = texts["full"][problem]
    assert a.tokens == b.tokens == full.prompt_tokens + full.tokens
    assert (a.method.name, b.method.name) == ("rkv", "skipkv")


@pytest.mark.parametrize("argv, message", [
    (["--problems", "0"], "problems is 0; allowed: integers from 1"),
    (["--budgets", "0.5,2"], "budgets is '0.5,2'; allowed: shares above 0, up to 1, separated by commas"),
    (["--budgets", "half"], "budgets is 'half'; allowed: shares above 0, up to 1, separated by commas"),
    (["--steps", "8-4"], "steps is '8-4'; allowed: fewest-most from 1 to 31"),
    (["--steps", "4-99"], "steps is '4-99'; allowed: fewest-most from 1 to 31"),
    (["--protect", "all"], "protect is 'all'; allowed: none, prompt, sinks:N"),
    (["--tau", "7"], "tau is 7; allowed: numbers from -1 to 2"),
    (["--steering", "nowhere.safetensors"], "nowhere.safetensors: expected a file, found nothing"),
    (["--out", "nowhere/report.html"], "out is 'nowhere/report.html'; there is no directory 'nowhere'"),
])  # fmt: skip
def test_refusals_before_anything_runs(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(tiny, "Evaluation", lambda *_, **__: pytest.fail("it ran"))
    assert main(["demo", *argv, "--quiet"]) == 2
    assert f"skipkv: {message}" in capsys.readouterr().err


def test_a_budget_too_small_is_refused_before_the_table_begins(capsys):
    assert main([*SMALL, "--budgets", "0.5,0.15", "--protect", "prompt"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("skipkv: budget is ") and " protected" in err
    assert out.splitlines()[-1] == tiny.table().head  # no row was lost


def test_no_problems_are_refused(model):
    for run in (lambda: evaluate("tiny", model, "full", data=[]), lambda: list(tiny.demo(model, [], progress=False))):
        with pytest.raises(skipkv.ConfigError, match="data holds no items; allowed: a file, or at least one Item"):
            run()


def test_a_budget_given_twice_runs_once():
    assert _shares("0.5,0.25,0.50") == [0.5, 0.25]


def test_ctrl_c_ends_the_demo(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "Evaluation", stop)
    assert main([*SMALL, "-o", str(tmp_path / "report.html")]) == 130
    assert not (tmp_path / "report.html").exists()
