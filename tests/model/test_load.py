"""Loading: what it costs, what it refuses, what it leaves alone, and models beside each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import LLAMA, write, write_tokenizer
from generations import PROBLEMS
from harness import TINY, VARIANTS, refused

import skipkv
from skipkv import _skipkv, engine
from skipkv.load.config import ModelConfig

SOURCE = str(Path(skipkv.__file__).parents[1])


def run(code, *arguments, **environment):
    """Standard output of a fresh interpreter."""
    environment = os.environ | {"PYTHONPATH": SOURCE} | {key: str(value) for key, value in environment.items()}
    command = [sys.executable, "-B", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


BIG = LLAMA | dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=16384,
)  # fmt: skip
PEAK = """
import sys, skipkv
def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key + ":"))
skipkv.load("tiny", progress=False)  # libraries, threads
before = kilobytes("VmRSS")
model = skipkv.load(sys.argv[1], progress=False)
print(model.dtype, (kilobytes("VmHWM") - before) * 1024, (kilobytes("VmRSS") - before) * 1024)
"""


@pytest.fixture(scope="module", params=[1, 3], ids=["one file", "shards"])
def big(request, tmp_path_factory):
    """A bf16 checkpoint of about 200 MB: directory, its bytes, those of its largest tensor."""
    directory = tmp_path_factory.mktemp("big")
    (directory / "config.json").write_text(json.dumps(BIG))
    config = ModelConfig.from_json(directory / "config.json")
    block = (np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * 0.1).view(np.uint16)[1::2]
    tensors = {
        name: ("BF16", shape, np.resize(block, shape).tobytes()) for name, shape, _ in _skipkv.tensors(config.as_dict())
    }
    write(directory, BIG, tensors, shards=request.param)
    write_tokenizer(directory, 16)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert size > 180e6
    return directory, size, max(len(raw) for _, _, raw in tensors.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_holds_the_weights_about_once(big):
    directory, size, largest = big
    dtype, peak, after = run(PEAK, directory).split()
    assert dtype == "bf16"
    # A tensor is held twice while it is packed; two copies of everything would be 2 x size.
    assert 0.95 * size < int(peak) < 1.1 * size + largest
    assert 0.95 * size < int(after) < 1.1 * size  # and of the file nothing stays


def test_the_environment_forces_a_variant(variant, capsys):
    model = skipkv.load("tiny", threads=2)
    assert model._core.variant == variant and variant in repr(model)
    # name, parameters, bytes
    expected = f"tiny: llama, 2.5 M parameters, 5.0 MB as bf16, {variant}, 2 threads\n"
    assert capsys.readouterr() == ("", expected)
    skipkv.load("tiny", threads=2, progress=False)
    assert capsys.readouterr() == ("", "")
    # Two bytes a weight, and four in the 9 norms of 256; the kernels pad the vocabulary to whole blocks of rows.
    assert 0 <= model._core.n_bytes - (2 * 2479872 + 2 * 9 * 256) <= 2 * 256 * 64


def test_threads_are_no_more_than_processors(monkeypatch, tmp_path):
    """Those of the affinity, or what the control group's share of their time comes to, rounded up."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(engine, "CGROUP", tmp_path)
    (tmp_path / "cpu").mkdir()

    def found(*counts, **files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".", 1).replace("cpu.cfs", "cpu/cpu.cfs")).write_text(text)
        assert [engine.cpu_count(), engine.count_threads(None), engine.count_threads(2)] == list(counts)

    found(6, 6, 2)
    found(6, 6, 2, cpu_cfs_quota_us="-1\n", cpu_cfs_period_us="100000\n")
    found(3, 3, 2, cpu_cfs_quota_us="250000\n", cpu_cfs_period_us="100000\n")
    found(3, 3, 2, cpu_max="max 100000\n")
    found(2, 2, 2, cpu_max="150000 100000\n")
    found(6, 6, 2, cpu_max="10000000 100000\n")
    (tmp_path / "cpu.max").unlink()
    with pytest.warns(UserWarning, match="^threads is 1024, but this process has 3 processors: 3 compute$"):
        assert skipkv.load("tiny", threads=1024, progress=False).threads == 3


