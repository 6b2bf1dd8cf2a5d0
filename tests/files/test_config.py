"""config.json: what is read, and every way in which it can be wrong, each with its exact sentence."""

import json
import math

import pytest
from checkpoints import LLAMA, LLAMA3_ROPE, MISTRAL, QWEN2, QWEN3, SMOLLM3, read, refusal, write, write_tokenizer
from harness import refused

import skipkv
from skipkv import CheckpointError, _skipkv

pytestmark = pytest.mark.sanitize

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}

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
        rope_beta_fast=32.0, rope_beta_slow=1.0, rope_original_context=131072, rope_truncate=True,
        rope_attention_factor=1.0, unrotated=(),
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
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, {"rope_type": "dynamic", "context": 128}),
    ({"rope_scaling": YARN}, {"rope_factor": 4.0, "rope_original_context": 64, "context": 256, "rope_beta_fast": 32.0,
                              "rope_attention_factor": 0.1 * math.log(4) + 1, "rope_truncate": True}),
    ({"rope_parameters": YARN | {"rope_theta": 1e6, "mscale": 2, "mscale_all_dim": 1, "beta_slow": 2},
      "rope_theta": None},
     {"rope_theta": 1e6, "rope_beta_slow": 2.0,
      "rope_attention_factor": (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)}),
    ({"rope_scaling": {"type": "yarn", "attention_factor": 0.5, "truncate": False, "beta_fast": 0},
      "original_max_position_embeddings": 32},
     {"rope_factor": 4.0, "rope_attention_factor": 0.5, "rope_truncate": False, "rope_beta_fast": 32.0}),
    (QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, {"family": "qwen2"}),
    (QWEN3 | {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}, {"family": "qwen3"}),
    (QWEN3 | {"use_sliding_window": True, "sliding_window": None}, {"family": "qwen3"}),
    (MISTRAL, {"family": "mistral", "context": 128}),
    (MISTRAL | {"sliding_window": 64, "max_position_embeddings": 64}, {"context": 64}),
    (SMOLLM3 | {"num_hidden_layers": 9, "no_rope_layers": None, "rope_theta": None, "tie_word_embeddings": None},
     {"unrotated": (3, 7), "rope_theta": 2e6, "tied": True}),
    (SMOLLM3 | {"no_rope_layers": [0, 1, 0]}, {"unrotated": (0,)}),
    ({"pretraining_tp": 1, "partial_rotary_factor": 1, "dtype": "float32", "nonsense": {}}, {}),
])  # fmt: skip
def test_variants_that_are_read(tmp_path, changes, expected):
    config = read(tmp_path, **changes).as_dict()
    assert {key: config[key] for key in expected} == expected
    _skipkv.tensors(config)


def test_dynamic_rope_is_refused_beyond_the_original_context(tmp_path):
    write(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})
    write_tokenizer(tmp_path, 40)
    model = skipkv.load(tmp_path, progress=False)
    reach = "the context of 128, beyond which 'dynamic' RoPE is not supported"
    with refused(f"prompt 0 has 129 tokens; allowed: up to {reach}"):
        model.generate([1] * 129)
    with refused(f"text has 129 tokens; allowed: 1 to {reach}"):
        model.logits([1] * 129)
    assert model.generate([1] * 127, max_new_tokens=9, stop_ids=(), progress=False)[0].finish_reason == "context"


def test_biases_follow_the_family_where_it_leaves_no_choice(tmp_path):
    config = read(tmp_path, QWEN2, attention_bias=False, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    config = read(tmp_path, QWEN3, attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)


ARCHITECTURES = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM"
INTEGERS = {
    "num_hidden_layers": 1024, "num_attention_heads": 1024, "num_key_value_heads": 1024, "hidden_size": 131072,
    "intermediate_size": 1048576, "vocab_size": 4194304, "max_position_embeddings": 16777216, "head_dim": 512,
}  # fmt: skip
ROPE_TYPES = "one of 'default', 'linear', 'dynamic', 'llama3', 'yarn'"
BOOLEAN, FACTOR = "true or false", "a number from 1 to 1e+06"
ONE_ROPE = "one set of RoPE parameters for all layers"
NAN, INF = float("nan"), float("inf")
VALUES = [
    ("architectures", (None, [], "LlamaForCausalLM", [[]], ["PhiForCausalLM"]), f"one of {ARCHITECTURES}"),
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


def named(base):
    return {key: base[key] for key in ("architectures", "model_type")}


def yarn(**more):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": rope | more}


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
      for kind in ("longrope", "")),
    ({"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters.rope_type", ROPE_TYPES, "'mrope'"),
    *((yarn(**{key: value}), f"rope_parameters.{key}", wanted, shown(value)) for key, value, wanted in (
        ("factor", 0.5, FACTOR), ("original_max_position_embeddings", 0, "an integer from 1 to 16777216"),
        ("beta_fast", -1, "a number from 0 to 1e+06"), ("beta_slow", "1", "a number from 0 to 1e+06"),
        ("mscale", NAN, "a number from 0 to 1e+06"), ("mscale_all_dim", [], "a number from 0 to 1e+06"),
        ("attention_factor", 0, "a number from 1e-06 to 1e+06"), ("truncate", 1, BOOLEAN))),
    (yarn(rope_theta=1.0) | {"rope_theta": None}, "rope_parameters.rope_theta", "more than 1", "1.0"),
    (yarn() | {"original_max_position_embeddings": 16}, "rope_parameters.original_max_position_embeddings",
     "16 as in original_max_position_embeddings", "32"),
    *((slides | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window",
       "null, or at least the context of 128 (sliding windows are not supported)", "64")
      for slides in (named(QWEN2), named(QWEN3), named(MISTRAL), named(SMOLLM3) | {"no_rope_layers": [1, 0]})),
    (named(MISTRAL) | {"max_position_embeddings": 4097}, "sliding_window",
     "null, or at least the context of 4097 (sliding windows are not supported)", "4096"),
    (named(MISTRAL) | {"sliding_window": 0}, "sliding_window", "an integer from 1 to 1073741824", "0"),
    (named(QWEN2) | {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers",
     "an integer from 0 to 1073741824", "-1"),
    *((named(SMOLLM3) | {"no_rope_layers": found}, "no_rope_layers",
       "a list of 0 or 1 for each of num_hidden_layers = 2", repr(found)) for found in ([1], [1, 2], "10", [1, 1.0])),
    (named(SMOLLM3) | {"no_rope_layer_interval": 0}, "no_rope_layer_interval", "an integer from 1 to 16777216", "0"),
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
