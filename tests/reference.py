"""METHOD.md as plain NumPy: the specification the C engine is compared with. Decoder, cache, schedule, run.

Scores, selection, sentences and steering strength are in reference_methods.py and are re-exported here. Float64 from
float32 inputs (§9), no dependency but NumPy. Read it beside METHOD.md; each function names its section.

    decoder = Decoder(config, weights)                    # Hugging Face names, float32 arrays
    decoder.logits(tokens)                                # [n, vocab], full cache
    decoder.generate(prompt, 100, method=Method("rkv", budget=64)).row.trace

config is a dict: family, n_layers, n_heads, n_kv_heads, head_dim, hidden, ffn, vocab, context, norm_eps, tied,
qkv_bias, o_bias, mlp_bias, rope_type ("default", "linear", "llama3"), rope_theta, rope_factor, rope_low_freq_factor,
rope_high_freq_factor, rope_original_context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from reference_methods import (
    METHODS,
    Selection,
    Sentences,
    Steering,
    cosine_margin,
    count_thoughts,
    flag_repeats,
    importance,
    inside_think,
    near_tie,
    newest_kept,
    noise,
    official_ids,
    penalty,
    protected_below,
    redundancy,
    segment,
    select,
    sentence_vectors,
    softmax,
    splitmix64,
    steering_alpha,
)

__all__ = [
    "METHODS",
    "Cache",
    "Compaction",
    "Decoder",
    "Generation",
    "Method",
    "Row",
    "Selection",
    "Sentences",
    "Steering",
    "cosine_margin",
    "count_thoughts",
    "flag_repeats",
    "importance",
    "inside_think",
    "near_tie",
    "noise",
    "official_ids",
    "penalty",
    "redundancy",
    "round_bf16",
    "segment",
    "select",
    "sentence_vectors",
    "splitmix64",
    "steering_alpha",
    "visibility",
]


# ---------------------------------------------------------------------------------------------------------------------
# Decoder


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, by way of float32 (which is what an engine rounds). Finite numbers only."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


STORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"f32": lambda x: x, "bf16": round_bf16}


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
        elif config["rope_type"] != "default":
            raise ValueError(f"rope_type is {config['rope_type']!r}; allowed are 'default', 'linear' and 'llama3'")
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
    """Llama, Qwen2 and Qwen3 in float64. weights: arrays by Hugging Face name."""

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
        q, k = rotate(q, positions, self.frequencies), rotate(k, positions, self.frequencies)
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
        head = w["model.embed_tokens.weight"] if c["tied"] else w["lm_head.weight"]
        return hidden @ head.T

    def logits(self, tokens: Sequence[int], *, store: str | Callable = "f32") -> np.ndarray:
        """[n, vocab] with the full cache."""
        return self.forward(Cache(self.config, store=store), tokens)

    def forward_masked(
        self,
        tokens: Sequence[int],
        visible: np.ndarray,
        *,
        steer: tuple[int, np.ndarray] | None = None,
        store: str | Callable = "f32",
    ) -> np.ndarray:
        """Logits with a full cache in which evicted positions are hidden: what compaction must equal (`visibility`)."""
        return self.forward(Cache(self.config, store=store), tokens, steer=steer, visible=visible)

    def generate(
        self,
        tokens: Sequence[int],
        max_new: int,
        method: Method | None = None,
        steering: Steering | None = None,
        *,
        stop: Collection[int] = (),
        chunk: int | None = None,
        **row: object,
    ) -> Generation:
        """Greedy decoding, ties to the lower id (§9). The last new token is not fed. **row: as for Row."""
        state = Row(self, method, steering, **row)
        logits = [state.prefill(tokens, chunk=chunk)[-1]]
        new = [int(np.argmax(logits[-1]))]  # argmax takes the first of equals
        while len(new) < max_new and new[-1] not in stop:
            logits.append(state.feed(new[-1:])[-1])
            new.append(int(np.argmax(logits[-1])))
        return Generation(new, np.array(logits), state)

    def replay(
        self,
        tokens: Sequence[int],
        n_prompt: int,
        method: Method | None = None,
        steering: Steering | None = None,
        **row: object,
    ) -> tuple[np.ndarray, Row]:
        """§1: a recorded text under a method, as if it had been decoded. Logits [n, vocab] and the row."""
        state = Row(self, method, steering, **row)
        parts = [state.prefill(tokens[:n_prompt])]
        if len(tokens) > n_prompt:
            parts.append(state.feed(tokens[n_prompt:]))
        return np.concatenate(parts), state


# ---------------------------------------------------------------------------------------------------------------------
# §1 schedule


@dataclass(frozen=True)
class Method:
    """Parameters of §0 and §6. budget: a number, or an array that broadcasts to [n_layers, n_kv]."""

    name: str = "full"
    budget: object = None
    interval: int = 128
    window: int = 8
    mix: float = 0.1
    kernel: int = 7
    sinks: int = 4
    protect: str = "none"
    tau: float = 0.95
    evict: bool = True


@dataclass(eq=False)
class Compaction:
    """One head of one compaction. step: t (§0). positions: of the slots held before; kept: of those held after.

    The scores run over the candidates, positions[: len(score)], and are None where the method has none.
    """

    step: int
    layer: int
    head: int
    positions: np.ndarray
    kept: np.ndarray
    importance: np.ndarray | None
    redundancy: np.ndarray | None
    penalty: np.ndarray | None
    score: np.ndarray | None


@dataclass(eq=False)
class Generation:
    """tokens: the new ones. logits [len(tokens), vocab]: those each new token was taken from."""

    tokens: list[int]
    logits: np.ndarray
    row: Row


@dataclass(eq=False)
class Row:
    """One sequence being decoded (§0). `prefill` the prompt, then `feed` tokens one by one or many at once.

    texts: text of every token id (a list or a function of the id); without it no sentence ever ends under "auto".
    think: (ways to write <think>, ways to write </think>), each way a sequence of ids.
    """

    decoder: Decoder
    method: Method | None = None
    steering: Steering | None = None
    texts: Sequence[str] | Callable[[int], str] | None = None
    delimiters: str | Collection[int] = "auto"
    markers: str | Collection[int] = "auto"
    think: tuple[Collection, Collection] | None = None
    seed: int = 0
    sequence: tuple[int, int] = (0, 0)
    store: str | Callable = "f32"

    cache: Cache = field(init=False)
    ids: list[int] = field(init=False, default_factory=list)  # tokens fed; t = len(ids)
    n_prompt: int = field(init=False, default=0)
    sentences: Sentences = field(init=False)  # finished by the last point of the grid
    flags: np.ndarray = field(init=False)  # λ of each of them, 0 = not flagged
    trace: list[Compaction] = field(init=False, default_factory=list)
    alphas: dict[int, float] = field(init=False, default_factory=dict)  # position -> α of the steered tokens
    peak: int = field(init=False, default=0)  # most slots any head held (§1); under evict=False, as attention saw them

    def __post_init__(self) -> None:
        self.method = self.method or Method()
        if self.method.name not in METHODS:
            raise ValueError(f"method is {self.method.name!r}; allowed are {', '.join(METHODS)}")
        if self.method.name != "full" and self.method.budget is None:
            raise ValueError(f"{self.method.name} needs a budget")
        self.cache = Cache(self.decoder.config, ring=self.method.window, store=self.store)
        self.update_flags()

    # -- texts, sentences, steering

    def text(self, token: int) -> str:
        if self.texts is None:
            return ""
        return self.texts(token) if callable(self.texts) else self.texts[token]

    def update_flags(self) -> None:
        """§4: sentences finished so far, and which of them a later one repeats."""
        texts = [self.text(i) for i in self.ids]
        self.sentences = segment(self.ids, texts, delimiters=self.delimiters, markers=self.markers)
        vectors = sentence_vectors(self.cache.hidden, self.sentences)
        self.flags = flag_repeats(vectors, self.method.tau)

    def penalties(self) -> np.ndarray:
        """[m, 3] first, last, λ of the flagged sentences."""
        flagged = self.flags > 0
        return np.column_stack([self.sentences.spans[flagged], self.flags[flagged]])

    def thoughts(self) -> int:
        """§4: N_o."""
        texts = [self.text(i) for i in self.ids]
        return count_thoughts(self.ids, texts, self.think, delimiters=self.delimiters, markers=self.markers)

    def steer_for(self, tokens: Sequence[int], n_prompt: int) -> tuple[int, np.ndarray] | None:
        """§7: what is added to each of the next tokens. Labels follow from the ids: α is known before the forward."""
        if self.steering is None:
            return None
        vector = np.asarray(self.steering.vector, dtype=np.float64)
        add = np.zeros((len(tokens), len(vector)))
        for i in range(len(tokens)):
            ids = [*self.ids, *(int(token) for token in tokens[: i + 1])]
            if "\n\n" not in self.text(ids[-1]):
                continue
            alpha = steering_alpha(
                self.steering,
                ids,
                [self.text(token) for token in ids],
                self.think,
                n_prompt=n_prompt,
                delimiters=self.delimiters,
                markers=self.markers,
            )
            if alpha is not None:
                add[i] = alpha * vector
                self.alphas[len(ids) - 1] = alpha
        return self.steering.layer, add

    # -- forward and compaction

    def budgets(self) -> np.ndarray:
        """[n_layers, n_kv]"""
        return np.broadcast_to(np.asarray(self.method.budget), (self.cache.n_layers, self.cache.n_kv))

    def refuse(self, n_prompt: int) -> None:
        """§5: a budget that the protected slots alone exceed is refused when the request is made."""
        m = self.method
        if m.name == "full":
            return
        for budget in np.unique(self.budgets()):
            newest = newest_kept(m.name, int(budget), m.window)
            below = protected_below(m.protect, n_prompt)
            if m.name == "streaming":
                below = max(below, m.sinks)
            if budget <= newest or budget < newest + below or (m.name == "streaming" and budget <= m.sinks):
                raise ValueError(f"budget is {budget}, but {newest} newest and {below} first slots are protected")

    def advance(self, tokens: Sequence[int], n_prompt: int) -> np.ndarray:
        """One forward, without the compaction that may follow."""
        logits = self.decoder.forward(self.cache, tokens, steer=self.steer_for(tokens, n_prompt))
        self.ids += [int(token) for token in tokens]
        self.peak = max(self.peak, max(len(k) for layer in self.cache.keys for k in layer))
        return logits

    def prefill(self, prompt: Sequence[int], *, chunk: int | None = None) -> np.ndarray:
        """§1: the whole prompt, in chunks; then a compaction if it has at least B tokens. Logits [n, vocab]."""
        if self.ids:
            raise ValueError("the row has its prompt already")
        if len(prompt) == 0:
            raise ValueError("the prompt is empty")
        self.refuse(len(prompt))
        self.n_prompt = len(prompt)
        size = chunk or len(prompt)
        parts = [self.advance(prompt[i : i + size], len(prompt)) for i in range(0, len(prompt), size)]
        self.grid_point()
        return np.concatenate(parts)

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Decoded (or recorded) tokens, in chunks that end where a compaction is due (§1 replay). Logits [n, vocab]."""
        if not self.ids:
            raise ValueError("the row has no prompt yet")
        parts, todo = [], list(tokens)
        while todo:
            n = 1
            while n < len(todo) and not self.on_grid(len(self.ids) + n):
                n += 1
            parts.append(self.advance(todo[:n], self.n_prompt))
            todo = todo[n:]
            if self.on_grid(len(self.ids)):
                self.grid_point()
        return np.concatenate(parts)

    def on_grid(self, t: int) -> bool:
        return t > 1 and t % self.method.interval == 1 % self.method.interval

    def grid_point(self) -> None:
        """§1: the last act of a forward. Flags first, then every layer and head with L >= B."""
        self.update_flags()
        if self.method.name == "full":
            return
        for layer in range(self.cache.n_layers):
            self.compact_layer(layer)

    def compact_layer(self, layer: int) -> None:
        m, cache, budgets = self.method, self.cache, self.budgets()[layer]
        held = cache.held[layer]
        due = [h for h in range(cache.n_kv) if held[h].sum() >= budgets[h]]
        if not due:
            return
        positions = [cache.positions[layer][h][held[h]] for h in range(cache.n_kv)]
        chosen = select(
            m.name,
            [cache.keys[layer][h][held[h]] for h in range(cache.n_kv)],
            cache.queries[layer],
            positions=positions,
            penalties=self.penalties(),
            budget=budgets,
            window=m.window,
            mix=m.mix,
            kernel=m.kernel,
            sinks=m.sinks,
            protect=m.protect,
            prompt=self.n_prompt,
            seed=self.seed,
            sequence=self.sequence,
            layer=layer,
            sums=[cache.sums[layer][h][held[h]] for h in range(cache.n_kv)],
        )
        for h in due:
            scores = (chosen.importance, chosen.redundancy, chosen.penalty, chosen.score)
            self.trace.append(
                Compaction(
                    len(self.ids),
                    layer,
                    h,
                    positions[h],
                    positions[h][chosen.kept[h]],
                    *(None if s is None else s[h] for s in scores),
                )
            )
            cache.compact(layer, h, chosen.kept[h], evict=m.evict)


def visibility(trace: Sequence[Compaction], n_layers: int, n_kv: int, n_tokens: int) -> np.ndarray:
    """[n_layers, n_kv, T, T]: which position j the query at position i may still see after the compactions of a trace.

    A compaction at step t comes after position t - 1: queries at t and later lose what it dropped of 0 … t - 1.
    """
    visible = np.ones((n_layers, n_kv, n_tokens, n_tokens), dtype=bool)
    for c in trace:
        dropped = np.setdiff1d(np.arange(c.step), c.kept)
        visible[c.layer, c.head, c.step :, dropped] = False
    return visible
