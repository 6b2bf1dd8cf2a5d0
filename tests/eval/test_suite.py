"""The paper's tables beside its figures, and τ and α chosen on training data."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from stored import record

from skipkv import CheckpointError, ConfigError, Steering
from skipkv.eval import Item, Store, calibrate, evaluate, paper, scales, suite
from skipkv.eval.tasks import TASKS, digest, load_items
from skipkv.load.config import ModelConfig
from skipkv.tiny.problems import draw

SMALL = ["--limit", "3", "--threads", "1", "--quiet"]
SHAPE = {"n_heads": 28, "n_kv_heads": 4, "head_dim": 128, "ffn": 18944, "vocab": 152064, "context": 131072,
         "norm_eps": 1e-6}  # fmt: skip


# -- calibration

def texts(correct, lengths):
    both = enumerate(zip(correct, lengths, strict=True))
    return [record("s", f"i{i}", 0, bool(c), prompt=0, new=n) for i, (c, n) in both]


@pytest.mark.parametrize("chosen, others", [
    (0.8, {}),
    (0.9, {0.9: (1.0, 0)}),  # more accurate
    (0.95, {0.9: (0.8, 0), 0.95: (1.0, 50)}),  # the most accurate, even if longer
    (0.7, {0.9: (1.0, 0), 0.7: (1.0, -20)}),  # of equals the shorter
    (0.8, {0.9: (0.55, 0)}),  # within the noise
    (0.7, {0.7: (0.5, -20), 0.9: (0.55, -10)}),  # as accurate, and shorter: the shortest
    (0.8, {0.7: (0.45, -40)}),  # shorter, but less accurate
    (0.9, {0.7: (0.0, -80), 0.9: (1.0, 10)}),
    (0.8, {0.9: (0.5, 10)}),
])  # fmt: skip
def test_a_value_is_chosen_where_the_difference_is_no_noise(chosen, others):
    rng = np.random.default_rng(1)
    lengths = rng.integers(200, 300, 40)

    def of(share, more):
        return texts(np.arange(40) < round(40 * share), lengths + more + rng.integers(-2, 3, 40) * (more != 0))

    found, _ = calibrate.choose({0.8: of(0.5, 0)} | {v: of(*args) for v, args in others.items()}, 0.8)
    assert found == chosen


def test_a_length_that_differs_by_chance_changes_nothing():
    rng = np.random.default_rng(2)
    default, other = (texts([1] * 30, rng.integers(100, 900, 30)) for _ in range(2))
    assert calibrate.choose({0.8: default, 0.9: other}, 0.8)[0] == 0.8
    assert calibrate.choose({0.8: default[:1], 0.9: texts([1], [1])}, 0.8)[0] == 0.8  # of one item nothing follows


def lines(path, problems):
    items = [{"id": str(i), "problem": p, "answer": "1"} for i, p in enumerate(problems)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def test_problems_of_the_test_set_are_refused(tmp_path):
    own = [item.problem for item in load_items("tiny")[0]]
    other = [p["prompt"] for p in draw(3, "choose")]
    assert len(calibrate.training_items("tiny", lines(tmp_path / "a", other), 2)) == 2
    for problems in (own[:1], [*other, own[7].replace(" ", "  ")], own):
        with pytest.raises(ConfigError, match="a: the problem of item .* is one that is measured"):
            calibrate.training_items("tiny", lines(tmp_path / "a", problems), 1)
    with pytest.raises(ConfigError, match="data is not given"):
        calibrate.training_items("gsm8k", None, None)


def test_where_the_test_set_cannot_be_had_it_is_told_by_its_digest(tmp_path, monkeypatch):
    def fail(*_):
        raise CheckpointError("no hub")

    monkeypatch.setattr("skipkv.eval.tasks._fetch", fail)
    data = lines(tmp_path / "a", ["What is 1?", "What is 2?"])
    with pytest.warns(UserWarning, match="checked where it is used only: no hub"):
        items = calibrate.training_items("gsm8k", data, None)
    monkeypatch.setitem(TASKS, "gsm8k", replace(TASKS["gsm8k"], digest=digest(items)))
    with pytest.raises(ConfigError, match="is one that is measured"):
        calibrate.training_items("gsm8k", data, None)


# -- the suite

PUBLISHED = {"full": ((46.0,), (500,)), "rkv": ((None, 36.0), ()), "grouped": ((33.0, 50.0), (300, 200))}


@pytest.fixture
def small(monkeypatch):
    """The model in the box in the place of one of the paper's."""
    monkeypatch.setattr(paper, "size_of", lambda config: "7B")
    monkeypatch.setitem(paper.POINTS, ("7B", "tiny"), PUBLISHED)
    monkeypatch.setitem(paper.BUDGETS, ("7B", "tiny"), (175, 250))
    monkeypatch.setitem(paper.SPEEDS, ("7B", "tiny"), {"full": (2.0, 4.0), "rkv": (6.0, 8.0)})
    monkeypatch.setattr(paper, "ROWS", (1, 3))
    monkeypatch.setitem(scales.SCALES, "tiny", replace(scales.SCALES["tiny"], rows=(1, 3), memory=5))
    monkeypatch.setattr(calibrate, "TAUS", ())
    monkeypatch.setattr(calibrate, "ALPHAS", (0.5,))


