"""skipkv bench: what it says it measured, and that it says the same again."""

import functools
import json
import re

import pytest

from skipkv.eval import speed
from skipkv.load.config import ModelConfig


@pytest.fixture
def small(monkeypatch):
    """A shape of some thousand weights, and limits measured in a moment, once for a model."""
    config = ModelConfig(
        "qwen2", n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden=64, ffn=96, vocab=300, context=512,
        norm_eps=1e-6, tied=True, qkv_bias=True, rope_theta=1e4,
    )  # fmt: skip
    monkeypatch.setitem(speed.SHAPES, "small", config)
    monkeypatch.setattr(speed, "LIMIT_BYTES", 8 << 20)
    monkeypatch.setattr(speed, "machine_limits", functools.cache(speed.machine_limits))
    return config


@pytest.fixture
def quick(small, monkeypatch):
    """That shape beside limits that were not measured."""
    monkeypatch.setattr(speed, "machine_limits", lambda model: LIMITS)


LIMITS = {"read_bytes_per_second": 2e9, "macs_per_second": 3e9, "matrix_macs_per_second": 5e9}
SETTINGS = ["--threads", 1, "--rows", "1,3", "--contexts", "40,100", "--prefill", 70, "--steps", 4, "--repeats", 2]


def test_bench_measures_what_it_says(skip, small):
    method = "skipkv:budget=24,interval=16"
    argv = ["bench", "--random-weights", "small", *SETTINGS, "--quiet", "--json", "--methods", method]
    status, out, err = skip(*argv)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found.keys() == {"model", "variant", "dtype", "cache", "threads", *LIMITS, "results"}
    assert (found["model"], found["dtype"], found["cache"], found["threads"]) == ("random small", "bf16", "bf16", 1)
    assert found["read_bytes_per_second"] > 1e8 and found["macs_per_second"] > 1e7
    prefill, *decodes, compaction = found["results"]
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
    assert (prefill["kind"], prefill["tokens"]) == ("prefill", 70)
    assert prefill["macs"] == 70 * weights + 300 * 64 + 2 * 2 * 4 * 16 * 70 * 71 // 2
    shapes = [(d["kind"], d["rows"], d["context"]) for d in decodes]
    assert shapes == [("decode", rows, context) for context in (40, 100) for rows in (1, 3)]
    for d in decodes:
        assert d["tokens"] == d["rows"] and d["method"] == method
        # Tokens 42 to 49 are timed, and 102 to 109: only of the former one (16 k + 1) brings a compaction.
        assert (0 < d["evict_share"] < 1) == (d["context"] == 40) and d["peak_bytes"] > 0 < d["seconds"] < 10
        # All head slots at the end: between a budget and a budget and an interval.
        slots = (d["macs"] / d["rows"] - weights - 300 * 64) / (2 * 2 * 4 * 16)
        assert slots == int(slots) and 24 <= slots < 24 + 16
        assert d["bytes"] == 2 * (weights + 300 * 64) + d["rows"] * 2 * 2 * 2 * 16 * slots * 2
    assert (compaction["kind"], compaction["slots"]) == ("compaction", 24 + 16) and 0 < compaction["pairs_share"] <= 1
    again = json.loads(skip(*argv)[1])["results"]
    assert [d["hash"] for d in decodes] == [d["hash"] for d in again[1:-1]]
    assert len({d["hash"] for d in decodes}) == 4
    smaller = json.loads(skip(*argv, "--dtype", "q8")[1])["results"][1:-1]  # 34 bytes for 32 weights in place of 64
    assert {a["bytes"] - b["bytes"] for a, b in zip(decodes, smaller, strict=True)} == {30 / 32 * (weights + 300 * 64)}


def bench(skip, *argv):
    status, out, err = skip("bench", "--random-weights", "small", *SETTINGS, "--quiet", "--json", *argv)
    assert (status, err) == (0, "")
    return json.loads(out)["results"]


