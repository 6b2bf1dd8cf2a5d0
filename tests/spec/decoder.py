"""A row's decoder and cache: the families of the Llama kind as Hugging Face computes them.

config is a dict: family, n_layers, n_heads, n_kv_heads, head_dim, hidden, ffn, vocab, context, norm_eps, tied,
qkv_bias, o_bias, mlp_bias, rope_type ("default", "linear", "dynamic", "llama3", "yarn"), rope_theta, rope_factor,
rope_low_freq_factor, rope_high_freq_factor, rope_beta_fast, rope_beta_slow, rope_original_context, rope_truncate,
rope_attention_factor, unrotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spec.scores import softmax


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, by way of float32 (which is what an engine rounds). Finite numbers only."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def round_q8(x: np.ndarray) -> np.ndarray:
    """Each vector [..., head_dim] as 127ths of its largest number, to nearest even, in float32 as an engine does it."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=-1, keepdims=True, initial=0) / np.float32(127)
    small = scale < np.finfo(np.float32).tiny
    return np.where(small, 0, scale * np.rint(x / np.where(small, 1, scale))).astype(np.float64)


def quantise_q8(x: np.ndarray, round_scale: Callable = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(q [n, groups, 32], scale [n, groups]), float32: each group of a row [n, k] as the nearest multiples of a scale.

    A group of subnormal scale is zero; the scale of one that holds what is not finite is NaN.
    """
    groups = np.zeros((len(x), -(-x.shape[1] // 32) * 32), np.float32)
    groups[:, : x.shape[1]] = x
    groups = groups.reshape(len(x), -1, 32)
    scale, q = np.abs(groups).max(axis=2) / np.float32(127), np.zeros_like(groups)
    scale[scale < np.finfo(np.float32).tiny] = 0
    scale[~np.isfinite(scale)] = np.nan
    usable = scale > 0
    scale[usable] = round_scale(scale[usable])
    q[usable] = np.rint(groups[usable] / scale[usable][:, None])
    return q, scale


def weights_q8(w: np.ndarray) -> np.ndarray:
    """Weights [n, k] as q8 holds them: their scales are bfloat16."""
    q, scale = quantise_q8(w, round_bf16)
    return (q * scale[..., None]).reshape(len(w), -1)[:, : w.shape[1]]


def linear_q8(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [n, k] times q8 weights [m, k], float32: the sum of a group is exact, groups are added in order."""
    (a, inputs), (b, weights) = quantise_q8(x), quantise_q8(w, round_bf16)
    y = np.zeros((len(x), len(w)), np.float32)
    for g in range(a.shape[1]):
        y += (a[:, g] @ b[:, g].T) * (weights[:, g] * inputs[:, g, None])
    return y


def linear_bf16a16(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [n, k] times weights [m, k], both rounded to bfloat16: of every two inputs the second is added first."""
    a, b = (np.pad(round_bf16(v).astype(np.float32), ((0, 0), (0, v.shape[1] % 2))) for v in (x, w))
    y = np.zeros((len(x), len(w)), np.float32)
    for k in range(a.shape[1]):
        y += a[:, k ^ 1, None] * b[:, k ^ 1]  # exact, if it is not subnormal
    return y


# Types of weights that round what they meet, too: how a matrix is held, and its product.
ROUNDED: dict[str, tuple[Callable, Callable]] = {
    "q8": (weights_q8, linear_q8), "bf16a16": (round_bf16, linear_bf16a16)
}  # fmt: skip
STORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"f32": lambda x: x, "bf16": round_bf16, "q8": round_q8}


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rope_frequencies(config: Mapping) -> np.ndarray:
    """Radians per position of each of the head_dim / 2 pairs, with Hugging Face's scaling rules."""
    d = config["head_dim"]
    out = []
    for i in range(d // 2):
        f = 1.0 / config["rope_theta"] ** (2 * i / d)
        if config["rope_type"] == "linear":
            f = f / config["rope_factor"]
        elif config["rope_type"] == "llama3":
            factor, low, high = (config["rope_" + k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
            turns = config["rope_original_context"] * f / (2 * math.pi)  # within the original context
            if turns < low:
                f = f / factor
            elif turns <= high:
                smooth = (turns - low) / (high - low)
                f = (1 - smooth) * f / factor + smooth * f
        elif config["rope_type"] == "yarn":
            factor, original = config["rope_factor"], config["rope_original_context"]
            low, high = (
                d * math.log(original / (2 * math.pi * config["rope_beta_" + k])) / (2 * math.log(config["rope_theta"]))
                for k in ("fast", "slow")
            )
            if config["rope_truncate"]:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, d - 1)
            ramp = min(max((i - low) / (high - low if high != low else 0.001), 0), 1)
            f = ramp * f / factor + (1 - ramp) * f
        elif config["rope_type"] not in ("default", "dynamic"):  # the latter within the original context
            raise ValueError(f"rope_type is {config['rope_type']!r}")
        out.append(f)
    return np.array(out)


def rotate(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """RoPE, half-rotation layout: element i is paired with i + d/2. x [n, heads, d], positions [n]."""
    angle = positions[:, None, None] * frequencies  # [n, 1, d/2]
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


class Cache:
    """Slots of one row: per layer and KV head its own keys, values, positions (§0), and what the scores need.

    held: False for slots that a method with evict=False would have dropped (§1); attention still sees them.
    sums: attention received (§6 h2o). queries: per layer [n_heads, <= ring, d], the newest last (§2.1).
    hidden: [t, D] final-norm states of every token fed. entering: per layer [n, D], residual stream entering the
    block in the last forward, before steering.
    """

    def __init__(self, config: Mapping, *, ring: int = 8, store: str | Callable = "f32") -> None:
        self.n_layers, self.n_kv, d = config["n_layers"], config["n_kv_heads"], config["head_dim"]
        self.ring = ring
        self.store = STORES[store] if isinstance(store, str) else store
        self.length = 0

        def per_head(make: Callable) -> list[list[np.ndarray]]:
            return [[make() for _ in range(self.n_kv)] for _ in range(self.n_layers)]

        self.keys = per_head(lambda: np.zeros((0, d)))
        self.values = per_head(lambda: np.zeros((0, d)))
        self.positions = per_head(lambda: np.zeros(0, dtype=np.int64))
        self.held = per_head(lambda: np.zeros(0, dtype=bool))
        self.sums = per_head(lambda: np.zeros(0))
        self.queries = [np.zeros((config["n_heads"], 0, d)) for _ in range(self.n_layers)]
        self.hidden = np.zeros((0, config["hidden"]))
        self.entering: list[np.ndarray] = []

    def append(self, layer: int, keys: np.ndarray, values: np.ndarray, positions: np.ndarray) -> None:
        """keys, values [n, n_kv, d] are rounded to the cache's type on the way in."""
        n = len(positions)
        for h in range(self.n_kv):
            self.keys[layer][h] = np.concatenate([self.keys[layer][h], self.store(keys[:, h])])
            self.values[layer][h] = np.concatenate([self.values[layer][h], self.store(values[:, h])])
            self.positions[layer][h] = np.concatenate([self.positions[layer][h], positions])
            self.held[layer][h] = np.concatenate([self.held[layer][h], np.ones(n, dtype=bool)])
            self.sums[layer][h] = np.concatenate([self.sums[layer][h], np.zeros(n)])

    def compact(self, layer: int, head: int, kept: np.ndarray, *, evict: bool) -> None:
        """kept: indices among the held slots, ascending."""
        slots = np.nonzero(self.held[layer][head])[0][kept]
        if evict:
            for field_ in (self.keys, self.values, self.positions, self.held, self.sums):
                field_[layer][head] = field_[layer][head][slots]
        else:
            self.held[layer][head][:] = False
            self.held[layer][head][slots] = True


class Decoder:
    """In float64. weights: arrays by Hugging Face name."""

    def __init__(self, config: Mapping, weights: Mapping[str, np.ndarray]) -> None:
        self.config = dict(config)
        self.weights = {name: np.asarray(w, dtype=np.float64) for name, w in weights.items()}
        self.frequencies = rope_frequencies(config)
        self.qk_norm = config["family"] == "qwen3"

    def linear(self, x: np.ndarray, name: str, bias: bool) -> np.ndarray:
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if bias else y

    def attention(
        self, cache: Cache, layer: int, h: np.ndarray, positions: np.ndarray, visible: np.ndarray | None
    ) -> np.ndarray:
        """Keys and values go in first, then every query sees the slots at its own position and before it."""
        c, p = self.config, f"model.layers.{layer}.self_attn."
        n, d, group = len(h), c["head_dim"], c["n_heads"] // c["n_kv_heads"]
        q = self.linear(h, p + "q_proj", c["qkv_bias"]).reshape(n, c["n_heads"], d)
        k = self.linear(h, p + "k_proj", c["qkv_bias"]).reshape(n, c["n_kv_heads"], d)
        v = self.linear(h, p + "v_proj", c["qkv_bias"]).reshape(n, c["n_kv_heads"], d)
        if self.qk_norm:
            q = rms_norm(q, self.weights[p + "q_norm.weight"], c["norm_eps"])
            k = rms_norm(k, self.weights[p + "k_norm.weight"], c["norm_eps"])
        if layer not in c["unrotated"]:
            q, k = (c["rope_attention_factor"] * rotate(x, positions, self.frequencies) for x in (q, k))
        cache.append(layer, k, v, positions)
        ring = np.concatenate([cache.queries[layer], q.transpose(1, 0, 2)], axis=1)
        cache.queries[layer] = ring[:, max(0, ring.shape[1] - cache.ring) :]

        out = np.zeros((n, c["n_heads"], d))
        for kv in range(c["n_kv_heads"]):
            keys, values = cache.keys[layer][kv], cache.values[layer][kv]
            seen = cache.positions[layer][kv][None, :] <= positions[:, None]  # [n, L]
            if visible is not None:
                seen = seen & visible[layer, kv][positions][:, cache.positions[layer][kv]]
            for head in range(kv * group, (kv + 1) * group):
                logits = np.where(seen, q[:, head] @ keys.T / math.sqrt(d), -np.inf)
                probability = softmax(logits)
                cache.sums[layer][kv] += probability.sum(axis=0)
                out[:, head] = probability @ values
        return self.linear(out.reshape(n, c["n_heads"] * d), p + "o_proj", c["o_bias"])

    def mlp(self, layer: int, h: np.ndarray) -> np.ndarray:
        p, bias = f"model.layers.{layer}.mlp.", self.config["mlp_bias"]
        gate, up = self.linear(h, p + "gate_proj", bias), self.linear(h, p + "up_proj", bias)
        return self.linear(gate / (1 + np.exp(-gate)) * up, p + "down_proj", bias)

    def forward(
        self,
        cache: Cache,
        tokens: Sequence[int],
        *,
        steer: tuple[int, np.ndarray] | None = None,
        visible: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits [n, vocab] of the next n tokens of a row.

        steer: (block, [n, D] added to the residual stream entering it) (§7).
        visible: [n_layers, n_kv, T, T], may the query at position i see position j; on top of causality.
        """
        c, w = self.config, self.weights
        positions = cache.length + np.arange(len(tokens))
        x = w["model.embed_tokens.weight"][np.asarray(tokens, dtype=np.int64)]
        cache.entering = []
        for layer in range(c["n_layers"]):
            cache.entering.append(x)
            if steer is not None and steer[0] == layer:
                x = x + steer[1]
            p = f"model.layers.{layer}."
            h = rms_norm(x, w[p + "input_layernorm.weight"], c["norm_eps"])
            x = x + self.attention(cache, layer, h, positions, visible)
            h = rms_norm(x, w[p + "post_attention_layernorm.weight"], c["norm_eps"])
            x = x + self.mlp(layer, h)
        hidden = rms_norm(x, w["model.norm.weight"], c["norm_eps"])
        cache.hidden = np.concatenate([cache.hidden, hidden])
        cache.length += len(tokens)
        return self.linear(hidden, "model.embed_tokens" if c["tied"] else "lm_head", False)

    def logits(
        self, tokens: Sequence[int], *, store: str | Callable = "f32", visible: np.ndarray | None = None
    ) -> np.ndarray:
        """[n, vocab] with the full cache. With what `visibility` says of a trace: what compaction must equal."""
        return self.forward(Cache(self.config, store=store), tokens, visible=visible)


class RoundedDecoder(Decoder):
    """With matrices of a type of `ROUNDED`, and what they are multiplied with rounded likewise."""

    def __init__(self, config: Mapping, weights: Mapping[str, np.ndarray], dtype: str) -> None:
        hold, self.multiply = ROUNDED[dtype]
        super().__init__(config, {name: hold(w) if w.ndim == 2 else w for name, w in weights.items()})

    def linear(self, x: np.ndarray, name: str, bias: bool) -> np.ndarray:
        y = self.multiply(x.astype(np.float32), self.weights[name + ".weight"])
        return y + self.weights[name + ".bias"] if bias else y
