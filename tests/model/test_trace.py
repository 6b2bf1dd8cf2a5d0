"""Traces: what a run kept, in memory and as a file."""

import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import spec
from generations import PROBLEMS, make, recorded, same_compactions
from harness import EVICTING, SHARING, reference_name, refused

import skipkv
from skipkv import Custom, Steering, Trace, _skipkv
from skipkv.trace import SCORES, StoredMethod


def same_trace(got, want):
    for name in ("tokens", "texts", "n_prompt", "n_layers", "n_kv_heads", "method", "sentences", "alphas", "bytes"):
        assert getattr(got, name) == getattr(want, name), name
    same_compactions(got.compactions, want.compactions)


@pytest.mark.parametrize("name", EVICTING)
def test_a_trace_is_the_history_that_the_method_prescribes(model, name):
    out = recorded(model, make(name))[0]
    trace, fed = out.trace, len(out.prompt_tokens) + 150 - 1
    config = model.config
    assert trace.tokens == out.prompt_tokens + out.tokens and trace.n_prompt == len(out.prompt_tokens) < 48
    assert trace.texts == [model.tokenizer.token_texts[i] for i in trace.tokens]
    assert (trace.n_layers, trace.n_kv_heads) == (config.n_layers, config.n_kv_heads)
    if name != "custom":
        assert trace.method == make(name)
    # The prompt is shorter than the budget: due are the points 32 k + 1 with 48 slots at least.
    assert trace.steps == [step for step in range(49, fed + 1) if step % 32 == 1]
    keys = [(c.step, c.layer, c.head) for c in trace.compactions]
    assert keys == [(s, x, h) for s in trace.steps for x in range(config.n_layers) for h in range(config.n_kv_heads)]
    for c in trace.compactions:
        assert c.scores is None and len(c.kept) == 48 and np.all(np.diff(c.kept) > 0) and c.kept[-1] == c.step - 1
        before = trace.held(c.step - 1, c.layer, c.head).tolist() + [c.step - 1]
        assert c.before == len(before) and set(c.kept.tolist()) <= set(before)
        assert np.array_equal(trace.held(c.step, c.layer, c.head), c.kept)
    assert [c.step for c in trace.at(trace.steps[1])] == [trace.steps[1]] * config.n_layers * config.n_kv_heads
    assert out.stats.compactions == len(trace.steps)
    assert out.stats.evicted == sum(c.before - len(c.kept) for c in trace.compactions)
    page = _skipkv.Session(model._core, cache="bf16", method=make(name).as_dict(None) | {
        "budget": np.full((config.n_layers, config.n_kv_heads), 48, np.int32)}).ledger()["page_bytes"]  # fmt: skip
    assert trace.bytes == [(step, config.n_layers * config.n_kv_heads * page) for step in trace.steps]


def test_held_is_what_a_session_holds(model):
    method = make("skipkv")
    ids = model.encode(PROBLEMS[0])
    text = ids + recorded(model, method)[0].tokens
    session = model._session(method, "bf16", trace=1)
    row = session.open(len(text), n_prompt=len(ids))
    want = recorded(model, method)[0].trace
    for step in range(1, len(text)):
        session.forward(np.array([[row, 1]], np.int32), np.array(text[step - 1 : step], np.int32))
        if step % 16 in (0, 1):
            for layer in range(4):
                for head in range(4):
                    assert np.array_equal(session.positions(row, layer, head), want.held(step, layer, head)), step


def test_held_before_any_compaction_and_for_scores_order():
    kept = np.array([5, 1, 3], np.int32)
    trace = Trace([0] * 9, [""] * 9, 1, 1, 1, "snapkv:budget=3", [skipkv.Compaction(6, 0, 0, 6, kept)])
    assert trace.held(5, 0, 0).tolist() == [0, 1, 2, 3, 4]
    assert trace.held(6, 0, 0).tolist() == [1, 3, 5]
    assert trace.held(8, 0, 0).tolist() == [1, 3, 5, 6, 7]
    assert trace.steps == [6] and list(trace.at(5)) == []


