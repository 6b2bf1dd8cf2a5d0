"""Tasks: their items from files and the hub, how they are asked, how their programs are graded."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest

from skipkv import BackendError, CheckpointError, ConfigError
from skipkv.eval import TASKS, Grade, Item, Store, evaluate, marking, programs, work
from skipkv.eval.marking import regrade
from skipkv.eval.prompts import COMPLETION, MATH, THINK
from skipkv.eval.tasks import DRAWN, digest, load_items

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = {"gsm8k": "gsm8k_test", "math500": "math500", "aime24": "aime24", "humaneval": "humaneval"}
ROW = {"id": "a", "problem": "1 + 1?", "answer": "2"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name, file", FILES.items())
def test_the_published_items_are_known_by_their_digest(name, file, recwarn):
    path = DATA / f"{file}.jsonl"
    if not path.exists():
        pytest.skip("no ../shared/data")
    items, found = load_items(name, path)
    assert found == digest(items) == TASKS[name].digest and not recwarn
    assert len(items) == {"gsm8k": 1319, "math500": 500, "aime24": 30, "humaneval": 164}[name]
    assert all(item.problem and item.answer for item in items)
    few, same = load_items(name, path, 3)
    assert few == items[:3] and same == found


def test_other_items_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"expected the gsm8k problems with SHA-256 b5107a2ee9aca701…, found "):
        items, _ = load_items("gsm8k", write(tmp_path / "x.jsonl", ROW | {"solution": "s"}))
    assert items == [Item("a", "1 + 1?", "2", {"solution": "s"})]


@pytest.mark.parametrize("row, item", [
    ({"question": "1?", "answer": "So.\n#### -1,234"}, Item("gsm8k/0", "1?", "-1234")),
    (ROW | {"id": 7, "answer": 3}, Item("7", "1 + 1?", "3")), (ROW | {"answer": "033"}, Item("a", "1 + 1?", "33")),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*SHA-256")
def test_rows_as_the_hub_has_them(tmp_path, row, item):
    assert load_items("gsm8k", write(tmp_path / "x.jsonl", row))[0] == [item]


@pytest.mark.parametrize("name, rows, message", [
    ("math500", [{"id": "a", "problem": "x"}], "line 1: answer: expected a text, found nothing"),
    ("math500", [ROW, {"id": "b", "answer": "x"}], "line 2: problem: expected a text, found nothing"),
    ("math500", [ROW | {"problem": ["x"]}], "line 1: problem: expected a text, found ['x']"),
    ("math500", [ROW | {"problem": ""}], "line 1: problem: expected a text, found ''"),
    ("math500", [ROW, ROW], "line 2: id: 'a' stands on a line before"),
    ("math500", ["text"], "line 1: expected a JSON object"),
    ("gsm8k", [ROW | {"answer": "two"}], "line 1: answer: expected an integer, found 'two'"),
    ("humaneval", [ROW], "line 1: entry_point: expected a text, found nothing"),
    ("livecodebench", [ROW | {"public_test_cases": []}], "line 1: public_test_cases: expected a text, found []"),
])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, name, rows, message):
    with pytest.raises(ConfigError) as caught:
        load_items(name, write(tmp_path / "x.jsonl", *rows))
    assert str(caught.value) == f"{tmp_path / 'x.jsonl'}: {message}"


def test_a_file_without_items_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match="x.jsonl: expected at least one item, found none"):
        load_items("math500", tmp_path / "x.jsonl")


def test_tiny_draws_what_is_asked_for():
    items, found = load_items("tiny")
    more, same = load_items("tiny", None, DRAWN + 5)
    few, still = load_items("tiny", None, 5)
    assert len(items) == DRAWN and len(more) == DRAWN + 5 and items == more[:DRAWN] and few == items[:5]
    assert found == same == still == digest(items)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.hub])
def test_the_hub_is_asked_for_a_pinned_file(name, tmp_path, monkeypatch):
    row = ROW | dict.fromkeys(TASKS[name].needs, "x")
    asked = []

    def download(repository, file, **options):
        asked.append((repository, file, options))
        return write(tmp_path / "x.jsonl", row)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    if TASKS[name].digest:
        with pytest.warns(UserWarning, match="SHA-256"):
            items = load_items(name)[0]
    else:
        items = load_items(name)[0]
    [(repository, file, options)] = asked
    assert items[0].problem == ROW["problem"] and options == {"repo_type": "dataset", "revision": TASKS[name].hub[1]}
    assert len(TASKS[name].hub[1]) == 40 and (repository, file) == (TASKS[name].hub[0], TASKS[name].hub[2])


def test_what_the_hub_does_not_give_is_said_in_a_sentence(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    where = r"HuggingFaceH4/aime_2024 \(data/.* at 2fe88a2f1091\) on the Hugging Face hub"
    with pytest.raises(CheckpointError, match=f"aime24: expected {where}, or data in a file: no route to host$"):
        load_items("aime24")


@pytest.mark.filterwarnings("ignore:.*SHA-256")
def test_parquet_is_read_by_datasets_or_asked_for_by_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="no datasets")
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_list([{"question": "1?", "answer": "#### 5"}]).to_parquet(str(path))
    assert load_items("gsm8k", path)[0] == [Item("gsm8k/0", "1?", "5")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BackendError, match=r"datasets: pip install 'skipkv\[eval\]'"):
        load_items("gsm8k", path)


# -- prompts


def test_every_prompt_holds_its_problem(model):
    for task in TASKS.values():
        for prompt in task.prompts.values():
            assert prompt.text.count("{problem}") == 1 and "{starter}" not in prompt.text
            assert not prompt.starter or prompt.starter.count("{starter}") == prompt.starter.count("{problem}") == 1


@pytest.mark.parametrize("template", ["{{ messages[0].content }}<a>", "{{ messages[0].content }}<a><think>\n"])
def test_r1s_prompt_ends_with_a_thought_that_begins_once(model, monkeypatch, template):
    monkeypatch.setattr(type(model.tokenizer), "render", lambda self, turns, *_, **__: "\n".join(
        [turn["content"] for turn in turns] + [template.partition("<a>")[2]]))  # fmt: skip
    ids = MATH["r1"].ids(model, "Find Kim.", None, None)
    text = model.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith(THINK) and text.count("<think>") == 1


def test_code_with_and_without_a_starter(model, monkeypatch):
    monkeypatch.setattr(type(model), "encode", lambda self, prompt, variables=None: prompt)
    plain = TASKS["livecodebench"].prompts["plain"]
    without, within = plain.ids(model, "Q {starter}?", "", None), plain.ids(model, "Q?", "class Solution:", None)
    assert "Q {starter}?" in without and "# YOUR CODE HERE" in without and "STDOUT" in without
    assert "```python\nclass Solution:\n```" in within and "starter code" in within and "STDOUT" not in within
    assert COMPLETION["plain"].ids(model, "def f():\n", None, None) == "def f():\n"


# -- programs


class Shell:
    """Stands for the sandbox: nothing runs."""

    def __init__(self, unsafe=False):
        self.unsafe = unsafe


@pytest.fixture
def graded(monkeypatch):
    """Grading of programs, without running any: right where the text has an even number of tokens."""
    graded_now = []

    def grade_all(pairs, sandbox, progress):
        for i, (item, text) in enumerate(pairs):
            graded_now.append((item.id, text))
            yield i, Grade(len(text) % 2 == 0, note=item.more["test"])

    monkeypatch.setattr(programs, "grade_all", grade_all)
    for module in (work, marking):
        monkeypatch.setattr(module, "Sandbox", Shell)
    return graded_now


@pytest.mark.filterwarnings("ignore:.*SHA-256")
def test_programs_are_graded_once_their_texts_are_there(model, tmp_path, graded):
    rows = [{"id": f"h/{i}", "problem": f"Find {x}.", "answer": "", "entry_point": "f", "test": "t"} for i, x in
            enumerate(("Kim", "Leo"))]  # fmt: skip
    data, store = write(tmp_path / "h.jsonl", *rows), tmp_path / "store"
    options = {"data": data, "out": store, "stop": list("aeiou,. "), "progress": False, "unsafe": True}
    results = evaluate("humaneval", model, "full", max_new_tokens=400, **options)
    ended = [r for r in results.records if not r.truncated]
    assert ended and sorted(graded) == sorted((r.item, r.text) for r in ended)
    assert all(r.grade.unsafe and r.grade.note == "t" and r.correct == (len(r.text) % 2 == 0) for r in ended)
    lines = [json.loads(line) for line in (store / "results.jsonl").read_text().splitlines()]
    assert all((line["correct"] is None) == (line["finish_reason"] == "stop") for line in lines)
    graded.clear()
    evaluate("humaneval", model, "full", max_new_tokens=400, **options)
    assert not graded  # their grades are there
    os.remove(store / "grades.jsonl")
    assert regrade(Store(store), progress=False) == len(ended) == len(graded)
    assert not any(r.grade.unsafe for r in Store(store).records())


def test_where_nothing_can_be_isolated_programs_are_refused_first(model, monkeypatch):
    def refuse(*_):
        raise BackendError("no bubblewrap")

    monkeypatch.setattr(work, "Sandbox", refuse)
    monkeypatch.setattr(type(model), "stream", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(BackendError, match="no bubblewrap"):
        evaluate("humaneval", model, "full", data=[Item("a", "def f():", "")])


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
@pytest.mark.filterwarnings("ignore:.*SHA-256")
def test_regrade_by_the_other_rule_stands_beside(model, tmp_path):
    data = write(tmp_path / "m.jsonl", ROW | {"problem": "Find Kim."}, ROW | {"id": "b", "problem": "Find Leo."})
    evaluate("math500", model, "full", data=data, out=tmp_path / "s", limit=2, max_new_tokens=3, progress=False)
    store = Store(tmp_path / "s")
    assert regrade(store, "official", progress=False) == 2 and regrade(store, "official", progress=False) == 0
    for rule in ("default", "official"):
        assert [r.grade.note for r in store.records(rule=rule)] == ["cut off"] * 2
    write(data, ROW)
    with pytest.raises(ConfigError, match=r"item 'b': expected one of .*m\.jsonl"):
        regrade(Store(tmp_path / "s"), progress=False)