def test_methods_take_turns_and_each_says_what_it_would_say_alone(skip, quick):
    methods = ["skipkv:budget=24,interval=16", "full", "h2o:budget=24,interval=16"]
    _, *found = bench(skip, "--methods", ";".join(methods))
    assert [r["method"] for r in found] == [*methods * 4, methods[0], methods[2]]
    for i, r in enumerate(found[:12]):
        assert r["speedup"] == found[i - i % 3]["seconds"] / r["seconds"]
    assert [r["hash"] for r in found[1:12:3]] == [r["hash"] for r in bench(skip)[1:]]


def test_the_ops_of_a_step_by_hand(skip, quick, monkeypatch):
    """2 layers, hidden 64, 4 heads and 2 KV heads of 16, ffn 96, vocabulary 300; bf16 weights, float activations."""
    monkeypatch.setattr(speed, "FORWARD_TOKENS", 32)  # a prompt of three parts
    argv = ["--cache", "q8", "--methods", "full;h2o:budget=24,interval=16"]
    prefill, *decodes, compaction = bench(skip, "--ops", *argv)
    full = next(r for r in decodes if (r["method"], r["rows"], r["context"]) == ("full", 3, 40))
    slots = 3 * (40 + 1 + 2 * 4)  # of all rows, in a head
    ops = {op["op"]: (op["bytes"], op["macs"]) for op in full["ops"]}
    assert ops == {
        "embed": (3 * 64 * (2 + 4), 0), "steer": (0, 0), "norm": (5 * 3 * 64 * 2 * 4, 0),
        "q, k, v": (2 * (2 * 64 * 128 + 4 * 3 * (64 + 128)), 2 * 3 * 64 * 128),
        "rope": (2 * 3 * 96 * 2 * 4, 0), "append": (2 * 3 * 64 * (4 + 1.25), 0),  # a scale for 16 numbers
        "attention": (2 * (2 * 32 * slots * 1.25 + 4 * 3 * 2 * 64), 2 * 2 * 64 * slots),
        "o": (2 * (2 * 64 * 64 + 4 * 3 * 128), 2 * 3 * 64 * 64), "add": (2 * 2 * 3 * 64 * 3 * 4, 0),
        "gate, up": (2 * (2 * 64 * 192 + 4 * 3 * (64 + 192)), 2 * 3 * 64 * 192),
        "silu": (2 * 3 * 96 * 3 * 4, 0), "down": (2 * (2 * 96 * 64 + 4 * 3 * (96 + 64)), 2 * 3 * 64 * 96),
        "sentences": (0, 0), "last": (3 * 64 * 2 * 4, 0),
        "head": (2 * 64 * 300 + 4 * 3 * (64 + 300), 3 * 64 * 300),
    }  # fmt: skip
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
    assert prefill["macs"] == 70 * weights + 300 * 64 + 2 * 2 * 4 * 16 * 70 * 71 // 2
    for r in (prefill, full):
        assert sum(op["macs"] for op in r["ops"]) == r["macs"]
        for op in r["ops"]:
            rate = 5e9 if op["op"] in ("q, k, v", "o", "gate, up", "down", "head") else 3e9
            assert op["share"] == pytest.approx(max(op["bytes"] / 2e9, op["macs"] / rate) / op["seconds"])
    h2o = {op["op"]: op["macs"] for r in decodes if r["method"] != "full" for op in r["ops"]}
    assert h2o.keys() - ops.keys() == {"receive"} and 2 * h2o["receive"] == h2o["attention"]
    assert [op["op"] for op in compaction["ops"]] == ["compare", "score", "select", "compact"]
    assert sum(op["seconds"] for op in compaction["ops"]) < 2 * compaction["seconds"]
    _, *untimed, _ = bench(skip, *argv)
    assert [r["hash"] for r in untimed] == [r["hash"] for r in decodes] and not any("ops" in r for r in untimed)