@pytest.mark.parametrize("name", [*EVICTING, *SHARING])
def test_without_evicting_the_text_is_full_and_the_sets_are_virtual(model, name):
    full = recorded(model, None)[0]
    out = recorded(model, make(name, evict=False))[0]
    assert out.tokens == full.tokens
    assert out.stats.live_bytes >= full.stats.live_bytes and out.stats.compression == 1.0
    assert out.stats.evicted == sum(c.before - len(c.kept) for c in out.trace.compactions)  # virtually
    assert out.trace.steps == [s for s in range(49, len(out.trace.tokens)) if s % 32 == 1]
    for c in out.trace.compactions:
        before = [*out.trace.held(c.step - 1, c.layer, c.head).tolist(), c.step - 1]
        assert set(c.kept.tolist()) <= set(before) and c.before == len(before)
        layer = [len(o.kept) for o in out.trace.at(c.step) if o.layer == c.layer]
        assert sum(layer) == 4 * 48 and (name in SHARING or len(c.kept) == 48)
    assert full.trace.compactions == [] and full.trace.steps == []


@pytest.mark.parametrize("name", EVICTING)
def test_scores_say_what_was_kept(model, name):
    out = recorded(model, make(name), trace="scores")[0]
    plain = recorded(model, make(name))[0]
    assert out.tokens == plain.tokens
    newest = spec.newest_kept(reference_name(name), 48, 8)
    wanted = {"skipkv": set(SCORES), "rkv": {"importance", "redundancy", "score"}, "snapkv": {"importance", "score"},
              "custom": set(SCORES)}  # fmt: skip
    assert len(out.trace.compactions) == len(plain.trace.compactions) > 0
    for c, p in zip(out.trace.compactions, plain.trace.compactions, strict=True):
        assert np.array_equal(c.kept, p.kept)
        before = np.array([*out.trace.held(c.step - 1, c.layer, c.head), c.step - 1])
        score = c.scores["score"]
        assert len(score) == c.before - newest and np.isfinite(score).all()
        if name in wanted:
            assert c.scores.keys() == wanted[name]
        free = before[: len(score)]
        if name == "streaming":  # its first four stay whatever their score
            score, free = score[free >= 4], free[free >= 4]
        kept = np.isin(free, c.kept)
        assert score[kept].min() >= score[~kept].max()
    if name == "skipkv":
        parts = [c.scores for c in out.trace.compactions]
        assert any((s["penalty"] > 0).any() for s in parts)
        for s in parts:
            want = 0.1 * s["importance"] - 0.9 * s["redundancy"] - s["penalty"]
            assert np.allclose(s["score"], want, rtol=1e-5, atol=1e-7)


def test_sentences_and_alphas_are_in_the_trace(model):
    steering = Steering(np.full(256, 0.01), 2, alpha=0.5, gamma=0.25, alpha_max=1.0, scope="generation")
    out = recorded(model, make("skipkv"), steering=steering)[0]
    trace, texts = out.trace, out.trace.texts
    blank = [i for i in range(trace.n_prompt, len(texts) - 1) if "\n\n" in texts[i]]
    assert sorted(trace.alphas) == blank and out.stats.steered == len(blank) > 3
    expected = skipkv.segment(trace.tokens[:-1], texts[:-1])
    assert [list(s[:2]) for s in trace.sentences] == expected.spans.tolist()
    assert [s[3] for s in trace.sentences] == expected.labels.tolist()
    assert len(trace.sentences) == out.stats.sentences and sum(s[4] > 0 for s in trace.sentences) == out.stats.flagged
    # α = min(0.5 + 0.25 N_o, 1), N_o the re-checks closed so far while thinking, this token's own included.
    for position, alpha in trace.alphas.items():
        thoughts = sum(s[3] for s in trace.sentences if trace.n_prompt <= s[2] <= position)
        assert alpha == min(0.5 + 0.25 * thoughts, 1.0)
    assert {0.5, 1.0} <= set(trace.alphas.values())
    settings = trace.settings
    assert (settings["model"], settings["prompt"], settings["sample"], settings["seed"]) == ("tiny", 0, 0, 0)
    assert settings["steering"] == steering.describe()