def test_calibrated_and_whole(skip, small, tmp_path, model):
    chosen, out = tmp_path / "c.json", tmp_path / "s"
    status, text, err = skip("eval", "calibrate", "tiny", *SMALL, "--budget", "50%", "-o", chosen)
    assert status == 0 and err == "" and text.splitlines()[1].split()[:3] == ["tau", "0.8", "(default)"]
    found = json.loads(chosen.read_text()) | {"tau": 0.85}
    assert [line["value"] for line in found["tried"]] == [0.8, 0.5, 0.75] and len(found["problems"]) == 3
    chosen.write_text(json.dumps(found))

    argv = ["--suite", "seed", "--calibration", chosen, "--out", out, "--rows", "2", "--json"]
    command = ["eval", "tiny", *argv, *SMALL]
    status, text, err = skip(*command)
    tables = json.loads(text)
    assert status == 0 and err == "" and list(tables) == [*suite.TABLES, suite.THROUGHPUT]
    runs = Store(out).runs()
    assert len(runs) == 2 + 2 * 6  # what stands in several tables ran once
    assert {of["calibration"]["tau"] for of in runs.values()} == {0.85}

    cells = {(row["budget"][-5:-2], row["method"]): row for row in tables["Ablation (Table 2)"]}
    rkv = cells["50 ", "rkv"]
    direct = evaluate("tiny", model, "rkv:budget=50%,interval=32,tau=0.85", limit=3, rows=2, padding="reserve",
                      progress=False).summary().rows  # fmt: skip
    assert rkv["run"] == direct[-1].run
    assert (rkv["accuracy"], rkv["length"]) == ([*direct[-1].accuracy], [*direct[-1].length])
    a, b, _ = (len(model.encode(p["prompt"])) for p in draw(3))
    assert rkv["valid"] == pytest.approx(direct[-1].budget - abs(a - b) / 3)  # two rows, and one alone
    assert (rkv["accuracy_paper"], rkv["length_paper"], cells["50 ", "+ grouping"]["length_paper"]) == (36.0, None, 200)

    full, *_, last = tables[suite.THROUGHPUT]
    assert [row["at_once"] for row in tables[suite.THROUGHPUT] if row["method"] == "full"] == [1, 2]  # of 5 / 2
    assert full["ratio"] == 1 and last["rows"] == 3 == last["at_once"] and last["speed"] > 0
    rkv = tables[suite.THROUGHPUT][2]
    assert [rkv[name] for name in ("speed_paper", "ratio_paper", "honest_paper")] == [6.0, 3.0, 1.5]

    page, before = (out / "suite.md").read_text(), (out / "results.jsonl").read_bytes()
    assert page.count("\n| ") == sum(map(len, tables.values())) + len(tables) and "τ 0.85 (calibrated:" in page
    assert json.loads(skip(*command)[1]) == tables and (out / "results.jsonl").read_bytes() == before


