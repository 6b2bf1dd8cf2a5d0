"""Weight files and configurations: whatever fuzzing finds is read, or refused."""

# ruff: noqa: E501  (a broken file and the sentence it must get stand on one line)

import json
import os
from pathlib import Path

import pytest
from checkpoints import LLAMA, LLAMA3_ROPE, check_invariants, pack, random_tensors, safetensors, write
from harness import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv import CapacityError, CheckpointError, _skipkv
from skipkv.load.checkpoint import Checkpoint, open_checkpoint
from skipkv.load.config import ROPE_KEYS, ModelConfig
from skipkv.load.texts import read_prompts
from skipkv.steering import load_vectors

pytestmark = pytest.mark.sanitize


def test_a_failed_opening_closes_its_files(tmp_path):
    write(tmp_path, shards=3)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:  # the exception's traceback keeps the half-made object alive
        open_checkpoint(tmp_path)
    if Path("/proc/self/fd").exists():
        assert not [file for file in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(file.resolve())], error


def long_lines(path, n):
    path.write_bytes(b"")
    os.truncate(path, n)  # sparse


def long_vector(path, n):
    path.write_bytes(safetensors({"layer.0": {"dtype": "F32", "shape": [n // 4], "data_offsets": [0, n]}}))
    os.truncate(path, path.stat().st_size + n)


@pytest.mark.skipif(bool(os.environ.get("LD_PRELOAD")), reason="a sanitizer takes more address space than any limit")
@pytest.mark.parametrize("make, opened", [
    (long_lines, lambda path: list(read_prompts(path))), (long_vector, load_vectors),
])  # fmt: skip
def test_what_no_memory_holds_is_named(tmp_path, make, opened):
    resource, path = pytest.importorskip("resource"), tmp_path / "a"
    make(path, 1 << 29)
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 28), before[1]))
    try:
        with refused(f"{path}: expected a file that fits into memory, found more", CapacityError):
            opened(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


MANY = os.environ.get("SKIPKV_FUZZ")
FUZZ = settings(max_examples=int(MANY or 200), deadline=None, derandomize=not MANY)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["silu", "linear", "llama3", "default", "F32", "BF16", "LlamaForCausalLM", "full_attention"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.sampled_from(list(LLAMA3_ROPE)), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    write(directory)
    return directory


def opens_or_refuses(directory):
    try:
        with Checkpoint(directory) as checkpoint:
            check_invariants(checkpoint)
    except CheckpointError as error:
        assert len(str(error)) < 1000 and str(error).isprintable()


KEYS = [
    *LLAMA, *LLAMA3_ROPE, "head_dim", "attention_bias", "mlp_bias", "rope_scaling", "rope_parameters", "layer_types",
    "use_sliding_window", "partial_rotary_factor", "pretraining_tp", "quantization_config", "sliding_window",
    "max_window_layers", "no_rope_layers", "no_rope_layer_interval", "original_max_position_embeddings",
]  # fmt: skip


@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3),
    family=st.sampled_from(sorted(_skipkv.families())),
    rope=st.none() | st.dictionaries(st.sampled_from(ROPE_KEYS), JSON | st.floats(0, 100) | st.just("yarn"), max_size=5),
)
def test_fuzzed_configs(base, changes, family, rope):
    (base / "model.safetensors").write_bytes(PACKED)
    named = {"model_type": family, "architectures": [_skipkv.families()[family]["architecture"]]}
    (base / "config.json").write_text(json.dumps(LLAMA | named | {"rope_parameters": rope} | changes))
    opens_or_refuses(base)


CONFIG = ModelConfig("llama", n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, hidden=16, ffn=24, vocab=40, context=128, norm_eps=1e-5)
PACKED = pack(random_tensors(CONFIG))
N_HEADER = int.from_bytes(PACKED[:8], "little")
HEADER = json.loads(PACKED[8 : 8 + N_HEADER])


def opens_with(base, raw):
    (base / "config.json").write_text(json.dumps(LLAMA))
    (base / "model.safetensors").write_bytes(raw)
    opens_or_refuses(base)


@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 8 + N_HEADER), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4))
def test_fuzzed_header_bytes(base, edits):
    raw = bytearray(PACKED)
    for at, cut, insert in edits:
        raw[at : at + cut] = insert
    opens_with(base, bytes(raw))


@FUZZ
@given(
    edits=st.dictionaries(st.sampled_from(list(HEADER)) | st.text(max_size=5), st.tuples(st.sampled_from(["dtype", "shape", "data_offsets", ""]), JSON), min_size=1, max_size=3)
)  # fmt: skip
def test_fuzzed_header_values(base, edits):
    header = json.loads(json.dumps(HEADER))
    for name, (key, value) in edits.items():
        if key and isinstance(header.get(name), dict):
            header[name][key] = value
        else:
            header[name] = value
    opens_with(base, safetensors(header, PACKED[8 + N_HEADER :]))


@FUZZ
@given(raw=st.binary(max_size=200), framed=st.booleans())
def test_random_bytes(base, raw, framed):
    opens_with(base, safetensors(raw) if framed else raw)
