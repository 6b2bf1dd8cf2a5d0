"""Devices: what is found, what is missing, and models on the CUDA backend, which tests/simt runs on the CPU."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import devices
import harness
import numpy as np
import pytest
from generations import PROBLEMS, VECTOR, make, run, running, same, work_of
from harness import ALL, SHARING, TINY, refused

import skipkv
from skipkv import Steering, _skipkv
from skipkv.devices import every, find
from skipkv.engine import Row, chunks
from skipkv.methods import NEEDS

ABOUT = "SIMT on the host, 8.6 GB"
NO_DEVICE = "no CUDA device: no CUDA-capable device is detected"


@pytest.fixture
def simt(monkeypatch):
    """Path of the backend on the host runtime, which skipkv finds."""
    path = devices.library("simt")
    monkeypatch.setenv("SKIPKV_CUDA_LIBRARY", path)
    return path


def load(device="cuda", **options):
    return skipkv.load("tiny", device, **({"dtype": "f32", "threads": 1, "progress": False} | options))


def cuda():
    """What `every` says of CUDA."""
    return [(row["device"], row["usable"], row["about"]) for row in every() if row["device"] != "cpu"]


def missing(message):
    """Loading is refused with this sentence, and the list of devices has it."""
    with refused(f"device is 'cuda': {message}", skipkv.BackendError):
        load()
    assert cuda() == [("cuda", False, message)]


def test_the_variants_of_the_cpu_are_listed():
    found = {row.pop("variant"): row for row in every() if row["device"] == "cpu"}
    assert found.keys() == _skipkv.variants().keys()
    assert found["generic"] == {"device": "cpu", "usable": True, "about": ""}
    lacks = "this processor lacks the instructions"
    assert all(row["about"] == ("" if row["usable"] else lacks) for row in found.values())


def test_a_build_without_the_backend_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("SKIPKV_CUDA_LIBRARY", raising=False)
    monkeypatch.setattr("skipkv.devices.__file__", str(tmp_path / "devices.py"))
    how = "with nvcc and cuBLAS's headers at hand, pip install --no-build-isolation --no-deps -e . makes one"
    missing(f"this build has no CUDA backend; {how}")
    (tmp_path / "_skipkv_cuda98.so").touch()
    missing('libcublas.so.98: not found (pip install "nvidia-cublas==98.*")')


def test_a_library_that_is_no_backend_is_refused(monkeypatch, tmp_path):
    for path, words in ((_skipkv.__file__, "no backend of skipkv"), (tmp_path / "none.so", "cannot open")):
        monkeypatch.setenv("SKIPKV_CUDA_LIBRARY", str(path))
        with pytest.raises(skipkv.BackendError, match=f"^device is 'cuda': {path}: .*{words}"):
            load()
        [(name, usable, about)] = cuda()
        assert (name, usable) == ("cuda", False) and about.startswith(f"{path}: ") and words in about


@pytest.mark.parametrize("place", ["LD_LIBRARY_PATH", "CUDA_HOME", "wheel"])
def test_cublas_is_found_where_it_may_lie(place, tmp_path):
    """Both of its libraries, and their symbols are there for a backend that comes later; a broken one is named."""
    root, folder = tmp_path, {"CUDA_HOME": "lib64", "wheel": "nvidia/cu97/lib"}.get(place, ".")
    (root / folder).mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if place == "wheel":
        environment["PYTHONPATH"] += f"{os.pathsep}{root}"
    else:
        environment[place] = str(root)
    backend = root / "_skipkv_cuda97.so"
    for name, code in (("libcublas.so.97", "int cublas_of_test(void) { return 97; }"),
                       ("libcublasLt.so.97", "int lt_of_test;"),
                       (backend.name, "int cublas_of_test(void); int skv_cuda_backend(void) "
                                      "{ return cublas_of_test() == 97 ? 0 : *(volatile int *)0; }")):  # fmt: skip
        where = root / ("." if name == backend.name else folder) / name
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", where]
        subprocess.run(command, input=code, text=True, check=True)
    environment["SKIPKV_CUDA_LIBRARY"] = str(backend)
    command = [sys.executable, "-c", "import skipkv; skipkv.load('tiny', 'cuda', progress=False)"]

    def last_line():
        return subprocess.run(command, env=environment, capture_output=True, text=True).stderr.splitlines()[-1]

    assert last_line().endswith(f"device is 'cuda': {backend}: built for another version of skipkv; build both again")
    (root / folder / "libcublas.so.97").write_text("no library")  # what the loader skips in its own path
    found = "not found" if place == "LD_LIBRARY_PATH" else f"{root / folder}/libcublas.so.97: "
    assert found in last_line() and last_line().endswith('(pip install "nvidia-cublas==97.*")')


def test_the_cpu_needs_nothing_of_cuda():
    code = """
