"""checkpoint.py: what it opens, and every way in which a checkpoint can be wrong, each with its exact sentence."""

# ruff: noqa: E501  (a broken file and the sentence it must get stand on one line)

import json
import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import BYTES, LLAMA, QWEN2, QWEN3, pack, random_tensors, safetensors, write
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv import CheckpointError, _skipkv
from skipkv.checkpoint import Checkpoint, ModelConfig, open_checkpoint

DEEPSEEK_R1_DISTILL_QWEN_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(directory, base=LLAMA, **changes):
    values = {key: value for key, value in (base | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    return ModelConfig.from_json(directory / "config.json")


def refusal(directory):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(directory)
    return str(error.value).replace(str(directory), "DIR")


def check_invariants(checkpoint):
    """What the engine relies on without looking again."""
    needed = {name: shape for name, shape, _ in _skipkv.tensors(checkpoint.config.as_dict())}
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == needed
    end = {}
    for name, tensor in checkpoint.tensors.items():
        assert tensor.name == name and tensor.n_bytes == BYTES[tensor.dtype] * int(np.prod(tensor.shape))
        assert end.get(tensor.file, 8) <= tensor.offset  # file order, no overlap
        end[tensor.file] = tensor.offset + tensor.n_bytes
        view = checkpoint.view(name)
        assert view.nbytes == tensor.n_bytes and not view.flags.writeable or tensor.offset % BYTES[tensor.dtype]
        assert view.ctypes.data % BYTES[tensor.dtype] == 0
    for file, last in end.items():
        assert last <= file.stat().st_size


# --- what opens ---


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype, auto", [("F32", "f32"), ("F16", "f32"), ("BF16", "bf16")])
@pytest.mark.parametrize("base", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_what_was_written_is_read(tmp_path, base, dtype, auto, shards):
    tensors = write(tmp_path, base, dtype=dtype, shards=shards)
    with open_checkpoint(tmp_path) as checkpoint:
        check_invariants(checkpoint)
        assert {name: checkpoint.view(name).tobytes() for name in checkpoint.tensors} == {
            n: t[2] for n, t in tensors.items()
        }
        assert checkpoint.dtype == auto and checkpoint.name == tmp_path.name and checkpoint.generation == {}
        assert checkpoint.n_parameters == sum(int(np.prod(shape)) for _, shape, _ in tensors.values())
        assert checkpoint.n_bytes == BYTES[dtype] * checkpoint.n_parameters


def test_norms_in_f32_beside_bf16_matrices_are_still_bf16(tmp_path):
    config = read(tmp_path)
    wide = random_tensors(config, "F32")
    mixed = {n: wide[n] if len(t[1]) == 1 else t for n, t in random_tensors(config).items()}
    write(tmp_path, tensors=mixed)
    assert open_checkpoint(tmp_path).dtype == "bf16"
    write(tmp_path, tensors=mixed | {"lm_head.weight": wide["lm_head.weight"]})
    assert open_checkpoint(tmp_path).dtype == "f32"


def test_a_tensor_at_an_odd_address_is_shown_aligned(tmp_path):
    tensors = write(tmp_path)
    raw = pack(tensors)
    n = int.from_bytes(raw[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(safetensors(raw[8 : 8 + n] + b" ", raw[8 + n :]))
    checkpoint = open_checkpoint(tmp_path)
    check_invariants(checkpoint)
    assert checkpoint.tensors["model.norm.weight"].offset % 2 == 1
    assert checkpoint.view("model.norm.weight").tobytes() == tensors["model.norm.weight"][2]


def test_old_rope_frequencies_are_left_out(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (2,), bytes(8))}
    write(tmp_path, tensors=write(tmp_path) | extra)
    check_invariants(open_checkpoint(tmp_path))


def test_a_tied_head_stored_a_second_time_is_left_out(tmp_path):
    tensors = write(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(tmp_path, tensors=tensors, tie_word_embeddings=True)
    check_invariants(open_checkpoint(tmp_path))


def test_symbolic_links_as_in_the_hub_cache(tmp_path):
    write(tmp_path / "blobs", shards=2)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    check_invariants(open_checkpoint(tmp_path / "snapshot"))


def test_the_single_file_wins_over_an_index(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("nonsense")
    check_invariants(open_checkpoint(tmp_path))


def test_generation_config_is_passed_on(tmp_path):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    assert open_checkpoint(tmp_path).generation == {"eos_token_id": [1, 2], "temperature": 0.6}


def test_tiny_is_the_model_in_the_package():
    with open_checkpoint("tiny") as checkpoint:
        check_invariants(checkpoint)
        assert (checkpoint.name, checkpoint.dtype, checkpoint.config.family) == ("tiny", "bf16", "llama")
        assert checkpoint.n_parameters == 2479872
        assert repr(checkpoint) == "<Checkpoint 'tiny': llama, 2479872 parameters, bf16>"


def test_closing_keeps_views_alive_and_gives_no_new_ones(tmp_path):
    tensors = write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        view = checkpoint.view("lm_head.weight")
    assert view.tobytes() == tensors["lm_head.weight"][2]
    checkpoint.close()
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.view("lm_head.weight")


def test_views_are_the_map_itself_and_cannot_be_written(tmp_path):
    write(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    name = "model.norm.weight"
    assert checkpoint.view(name).ctypes.data == checkpoint.view(name).ctypes.data
    with pytest.raises(ValueError):
        checkpoint.view(name)[0] = 1


def resident(file):
    """Bytes of this file's map that are in this process's memory."""
    inside = total = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_release_gives_memory_back_and_keeps_the_data(tmp_path):
    tensors = write(tmp_path, vocab_size=1 << 18)
    big, small = "model.embed_tokens.weight", "model.norm.weight"
    checkpoint = open_checkpoint(tmp_path)
    view = checkpoint.view(big)
    assert view.tobytes() == tensors[big][2]
    before = resident(tmp_path / "model.safetensors")
    checkpoint.release(big)
    checkpoint.release(small)  # less than a page: nothing to give back
    after = resident(tmp_path / "model.safetensors")
    # The kernel maps pages around a fault, so some at both ends of the tensor may be another's.
    assert before >= view.nbytes and after <= before - view.nbytes + 32 * mmap.PAGESIZE
    assert view.tobytes() == tensors[big][2]
    assert checkpoint.view(small).tobytes() == tensors[small][2]


def test_comparing_a_stored_tied_head_leaves_nothing_resident(tmp_path):
    tensors = write(tmp_path, tie_word_embeddings=True, vocab_size=1 << 18)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(tmp_path, tensors=tensors, tie_word_embeddings=True, vocab_size=1 << 18)
    checkpoint = open_checkpoint(tmp_path)
    check_invariants(checkpoint)
    if Path("/proc/self/smaps").exists():
        assert resident(tmp_path / "model.safetensors") < checkpoint.tensors["model.embed_tokens.weight"].n_bytes / 4


# --- configurations that are read ---


def test_deepseek_r1_distill_qwen(tmp_path):
    assert read(tmp_path, DEEPSEEK_R1_DISTILL_QWEN_1_5B).as_dict() == dict(
        family="qwen2", n_layers=28, n_heads=12, n_kv_heads=2, head_dim=128, hidden=1536, ffn=8960, vocab=151936,
        context=131072, norm_eps=1e-6, tied=False, qkv_bias=True, o_bias=False, mlp_bias=False, rope_type="default",
        rope_theta=10000.0, rope_factor=1.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
        rope_original_context=131072,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5},
        {"rope_scaling": {"type": "llama3"} | LLAMA3_ROPE, "rope_theta": 5e5},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}, "rope_theta": None},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}, "rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5},
    ],
    ids=["old", "old with both keys", "new", "both"],
)
def test_llama3_rope_in_both_spellings(tmp_path, changes):
    config = read(tmp_path, **changes)
    rope = (config.rope_theta, config.rope_factor, config.rope_low_freq_factor, config.rope_high_freq_factor)
    assert config.rope_type == "llama3" and rope == (5e5, 8.0, 1.0, 4.0) and config.rope_original_context == 64


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "rope_factor": 2.0}),
        ({"rope_theta": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_scaling": {}, "rope_parameters": {"partial_rotary_factor": 1.0}}, {"rope_type": "default"}),
        ({"num_key_value_heads": None}, {"n_kv_heads": 4}),
        ({"head_dim": 8}, {"head_dim": 8, "hidden": 16}),
        ({"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        ({"hidden_act": None, "model_type": None, "tie_word_embeddings": None}, {"tied": False}),
        ({"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": 64}, {}),
        ({"pretraining_tp": 1, "partial_rotary_factor": 1, "dtype": "float32", "nonsense": {}}, {}),
    ],
)
def test_variants_that_are_read(tmp_path, changes, expected):
    config = read(tmp_path, **changes).as_dict()
    assert {key: config[key] for key in expected} == expected
    _skipkv.tensors(config)


def test_biases_follow_the_family_where_it_leaves_no_choice(tmp_path):
    config = read(tmp_path, QWEN2, attention_bias=False, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    config = read(tmp_path, QWEN3, attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)


# --- config.json: every refusal ---

ARCHITECTURES = "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
INTEGERS = {
    "num_hidden_layers": 1024, "num_attention_heads": 1024, "num_key_value_heads": 1024, "hidden_size": 131072,
    "intermediate_size": 1048576, "vocab_size": 4194304, "max_position_embeddings": 16777216, "head_dim": 512,
}  # fmt: skip
ROPE_TYPES = "one of 'default', 'linear', 'llama3'"
BAD_CONFIGS = [
    ({"architectures": None}, f"architectures: expected one of {ARCHITECTURES}, found nothing"),
    ({"architectures": []}, f"architectures: expected one of {ARCHITECTURES}, found []"),
    ({"architectures": "LlamaForCausalLM"}, f"architectures: expected one of {ARCHITECTURES}, found 'LlamaForCausalLM'"),
    ({"architectures": [[]]}, f"architectures: expected one of {ARCHITECTURES}, found [[]]"),
    ({"architectures": ["MistralForCausalLM"]}, f"architectures: expected one of {ARCHITECTURES}, found ['MistralForCausalLM']"),
    ({"model_type": "mistral"}, "model_type: expected 'llama', which goes with LlamaForCausalLM, found 'mistral'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads = 4, found 3"),
    ({"num_key_value_heads": 8}, "num_key_value_heads: expected a divisor of num_attention_heads = 4, found 8"),
    ({"hidden_size": 18}, "hidden_size: expected a multiple of num_attention_heads = 4, as there is no head_dim, found 18"),
    ({"head_dim": 5}, "head_dim: expected an even integer from 2 to 512, found 5"),
    ({"hidden_size": 12}, "head_dim: expected an even integer from 2 to 512, found 3"),
    ({"hidden_size": 4096}, "head_dim: expected an even integer from 2 to 512, found 1024"),
    ({"hidden_act": "gelu"}, 'hidden_act: expected "silu" (others are not supported), found \'gelu\''),
    ({"pretraining_tp": 2}, "pretraining_tp: expected 1 (others are not supported), found 2"),
    ({"pretraining_tp": True}, "pretraining_tp: expected 1 (others are not supported), found true"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0 (others are not supported), found 0.5"),
    ({"rms_norm_eps": None}, "rms_norm_eps: expected a number from 1e-12 to 0.1, found nothing"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number from 1e-12 to 0.1, found 0"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number from 1e-12 to 0.1, found '1e-5'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number from 1e-12 to 0.1, found nan"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, found 1"),
    ({"attention_bias": "no"}, "attention_bias: expected true or false, found 'no'"),
    ({"mlp_bias": 0.0}, "mlp_bias: expected true or false, found 0.0"),
    ({"use_sliding_window": True}, "use_sliding_window: expected false (sliding windows are not supported), found true"),
    ({"use_sliding_window": 1}, "use_sliding_window: expected true or false, found 1"),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types: expected only 'full_attention' (others are not supported), found 'sliding_attention'",
    ),
    ({"layer_types": ["full_attention"]}, "layer_types: expected a list of num_hidden_layers = 2 names, found ['full_attention']"),
    *[
        (
            {"quantization_config": {"quant_method": method}},
            f"quantization_config: expected unquantised weights (F32, F16, BF16), found quant_method '{method}'",
        )
        for method in ("bitsandbytes", "gptq", "awq", "fp8")
    ],
    ({"quantization_config": {}}, "quantization_config: expected unquantised weights (F32, F16, BF16), found quant_method null"),
    *[
        ({"rope_scaling": {"type": kind, "factor": 2.0}}, f"rope_scaling.type: expected {ROPE_TYPES}, found '{kind}'")
        for kind in ("yarn", "dynamic", "longrope", "")
    ],
    ({"rope_parameters": {"rope_type": "yarn"}}, f"rope_parameters.rope_type: expected {ROPE_TYPES}, found 'yarn'"),
    ({"rope_scaling": {"rope_type": 3}}, f"rope_scaling.rope_type: expected {ROPE_TYPES}, found 3"),
    ({"rope_scaling": {"factor": 2.0}}, f"rope_scaling.rope_type: expected {ROPE_TYPES}, found nothing"),
    ({"rope_scaling": "linear"}, "rope_scaling: expected one set of RoPE parameters for all layers, found 'linear'"),
    (
        {"rope_parameters": {"full_attention": {}}},
        "rope_parameters: expected one set of RoPE parameters for all layers, found {'full_attention': {}}",
    ),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number from 1 to 1e+06, found nothing"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor: expected a number from 1 to 1e+06, found 0.5"),
    ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor: expected a number from 1 to 1e+06, found true"),
    *[
        ({"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != key}}, f"rope_scaling.{key}: expected {what}, found nothing")
        for key, what in [
            ("factor", "a number from 1 to 1e+06"),
            ("low_freq_factor", "a number from 1e-06 to 1e+06"),
            ("high_freq_factor", "a number from 1e-06 to 1e+06"),
            ("original_max_position_embeddings", "an integer from 1 to 16777216"),
        ]
    ],
    (
        {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}},
        "rope_scaling.high_freq_factor: expected more than low_freq_factor = 1, found 1.0",
    ),
    ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_scaling.rope_type: expected 'linear' as in rope_scaling.type, found 'llama3'"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta: expected 10000.0 as in rope_theta, found 5.0"),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor: expected 1.0 (others are not supported), found 0.5",
    ),
    ({"rope_theta": -1.0}, "rope_theta: expected a number from 1 to 1e+12, found -1.0"),
    ({"rope_theta": float("inf")}, "rope_theta: expected a number from 1 to 1e+12, found inf"),
    *[
        ({key: value}, f"{key}: expected an integer from 1 to {high}, found {found}")
        for key, high in INTEGERS.items()
        for value, found in [(0, "0"), (-4, "-4"), (True, "true"), (4.0, "4.0"), ("4", "'4'"), (high + 1, str(high + 1)), ([], "[]")]
    ],
    *[
        ({key: None}, f"{key}: expected an integer from 1 to {high}, found nothing")
        for key, high in INTEGERS.items()
        if key not in ("num_key_value_heads", "head_dim")
    ],
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_CONFIGS, ids=[message[:60] for _, message in BAD_CONFIGS])
def test_configs_that_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, **changes)
    assert str(error.value) == f"{tmp_path}/config.json: {message}"


BAD_JSON = [
    (b"", "DIR/config.json: invalid JSON: Expecting value: line 1 column 1 (char 0)"),
    (
        b"{",
        "DIR/config.json: invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    (b"[]", "DIR/config.json: expected a JSON object, found []"),
    (b"null", "DIR/config.json: expected a JSON object, found null"),
    (b'{"a": "\xff"}', "DIR/config.json: expected UTF-8, found byte 0xff at 7"),
    (b'{"a": 1, "a": 2}', "DIR/config.json: invalid JSON: duplicate key 'a'"),
    (b"\x00" * 64, "DIR/config.json: invalid JSON: Expecting value: line 1 column 1 (char 0)"),
]


@pytest.mark.parametrize("raw, message", BAD_JSON)
def test_config_files_that_are_no_object(tmp_path, raw, message):
    (tmp_path / "config.json").write_bytes(raw)
    assert refusal(tmp_path) == message


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"])
def test_json_that_breaks_parsers_is_refused(tmp_path, raw):
    (tmp_path / "config.json").write_bytes(raw)
    assert refusal(tmp_path).startswith("DIR/config.json: invalid JSON: ")  # Python's own words follow


def test_messages_stay_short_and_printable(tmp_path):
    hostile = {"hidden_act": "\n\ud800" * 10_000, "rope_scaling": [[[[[]]]]] * 1000}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | hostile))
    message = refusal(tmp_path)
    assert message.isprintable() and len(message) < 400


