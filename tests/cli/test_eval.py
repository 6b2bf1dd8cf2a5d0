"""skipkv eval on the command line: a run, what is shown of it, grading again, refusals."""

import json

import pytest

from skipkv.eval import Store

METHODS = "full:tau=0.8;rkv:budget=50%,interval=16"
SMALL = ["--methods", METHODS, "--limit", "2", "--max-new-tokens", "40", "--threads", "1", "--quiet"]


@pytest.fixture
def done(skip, tmp_path):
    assert skip("eval", "tiny", *SMALL, "--out", tmp_path / "s")[0] == 0
    return tmp_path / "s"


def test_a_table_for_people_and_lines_for_machines(skip, tmp_path):
    status, out, err = skip("eval", "tiny", *SMALL)
    assert status == 0 and err == "" and "full:tau=0.8" in out and "(50 %),interval=16" in out
    sampled = ["--samples", "2", "--temperature", "0.7", "--top-p", "0.9"]
    status, out, err = skip("eval", "tiny", *SMALL, *sampled, "--json")
    found = json.loads(out)
    assert status == 0 and err == "" and [(r["texts"], r["share"]) for r in found] == [(4, None), (4, 0.5)]


def test_the_store_has_the_command_that_made_it(done):
    line, other = Store(done).runs().values()
    assert line["command"] == other["command"] and line["command"].endswith(f"--out {done}")
    assert line["command"].startswith("skipkv eval tiny --methods 'full:tau=0.8;")


def test_show(skip, done):
    status, out, _ = skip("eval", "show", done)
    assert status == 0 and out.splitlines()[0].split() == ["run", "task", "method", "done", "right", "accuracy,", "%"]
    assert "2 of 2" in out and "full:tau=0.8" in out
    runs = json.loads(skip("eval", "show", done, "--json", "--method", "rkv")[1])
    assert [(r["done"], r["total"], r["right"], r["accuracy"]) for r in runs] == [(2, 2, 0, 0.0)]
    status, out, _ = skip("eval", "show", done, "--item", "held-out/1", "--method", "full")
    [record] = [r for r in Store(done).records() if r.item == "held-out/1" and r.method == "full:tau=0.8"]
    assert out == (
        "--- tiny held-out/1, sample 0, full:tau=0.8: wrong, cut off, "
        f"{len(record.prompt_tokens)} + 40 tokens (length)\n{record.text}\n"
    )
    found = json.loads(skip("eval", "show", done, "--item", "held-out/1", "--json")[1])
    assert [r["method"] for r in found] == [r.method for r in Store(done).records() if r.item == "held-out/1"]


def test_going_on_after_a_larger_call_shows_what_is_missing(skip, done):
    skip("eval", "tiny", "--methods", "full:tau=0.8", "--limit", "3", *SMALL[4:], "--out", done)
    assert [r["total"] for r in json.loads(skip("eval", "show", done, "--json")[1])] == [3, 2]


def test_regrade_and_report(skip, done):
    status, out, _ = skip("eval", "regrade", done, "--quiet")
    assert status == 0 and out.startswith("0 grades changed\n")
    (done / "grades.jsonl").write_text("")
    assert json.loads(skip("eval", "regrade", done, "--json", "--rule", "official")[1]) == {"changed": 4}
    status, out, err = skip("eval", "report", done, "--quiet")
    assert status == 0 and err == "" and (done / "report" / "report.html").exists()


@pytest.mark.parametrize("argv, message", [
    (["tiny", *SMALL, "--out", "file"], "file: expected a directory of results, found a file"),
    (["tiny", *SMALL, "--out", "other"], "other: expected a directory with results.jsonl or an empty directory, found"),
    (["show", "nowhere"], "nowhere: expected a directory with results.jsonl, found nothing"),
    (["regrade", "other"], "other: expected a directory with results.jsonl, found one with 'x'"),
    (["report", "nowhere"], "nowhere: expected a directory with results.jsonl, found nothing"),
    (["gsm8k", *SMALL, "--model", "tiny", "--data", "file"], "file: expected JSON lines, found an empty file"),
    (["tiny", *SMALL, "--methods", "none"], "method is 'none'; allowed: full"),
])  # fmt: skip
def test_refused(skip, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    status, out, err = skip("eval", *argv)
    assert status == 2 and out == "" and err.startswith(f"skipkv: {message}")


def test_an_item_that_is_not_there_is_named(skip, done):
    assert skip("eval", "show", done, "--item", "x")[2].startswith(f"skipkv: {done}: there is no text of item 'x'")