@pytest.mark.sanitize
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="limits processes as Linux does")
def test_threads_that_cannot_be_started_are_refused():
    """Where a session opens, or limits are measured; fewer threads still compute."""
    assert run(STARTED) == "ok\n"


STARTED = """
import resource
import skipkv

model = skipkv.load("tiny", threads=1, progress=False)
ids = model.encode("Kim")
alone = model.logits(ids)
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (40 << 20)
resource.setrlimit(resource.RLIMIT_STACK, (16 << 20, resource.RLIM_INFINITY))  # of a thread
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
model.threads = 1024
for call in (lambda: model.logits(ids), lambda: model._core.limits(1 << 20, 1024)):
    try:
        call()
        print("computed")
    except skipkv.CapacityError as error:
        said, started = str(error).rsplit(" ", 1)
        assert said == "threads is 1024, of which this process may start" and 0 < int(started) < 99, error
model.threads = 1
assert (model.logits(ids) == alone).all()
print("ok")
"""


def test_the_best_variant_is_the_default(monkeypatch):
    monkeypatch.delenv("SKIPKV_CPU", raising=False)
    model = skipkv.load("tiny", progress=False)
    best_first = "avx512bf16", "avx512vnni", "avx512", "avx2", "generic"
    assert model._core.variant == next(name for name in best_first if name in VARIANTS)


def test_an_unknown_variant_is_refused(monkeypatch):
    monkeypatch.setenv("SKIPKV_CPU", "sse9")
    with refused('CPU variant "sse9" is unknown; allowed: generic, avx2, avx512, avx512vnni, avx512bf16'):
        skipkv.load("tiny", progress=False)


@pytest.mark.parametrize("stored, auto", [("BF16", "bf16"), ("F16", "f32"), ("F32", "f32")])
def test_auto_follows_the_file(tmp_path, stored, auto):
    write(tmp_path, dtype=stored)
    write_tokenizer(tmp_path, 40)
    sizes = {}
    for dtype in ("auto", "bf16", "f32"):
        model = skipkv.load(tmp_path, dtype=dtype, progress=False)
        assert model.dtype == (auto if dtype == "auto" else dtype) and model.name == tmp_path.name
        sizes[dtype] = model._core.n_bytes
    assert sizes["auto"] == sizes[auto] and sizes["bf16"] < sizes["f32"]


def test_half_precision_is_widened_without_loss(tmp_path):
    """A bf16 file gives the same logits as bf16 and as f32: every product is one of float32 numbers."""
    write(tmp_path)
    write_tokenizer(tmp_path, 40)
    ids = np.random.default_rng(0).integers(0, 40, 100).tolist()
    narrow, wide = (skipkv.load(tmp_path, dtype=dtype, progress=False).logits(ids) for dtype in ("bf16", "f32"))
    assert np.abs(narrow - wide).max() <= 1e-5 * np.abs(wide).max()


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("tied", [True, False])
def test_q8_is_made_of_any_file(tmp_path, stored, tied):
    write(tmp_path, dtype=stored, tie_word_embeddings=tied)
    write_tokenizer(tmp_path, 40)
    ids = np.random.default_rng(0).integers(0, 40, 100).tolist()
    small, wide = (skipkv.load(tmp_path, dtype=dtype, progress=False) for dtype in ("q8", "f32"))
    logits, wanted = small.logits(ids), wide.logits(ids)
    assert small.dtype == "q8" and 1e-3 < np.abs(logits - wanted).max() / np.abs(wanted).max() < 0.1
    assert small._core.n_bytes < wide._core.n_bytes


