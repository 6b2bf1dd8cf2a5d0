"""Weight files, indexes and directories: every way in which they can be wrong, and whatever else fuzzing finds."""

# ruff: noqa: E501  (a broken file and the sentence it must get stand on one line)

import json
import os
import struct
from pathlib import Path

import pytest
from checkpoints import LLAMA, LLAMA3_ROPE, check_invariants, pack, random_tensors, refusal, safetensors, write
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv import CheckpointError, _skipkv
from skipkv.load.checkpoint import Checkpoint, open_checkpoint
from skipkv.load.config import ROPE_KEYS, ModelConfig

pytestmark = pytest.mark.sanitize


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


A, B = entry(), entry(offsets=(4, 8))
MODEL = "DIR/model.safetensors: "
NO_ENTRY = MODEL + "tensor 'a': expected an object of dtype, shape and data_offsets, found "
SHAPE, OFFSETS = MODEL + "tensor 'a': shape: expected ", MODEL + "tensor 'a': data_offsets: expected "
BAD_FILES = [
    (b"", MODEL + "expected 8 bytes of header size, found a file of 0 bytes"),
    (b"\2\0\0\0{}", MODEL + "expected 8 bytes of header size, found a file of 6 bytes"),
    (b"\3\0\0\0\0\0\0\0{}", MODEL + "header: expected at most 2 bytes, found a header size of 3"),
    (b"\xff" * 8 + b"{}", MODEL + "header: expected at most 2 bytes, found a header size of 18446744073709551615"),
    (b"\0" * 8, MODEL + "header: invalid JSON: Expecting value: line 1 column 1 (char 0)"),
    (b"\2\0\0\0\0\0\0\0\x80\x04", MODEL + "header: expected UTF-8, found byte 0x80 at 0"),
    (b"\2\0\0\0\0\0\0\0[]", MODEL + "header: expected a JSON object, found []"),
    (b"\2\0\0\0\0\0\0\0{x", MODEL + "header: invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (safetensors(b'{"a":{},"a":{}}'), MODEL + "header: invalid JSON: duplicate key 'a'"),
    (safetensors(b'{"a":{"dtype":"F32","dtype":"F16"}}'), MODEL + "header: invalid JSON: duplicate key 'dtype'"),
    (safetensors({"__metadata__": {"format": 1}}), MODEL + "header: __metadata__: expected an object of strings, found {'format': 1}"),
    (safetensors({"__metadata__": None}), MODEL + "header: __metadata__: expected an object of strings, found null"),
    (safetensors({"a": 7}), NO_ENTRY + "7"),
    (safetensors({"a": {}}), NO_ENTRY + "{}"),
    (safetensors({"a": {"dtype": "F32", "shape": []}}), NO_ENTRY + "{'dtype': 'F32', 'shape': []}"),
    *[
        (safetensors({"a": entry(dtype)}, bytes(4)), MODEL + f"tensor 'a': dtype: expected F32 or F16 or BF16, found {found}")
        for dtype, found in [("I8", "'I8'"), ("F8_E4M3", "'F8_E4M3'"), ("U32", "'U32'"), ("F64", "'F64'"), ("f32", "'f32'"), (4, "4"), ([], "[]")]
    ],
    (safetensors({"a": A | {"shape": 1}}), SHAPE + "at most 8 sizes, found 1"),
    *[(safetensors({"a": entry(shape=s)}), SHAPE + f"at most 8 sizes, found {s}") for s in ([-1], [1.0], [True], ["1"], [1 << 64])],
    (safetensors({"a": entry(shape=[1] * 9)}), SHAPE + "at most 8 sizes, found [1, 1, 1, 1, 1, 1, 1, 1, ...]"),
    (safetensors({"a": entry(shape=[1 << 32, 1 << 32])}), SHAPE + "less than 2^63 bytes, found [4294967296, 4294967296]"),
    (safetensors({"a": A | {"data_offsets": 4}}), OFFSETS + "a first byte and an end, found 4"),
    *[(safetensors({"a": entry(offsets=o)}, bytes(4)), OFFSETS + f"a first byte and an end, found {o}") for o in ([4], [0, 4, 8], [0, "4"], [-4, 0], [0, 4.0])],
    *[(safetensors({"a": entry(offsets=o)}, bytes(4)), OFFSETS + f"4 bytes for F32 [1], found {o}") for o in ([4, 0], [0, 3])],
    (safetensors({"a": entry(shape=[0, 5], offsets=[0, 4])}, bytes(4)), OFFSETS + "0 bytes for F32 [0, 5], found [0, 4]"),
    (safetensors({"a": A}, bytes(3)), OFFSETS + "an end within the file's 3 bytes of data, found [0, 4]"),
    (safetensors({"a": entry(offsets=[1 << 40, (1 << 40) + 4])}, bytes(4)), OFFSETS + "an end within the file's 4 bytes of data, found [1099511627776, 1099511627780]"),
    (safetensors({"a": A, "b": A}, bytes(4)), MODEL + "tensor 'b': expected to begin at byte 4 of the data, where the tensor before it ends, found 0 (an overlap)"),
    (safetensors({"a": A, "b": entry(offsets=[8, 12])}, bytes(12)), MODEL + "tensor 'b': expected to begin at byte 4 of the data, where the tensor before it ends, found 8 (a hole)"),
    (safetensors({"b": B}, bytes(8)), MODEL + "tensor 'b': expected to begin at byte 0 of the data, where the tensor before it ends, found 4 (a hole)"),
    (safetensors(json.dumps({"a": A}).encode().ljust(64), bytes(9)), MODEL + "expected 76 bytes as the header says, found 81"),
    (safetensors({}), "DIR: expected the 21 tensors that config.json calls for, found missing 21: 'lm_head.weight', "
     "'model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight', 'model.layers.0.mlp.down_proj.weight', …"),
]  # fmt: skip


@pytest.mark.parametrize("raw, message", BAD_FILES, ids=[f"{i}" for i in range(len(BAD_FILES))])
def test_hostile_safetensors_bytes(tmp_path, raw, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert refusal(tmp_path) == message


def test_a_header_above_the_limit_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse
    assert refusal(tmp_path) == MODEL + "header: expected at most 100000000 bytes, found a header size of 100000001"


@pytest.mark.parametrize("cut", [1, 8, 1000])
def test_a_truncated_download_is_refused(tmp_path, cut):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    n = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert f"data_offsets: expected an end within the file's {n} bytes of data, found" in refusal(tmp_path)


def edit_index(directory, edit):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def map_to(name, file):
    return lambda directory: edit_index(directory, lambda index: index["weight_map"].__setitem__(name, file))


def replace_tensor(shard, edit):
    """Rewrite one shard with its {name: (dtype, shape, bytes)} edited."""

    def apply(directory):
        path = directory / shard
        raw = path.read_bytes()
        data = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:data])
        header.pop("__metadata__")
        tensors = {
            name: (e["dtype"], e["shape"], raw[data + e["data_offsets"][0] : data + e["data_offsets"][1]])
            for name, e in header.items()
        }
        edit(tensors)
        path.write_bytes(pack(tensors))

    return apply


INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING = ("BF16", (40, 16), bytes(1280))
NOT_BESIDE = f"DIR/{INDEX}: tensor 'lm_head.weight': expected the name of a .safetensors file beside the index, found "
BAD_SHARDS = [
    (lambda d: (d / INDEX).write_text("{"), f"DIR/{INDEX}: invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (lambda d: (d / INDEX).write_text("[]"), f"DIR/{INDEX}: expected a JSON object, found []"),
    (lambda d: (d / INDEX).write_text("{}"), f"DIR/{INDEX}: weight_map: expected an object, tensor to file name, found null"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), f"DIR/{INDEX}: weight_map: expected an object, tensor to file name, found {{}}"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), f"DIR/{INDEX}: invalid JSON: duplicate key 'a'"),
    *[(map_to("lm_head.weight", file), NOT_BESIDE + repr(file)) for file in ("../other/model.safetensors", "/etc/model.safetensors",
      "..\\model.safetensors", "C:model.safetensors", "a\0.safetensors", "\ud800.safetensors", "..", "pytorch_model.bin", 1)],
    (lambda d: (d / SECOND).unlink(), f"DIR/{SECOND}: expected a file, found nothing"),
    (lambda d: ((d / SECOND).unlink(), (d / SECOND).mkdir()), f"DIR/{SECOND}: expected a file, found something else"),
    (lambda d: ((d / SECOND).unlink(), os.mkfifo(d / SECOND)), f"DIR/{SECOND}: expected a file, found something else"),
    (lambda d: ((d / SECOND).unlink(), (d / SECOND).symlink_to(SECOND)), f"DIR/{SECOND}: expected a file, found nothing"),
    (map_to("lm_head.weight", "x" * 300 + ".safetensors"), "DIR/" + "x" * 300 + ".safetensors: cannot be read: File name too long"),
    (map_to("lm_head.weight", SECOND), f"DIR/{INDEX}: tensor 'lm_head.weight': expected in '{SECOND}', found in '{FIRST}'"),
    (map_to("a", FIRST), f"DIR/{INDEX}: tensor 'a': expected in '{FIRST}', found in no file"),
    (replace_tensor(FIRST, lambda t: t.update({"a": EMBEDDING})), f"DIR/{FIRST}: expected only tensors that {INDEX} lists, found 1: 'a'"),
    (lambda d: edit_index(d, lambda index: index["weight_map"].pop("lm_head.weight")), f"DIR/{FIRST}: expected only tensors that {INDEX} lists, found 1: 'lm_head.weight'"),
    (replace_tensor(SECOND, lambda t: t.update({"lm_head.weight": EMBEDDING})), f"DIR/{SECOND}: tensor 'lm_head.weight': expected in one file, found in '{FIRST}' too"),
]  # fmt: skip


