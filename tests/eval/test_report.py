"""Reports of hand-made stores, end to end: files, numbers, kept tokens, refusals."""

import argparse
import csv
import json
import re
from dataclasses import replace

import pytest
from stored import RECORDS, RUNS, Memory

from skipkv import ConfigError, viz
from skipkv.commands import eval_report
from skipkv.eval import grade
from skipkv.eval.records import Grade, Record
from skipkv.eval.summary import summarise
from skipkv.tiny.problems import Level, draw


def report(tmp_path, *more, store=None):
    parser = argparse.ArgumentParser()
    eval_report.add(parser)
    args = parser.parse_args([str(tmp_path), "--quiet", *more])
    assert eval_report.run(args, store or Memory()) == 0
    return tmp_path / "report"


def test_a_report_without_a_model(tmp_path, capsys):
    folder = report(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "accuracy.svg", "length.svg", "report.html", "results.csv", "table.md",
    ]  # fmt: skip
    out = capsys.readouterr().out
    summary = summarise(RECORDS, RUNS)
    assert str(summary.table()) in out and str(summary.behaviour()) in out and f"report: {folder}" in out
    markdown = (folder / "table.md").read_text(encoding="utf-8")
    assert summary.table().markdown() in markdown and "    again r\n" in markdown
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["f", "r", "s"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    for part in (
        summary.table()._repr_html_(), summary.behaviour()._repr_html_(), "again r", "Accuracy against budget: sums, M",
        "Length against budget: sums, M", "Left out: without --model", "&quot;temperature&quot;: 0.6",
    ):  # fmt: skip
        assert part in page
    assert "<iframe" not in page and "http://" not in re.sub(r'"http://www.w3.org/[^"]*"', "", page)
    for name in ("accuracy", "length"):
        picture = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert "bars and bands: 95 % intervals" in picture and ">skipkv + steering</text>" in picture


def test_curves_of_summaries_have_their_intervals():
    summary = summarise(RECORDS, RUNS)
    for name, factor in (("accuracy", 100), ("length", 1), ("peak_bytes", 1e-6)):
        axes = viz.curve(summary.rows, name).figure.axes[0]
        for row in summary.rows[1:]:
            label = "rkv" if row.run == "r" else "skipkv + steering"
            line = next(line for line in axes.lines if line.get_label() == label)
            figure = getattr(row, name)
            assert line.get_xydata().tolist() == [[50, pytest.approx(factor * figure.value)]]
            bars = [c.lines[2][0].get_segments()[0][:, 1] for c in axes.containers if c.get_label() == f"_{label}"]
            assert all(bar == pytest.approx([factor * end for end in figure[1:]]) for bar in bars)
            assert bars or figure.low == figure.high
        full = next(line for line in axes.lines if line.get_label() == "full")
        assert full.get_ydata() == pytest.approx([factor * getattr(summary.rows[0], name).value] * 2)
    assert viz.curve(summary.rows, x="peak_bytes").figure.axes[0].get_xlabel() == "peak cache, MB"


def test_what_was_never_graded_is_drawn_without_accuracy(tmp_path):
    records = [replace(r, correct=None, grade=None) for r in RECORDS]
    folder = report(tmp_path, store=Memory(records))
    assert not (folder / "accuracy.svg").exists() and (folder / "length.svg").exists()


def test_each_comparison_has_its_own_pictures(tmp_path):
    runs = RUNS | {"o": RUNS["r"] | {"run": "o", "sampling": {"temperature": 0.0}}}
    folder = report(tmp_path, store=Memory(RECORDS + [replace(r, run="o") for r in RECORDS if r.run == "r"], runs))
    assert {"accuracy.svg", "accuracy-2.svg", "length-2.svg"} <= {path.name for path in folder.iterdir()}
    assert (folder / "report.html").read_text(encoding="utf-8").count("<section>") == 2


def test_json_for_machines(tmp_path, capsys):
    folder = report(tmp_path, "--json", "-o", str(tmp_path / "report"))
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(folder) and [row["run"] for row in found["rows"]] == ["f", "r", "s"]


@pytest.fixture(scope="module")
def real(model):
    """The model in the box on six problems under three methods."""
    problems = draw(6, level=Level(steps=(2, 3)))
    names = {"f": "full", "a": "streaming:budget=32,interval=16", "b": "skipkv:budget=64,interval=16",
             "c": "streaming:budget=64,interval=16"}  # fmt: skip
    runs = {run: {"task": "tiny", "run": run, "method": method} for run, method in names.items()}
    records = []
    for run, method in names.items():
        outs = model.generate([p["prompt"] for p in problems], method, progress=False, max_new_tokens=300)
        for i, (out, problem) in enumerate(zip(outs, problems, strict=True)):
            right = grade("boxed", out.text, problem["answer"]).correct
            records.append(Record("tiny", f"p{i}", 0, method, run, out.prompt_tokens, out.tokens, out.text,
                                  out.finish_reason, {"flagged": 0}, 1.0, "s", right, Grade(right, None)))  # fmt: skip
    return Memory(records, runs)


def test_the_report_shows_what_two_methods_kept(tmp_path, real):
    page = (report(tmp_path, "--model", "tiny", store=real) / "report.html").read_text(encoding="utf-8")
    assert page.count("<iframe") == 2
    records = {(r.run, r.item): r for r in real.records()}
    # The first and the last at the smallest budget that more than one have, or of all.
    pairs = [(records["a", f"p{i}"], records["c", f"p{i}"]) for i in range(6)]
    shown = next((a.item for a, c in pairs if a.correct != c.correct), "p0")
    assert f"<h3>{shown}</h3>" in page and page.count("The text is that of full.") == 1

    pair = "skipkv:budget=64,interval=16; full"
    folder = report(tmp_path, "--model", "tiny", "--pair", pair, "--items", "p3,p1", store=real)
    page = (folder / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r'<iframe title="([^"]*)"', page)
    assert titles == [f"{method}, {item}" for item in ("p3", "p1") for method in (pair.split("; ")[0], "full")]
    words = {True: "right", False: "wrong"}
    assert f"{pair.split('; ')[0]}: {words[records['b', 'p3'].correct]}" in page


@pytest.mark.parametrize("more, message", [
    (["--pair", "full"], "pair is 'full'; allowed: two names of the table, separated by \";\""),
    (["--pair", "full;h2o"], "pair is 'full;h2o'; allowed: full, streaming:budget=32,interval=16, "
     "skipkv:budget=64,interval=16, streaming:budget=64,interval=16"),
    (["--items", "p1,p9"], "items is 'p9'; allowed: items of both streaming:budget=32,interval=16 and "
     "streaming:budget=64,interval=16"),
])  # fmt: skip
def test_refusals_before_anything_is_written(tmp_path, real, more, message):
    with pytest.raises(ConfigError) as caught:
        report(tmp_path, "--model", "tiny", *more, store=real)
    assert str(caught.value) == message and not (tmp_path / "report").exists()


def test_a_choice_without_a_model_is_refused(tmp_path):
    for more in (["--pair", "full;rkv:budget=50"], ["--items", "a"]):
        with pytest.raises(ConfigError, match="they need --model"):
            report(tmp_path, *more)


def test_an_empty_store_and_a_single_run(tmp_path):
    with pytest.raises(ConfigError, match="expected results, found none"):
        report(tmp_path, store=Memory([], RUNS))
    one = Memory([r for r in RECORDS if r.run == "f"])
    page = (report(tmp_path, "--model", "nowhere", store=one) / "report.html").read_text(encoding="utf-8")
    assert "Left out: no two runs of one comparison." in page
    steered = Memory([r for r in RECORDS if r.item == "a"])
    rows = summarise(steered.records(), RUNS)
    assert [row.run for row in eval_report._choose(None, rows)] == ["f", "r"]  # two that replay as they ran
    apart = Memory([r for r in RECORDS if (r.run, r.item) in (("r", "c"), ("s", "d"))])
    page = (report(tmp_path, "--model", "nowhere", store=apart) / "report.html").read_text(encoding="utf-8")
    assert "have no item in common." in page
