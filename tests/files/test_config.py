"""config.json: what is read, and every way in which it can be wrong, each with its exact sentence."""

import json
import math

import pytest
from checkpoints import LLAMA, LLAMA3_ROPE, MISTRAL, QWEN2, QWEN3, SMOLLM3, read, refusal, write, write_tokenizer
from harness import refused

import skipkv
from skipkv import _skipkv

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
    ({"rope_scaling": YARN | {"truncate": None, "beta_slow": None, "factor": None}},
     {"rope_truncate": False, "rope_beta_slow": 1.0, "rope_factor": 2.0}),
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


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"])
def test_json_that_breaks_parsers_is_refused(tmp_path, raw):
    (tmp_path / "config.json").write_bytes(raw)
    assert refusal(tmp_path).startswith("DIR/config.json: invalid JSON: ")  # Python's own words follow


def test_messages_stay_short_and_printable(tmp_path):
    hostile = {"hidden_act": "\n\ud800" * 10_000, "rope_scaling": [[[[[]]]]] * 1000}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | hostile))
    message = refusal(tmp_path)
    assert message.isprintable() and len(message) < 400