import skipkv
skipkv.load("tiny", progress=False).generate("1", max_new_tokens=2, progress=False)
assert not [line for line in open("/proc/self/maps") if "cuda" in line or "cublas" in line]
"""
    environment = os.environ | {"PYTHONPATH": str(Path(skipkv.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# On the host runtime


@pytest.mark.simt
def test_without_a_device_the_driver_says_why(simt, monkeypatch):
    monkeypatch.setenv("SIMT_DEVICES", "0")
    assert cuda() == [("cuda:0", False, NO_DEVICE)]
    for device in ("cuda", "cuda:0", "cuda:1"):
        with refused(f"device is {device!r}: {NO_DEVICE}", skipkv.BackendError):
            load(device)
    config = load("cpu").config.as_dict()
    for variant, message in ((None, NO_DEVICE), ("cuda:0", f'device "cuda:0": {NO_DEVICE}')):
        with refused(message, skipkv.BackendError):
            _skipkv.Model(config, "f32", variant, simt)


@pytest.mark.simt
@pytest.mark.parametrize("n", [1, 2, 20])
def test_devices_are_those_that_there_are(simt, monkeypatch, n):
    monkeypatch.setenv("SIMT_DEVICES", str(n))
    names = [f"cuda:{i}{kind}" for i in range(min(n, 16)) for kind in ("", ":deterministic")]
    assert cuda() == [(name, True, ABOUT) for name in names]
    assert [find(name) for name in ("cuda", *names)] == [(name, simt) for name in ("cuda:0", *names)]
    for device in (f"cuda:{min(n, 16)}", "cuda:00"):
        with refused(f"device is {device!r}: usable here: {', '.join(names)}", skipkv.BackendError):
            load(device)


@pytest.mark.simt
@pytest.mark.parametrize("device, name", [("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_device_computes_what_the_cpu_does(simt, monkeypatch, capsys, device, name):
    monkeypatch.setenv("SIMT_DEVICES", "2")
    model = load(device, progress=True)
    assert capsys.readouterr().err == f"tiny: llama, 2.5 M parameters, 9.9 MB as f32, {name}, 1 threads\n"
    assert repr(model).endswith(f" bytes, {name}>")
    texts = [
        each.generate(PROBLEMS[0], "skipkv:budget=40,interval=16", max_new_tokens=30, progress=False)[0].text
        for each in (model, load("cpu"))
    ]
    assert texts[0] == texts[1]


@pytest.mark.simt
def test_a_device_says_which_types_of_weights_it_has(simt):
    with refused('dtype is "q8"; allowed on cuda:0: f32, bf16'):
        load(dtype="q8")


@pytest.mark.simt
def test_the_command_line_takes_a_device(simt, skip, monkeypatch):
    argv = ["generate", "tiny", "--dtype", "f32", "--threads", 1, "--problem", 0, "--max-new-tokens", 20, "--quiet"]
    assert skip(*argv, "--device", "cuda") == skip(*argv)
    monkeypatch.setenv("SIMT_DEVICES", "0")
    assert skip(*argv, "--device", "cuda") == (2, "", f"skipkv: device is 'cuda': {NO_DEVICE}\n")
    status, out, _ = skip("bench", "--random-weights", "smollm2-135m", "--device", "cuda")
    assert (status, out) == (2, "")
    status, out, _ = skip("devices")
    assert (status, out.splitlines()[-1].split(None, 2)) == (0, ["cuda:0", "no", NO_DEVICE])
    assert json.loads(skip("devices", "--json")[1]) == every()


# ---------------------------------------------------------------------------------------------------------------------
# Generations and their replay, on the host runtime or a device


FAMILIES = [checkpoints.LLAMA, checkpoints.QWEN2, checkpoints.QWEN3, checkpoints.MISTRAL,
            checkpoints.SMOLLM3 | {"no_rope_layers": [1, 0]}]  # fmt: skip
NEAR = {"f32": (1e-4, 1e-4), "bf16": (5e-2, 2e-2)}  # of scores and of log-probabilities; bf16: beside a rounding's edge
# A family and a cache each; heads that share their budgets keep all slots in memory, or do as the published code does.
RUNS = [*((name, {}) for name in ALL),
        *((name, ({"evict": False}, {"compat": "official"})[i % 2]) for i, name in enumerate(SHARING))]  # fmt: skip
SELECTIONS = [0, 0]  # all, and those that a near tie decided


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of every family, whose texts are lively."""
    directories = []
    for base in FAMILIES:
        directories.append(tmp_path_factory.mktemp(base["model_type"]))
        base = base | {"hidden_size": 32, "vocab_size": 231, "max_position_embeddings": 512}
        config, rng, tensors = checkpoints.read(directories[-1], base), np.random.default_rng(3), {}
        for name, shape, _ in _skipkv.tensors(config.as_dict()):
            values = rng.normal(1.0 * ("norm" in name), 0.3, shape)
            tensors[name] = "F32", shape, values.astype(np.float32).tobytes()
        checkpoints.write(directories[-1], base, tensors)
        shutil.copy(TINY / "tokenizer.json", directories[-1])
    return directories


