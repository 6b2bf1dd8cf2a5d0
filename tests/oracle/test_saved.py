"""What transformers saves is what we open."""

import json

import numpy as np
import pytest
from checkpoints import LLAMA3_ROPE, check_invariants, refusal

from skipkv.load.checkpoint import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
BIASES, SLIDING = dict(attention_bias=True, mlp_bias=True), dict(sliding_window=64, max_window_layers=1)
WRITTEN = {
    "llama": ("Llama", {}, {"rope_type": "default"}),
    "llama-biases": ("Llama", BIASES, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", dict(rope_scaling=LLAMA3_ROPE, rope_theta=5e5), {"rope_type": "llama3", "rope_theta": 5e5}),
    "linear": ("Llama", dict(rope_scaling={"type": "linear", "factor": 4.0}), {"rope_type": "linear"}),
    "qwen2": ("Qwen2", dict(use_sliding_window=False, **SLIDING), {"qkv_bias": True, "o_bias": False}),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True), {"tied": True}),
    "qwen3": ("Qwen3", dict(head_dim=16), {"head_dim": 16, "family": "qwen3"}),
    "mistral": ("Mistral", dict(head_dim=16, sliding_window=None), {"family": "mistral", "qkv_bias": False}),
    "smollm3": ("SmolLM3", dict(pad_token_id=0, no_rope_layer_interval=2), {"tied": True, "unrotated": (1,)}),
}
FACTORS = {"llama3": 8.0, "linear": 4.0}


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", WRITTEN)
def test_what_transformers_saves(tmp_path, case, dtype, size):
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
        assert {key: values[key] for key in expected} == expected and values["rope_factor"] == FACTORS.get(case, 1.0)
        for name, weight in model.state_dict().items():
            if name in checkpoint.tensors or not checkpoint.config.tied:
                raw = weight.contiguous().view(torch.uint8).numpy().ravel()
                assert np.array_equal(checkpoint.read(name), raw), name


@pytest.mark.parametrize("family, options, refused", [
    ("Qwen2", dict(use_sliding_window=True, **SLIDING), "layer_types: expected only 'full_attention'"),
    ("SmolLM3", dict(use_sliding_window=True, sliding_window=64, no_rope_layer_interval=2),
     "layer_types: expected only 'full_attention'"),
    ("Mistral", dict(sliding_window=64), "sliding_window: expected null, or at least the context of 128"),
    ("Mistral", dict(sliding_window=None), ""),
    ("Mistral", {}, ""),  # 4096, more than the context
    ("Qwen3", dict(use_sliding_window=True, sliding_window=64, max_window_layers=2), ""),
    ("Qwen3", dict(use_sliding_window=True, sliding_window=128, max_window_layers=0), ""),
    ("SmolLM3", dict(use_sliding_window=True, sliding_window=None), ""),
    ("SmolLM3", dict(sliding_window=64, no_rope_layer_interval=2), ""),
])  # fmt: skip
def test_windows_that_slide_are_refused(tmp_path, family, options, refused):
    getattr(transformers, f"{family}Config")(**SIZES, pad_token_id=0, **options).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [f"{family}ForCausalLM"]}
    for kinds in (values.get("layer_types"), None):  # older files have no list of layers
        (tmp_path / "config.json").write_text(json.dumps(values | {"layer_types": kinds}))
        found = refusal(tmp_path).removeprefix("DIR/config.json: ")
        if not refused:
            assert found == "DIR: expected model.safetensors or model.safetensors.index.json, found neither"
        elif kinds:
            assert found.startswith(refused)
        else:
            assert found.startswith("sliding_window: expected null, or at least the context of 128 ")