def test_q8_takes_34_bytes_for_32_weights():
    core = skipkv.load("tiny", dtype="q8", progress=False)._core
    matrices, norms = 2479872 / 32 * 34, 4 * 9 * 256
    assert 0 <= core.n_bytes - (matrices + norms) <= 2 * 256 * 64


def test_no_tensor_is_stored_as_q8():
    core = _skipkv.Model(ModelConfig.from_json(TINY / "config.json").as_dict())
    with refused('dtype is "q8"; allowed: f32, bf16, f16'):
        core.bind("model.norm.weight", "q8", (256,), np.zeros(256, np.uint8), 1)


WATCH = """
import os, signal, sys
written, connected = [], []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(arguments[0])
    if event.startswith("socket.connect") or event in ("subprocess.Popen", "os.mkdir", "os.rename", "os.remove"):
        connected.append((event, arguments))
sys.addaudithook(watch)
import threading
environment, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
import skipkv
assert threading.active_count() == 1
{then}
assert dict(os.environ) == environment and signal.getsignal(signal.SIGINT) is handler
heavy = {{"torch", "transformers", "matplotlib", "datasets", "ray", "accelerate"}} & set(sys.modules)
assert not (heavy or written or connected), (heavy, written, connected)
"""


USE = 'skipkv.load("tiny", progress=False).generate("1", max_new_tokens=2, progress=False)'


@pytest.mark.oracle
@pytest.mark.parametrize("then", ["", USE], ids=["import", "use"])
def test_importing_changes_nothing_outside(tmp_path, monkeypatch, then):
    monkeypatch.chdir(tmp_path)
    assert run(WATCH.format(then=then), HOME=tmp_path, XDG_CACHE_HOME=tmp_path, HF_HOME=tmp_path / "hub") == ""
    assert not list(tmp_path.iterdir())


def test_a_hub_id_is_found_in_the_local_cache_offline(tmp_path):
    pytest.importorskip("huggingface_hub")
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--skipkv-test--small"
    snapshot = cached / "snapshots" / revision
    tensors = write(cached / "written", shards=2)
    write_tokenizer(cached / "written", 40)
    # As the hub's client lays it out: files are links to blobs.
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for i, file in enumerate(sorted((cached / "written").iterdir())):
        file.rename(cached / "blobs" / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    code = """
import skipkv
model = skipkv.load("skipkv-test/small")
print(model.name, model.generate([[1, 2]], max_new_tokens=3, stop_ids=(), progress=False)[0].tokens)
"""
    out = run(code, HF_HUB_OFFLINE=1, HF_HOME=tmp_path)
    for i, file in enumerate(sorted(path.name for path in snapshot.iterdir())):
        (tmp_path / file).write_bytes((cached / "blobs" / f"blob{i}").read_bytes())
    expected = skipkv.load(tmp_path, progress=False).generate([[1, 2]], max_new_tokens=3, stop_ids=(), progress=False)
    assert out == f"skipkv-test/small {expected[0].tokens}\n" and len(tensors) > 10


def test_tokens_that_the_embedding_has_no_rows_for(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    config = json.loads((TINY / "config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    moved = {"</think>": 231, "</s>": 240}
    tokenizer["model"]["vocab"] |= moved
    for token in tokenizer["added_tokens"]:
        token["id"] = moved.get(token["content"], token["id"])
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    model = skipkv.load(tmp_path, threads=1, progress=False)
    assert model.stop_ids == frozenset() and model.end_of_thinking == []
    for method in ("skipkv:budget=40,interval=32", "skipkv:budget=40,interval=32,compat=official"):
        [out] = model.generate(PROBLEMS[0], method, max_new_tokens=60, brake=1, progress=False)
        assert len(out.tokens) == 60 and out.stats.compactions
    with refused("text: expected ids below 231, the rows of the embedding, found 231 ('</think>')"):
        model.generate(["Dot", "Dot</think>"], progress=False)
    with refused("prompt 0 holds token 231; allowed: 0 to 230"):
        model.generate([[5, 231]], progress=False)