@pytest.mark.parametrize("damage, message", BAD_SHARDS, ids=[f"{i}" for i in range(len(BAD_SHARDS))])
def test_broken_indexes_and_shards(tmp_path, damage, message):
    tensors = write(tmp_path, shards=2)
    assert list(tensors).index("lm_head.weight") % 2 == 0  # so it lies in the first shard
    damage(tmp_path)
    assert refusal(tmp_path) == message


SINGLE, CALLS_FOR = "model.safetensors", "DIR: expected the 21 tensors that config.json calls for, found "
Q = "model.layers.0.self_attn.q_proj"
BAD_TENSORS = [
    (lambda t: t.pop("lm_head.weight"), CALLS_FOR + "missing 1: 'lm_head.weight'"),
    (lambda t: [t.pop(n) for n in list(t)[:6]], CALLS_FOR + "missing 6: 'model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight', "
     "'model.layers.0.self_attn.k_proj.weight', 'model.layers.0.self_attn.o_proj.weight', …"),
    (lambda t: t.update({f"{Q}.bias": ("F32", (16,), bytes(64))}), CALLS_FOR + f"surplus 1: '{Q}.bias'"),
    (lambda t: t.update({"norm.weight": t.pop("model.norm.weight")}), CALLS_FOR + "missing 1: 'model.norm.weight'; surplus 1: 'norm.weight'"),
    (lambda t: t.update({f"{Q}.weight": ("BF16", (16, 15), bytes(480))}), MODEL + f"tensor '{Q}.weight': expected shape [16, 16], found [16, 15]"),
    (lambda t: t.update({f"{Q}.weight": ("BF16", (256,), bytes(512))}), MODEL + f"tensor '{Q}.weight': expected shape [16, 16], found [256]"),
    (lambda t: t.update({"model.norm.weight": ("F32", (), bytes(4))}), MODEL + "tensor 'model.norm.weight': expected shape [16], found []"),
    (lambda t: t.update({"model.norm.weight": ("F32", (0,), b"")}), MODEL + "tensor 'model.norm.weight': expected shape [16], found [0]"),
]  # fmt: skip


@pytest.mark.parametrize("edit, message", BAD_TENSORS, ids=[f"{i}" for i in range(len(BAD_TENSORS))])
def test_tensors_that_do_not_fit_the_config(tmp_path, edit, message):
    write(tmp_path)
    replace_tensor(SINGLE, edit)(tmp_path)
    assert refusal(tmp_path) == message


@pytest.mark.parametrize("head", [("BF16", (40, 16), b"\1" + bytes(1279)), ("F16", (40, 16), bytes(1280))])
def test_a_tied_head_that_differs_counts(tmp_path, head):
    write(tmp_path, tie_word_embeddings=True)
    both = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": head}
    replace_tensor(SINGLE, lambda t: t.update(both))(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        check_invariants(checkpoint)
        assert not checkpoint.config.tied and checkpoint.view("lm_head.weight").tobytes() == head[2]
    replace_tensor(SINGLE, lambda t: t.update({"lm_head.weight": ("BF16", (16, 40), head[2])}))(tmp_path)
    assert refusal(tmp_path) == MODEL + "tensor 'lm_head.weight': expected shape [40, 16], found [16, 40]"


NO_WEIGHTS = "DIR: expected model.safetensors or model.safetensors.index.json, found "


@pytest.mark.parametrize("files, message", [
    ([], "DIR/config.json: expected a file, found nothing"),
    (["model.safetensors"], "DIR/config.json: expected a file, found nothing"),
    (["config.json"], NO_WEIGHTS + "neither"),
    (["config.json", "pytorch_model.bin"], NO_WEIGHTS + "only 1: 'pytorch_model.bin' (convert to safetensors)"),
    (["config.json", "m.gguf", "a.pt"], NO_WEIGHTS + "only 2: 'a.pt', 'm.gguf' (convert to safetensors)"),
    (["config.json", FIRST], NO_WEIGHTS + f"only 1: '{FIRST}'"),
])  # fmt: skip
def test_directories_without_their_files(tmp_path, files, message):
    for file in files:
        (tmp_path / file).write_text(json.dumps(LLAMA))
    assert refusal(tmp_path) == message


def test_a_failed_opening_closes_its_files(tmp_path):
    write(tmp_path, shards=3)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:  # the exception's traceback keeps the half-made object alive
        open_checkpoint(tmp_path)
    if Path("/proc/self/maps").exists():
        assert str(tmp_path) not in Path("/proc/self/maps").read_text(), error


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
