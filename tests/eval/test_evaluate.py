"""Evaluations: what a run is, what is taken from a store, shares, grading, what is refused and what an error keeps."""

import json
from dataclasses import replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from generations import like

import skipkv
import skipkv.eval.work
from skipkv import CapacityError, ConfigError
from skipkv.eval import Item, Store, evaluate
from skipkv.tiny.problems import draw

SMALL = {"limit": 3, "max_new_tokens": 30, "rows": 4, "progress": False}
ITEMS = [Item(str(i), p["prompt"], p["answer"]) for i, p in enumerate(draw(4))]


def run(model, methods="full", **options):
    return evaluate("tiny", model, methods, **(SMALL | options))


def texts(results):
    return [(r.method, r.item, r.sample, r.tokens) for r in results.records]


@pytest.fixture
def counted(model, monkeypatch):
    """Sequences that the engine has run, as (prompt, sample)."""
    made = []
    stream = type(model).stream

    def counting(self, *args, **options):
        for event in stream(self, *args, **options):
            made.extend([(event.prompt, event.sample)] * (event.generation is not None))
            yield event

    monkeypatch.setattr(type(model), "stream", counting)
    return made


def test_records_are_the_engines_texts(model):
    results = run(model, "rkv:budget=40,interval=16", samples=2, temperature=1.0, seed=4)
    outs = model.generate([p["prompt"] for p in draw(3)], "rkv:budget=40,interval=16", n=2, temperature=1.0, seed=4,
                          max_new_tokens=30, progress=False)  # fmt: skip
    assert [(r.tokens, r.text, r.finish_reason, r.prompt_tokens) for r in results.records] == [
        (o.tokens, o.text, o.finish_reason, o.prompt_tokens) for o in outs
    ]
    assert all(r.truncated and r.correct is False and r.grade.note == "cut off" for r in results.records)
    assert all(0 < r.seconds and r.stats["peak_bytes"] for r in results.records)


@pytest.mark.parametrize("options", [{}, {"padding": "reserve", "grouping": True}])
def test_a_larger_call_makes_only_what_is_missing(model, tmp_path, counted, options):
    settings = {"temperature": 0.8} | options
    methods = "full;random:budget=60,interval=16"
    run(model, methods, out=tmp_path, limit=2, **settings)
    assert len(counted) == 4
    counted.clear()
    run(model, methods, out=tmp_path, limit=2, **settings)
    assert not counted
    more = run(model, methods, out=tmp_path, limit=4, samples=2, **settings)
    grouped = bool(options)  # reserves depend on which prompts there are: another run, but not of the full cache
    assert len(counted) == (14 if grouped else 12) and len(more.runs) == (3 if grouped else 2)
    assert texts(more) == texts(run(model, methods, limit=4, samples=2, **settings))
    assert len(Store(tmp_path).records()) == (18 if grouped else 16)


def test_with_padding_it_goes_on_as_if_it_had_not_ended(model, tmp_path, monkeypatch):
    settings = {"padding": "reserve", "temperature": 0.8, "samples": 2, "limit": 4, "rows": 3}
    method = "random:budget=60,interval=16"
    whole = run(model, method, **settings)
    add = Store.add
    for _ in range(4):

        def fail(self, record, left=[2]):  # noqa: B006
            if not left[0]:
                raise OSError(28, "No space left on device", "results.jsonl")
            left[0] -= 1
            add(self, record)

        monkeypatch.setattr(Store, "add", fail)
        try:
            run(model, method, out=tmp_path, **settings)
        except OSError as error:
            assert len(error.results.records) == len(Store(tmp_path).records())
    monkeypatch.setattr(Store, "add", add)
    assert texts(run(model, method, out=tmp_path, **settings)) == texts(whole)


@pytest.mark.parametrize("change", [
    {"temperature": 0.1}, {"seed": 1, "temperature": 0.1}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1},
    {"cache": "f32"},
    {"repetition_penalty": 1.1}, {"max_new_tokens": 31}, {"stop": "Wait"}, {"stop_ids": [3]}, {"brake": 2},
    {"context": 90}, {"padding": "reserve"}, {"data": ITEMS[1:]}, {"methods": "full:tau=0.5"},
    {"methods": [("full", skipkv.Steering(np.ones(256), 1))]}, {"padding": "reserve", "rows": 2},
    {"padding": "reserve", "limit": 2},
])  # fmt: skip
def test_what_texts_depend_on_makes_another_run(model, change):
    options = {"data": ITEMS, "methods": "rkv:budget=44,interval=16"}
    first = run(model, **options).runs
    other = run(model, **(options | change)).runs
    assert first.keys() != other.keys() and len(first) == len(other) == 1
    assert json.loads(json.dumps(first)) and set(next(iter(first.values()))) == set(next(iter(other.values())))


def test_batches_make_no_other_run_of_the_full_cache(model):
    alone = run(model, data=ITEMS)
    padded = run(model, data=ITEMS, padding="reserve", grouping=True, rows=2)
    assert alone.runs.keys() == padded.runs.keys() and texts(alone) == texts(padded)


@pytest.mark.parametrize("change", [{"rows": 1}, {"limit": 2}, {"samples": 3}, {"memory_limit": 1 << 28}])
def test_what_they_do_not_depend_on_makes_none(model, change):
    assert run(model).runs.keys() == run(model, **change).runs.keys()


