"""Shapes that the CUDA backend is measured with, beside those of `skipkv bench`."""

from dataclasses import replace

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