def test_a_bad_generation_config_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    assert refusal(tmp_path) == "DIR/generation_config.json: expected a JSON object, found []"


# --- safetensors: literal hostile bytes ---


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
    (safetensors({"a": entry(shape=[-1])}), SHAPE + "at most 8 sizes, found [-1]"),
    (safetensors({"a": entry(shape=[1.0])}), SHAPE + "at most 8 sizes, found [1.0]"),
    (safetensors({"a": entry(shape=[True])}), SHAPE + "at most 8 sizes, found [true]".replace("true", "True")),
    (safetensors({"a": entry(shape=["1"])}), SHAPE + "at most 8 sizes, found ['1']"),
    (safetensors({"a": entry(shape=[1] * 9)}), SHAPE + "at most 8 sizes, found [1, 1, 1, 1, 1, 1, 1, 1, ...]"),
    (safetensors({"a": entry(shape=[1 << 64])}), SHAPE + "at most 8 sizes, found [18446744073709551616]"),
    (safetensors({"a": entry(shape=[1 << 32, 1 << 32])}), SHAPE + "less than 2^63 bytes, found [4294967296, 4294967296]"),
    (safetensors({"a": A | {"data_offsets": 4}}), OFFSETS + "a first byte and an end, found 4"),
    (safetensors({"a": entry(offsets=[4])}), OFFSETS + "a first byte and an end, found [4]"),
    (safetensors({"a": entry(offsets=[0, 4, 8])}), OFFSETS + "a first byte and an end, found [0, 4, 8]"),
    (safetensors({"a": entry(offsets=[0, "4"])}), OFFSETS + "a first byte and an end, found [0, '4']"),
    (safetensors({"a": entry(offsets=[-4, 0])}, bytes(4)), OFFSETS + "a first byte and an end, found [-4, 0]"),
    (safetensors({"a": entry(offsets=[0, 4.0])}, bytes(4)), OFFSETS + "a first byte and an end, found [0, 4.0]"),
    (safetensors({"a": entry(offsets=[4, 0])}, bytes(4)), OFFSETS + "4 bytes for F32 [1], found [4, 0]"),
    (safetensors({"a": entry(offsets=[0, 3])}, bytes(4)), OFFSETS + "4 bytes for F32 [1], found [0, 3]"),
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