def test_what_was_chosen_on_is_not_measured(model, tmp_path):
    steering = Steering.load("tiny")
    item = load_items("tiny", limit=1)[0][0]
    found = {"tau": 0.8, "alpha": 1.0, "data": "d", "problems": [calibrate.problem(item)], "model": model.hashes,
             "vector": calibrate.vector(steering)}  # fmt: skip
    path = tmp_path / "c.json"
    path.write_text(json.dumps(found))
    loaded = calibrate.load(path, model, steering)
    made = suite.Suite("tiny", model, steering, tmp_path / "s", loaded, limit=2, progress=False)
    with pytest.raises(ConfigError, match="c.json: the problem of item 'held-out/0' is one that is measured"):
        made.tables()
    for name, value in {"tau": 2, "alpha": None, "model": {}, "vector": "x", "problems": 1, "data": 3}.items():
        path.write_text(json.dumps(found | {name: value}))
        with pytest.raises(CheckpointError, match=f"c.json: .*{name}"):
            calibrate.load(path, model, steering)


def test_samples_a_minute_and_texts_in_the_cache_together():
    ends = [("a", 0.0, 2.0), ("a", 0.0, 3.0), ("a", 2.0, 4.0), ("b", 0.0, 2.0), ("b", 1.0, 2.0), ("b", 1.5, 6.0)]
    made = [
        replace(record("f", str(i), 0, True, seconds=end, segment=part), stats={"seconds": end - begin})
        for i, (part, begin, end) in enumerate(ends)
    ]
    assert suite.at_once(made) == 3 and suite.at_once(made[:3]) == 2 and suite.speed(made) == 60 * 6 / (4 + 6)


# -- what the paper says


def test_the_papers_figures_fit_together():
    for key, points in paper.POINTS.items():
        n = len(paper.BUDGETS[key])
        assert all(len(of) in ((1, 0) if variant in ("full", "seal") else (n, 0))
                   for variant, both in points.items() for of in both)  # fmt: skip
    assert paper.shares("7B", "aime24") == ("14%", "20%", "28%", "37%") == paper.shares("", "aime24")
    assert paper.shares("8B", "aime24") == ("18%", "24%", "28%", "37%") and paper.shares("7B", "gsm8k") == ()
    speeds = paper.SPEEDS["7B", "gsm8k"]
    assert round(max(speeds["grouped"]) / speeds["full"][1], 1) == 9.6 and max(filter(None, speeds["full"])) == 4.07
    shapes = [*paper.MODELS, ("qwen2", 28, 1536)]
    configs = [ModelConfig(family, layers, hidden=hidden, **SHAPE) for family, layers, hidden in shapes]
    assert [paper.size_of(config) for config in configs] == ["7B", "14B", "8B", ""]


@pytest.mark.parametrize("argv, message", [
    (["tiny"], "--methods is not given"),
    (["tiny", "--suite", "seed"], "--suite keeps its texts and tables"),
    (["tiny", "--suite", "seed", "--out", "s", "--methods", "full"], "--suite has its own methods"),
    (["tiny", "--suite", "seed", "--out", "s", "--padding", "none"], "--suite has its own padding"),
    (["tiny", "--methods", "full", "--calibration", "c"], "--calibration is for --suite"),
    (["tiny", "--suite", "seed", "--out", "s", "--calibration", "c.json"], "c.json"),
    (["gsm8k", "--model", "x", "--suite", "seed", "--out", "s"], "--steering is not given"),
    (["calibrate", "tiny", "-o", "no/c.json"], "out is 'no/c.json'; there is no directory"),
    (["calibrate", "gsm8k", "--model", "x", "-o", "c"], "--steering is not given"),
    (["calibrate", "gsm8k", "--model", "x", "-o", "c", "--steering", "tiny"], "data is not given"),
])  # fmt: skip
def test_refused(skip, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = skip("eval", *argv, "--quiet")
    assert status == 2 and out == "" and err.startswith(f"skipkv: {message}")


def test_without_ray(skip, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = "skipkv: many machines take the package ray: pip install 'skipkv[scale]'\n"
    assert skip("eval", "tiny", "--methods", "full", "--ray", "--quiet") == (2, "", message)


def test_items_are_told_apart_by_their_problems():
    a, b, c = (Item(i, text, "1") for i, text in zip("abc", ("x  y\n", "x y", "x z"), strict=True))
    assert calibrate.problem(a) == calibrate.problem(b) != calibrate.problem(c)