@pytest.fixture(params=devices.params(devices.DEVICES))
def device(request, monkeypatch):
    monkeypatch.setenv("SKIPKV_CUDA_LIBRARY", devices.library(request.param))
    monkeypatch.setenv("SKIPKV_CPU", "generic")


def first_difference(got, want, rtol, size):
    """How many tokens were fed when a kept set first differed, which must follow from a near tie (METHOD §9)."""
    both = [*zip(got.compactions, want.compactions, strict=True)]
    SELECTIONS[0] += len(both)
    for c, w in both:
        if np.array_equal(c.kept, w.kept):
            continue
        heads = [(c, w)]
        if want.method.allocate == "layer":
            heads = [pair for pair in both if (pair[1].step, pair[1].layer) == (w.step, w.layer)]
        held = [[*want.held(w.step - 1, w.layer, head.head), w.step - 1] for _, head in heads]
        kept, wanted = (
            [np.searchsorted(slots, head.kept) for slots, head in zip(held, side, strict=True)]
            for side in zip(*heads, strict=True)
        )
        scores, no_keys = [head.scores for _, head in heads], [np.eye(2)]
        verdict = harness.judge_layer(scores, kept, wanted, no_keys, rtol, 0, size)
        assert verdict != "different"
        SELECTIONS[1] += verdict == "near"
        return w.step
    return len(want.tokens)