# --- the directory, the index, and what config.json calls for ---


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


INDEX, FIRST, SECOND = (
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
EMBEDDING = ("BF16", (40, 16), bytes(1280))
NOT_BESIDE = f"DIR/{INDEX}: tensor 'lm_head.weight': expected the name of a .safetensors file beside the index, found "
BAD_SHARDS = [
    (lambda d: (d / INDEX).write_text("{"), f"DIR/{INDEX}: invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (lambda d: (d / INDEX).write_text("[]"), f"DIR/{INDEX}: expected a JSON object, found []"),
    (lambda d: (d / INDEX).write_text("{}"), f"DIR/{INDEX}: weight_map: expected an object, tensor to file name, found null"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), f"DIR/{INDEX}: weight_map: expected an object, tensor to file name, found {{}}"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), f"DIR/{INDEX}: invalid JSON: duplicate key 'a'"),
    (map_to("lm_head.weight", "../other/model.safetensors"), NOT_BESIDE + "'../other/model.safetensors'"),
    (map_to("lm_head.weight", "/etc/model.safetensors"), NOT_BESIDE + "'/etc/model.safetensors'"),
    (map_to("lm_head.weight", "..\\model.safetensors"), NOT_BESIDE + "'..\\\\model.safetensors'"),
    (map_to("lm_head.weight", "C:model.safetensors"), NOT_BESIDE + "'C:model.safetensors'"),
    (map_to("lm_head.weight", "a\0.safetensors"), NOT_BESIDE + "'a\\x00.safetensors'"),
    (map_to("lm_head.weight", "\ud800.safetensors"), NOT_BESIDE + "'\\ud800.safetensors'"),
    (map_to("lm_head.weight", ".."), NOT_BESIDE + "'..'"),
    (map_to("lm_head.weight", "pytorch_model.bin"), NOT_BESIDE + "'pytorch_model.bin'"),
    (map_to("lm_head.weight", 1), NOT_BESIDE + "1"),
    (lambda d: (d / SECOND).unlink(), f"DIR/{SECOND}: expected a file, found nothing"),
    (lambda d: ((d / SECOND).unlink(), (d / SECOND).mkdir()), f"DIR/{SECOND}: expected a file, found something else"),
    (lambda d: ((d / SECOND).unlink(), os.mkfifo(d / SECOND)), f"DIR/{SECOND}: expected a file, found something else"),
    (lambda d: ((d / SECOND).unlink(), (d / SECOND).symlink_to(SECOND)), f"DIR/{SECOND}: expected a file, found nothing"),
    (map_to("lm_head.weight", "x" * 300 + ".safetensors"), "DIR/" + "x" * 300 + ".safetensors: cannot be read: File name too long"),
    (map_to("lm_head.weight", SECOND), f"DIR/{INDEX}: tensor 'lm_head.weight': expected in '{SECOND}', found in '{FIRST}'"),
    (map_to("a", FIRST), f"DIR/{INDEX}: tensor 'a': expected in '{FIRST}', found in no file"),
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


@pytest.mark.parametrize(
    "head", [("BF16", (40, 16), b"\1" + bytes(1279)), ("F16", (40, 16), bytes(1280)), ("BF16", (16, 40), bytes(1280))]
)
def test_a_tied_head_that_differs_is_refused(tmp_path, head):
    write(tmp_path, tie_word_embeddings=True)
    replace_tensor(SINGLE, lambda t: t.update({"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": head}))(
        tmp_path
    )
    assert refusal(tmp_path) == MODEL + (
        "tensor 'lm_head.weight': expected the embedding's bytes, as config.json ties them (tie_word_embeddings), "
        "found a different head"
    )


NO_WEIGHTS = "DIR: expected model.safetensors or model.safetensors.index.json, found "


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "DIR/config.json: expected a file, found nothing"),
        (["model.safetensors"], "DIR/config.json: expected a file, found nothing"),
        (["config.json"], NO_WEIGHTS + "neither"),
        (["config.json", "pytorch_model.bin"], NO_WEIGHTS + "only 1: 'pytorch_model.bin' (convert to safetensors)"),
        (["config.json", "m.gguf", "a.pt"], NO_WEIGHTS + "only 2: 'a.pt', 'm.gguf' (convert to safetensors)"),
        (
            ["config.json", "model-00001-of-00002.safetensors"],
            NO_WEIGHTS + "only 1: 'model-00001-of-00002.safetensors'",
        ),
    ],
)
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