def test_the_rows_that_one_memory_limit_holds(skip, quick):
    """Pages of 64 slots, 2 × 2 heads: a sample of 160 tokens takes 3 pages in each, one of 24 + 16 slots takes 1."""
    page = 64 * (2 * 2 * 16 + 4)  # keys and values of 16 numbers, a position
    limit, method = 5 * 12 * page + 100, "skipkv:budget=24,interval=16"
    argv = ["--memory-limit", limit, "--length", 160, "--methods", f"{method};full"]
    found = bench(skip, *argv)
    assert [(r["method"], r["rows"], r["row_bytes"]) for r in found] == [
        *(("full", rows, 12 * page) for rows in (1, 2, 4, 5)),
        *((method, rows, 4 * page) for rows in (1, 2, 4, 8, 15)),
    ]
    full = [r["samples_per_minute"] for r in found[:4]]
    for r in found:
        assert r["samples_per_minute"] == 60 * r["rows"] / (160 * r["seconds"])
        assert r["of_largest"] == r["samples_per_minute"] / full[-1]
        assert r["of_best"] == r["samples_per_minute"] / max(full) <= r["of_largest"]
    refused = skip("bench", "--random-weights", "small", *SETTINGS, "--memory-limit", 12 * page - 1, "--length", 160)
    said = f"full: a row of 160 tokens needs {12 * page} bytes of cache; memory_limit is {12 * page - 1}"
    assert refused[0] == 2 and refused[2].splitlines()[-1] == f"skipkv: {said}"


def test_a_sample_bears_its_share_of_its_compactions(skip, quick, monkeypatch):
    """(160 − 24) / 16 compactions in 160 steps; none where a sample ends before its budget is full."""
    monkeypatch.setattr(speed, "compaction", lambda *_: {"seconds": 1000.0})
    argv = ["--memory-limit", 10**6, "--length", 160, "--methods"]
    found = bench(skip, *argv, "skipkv:budget=24,interval=16;skipkv:budget=160,interval=16")
    for r in found:
        least = r["rows"] * 1000 * 8.5 / 160 if "budget=24" in r["method"] else 0
        assert least < r["seconds"] < least + 10


def test_rows_that_the_machine_has_no_memory_for_are_refused(skip, quick, monkeypatch):
    monkeypatch.setattr(speed, "free_memory", lambda: 1000)
    status, out, err = skip("bench", "--random-weights", "small", *SETTINGS, "--quiet")
    need = 4 * 64 * (2 * 2 * 16 + 4) + 300 * 4
    said = f"1 rows of 49 tokens need {need} bytes of cache and logits; 1000 are free"
    assert status == 2 and "prefill of 70" in out and err == f"skipkv: {said}\n"


def test_bench_runs_on_tiny_and_tells_people(skip, monkeypatch):
    monkeypatch.setattr(speed, "machine_limits", lambda model: LIMITS)
    argv = ["bench", "tiny", "--quiet", *SETTINGS, "--rows", 2, "--contexts", 40]
    status, out, err = skip(*argv, "--json")
    found = json.loads(out)
    assert (status, err, found["model"]) == (0, "", "tiny")
    assert [r["kind"] for r in found["results"]] == ["prefill", "decode"]
    assert found["results"][1]["evict_share"] < 0.5  # full drops nothing; comparing sentences needs a tokenizer
    status, out, _ = skip(*argv, "--dtype", "f32", "--cache", "f32")
    head, limits, _, columns, *lines = out.splitlines()
    assert head.startswith("tiny, f32 weights, f32 cache, ") and limits.startswith("limits: ")
    assert columns.split()[:5] == ["measurement", "ms", "tokens/s", "GB/s", "read"]
    assert [re.split("  +", line)[0] for line in lines] == ["prefill of 70", "decode, 2 rows, context 40"]
    assert skip(*argv, "--dtype", "q8")[1].startswith("tiny, q8 weights, bf16 cache, ")
    figures = r" +[\d.]+ +[\d.]+ +[\d.]+ +\d+ +[\d.]+ +\d+"  # ms, tokens/s, GB/s, its share, Gflop/s, its share
    assert all(re.search(figures, line) for line in lines)
    ops = skip(*argv, "--ops")[1].splitlines()[3:]
    assert ops[0].split()[:2] == ["op", "ms"] and ops[1] == "prefill of 70"
    assert "decode, 2 rows, context 40, full" in ops and re.fullmatch(r"  gate, up" + r" +[\d.]+" * 8, ops[11])
    batches = skip(*argv, "--memory-limit", 10**6, "--length", 64)[1].splitlines()[3:]
    assert batches[0].split()[:2] == ["rows", "ms"] and re.fullmatch(r" +1" + r" +[\d.]+" * 6 + "  full", batches[1])
