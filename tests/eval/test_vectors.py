"""Steering vectors: labels, steps, extraction, files, released tensors; the vocabulary that sentences are read with."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import spec
from harness import refused, tiny_decoder

import skipkv
from skipkv import CheckpointError, ConfigError, Steering, sentences, vectors
from skipkv.cli import main
from skipkv.steering import load_vectors, parse_steering, save_vectors
from skipkv.tiny.problems import draw
from skipkv.vectors.released import _rebuild

SHARED = Path(__file__).parents[3] / "shared" / "data"
SMOLLM2 = Path.home() / ".cache" / "skipkv" / "models" / "SmolLM2-135M-Instruct"
PROBLEM = draw(8)[7]["prompt"]


@pytest.fixture(scope="module")
def text(model):
    out = model.generate(PROBLEM, progress=False)[0]
    return out.prompt_tokens + out.tokens, len(out.prompt_tokens)


@pytest.mark.parametrize("step, name", [
    ("Wait, that is odd", "reflection"), (" wait", "reflection"), ("So we await", "execution"),
    ("Let me check this", "reflection"), ("That's correct", "reflection"), ("x = 3", "execution"),
    ("Alternatively, wait", "transition"), ("I alternatively", "execution"), ("Think differently", "transition"),
    ("Another Approach is", "transition"), ("another number", "execution"),
    ("Alternatively, let me verify", "reflection"),  # reflection is looked for first
])  # fmt: skip
def test_labels_by_text(step, name):
    assert vectors.label(step) == name


def test_steps_stand_behind_blank_lines_inside_think(model, text):
    ids, n_prompt = text
    found = vectors.steps(model, ids, n_prompt)
    texts = model.tokenizer.token_texts
    inside = sentences.thinking(ids, model.vocabulary)
    assert len(found) > 20
    for step in found:
        assert "\n\n" in texts[ids[step.before]]
        assert inside[step.before + 1]
        assert "\n\n" not in step.text.rstrip("\n")
    # Every blank line inside, but for the last, begins a step, and nothing else does.
    blanks = [t for t in range(len(ids) - 1) if "\n\n" in texts[ids[t]] and inside[t + 1]]
    assert [step.before for step in found] == blanks
    joined = "".join(texts[i] for i in ids)
    assert all(step.text in joined for step in found)


def test_a_text_without_think_begins_to_think_behind_its_prompt(model, text):
    ids, n_prompt = text
    opening = model.tokenizer.encode("<think>", add_special_tokens=False)
    at = ids.index(opening[-1])
    bare = ids[:at] + ids[at + 1 :]
    wanted = [s.text for s in vectors.steps(model, ids, n_prompt)]
    assert [s.text for s in vectors.steps(model, bare, at)] == wanted
    # A prompt may speak of </think>, or hold an earlier turn's.
    close = model.tokenizer.encode("</think>", add_special_tokens=False)
    assert [s.text for s in vectors.steps(model, bare[:1] + close + bare[1:], at + len(close))] == wanted


def test_extraction_is_the_difference_of_the_means(model, text):
    ids, n_prompt = text
    found = vectors.extract(model, [text, text], [1, 3], progress=False)
    steps = vectors.steps(model, ids, n_prompt)
    states = model.hidden(ids, [1, 3])
    labels = np.array([vectors.label(step.text) == "execution" for step in steps])
    before = np.array([step.before for step in steps])
    for i, layer in enumerate((1, 3)):
        expected = states[i, before[labels]].mean(0) - states[i, before[~labels]].mean(0)
        assert np.allclose(found.vectors[layer], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert found.counts["execution"] == 2 * labels.sum() and sum(found.counts.values()) == 2 * len(steps)
    assert found.norms[3][0] == pytest.approx(np.linalg.norm(found.vectors[3]), rel=1e-5)


def test_hidden_states_equal_the_reference(model, text):
    ids = text[0][:60]
    cache = spec.Cache(tiny_decoder().config)
    tiny_decoder().forward(cache, ids)
    got = model.hidden(ids, [0, 2, model.config.n_layers])
    for mine, theirs in zip(got, (cache.entering[0], cache.entering[2], cache.hidden), strict=True):
        assert np.abs(mine - theirs).max() <= 1e-4 * np.abs(theirs).max()
    some = model.hidden(ids, [2], positions=[5, 59, 5])
    assert np.array_equal(some[0], got[1][[5, 59, 5]])


def test_texts_without_rechecks_are_refused(model):
    with refused("texts: expected steps of execution and of re-checking, found 1 and 0"):
        vectors.extract(model, [(model.encode("Dot = 9.\n\nLeo = 4."), 1)], [1], progress=False)


def test_a_vector_of_our_own_shortens_the_thinking(model):
    texts = model.generate([p["prompt"] for p in draw(4, "calibration")], progress=False)
    ids = [(out.prompt_tokens + out.tokens, len(out.prompt_tokens)) for out in texts]
    vector = vectors.extract(model, ids, [3], progress=False).vectors[3]
    asked = draw(4)
    plain, steered = (
        model.generate([p["prompt"] for p in asked], steering=steering, progress=False)
        for steering in (None, Steering(vector, 3, alpha=0.75, gamma=0.0))
    )
    for a, b, problem in zip(plain, steered, asked, strict=True):
        assert b.stats.steered > 5 and b.stats.thoughts < a.stats.thoughts
        assert len(b.tokens) < 0.8 * len(a.tokens)
        assert f"\\boxed{{{problem['answer']}}}" in b.text


@pytest.mark.parametrize("problem", range(5))
def test_the_reference_writes_the_same_text_under_skipkv_with_steering(model, problem):
    steering = Steering.load("tiny", alpha=0.75, gamma=0.01)
    prompt = model.encode(draw(problem + 1)[problem]["prompt"])
    parameters = dict(budget=90, interval=32, tau=0.8, protect="prompt")
    ours = model.generate(
        [prompt], skipkv.SkipKV(**parameters), steering, max_new_tokens=700, cache="f32", progress=False,
    )[0]  # fmt: skip
    theirs, _ = spec.generate(
        tiny_decoder(), prompt, 700, spec.Method("skipkv", **parameters),
        spec.Steering(steering.vector, steering.layer, alpha=0.75, gamma=0.01),
        stop=model.stop_ids, texts=model.tokenizer.token_texts,
    )  # fmt: skip
    assert ours.stats.steered > 3 and ours.stats.compactions > 2
    assert ours.tokens == theirs


def test_vectors_round_trip_with_their_story(tmp_path, model, text, capsys):
    path = tmp_path / "v.safetensors"
    found = vectors.extract(model, [text], [1, 2], progress=False)
    found.save(path, "tiny")
    stored, metadata = load_vectors(path)
    assert all(np.array_equal(stored[layer], found.vectors[layer]) for layer in (1, 2))
    assert metadata["model"] == "tiny" and json.loads(metadata["counts"]) == found.counts
    assert main(["steer", "show", "tiny"]) == 0 and "layer 3: norm" in capsys.readouterr().out
    assert main(["steer", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    said = ("layer 1: norm", "cosine between layers", f"{found.counts['execution']} execution", "reflection: Wait")
    assert all(words in shown for words in said)
    assert main(["steer", "show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == found.counts
    steering = parse_steering(f"{path},layer=2,alpha=0.5,scope=all")
    assert (steering.layer, steering.alpha, steering.scope) == (2, 0.5, "all")
    with pytest.raises(ConfigError, match="layer is None; allowed: one of 1, 2"):
        Steering.load(path)
    with pytest.raises(ConfigError, match="layer is 7; allowed: 1, 2"):
        Steering.load(path, 7)


@pytest.mark.parametrize("key, value, message", [
    ("counts", "{", "invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ("counts", "[]", "expected a JSON object, found []"),
    ("counts", '{"execution": "many"}', "'execution': expected an integer, found 'many'"),
    *(("norms", json.dumps({"1": v}), f"'1': expected three numbers, found {v}")
      for v in ([1.0], [1.0, 2.0, "3"], [1.0, 2.0, 10**400], 5)),
    *(("examples", json.dumps({"a": v}), f"'a': expected a list of texts, found {v}") for v in ([1], 5)),
])  # fmt: skip
def test_a_story_that_is_malformed_is_refused(tmp_path, skip, key, value, message):
    path = tmp_path / "v.safetensors"
    save_vectors(path, {1: np.ones(2)}, {key: value})
    for more in ([], ["--json"]):
        status, out, said = skip("steer", "show", path, *more)
        assert (status, out) == (2, "") and said.startswith(f"skipkv: {path}: {key}: ")
        assert said.split(": ", 3)[3].strip()[:60] == message[:60]


def test_layers_whose_states_are_the_same_at_all_blank_lines_are_left_out(model, text):
    with pytest.warns(UserWarning, match="before layers 0 are the same at all blank lines; these are left out"):
        assert list(vectors.extract(model, [text], [0, 1], progress=False).vectors) == [1]
    with refused("the states before layers 0 are the same at all blank lines; "
                 "allowed: at least one layer where they differ"):  # fmt: skip
        vectors.extract(model, [text], [0], progress=False)


def test_extract_on_the_command_line_from_traces_and_problems(tmp_path, capsys):
    traces = tmp_path / "traces.jsonl"
    body = "So x = 3.\n\nWait, x = 4.\n\nNow y = 2.\n\nAlternatively, y = 1.\n\n"
    traces.write_text(json.dumps({"prompt": "", "output": "<think>\n" + body + "</think>"}) + "\n")
    out = tmp_path / "v.safetensors"
    end = ["-o", str(out), "--quiet"]
    if SMOLLM2.exists():
        assert main(["steer", "extract", str(SMOLLM2), "--traces", str(traces), "--layers", "5", *end]) == 0
        # The first step has no blank line before it.
        assert json.loads(load_vectors(out)[1]["counts"]) == {"execution": 1, "reflection": 1, "transition": 1}
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps(draw(1)[0]) + "\n")
    assert main(["steer", "extract", "tiny", "--problems", str(problems), "--layers", "all", *end]) == 0
    vectors = load_vectors(out)[0]
    assert sorted(vectors) == [1, 2, 3]  # one token ends all blank lines: layer 0 tells nothing
    content = draw(1)[0]["prompt"].removeprefix("<s><|user|>").removesuffix("<|assistant|><think>\n")
    problems.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
    assert main(["steer", "extract", "tiny", "--problems", str(problems), "--layers", "all", *end]) == 0
    assert all(np.array_equal(vectors[layer], found) for layer, found in load_vectors(out)[0].items())
    problems.write_text("{}\n")
    assert main(["steer", "extract", "tiny", "--problems", str(problems), *end]) == 2
    assert "line 1: expected an object with a prompt, messages or a problem" in capsys.readouterr().err


def test_files_that_are_no_vectors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_vectors(path, {}, {})
    with pytest.raises(CheckpointError, match="expected at least one vector, all of one length, found none"):
        load_vectors(path)
    save_vectors(path, {1: np.ones(2), 2: np.ones(3)}, {})
    with pytest.raises(CheckpointError, match="expected at least one vector, all of one length, found 2, 3"):
        load_vectors(path)
    raw = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(CheckpointError, match=r"expected tensors layer.N of F32 \[hidden\], found 'w' F32 \[1\]"):
        load_vectors(path)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_released_tensors_are_read_without_torch(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.arange(6.0).to(getattr(torch, dtype)))
    torch.save(parameter, tmp_path / "v.pt")
    assert np.array_equal(vectors.read_torch_tensor(tmp_path / "v.pt"), np.arange(6))
    values = torch.randn(12, generator=torch.Generator().manual_seed(3)).to(getattr(torch, dtype))
    torch.save(values[2:10:2], tmp_path / "v.pt")  # a view with offset and stride
    assert np.array_equal(vectors.read_torch_tensor(tmp_path / "v.pt"), values[2:10:2].float().numpy())
    out = tmp_path / "v.safetensors"
    torch.save(values.reshape(1, 12), tmp_path / "v.pt")
    assert main(["steer", "import", str(tmp_path / "v.pt"), "--layer", "20", "-o", str(out)]) == 0
    assert np.array_equal(load_vectors(out)[0][20], -values.float().numpy())


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def archive(path, payload):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("v/data.pkl", payload)


@pytest.mark.parametrize("value, message", [
    (Evil((print, ("run",))), "expected a tensor, found builtins.print"),
    (Evil((exec, ("raise SystemExit",))), "expected a tensor, found builtins.exec"),
    ({"a": 1}, "expected one tensor, found dict"),
    ([1, 2], "expected one tensor, found list"),
])  # fmt: skip
def test_pickles_that_are_no_tensors_run_nothing(tmp_path, capsys, value, message):
    archive(tmp_path / "v.pt", pickle.dumps(value))
    with refused(f"{tmp_path / 'v.pt'}: {message}", CheckpointError):
        vectors.read_torch_tensor(tmp_path / "v.pt")
    assert capsys.readouterr().out == ""


def test_damaged_archives_are_refused(tmp_path):
    path = tmp_path / "v.pt"
    path.write_bytes(b"\x80\x02junk")
    with pytest.raises(CheckpointError, match="expected a zip archive of torch.save"):
        vectors.read_torch_tensor(path)
    archive(path, b"\x80\x02")
    with pytest.raises(CheckpointError, match="expected a tensor of torch.save"):
        vectors.read_torch_tensor(path)


@pytest.mark.parametrize("payload, found", [
    (b"\x80\x02Np999999999\n.", "a pickle of 15 bytes with a memo of 999999999 places"),
    (b"\x80\x02K\x01" + b"2\x86" * 60 + b".", "a pickle with one part in several places"),
    (b"\x80\x02)" + b"q\0h\0\x86" * 60 + b".", "a pickle with one part in several places"),
])  # fmt: skip
def test_a_small_pickle_does_not_become_large(tmp_path, payload, found):
    archive(tmp_path / "v.pt", payload)
    with refused(f"{tmp_path / 'v.pt'}: expected a tensor of torch.save: {found}", CheckpointError):
        vectors.read_torch_tensor(tmp_path / "v.pt")


def test_a_tensor_beyond_its_storage_is_refused():
    storage = np.arange(4, dtype=np.float32)
    assert np.array_equal(_rebuild(storage, 1, (3,), (1,)), [1, 2, 3])
    for offset, shape, stride in ((2, (3,), (1,)), (0, (2, 2), (3, 1)), (0, (2,), (-1,))):
        with pytest.raises(ValueError, match="beyond its storage"):
            _rebuild(storage, offset, shape, stride)