@pytest.mark.filterwarnings("ignore:.*steered no token", "ignore:.*never compacted")
@pytest.mark.parametrize("i", range(len(RUNS)), ids=lambda i: "-".join([RUNS[i][0], *map(str, RUNS[i][1].values())]))
def test_generations_and_replays_are_the_cpus(device, written, i):
    """Greedy texts of a batch whose rows begin at different lengths, steered and not; the longest one fed again."""
    (name, options), cache = RUNS[i], ("f32", "bf16")[i // len(FAMILIES) % 2]
    scores, logprobs = NEAR[cache]
    method, prompts = make(name, **options), [PROBLEMS[0], PROBLEMS[3] * 2, "1"]
    steering = [Steering(harness.VECTOR, 1, scope="all"), None, Steering(-harness.VECTOR, 0, scope="generation")]
    outs, replays = [], []
    for where in ("cuda", "cpu"):
        model = skipkv.load(written[i % len(FAMILIES)], where, dtype="f32", threads=1, progress=False)
        recorded = {"cache": cache, "trace": "scores"}
        outs.append(run(model, prompts, method, steering, max_new_tokens=100, stop_ids=(), **recorded))
        text, n_prompt = outs[0][1].prompt_tokens + outs[0][1].tokens, len(outs[0][1].prompt_tokens)
        replays.append(model.replay(text, method, n_prompt=n_prompt, sequence=(1, 0), **recorded))
    assert all(out.stats.compactions > 0 for out in outs[1]) == (name != "full")
    for got, want in zip(*outs, strict=True):
        end = first_difference(got.trace, want.trace, scores, harness.SIZE.get(name, 0))
        assert got.trace.tokens[: end + 1] == want.trace.tokens[: end + 1] and len(set(want.tokens)) > 9
    end = first_difference(*(replay.trace for replay in replays), scores, harness.SIZE.get(name, 0))
    assert np.abs(replays[0].logprobs - replays[1].logprobs)[:end].max() <= logprobs
    assert SELECTIONS[1] <= max(2, 0.001 * SELECTIONS[0])


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def used(simt):
    """Bytes of the device that are taken."""
    available, total = ctypes.c_size_t(), ctypes.c_size_t()
    ctypes.CDLL(simt).cudaMemGetInfo(ctypes.byref(available), ctypes.byref(total))
    return total.value - available.value


@pytest.mark.simt
def test_weights_that_do_not_fit_are_named_with_what_there_is(simt, monkeypatch):
    taken = used(simt)
    monkeypatch.setenv("SIMT_MEMORY", str(taken + 1000))
    asked = f"cuda:0: 4194304 bytes asked, 1000 of {taken + 1000} free"
    with refused(f'out of memory for tensor "lm_head.weight"; {asked}', skipkv.CapacityError):
        load()


COUNTED = "pool_bytes", "ring_bytes", "sentence_bytes", "workspace_bytes"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.simt)])
@pytest.mark.parametrize("text", ["full", "skipkv:budget=40,interval=16,compat=official", "h2o:budget=40,interval=16",
                                  "rkv:budget=40,interval=16,evict=false"])  # fmt: skip
