"""config.json: what is read, and every way in which it can be wrong, each with its exact sentence."""

import json

import pytest
from checkpoints import LLAMA, LLAMA3_ROPE, QWEN2, QWEN3, read, refusal, write
from harness import refused

from skipkv import CheckpointError, _skipkv

pytestmark = pytest.mark.sanitize

DEEPSEEK_R1_DISTILL_QWEN_1_5B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
    "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.44.0",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


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


@pytest.mark.parametrize("changes, expected", [
    ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "rope_factor": 2.0}),
    ({"rope_theta": None}, {"rope_type": "default", "rope_theta": 10000.0}),
    ({"rope_scaling": {}, "rope_parameters": {"partial_rotary_factor": 1.0}}, {"rope_type": "default"}),
    ({"num_key_value_heads": None}, {"n_kv_heads": 4}),
    ({"head_dim": 8}, {"head_dim": 8, "hidden": 16}),
    ({"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
    ({"hidden_act": None, "model_type": None, "tie_word_embeddings": None}, {"tied": False}),
    ({"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": 64}, {}),
    ({"pretraining_tp": 1, "partial_rotary_factor": 1, "dtype": "float32", "nonsense": {}}, {}),
])  # fmt: skip
def test_variants_that_are_read(tmp_path, changes, expected):
    config = read(tmp_path, **changes).as_dict()
    assert {key: config[key] for key in expected} == expected
    _skipkv.tensors(config)


def test_biases_follow_the_family_where_it_leaves_no_choice(tmp_path):
    config = read(tmp_path, QWEN2, attention_bias=False, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    config = read(tmp_path, QWEN3, attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)


ARCHITECTURES = "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
INTEGERS = {
    "num_hidden_layers": 1024, "num_attention_heads": 1024, "num_key_value_heads": 1024, "hidden_size": 131072,
    "intermediate_size": 1048576, "vocab_size": 4194304, "max_position_embeddings": 16777216, "head_dim": 512,
}  # fmt: skip
ROPE_TYPES = "one of 'default', 'linear', 'llama3'"
BOOLEAN, FACTOR = "true or false", "a number from 1 to 1e+06"
ONE_ROPE = "one set of RoPE parameters for all layers"
NAN, INF = float("nan"), float("inf")
VALUES = [
    ("architectures", (None, [], "LlamaForCausalLM", [[]], ["MistralForCausalLM"]), f"one of {ARCHITECTURES}"),
    ("model_type", ("mistral",), "'llama', which goes with LlamaForCausalLM"),
    ("num_key_value_heads", (3, 8), "a divisor of num_attention_heads = 4"),
    ("hidden_size", (18,), "a multiple of num_attention_heads = 4, as there is no head_dim"),
    ("head_dim", (5,), "an even integer from 2 to 512"),
    ("hidden_act", ("gelu",), '"silu" (others are not supported)'),
    ("pretraining_tp", (2, True), "1 (others are not supported)"),
    ("partial_rotary_factor", (0.5,), "1.0 (others are not supported)"),
    ("rms_norm_eps", (None, 0, "1e-5", NAN), "a number from 1e-12 to 0.1"),
    ("tie_word_embeddings", (1,), BOOLEAN),
    ("attention_bias", ("no",), BOOLEAN),
    ("mlp_bias", (0.0,), BOOLEAN),
    ("use_sliding_window", (1,), BOOLEAN),
    ("use_sliding_window", (True,), "false (sliding windows are not supported)"),
    ("layer_types", (["full_attention"],), "a list of num_hidden_layers = 2 names"),
    ("rope_scaling", ("linear",), ONE_ROPE),
    ("rope_parameters", ({"full_attention": {}},), ONE_ROPE),
    ("rope_theta", (-1.0, INF), "a number from 1 to 1e+12"),
    *((key, (0, -4, True, 4.0, "4", high + 1, []), f"an integer from 1 to {high}") for key, high in INTEGERS.items()),
    *((key, (None,), f"an integer from 1 to {high}") for key, high in INTEGERS.items()
      if key not in ("num_key_value_heads", "head_dim")),
]  # fmt: skip


def shown(value):
    return "nothing" if value is None else "true" if value is True else repr(value)


def linear(**more):
    return {"rope_scaling": {"type": "linear"} | more}


BAD_CONFIGS = [({key: v}, key, wanted, shown(v)) for key, values, wanted in VALUES for v in values] + [
    ({"hidden_size": 12}, "head_dim", "an even integer from 2 to 512", "3"),
    ({"hidden_size": 4096}, "head_dim", "an even integer from 2 to 512", "1024"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types",
     "only 'full_attention' (others are not supported)", "'sliding_attention'"),
    *(({"quantization_config": {"quant_method": m} if m else {}}, "quantization_config",
       "unquantised weights (F32, F16, BF16)", f"quant_method {m!r}" if m else "quant_method null")
      for m in ("bitsandbytes", "gptq", "awq", "fp8", "")),
    *((linear(type=kind, factor=2.0), "rope_scaling.type", ROPE_TYPES, repr(kind))
      for kind in ("yarn", "dynamic", "longrope", "")),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type", ROPE_TYPES, "'yarn'"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type", ROPE_TYPES, "3"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type", ROPE_TYPES, "nothing"),
    (linear(), "rope_scaling.factor", FACTOR, "nothing"),
    (linear(factor=0.5), "rope_scaling.factor", FACTOR, "0.5"),
    (linear(factor=True), "rope_scaling.factor", FACTOR, "true"),
    *(({"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != key}}, f"rope_scaling.{key}", what, "nothing")
      for key, what in (("factor", FACTOR), ("low_freq_factor", "a number from 1e-06 to 1e+06"),
                        ("high_freq_factor", "a number from 1e-06 to 1e+06"),
                        ("original_max_position_embeddings", "an integer from 1 to 16777216"))),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor",
     "more than low_freq_factor = 1", "1.0"),
    (linear(rope_type="llama3"), "rope_scaling.rope_type", "'linear' as in rope_scaling.type", "'llama3'"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta", "10000.0 as in rope_theta", "5.0"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     "rope_parameters.partial_rotary_factor", "1.0 (others are not supported)", "0.5"),
]  # fmt: skip


@pytest.mark.parametrize("changes, field, wanted, found", BAD_CONFIGS, ids=[f"{c[1]}={c[3]}"[:60] for c in BAD_CONFIGS])
def test_configs_that_are_refused(tmp_path, changes, field, wanted, found):
    with refused(f"{tmp_path}/config.json: {field}: expected {wanted}, found {found}", CheckpointError):
        read(tmp_path, **changes)


BAD_JSON = [
    (b"", "invalid JSON: Expecting value: line 1 column 1 (char 0)"),
    (b"{", "invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (b"[]", "expected a JSON object, found []"),
    (b"null", "expected a JSON object, found null"),
    (b'{"a": "\xff"}', "expected UTF-8, found byte 0xff at 7"),
    (b'{"a": 1, "a": 2}', "invalid JSON: duplicate key 'a'"),
    (b"\x00" * 64, "invalid JSON: Expecting value: line 1 column 1 (char 0)"),
]


@pytest.mark.parametrize("raw, message", BAD_JSON)
def test_config_files_that_are_no_object(tmp_path, raw, message):
    (tmp_path / "config.json").write_bytes(raw)
    assert refusal(tmp_path) == f"DIR/config.json: {message}"


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