# --- what a name means ---


@pytest.fixture
def hub(monkeypatch):
    """Calls to the hub are recorded, and answered by the function put into ``answer``."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return calls.answer(repo_id)

    class Calls(list):
        answer = staticmethod(lambda repo_id: pytest.fail(f"the hub was asked for {repo_id}"))

    calls = Calls()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_is_downloaded_without_other_formats(tmp_path, hub):
    write(tmp_path, shards=2)
    hub.answer = lambda repo_id: str(tmp_path)
    with open_checkpoint("owner/Model-1.5B") as checkpoint:
        assert checkpoint.name == "owner/Model-1.5B" and checkpoint.path == tmp_path
    [(repo_id, options)] = hub
    assert repo_id == "owner/Model-1.5B" and set(options) == {"allow_patterns"}
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "generation_config.json", "model.safetensors", FIRST, INDEX, "tokenizer.json",
              "tokenizer_config.json", "chat_template.jinja"]  # fmt: skip
    others = ["README.md", "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "m.gguf",
              "original/params.json", "onnx/model.onnx"]  # fmt: skip
    assert list(filter_repo_objects(wanted + others, allow_patterns=options["allow_patterns"])) == wanted


def test_a_hub_failure_names_the_id(hub):
    def answer(repo_id):
        raise ConnectionError("no route\nmore lines")

    hub.answer = answer
    with pytest.raises(CheckpointError) as error:
        open_checkpoint("owner/model")
    assert str(error.value) == "owner/model: expected a directory or a model on the Hugging Face hub: no route"


def test_offline_the_hub_is_not_asked(tmp_path):
    pytest.importorskip("huggingface_hub")
    code = "from skipkv.checkpoint import *\ntry: open_checkpoint('skipkv-test/none')\nexcept Exception as e: print(type(e).__name__, e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    ).stdout
    assert out.startswith("CheckpointError skipkv-test/none: expected a directory or a model on the Hugging Face hub: ")
    assert "HF_HUB_OFFLINE" in out


def test_a_directory_wins_over_a_hub_id_and_the_word_tiny_over_both(tmp_path, hub, monkeypatch):
    write(tmp_path / "owner" / "model")
    write(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/model").path == Path("owner/model")
    assert open_checkpoint("tiny").n_parameters == 2479872
    assert open_checkpoint("./tiny").n_parameters < 10_000
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/tiny").path == tmp_path / "tiny"


@pytest.mark.parametrize(
    "source, message",
    [
        ("./nothing", "./nothing: expected a directory with config.json, found nothing"),
        ("../owner/nothing", "../owner/nothing: expected a directory with config.json, found nothing"),
        ("/nothing/here", "/nothing/here: expected a directory with config.json, found nothing"),
        ("~/nothing", "HOME/nothing: expected a directory with config.json, found nothing"),
        (Path("owner/nothing"), "owner/nothing: expected a directory with config.json, found nothing"),
        ("file", "file: expected a directory with config.json, found something else"),
        ("", "'': expected a directory or a hub id (owner/name), found neither"),
        ("a/b/c", "'a/b/c': expected a directory or a hub id (owner/name), found neither"),
        ("a b", "'a b': expected a directory or a hub id (owner/name), found neither"),
        ("a\0b", "'a\\x00b': expected a directory or a hub id (owner/name), found neither"),
    ],
)
def test_names_that_are_no_model(tmp_path, hub, monkeypatch, source, message):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(source)
    assert str(error.value).replace(str(tmp_path), "HOME") == message and not hub


# --- fuzz: opens and holds what it promises, or CheckpointError; never another exception ---

FUZZ = settings(
    max_examples=int(os.environ.get("SKIPKV_FUZZ", 200)), deadline=None, derandomize="SKIPKV_FUZZ" not in os.environ
)
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
    "use_sliding_window", "partial_rotary_factor", "pretraining_tp", "quantization_config",
]  # fmt: skip


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_fuzzed_configs(base, changes):
    (base / "model.safetensors").write_bytes(PACKED)
    (base / "config.json").write_text(json.dumps(LLAMA | changes))
    opens_or_refuses(base)


def packed():
    config = dict(
        family="llama",
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=4,
        hidden=16,
        ffn=24,
        vocab=40,
        context=128,
        norm_eps=1e-5,
    )
    return pack(random_tensors(ModelConfig(**config)))


PACKED = packed()
N_HEADER = int.from_bytes(PACKED[:8], "little")
HEADER = json.loads(PACKED[8 : 8 + N_HEADER])


def opens_with(base, raw):
    (base / "config.json").write_text(json.dumps(LLAMA))
    (base / "model.safetensors").write_bytes(raw)
    opens_or_refuses(base)


@FUZZ
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 8 + N_HEADER), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4
    )
)
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


# --- transformers as the writer ---

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128,
)  # fmt: skip
WRITTEN = {
    "llama": ("Llama", {}, {"rope_type": "default"}),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True), {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", dict(rope_scaling=LLAMA3_ROPE, rope_theta=5e5), {"rope_type": "llama3", "rope_factor": 8.0, "rope_theta": 5e5}),
    "linear": ("Llama", dict(rope_scaling={"type": "linear", "factor": 4.0}), {"rope_type": "linear", "rope_factor": 4.0}),
    "qwen2": ("Qwen2", dict(use_sliding_window=False, sliding_window=64, max_window_layers=1), {"qkv_bias": True, "o_bias": False}),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True), {"tied": True}),
    "qwen3": ("Qwen3", dict(head_dim=16), {"head_dim": 16, "family": "qwen3"}),
}  # fmt: skip


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", WRITTEN)
def test_what_transformers_saves(tmp_path, case, dtype, size):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, options, expected = WRITTEN[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=size)
    with open_checkpoint(tmp_path) as checkpoint:
        check_invariants(checkpoint)
        assert len({tensor.file for tensor in checkpoint.tensors.values()}) > 1 or size == "1GB"
        assert checkpoint.dtype == ("bf16" if dtype == "bfloat16" else "f32")
        values = checkpoint.config.as_dict()
        assert {key: values[key] for key in expected} == expected
        for name, weight in model.state_dict().items():
            if name in checkpoint.tensors or not checkpoint.config.tied:
                raw = weight.contiguous().view(torch.uint8).numpy().ravel()
                assert np.array_equal(checkpoint.view(name), raw), name


def test_an_active_sliding_window_of_transformers_is_refused(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=1).save_pretrained(
        tmp_path
    )
    values = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert refusal(tmp_path).startswith("DIR/config.json: use_sliding_window: expected false")
    values["use_sliding_window"] = False
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert refusal(tmp_path).startswith("DIR/config.json: layer_types: expected only 'full_attention'")
