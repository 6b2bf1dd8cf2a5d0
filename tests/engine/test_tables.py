"""The tables of the core: families, the tensors they call for, CPU variants."""

import json

import pytest
from harness import TINY, refused

from skipkv import _skipkv
from skipkv.load.config import ModelConfig

pytestmark = [pytest.mark.sanitize, pytest.mark.clang]

CONFIG = dict(
    family="llama", n_layers=4, n_heads=8, n_kv_heads=4, head_dim=32, hidden=256, ffn=512, vocab=231, context=4096,
    norm_eps=1e-5, tied=False, qkv_bias=False, o_bias=False, mlp_bias=False, rope_theta=1e8, rope_type="default",
    rope_factor=1.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_original_context=4096,
    rope_beta_fast=32.0, rope_beta_slow=1.0, rope_truncate=True, rope_attention_factor=1.0, unrotated=(),
)  # fmt: skip


def shapes(**changes):
    return {name: shape for name, shape, _ in _skipkv.tensors(CONFIG | changes)}


def test_tensors_are_those_of_the_tiny_checkpoint():
    with open(TINY / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert shapes() == {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    read = ModelConfig.from_json(TINY / "config.json").as_dict()
    assert {key: read[key] for key in CONFIG} == CONFIG
    assert _skipkv.tensors(read) == _skipkv.tensors(CONFIG)


def test_biases_and_norms_follow_the_family():
    assert "model.layers.3.self_attn.q_proj.bias" in shapes(family="qwen2")
    assert "model.layers.3.self_attn.o_proj.bias" not in shapes(family="qwen2", o_bias=True)
    assert shapes(family="qwen3")["model.layers.0.self_attn.k_norm.weight"] == (32,)
    assert "lm_head.weight" not in shapes(tied=True)
    assert shapes(family="mistral", qkv_bias=True, mlp_bias=True) == shapes(family="smollm3") == shapes()
    assert shapes(qkv_bias=True)["model.layers.0.self_attn.v_proj.bias"] == (128,)


@pytest.mark.parametrize("changes, message", [
    (dict(n_layers=0), "n_layers is 0; allowed: 1 to 16777216"),
    (dict(vocab=2**40), "vocab is -1; allowed: 1 to 16777216"),
    (dict(n_kv_heads=3), "n_heads is 8; it must be a multiple of n_kv_heads, 3"),
    (dict(head_dim=31), "head_dim is 31; allowed: even numbers up to 512"),
    (dict(n_layers=1025), "n_layers is 1025; allowed: 1 to 1024"),
    (dict(rope_theta=0.0), "rope_theta is 0; it must be positive"),
    (dict(rope_factor=0.0), "rope_factor is 0; it must be positive"),
    (dict(rope_attention_factor=-1.0), "rope_attention_factor is -1; it must be positive"),
    (dict(rope_type="yarn", rope_theta=1.0),
     "yarn rope needs theta > 1 and beta_fast, beta_slow, original_context > 0; found 1, 32, 1, 4096"),
    (dict(unrotated=[1024]), "unrotated holds layer 1024; allowed: 0 to 1023"),
])  # fmt: skip
def test_bad_dimensions_are_refused_by_name(changes, message):
    with refused("config: " + message):
        shapes(**changes)


def test_plain_c_runs_everywhere():
    assert _skipkv.variants()["generic"] == (True, "")