def test_the_ledger_counts_what_rows_take(request, device, text):
    """And on a device no step takes more than what was counted before it."""
    if device == "cuda":
        request.getfixturevalue("simt")
    model, method = load(device), skipkv.parse_method(text)
    config, capacity = model.config, 150
    chosen = method.as_dict((config.n_layers, config.n_kv_heads))
    session = model._session(method, "f32", rows=3, tokens=64, trace=2)
    width, heads = -(-config.hidden // 16) * 16, config.n_layers * config.n_kv_heads
    floats = width + heads * 40 * ("evict=false" in text)
    if method.needs & NEEDS["queries"]:
        floats += config.n_layers * config.n_heads * config.head_dim * chosen["window"]
    ids = np.array(model.encode(PROBLEMS[0] * 4)[:capacity], np.int32)
    rows = [session.open(capacity, n_prompt=40)]
    opened, closing = session.ledger(), chosen["interval"] if "official" in text else chosen["interval"] // 2 + 1
    assert opened["ring_bytes"] == 4 * floats
    assert opened["sentence_bytes"] == 4 * width * -(-min(closing, capacity) // 16) * 16
    fixed = session.fixed_bytes(capacity, 40)
    assert fixed == (opened["workspace_bytes"] if device == "cuda" else 0)
    for part, spans in chunks(session, Row(rows[0], 40, None), ids, 64):
        session.forward(spans, ids[part])
    steering = skipkv.Steering(VECTOR[: config.hidden], 1).as_tuple()
    rows += [session.fork(rows[0], capacity, 1), session.open(capacity, n_prompt=40, steering=steering)]
    ledger = session.ledger()
    assert ledger["workspace_bytes"] == opened["workspace_bytes"] < session.ledger()["heap_bytes"]
    assert ledger["ring_bytes"] == 4 * (3 * floats + config.hidden)
    assert ledger["sentence_bytes"] > 2 * opened["sentence_bytes"]
    assert ledger["weight_bytes"] == model._core.n_bytes
    for row in rows:
        session.close(row)
    ledger = session.ledger()
    assert [ledger[name] for name in COUNTED[1:]] == [0, 0, opened["workspace_bytes"]]


@pytest.mark.simt
def test_a_limit_is_on_all_that_a_run_takes_of_a_device(simt):
    """Rows wait for it; no text changes. What never fits is refused before anything runs."""
    model, method = load(), skipkv.parse_method("skipkv:budget=18,interval=8")
    prompts, shapes = [model.encode(PROBLEMS[i])[:n] for i, n in enumerate((12, 9))], [(25, 12), (22, 9)]
    options = {"n": 2, "rows": 4, "cache": "f32", "temperature": 1.0, "max_new_tokens": 14, "stop_ids": ()}
    done, session = [], work_of(model, prompts, method, **options).session
    fixed, row = session.fixed_bytes(*max(shapes)), max(session.row_bytes(*shape) for shape in shapes)
    for fit in (1, 2.5):
        work, most = work_of(model, prompts, method, memory_limit=fixed + int(fit * row), **options), 0
        for _, now in running(work.events()):
            ledger = work.session.ledger()
            grown = ledger["sentence_bytes"] - 4 * 16 * model.config.hidden * (len(now) + bool(work.template))
            assert sum(ledger[name] for name in COUNTED) - max(0, grown) <= work.options.memory_limit
            most = max(most, len(now))
        assert most == int(fit)
        done.append(work.results())
    same(*done)
    worst = next(i for i, shape in enumerate(shapes) if session.row_bytes(*shape) == row)
    with refused(f"prompt {worst} needs {row} bytes of cache beside {fixed} of workspace; memory_limit is "
                 f"{fixed + row - 1}", skipkv.CapacityError):  # fmt: skip
        run(model, prompts, method, memory_limit=fixed + row - 1, **options)
    words = r"a session of 5 rows .* \d+ bytes for activations and \d+ for workspace; memory_limit is 1000"
    with pytest.raises(skipkv.CapacityError, match=words):
        run(model, prompts, method, memory_limit=1000, **options)


@pytest.mark.simt
def test_a_sessions_device_memory_is_all_in_its_ledger(simt):
    """cuBLAS's workspace, too; graphs of a step take none."""
    model, rows, before = load(), 6, used(simt)  # rows: more than are multiplied without cuBLAS
    session = _skipkv.Session(model._core, rows=rows, tokens=32)
    spans = np.array([(session.open(60), 1) for _ in range(rows)], np.int32)
    taken, heap = used(simt) - before, session.ledger()["heap_bytes"]
    assert 32 << 20 < taken < heap < taken + (1 << 20)
    logits = np.zeros((rows, model.config.vocab), np.float32)
    for token in range(40, 44):
        session.forward(spans, np.full(rows, token, np.int32), logits)
    assert used(simt) - before == taken


@pytest.mark.simt
@pytest.mark.parametrize("method", ["h2o:budget=64,interval=16", "skipkv:budget=64,interval=16"])
def test_a_row_that_does_not_fit_leaves_the_others_as_they_were(simt, monkeypatch, method):
    """With memory for ever more of the new row's parts; the row that there is goes on as if nobody had asked."""
    model, tokens = load(), np.arange(3, 43, dtype=np.int32)
    method = skipkv.parse_method(method).as_dict((model.config.n_layers, model.config.n_kv_heads))
    logits, messages = np.zeros((1, model.config.vocab), np.float32), []

    def feed(session, tokens):
        session.forward(np.array([[0, len(tokens)]], np.int32), tokens, logits)
        return logits.copy()

    def opened():
        session = _skipkv.Session(model._core, rows=2, tokens=32, cache="f32", method=method)
        assert session.open(100, n_prompt=16) == 0
        feed(session, tokens[:16])
        return session

    session = opened()
    wanted = [feed(session, tokens[i : i + 1]) for i in range(16, len(tokens))]
    session = opened()
    for i in range(16, len(tokens)):
        monkeypatch.setenv("SIMT_MEMORY", str(used(simt) + int(1e4 * 1.5 ** (i - 16))))
        try:
            session.close(session.open(4000, n_prompt=3000))
        except skipkv.CapacityError as error:
            messages.append(str(error))
        assert np.array_equal(feed(session, tokens[i : i + 1]), wanted[i - 16])
    assert 2 < len(messages) < len(wanted) and all(" bytes asked, " in message for message in messages)
    assert "out of memory for the workspace" in {message.partition(";")[0] for message in messages}