@pytest.mark.parametrize("level", [True, "scores"])
def test_a_saved_trace_comes_back_equal(model, level, tmp_path):
    steering = Steering(np.full(256, 0.01), 0, scope="generation")
    for name in ("skipkv", "full", "h2o-last"):
        trace = recorded(model, make(name), steering=steering, trace=level, seed=np.int64(7))[0].trace
        trace.save(tmp_path / f"{name}.npz")
        loaded = Trace.load(tmp_path / f"{name}.npz")
        same_trace(loaded, trace)
        assert loaded.settings == trace.settings and loaded.settings["seed"] == 7
        assert bool(trace.compactions) == (name != "full") and trace.alphas and trace.sentences


def test_a_stored_score_of_ones_own_says_what_it_was(model, tmp_path):
    def mine(c):
        return -c.keys[: c.n_candidates, 0]

    method = Custom(mine, budget=48, interval=32, evict=False)
    trace = recorded(model, method)[0].trace
    assert trace.method is method
    trace.save(tmp_path / "t.npz")
    stored = Trace.load(tmp_path / "t.npz").method
    assert isinstance(stored, StoredMethod) and str(stored) == str(method)
    assert (stored.name, stored.evict) == ("custom", False)
    assert stored.parameters == {"score": "mine", "budget": "48", "interval": "32", "evict": "False"}
    assert Trace([], [], 0, 1, 1, "rkv:budget=48").method == skipkv.RKV(48)
    assert Trace([], [], 0, 1, 1, "rkv:budget=48,depth=2").method.parameters["depth"] == "2"


def test_sentences_have_names(model):
    for s in recorded(model, make("skipkv"))[0].trace.sentences:
        assert s == (s.first, s.last, s.closed, s.thought, s.similarity, s.repeats) and s.first <= s.last


def test_a_trace_needs_neither_model_nor_its_file_to_be_named_npz(model, tmp_path):
    trace = recorded(model, make("rkv"))[0].trace
    path = tmp_path / "what I kept"
    trace.save(path)
    code = (
        "import sys, numpy; from skipkv import Trace; t = Trace.load(sys.argv[1]); "
        "print(len(t.compactions), t.held(len(t.tokens) - 1, 3, 3).sum(), ''.join(t.texts) == sys.argv[2])"
    )
    arguments = [sys.executable, "-c", code, str(path), "".join(trace.texts)]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    assert out == [str(len(trace.compactions)), str(trace.held(len(trace.tokens) - 1, 3, 3).sum()), "True"]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "good.npz"
    recorded(model, make("snapkv"), max_new_tokens=60, trace="scores")[0].trace.save(path)
    return path.read_bytes()


def rewritten(raw, **changes):
    """The same file with some arrays replaced (None: left out), or keys of its head (head_KEY)."""
    with np.load(io.BytesIO(raw)) as file:
        arrays = {name: file[name] for name in file.files}
    head = json.loads(str(arrays["head"]))
    for name, value in changes.items():
        if name.startswith("head_"):
            head[name[5:]] = value
        elif callable(value):
            arrays[name] = value(arrays[name])
        else:
            arrays[name] = value
    if "head" not in changes:
        arrays["head"] = np.array(json.dumps(head))
    out = io.BytesIO()
    np.savez_compressed(out, **{name: array for name, array in arrays.items() if array is not None})
    return out.getvalue()


def less(array):
    return array[:-1]


