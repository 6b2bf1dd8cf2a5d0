"""Shapes that are measured, beside those of `skipkv bench`, and what transformers calls them."""

from dataclasses import replace
from typing import Any

from skipkv.eval import speed
from skipkv.load.config import ModelConfig

_QWEN_7B = ModelConfig(
    "qwen2", n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, hidden=3584, ffn=18944, vocab=152064, context=131072,
    norm_eps=1e-6, tied=False, qkv_bias=True, rope_theta=1e4,
)  # fmt: skip
_TINY = ModelConfig(
    "qwen2", n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden=64, ffn=96, vocab=260, context=4096,
    norm_eps=1e-6, tied=False, qkv_bias=True, rope_theta=1e4,
)  # fmt: skip

SHAPES = speed.SHAPES | {
    "r1-distill-qwen-7b": _QWEN_7B,
    "tiny": _TINY,
    "head-256": replace(_QWEN_7B, n_heads=16, n_kv_heads=4, head_dim=256),
    "head-512": replace(_QWEN_7B, n_heads=8, n_kv_heads=4, head_dim=512),
}


def transformers_config(config: ModelConfig) -> Any:
    """The same shape, of a model of transformers."""
    import transformers

    return transformers.AutoConfig.for_model(
        config.family, vocab_size=config.vocab, hidden_size=config.hidden, intermediate_size=config.ffn,
        head_dim=config.head_dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, max_position_embeddings=config.context, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied, rope_theta=config.rope_theta,
    )  # fmt: skip
