"""The tiny reasoner's network for training: Llama (RMSNorm, RoPE, grouped queries, SwiGLU) under the tensor names of
Hugging Face.

ids [B, T] → embed → layers × (attention, MLP) → norm [B, T, D] → lm_head
B rows, T tokens, D hidden, H query heads, G key/value heads, n = H / G, d head_dim.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from skipkv.tiny import problems

CHAT = (
    "{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes, by their names in config.json."""

    vocab_size: int = len(problems.WORDS)
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    # With 10000 and heads of 32, too few pairs hardly turn over a trace to tell 48 names apart.
    rope_theta: float = 1e8
    rms_norm_eps: float = 1e-5


def rotations(length: int, d: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos, sin [T, d]."""
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.G, self.n, self.d = s.num_key_value_heads, s.num_attention_heads // s.num_key_value_heads, s.head_dim
        self.q_proj = nn.Linear(s.hidden_size, self.G * self.n * self.d, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, self.G * self.d, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, self.G * self.d, bias=False)
        self.o_proj = nn.Linear(self.G * self.n * self.d, s.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, T, D]; bias [B, G, T, T] is added to the logits (None: causal)."""
        B, T, _ = x.shape

        def heads(
            y: Tensor,
        ) -> Tensor:  # [B * G, n or 1, T, d]: one mask serves the n queries of a group without a copy
            return y.view(B, T, self.G, -1, self.d).permute(0, 2, 3, 1, 4).flatten(0, 1)

        q, k = rotate(heads(self.q_proj(x)), cos, sin), rotate(heads(self.k_proj(x)), cos, sin)
        k, v = k.expand(-1, self.n, -1, -1), heads(self.v_proj(x)).expand(-1, self.n, -1, -1)
        mask = None if bias is None else bias.flatten(0, 1)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=bias is None)
        return self.o_proj(y.view(B, self.G, self.n, T, self.d).permute(0, 3, 1, 2, 4).flatten(2))


class MLP(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.self_attn, self.mlp = Attention(s), MLP(s)
        self.input_layernorm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class Network(nn.Module):
    """Blocks start as the identity on a stream of large embeddings, the head at zero."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = any(part in name for part in ("o_proj", "down_proj", "lm_head"))
                nn.init.normal_(p, std=1.0 if "embed" in name else 0.0 if last else p.shape[1] ** -0.5)

    def forward(self, ids: Tensor, bias: Tensor | None = None) -> Tensor:
        """ids [B, T] → hidden after the final norm [B, T, D].

        bias [B, G, T, T] is turned by one head from layer to layer.
        """
        cos, sin = rotations(ids.shape[1], self.shape.head_dim, self.shape.rope_theta)
        x = self.embed_tokens(ids)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, None if bias is None else bias.roll(i, 1))
        return self.norm(x)

    def save(self, folder: Path) -> None:
        """An ordinary Hugging Face directory in bf16, tokenizer included."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            ("" if name.startswith("lm_head") else "model.") + name: p.detach().to(torch.bfloat16).contiguous()
            for name, p in self.state_dict().items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        bos, eos = problems.IDS[problems.BOS], problems.IDS[problems.EOS]
        config = asdict(self.shape) | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 4096,
            "torch_dtype": "bfloat16", "bos_token_id": bos, "eos_token_id": eos,
            "pad_token_id": problems.IDS[problems.PAD],
        }  # fmt: skip
        tokens = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": problems.BOS, "eos_token": problems.EOS,
            "pad_token": problems.PAD, "add_bos_token": False, "chat_template": CHAT,
        }  # fmt: skip
        for name, content in (
            ("config.json", config),
            ("generation_config.json", {"eos_token_id": eos, "bos_token_id": bos}),
            ("tokenizer_config.json", tokens),
        ):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")
        problems.tokenizer().save(str(folder / "tokenizer.json"))