def minus_one(index):
    index = index.copy()
    index[0, 4] = -1
    return index


def npy(shape):
    head = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00v\x00" + head.encode().ljust(118)


HOSTILE = {
    "text": lambda raw: b"not a trace, but a note",
    "cut": lambda raw: raw[: len(raw) // 2],
    "npy": lambda raw: npy((1,)) + b"\0" * 4,
    "pickle": lambda raw: b"\x80\x04N.",
    "another zip": lambda raw: archive({"a.txt": b"hello"}),
    "bytes for an array": lambda raw: archive({"head.npy": b"\x93NUMPY"}),
    "array as large as no memory": lambda raw: archive({"head.npy": npy((10**14,))}),
}
CHANGED = {
    "pickled array": {"kept": np.array([{}], object)}, "head is no JSON": {"head": np.array("{")},
    "head is a list": {"head": np.array("[1]")}, "head is deep": {"head": np.array("[" * 100_000)},
    "head lacks texts": {"head": np.array('{"format": 1}')}, "format": {"head_format": 2},
    "texts": {"head_texts": ["a"]}, "texts are numbers": {"head_texts": list(range(43 + 60))},
    "layers": {"head_n_layers": "four"}, "method": {"head_method": None}, "settings": {"head_settings": []},
    "alphas": {"head_alphas": [[1]]}, "sentences": {"head_sentences": [1]}, "no tokens": {"tokens": None},
    "no index": {"index": None}, "fewer kept": {"kept": less}, "fewer counts": {"n_scores": less},
    "fewer compactions": {"index": less, "n_scores": less}, "fewer scores": {"score": less},
    "a negative count": {"index": minus_one}, "narrow index": {"index": lambda a: a[:, :4]},
    "flat index": {"index": lambda a: a.reshape(-1)}, "scores are integers": {"score": lambda a: a.astype(np.int32)},
    "tokens are numbers": {"tokens": lambda a: a.astype(np.float32)},
}  # fmt: skip
HOSTILE |= {name: lambda raw, changes=changes: rewritten(raw, **changes) for name, changes in CHANGED.items()}


def archive(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, raw in files.items():
            file.writestr(name, raw)
    return out.getvalue()


@pytest.mark.parametrize("how", HOSTILE)
def test_a_broken_file_is_refused(saved, how, tmp_path):
    path = tmp_path / "broken.npz"
    path.write_bytes(HOSTILE[how](saved))
    with pytest.raises(skipkv.CheckpointError) as error:
        Trace.load(path)
    assert str(error.value).startswith(f"{path}: expected a ")
    path.write_bytes(rewritten(saved))
    assert Trace.load(path).compactions  # the file that was broken is whole


def test_a_file_holds_what_its_bytes_can(saved, tmp_path):
    path = tmp_path / "bomb.npz"
    path.write_bytes(saved)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as file:
        file.writestr("more.npy", npy((1 << 26,)) + bytes(1 << 28))
    with pytest.raises(skipkv.CheckpointError, match=r"arrays that \d+ bytes can hold, found 268\d+ bytes of them"):
        Trace.load(path)


def test_flipped_bytes_are_refused_or_change_nothing_that_is_checked(saved, tmp_path):
    rng = np.random.default_rng(3)
    path = tmp_path / "flipped.npz"
    refused = 0
    for _ in range(150):
        raw = bytearray(saved)
        for at in rng.integers(0, len(raw), rng.integers(1, 4)):
            raw[at] ^= 1 << rng.integers(8)
        path.write_bytes(raw)
        try:
            Trace.load(path)
        except skipkv.Error:
            refused += 1
    assert refused > 75  # most of the file is under a checksum


def test_what_is_no_file_is_refused(tmp_path):
    for path, found in ((tmp_path / "none.npz", "nothing"), (tmp_path, "something else")):
        with refused(f"{path}: expected a file, found {found}", skipkv.CheckpointError):
            Trace.load(path)