def test_a_run_is_of_its_weights_and_version(model, monkeypatch):
    first = run(model).runs.keys()
    copy = like(model)
    assert run(copy).runs.keys() != first and run(copy).runs.keys() == run(copy).runs.keys()  # no files: by its config
    box = Path(str(files("skipkv.tiny")))
    assert model.hashes.keys() >= {"config.json", "model.safetensors", "tokenizer.json"} and not copy.hashes
    assert all(sha256((box / name).read_bytes()).hexdigest() == found for name, found in model.hashes.items())
    monkeypatch.setattr(model, "hashes", model.hashes | {"model.safetensors": "0" * 64})
    assert run(model).runs.keys() != first
    monkeypatch.undo()
    monkeypatch.setattr(skipkv.eval.work, "__version__", "0.0.0")
    assert run(model).runs.keys() != first


def test_a_share_is_of_the_full_caches_mean_length(model):
    results = run(model, ["rkv:budget=40%,interval=16", "full"], limit=2)
    full = [r for r in results.records if r.method == "full"]
    slots = round(0.4 * sum(r.length for r in full) / 2)
    line = list(results.runs.values())[1]
    assert list(results.runs.values())[0]["method"] == "full" and line["share"] == 0.4
    assert line["method"] == f"rkv:budget={slots},interval=16"
    assert [r.method for r in results.records[2:]] == [f"rkv:budget={slots} (40 %),interval=16"] * 2
    # The full cache runs even if nobody asked, and the same slots in numbers are the same run.
    alone = run(model, "rkv:budget=40%,interval=16", limit=2)
    assert texts(alone) == texts(results)
    both = run(model, f"rkv:budget=40%,interval=16;rkv:budget={slots},interval=16", limit=2)
    assert texts(both) == texts(results)


def test_methods_in_all_forms(model):
    vector = skipkv.Steering(np.ones(256), 1)
    methods = [skipkv.RKV(40), ("rkv:budget=40", vector), "full; rkv:budget=41", (skipkv.Full(), None)]
    results = run(model, methods, limit=1)
    assert [r.method for r in results.records] == [
        "rkv:budget=40", "rkv:budget=40+steer:layer=1,alpha=1", "full", "rkv:budget=41"
    ]  # fmt: skip


def test_a_text_that_ends_is_graded(model):
    [right, wrong] = run(model, data=[ITEMS[0], replace(ITEMS[0], id="x", answer="none")], max_new_tokens=1500).records
    assert right.correct is True and wrong.correct is False and right.tokens == wrong.tokens
    assert right.grade.found == wrong.grade.found == ITEMS[0].answer


def test_an_error_keeps_what_ended(model, tmp_path):
    def score(c):
        if len(Store(tmp_path).records()) >= 2:
            raise ZeroDivisionError("mine")
        return np.zeros(c.n_candidates)

    method = skipkv.Custom(score, budget=60, interval=16)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        run(model, ["full", method], limit=2, rows=1, out=tmp_path)
    assert len(caught.value.results.records) == len(Store(tmp_path).records()) == 2
    with pytest.raises(CapacityError, match="memory_limit is 1000"):
        run(model, "full", limit=2, out=tmp_path, memory_limit=1000, seed=9)
    assert len(Store(tmp_path).records()) == 2


@pytest.mark.parametrize("options, message", [
    ({"methods": ""}, 'methods is \'\'; allowed: methods separated by ";"'),
    ({"methods": "rkv:budget=120%"}, "budget is 120%; allowed: shares of the full cache's mean length up to 100%"),
    ({"methods": "rkv:budget=0%"}, "budget is 0%; allowed: shares"),
    ({"methods": "rvk:budget=5"}, "method is 'rvk'; allowed: full"),
    ({"samples": 0}, "samples is 0; allowed: integers from 1"),
    ({"limit": 0}, "limit is 0; allowed: integers from 1"),
    ({"prompt": "chat"}, "prompt is 'chat'; allowed: plain"),
    ({"n": 2}, "option 'n' is the evaluation's own; allowed: samples"),
    ({"trace": True}, "option 'trace' is the evaluation's own"),
    ({"tempature": 1}, "option 'tempature' is unknown; allowed: max_new_tokens"),
    ({"temperature": -1}, "temperature is -1; allowed: numbers from 0"),
    ({"methods": "rkv:budget=12,protect=prompt"}, "budget is 12; "),
    ({"methods": "full;rkv:budget=9%,protect=prompt"}, "budget is "),
    ({"data": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
    ({"methods": [("full", skipkv.Steering(np.ones(3), 1))]}, "steering vector: expected shape [256]"),
    ({"methods": [("full", "steer")]}, "steering is 'steer'; allowed: a Steering or None"),
    ({"methods": [("full", None, 1)]}, "method is ('full', None, 1); allowed: a method or its string"),
    ({"methods": 3}, "method is 3; allowed: a method or its string"),
])  # fmt: skip
def test_refused(model, tmp_path, options, message):
    with pytest.raises(skipkv.errors.Error) as caught:
        run(model, **({"methods": "full", "out": tmp_path / "store"} | options))
    assert message in str(caught.value)


def test_an_unknown_task(model):
    with pytest.raises(ConfigError, match="task is 'gsm8'; allowed: gsm8k, math500"):
        evaluate("gsm8", model, "full")


def test_fragmentation_is_measured_where_it_is_asked_for(model):
    results = run(model, "full;rkv:budget=40,interval=16", fragmentation=True, max_new_tokens=60, limit=1)
    full, small = (r.stats for r in results.records)
    assert full["partial_words"] == 0 and full["mean_run"] > small["mean_run"] > 1
    assert "mean_run" not in run(model, limit=1).records[0].stats
