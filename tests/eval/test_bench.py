"""skipkv bench: what it says it measured, and that it says the same again."""

import json
import re

import pytest

from skipkv.eval import speed
from skipkv.load.config import ModelConfig


@pytest.fixture
def small(monkeypatch):
    """A shape of some thousand weights, and limits measured in a moment."""
    config = ModelConfig(
        "qwen2", n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden=64, ffn=96, vocab=300, context=512,
        norm_eps=1e-6, tied=True, qkv_bias=True, rope_theta=1e4,
    )  # fmt: skip
    monkeypatch.setitem(speed.SHAPES, "small", config)
    monkeypatch.setattr(speed, "LIMIT_BYTES", 8 << 20)
    return config


SETTINGS = ["--threads", 1, "--rows", "1,3", "--contexts", "40,100", "--prefill", 70, "--steps", 4, "--repeats", 2]


def test_bench_measures_what_it_says(skip, small):
    method = "skipkv:budget=24,interval=16"
    argv = ["bench", "--random-weights", "small", *SETTINGS, "--quiet", "--json", "--method", method]
    status, out, err = skip(*argv)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found.keys() == {"model", "variant", "dtype", "cache", "threads", "read_bytes_per_second", "macs_per_second",
                            "results"}  # fmt: skip
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


def test_bench_runs_on_tiny_and_tells_people(skip, monkeypatch):
    monkeypatch.setattr(speed, "LIMIT_BYTES", 8 << 20)
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
