"""§1: a row's schedule: what is fed, when it is compacted, and what that leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spec.decoder import Cache, Decoder
from spec.selection import METHODS, newest_kept, protected_below, select
from spec.sentences import (
    Sentences,
    Steering,
    count_thoughts,
    flag_repeats,
    segment,
    sentence_vectors,
    steering_alpha,
)


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
    weights: Mapping[str, float] | None = None
    allocate: str = "head"
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
class Row:
    """One sequence being decoded (§0). `prefill` the prompt, then `feed` tokens one by one or many at once.

    texts: text of every token id; without it no sentence ever ends under "auto".
    """

    decoder: Decoder
    method: Method | None = None
    steering: Steering | None = None
    texts: Sequence[str] | None = None
    delimiters: str | Collection[int] = "auto"
    markers: str | Collection[int] = "auto"
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
        return self.texts[token] if self.texts is not None else ""

    def rules(self) -> dict:
        return {"delimiters": self.delimiters, "markers": self.markers}

    def update_flags(self) -> None:
        """§4: sentences finished so far, and which of them a later one repeats."""
        texts = [self.text(i) for i in self.ids]
        self.sentences = segment(self.ids, texts, **self.rules())
        vectors = sentence_vectors(self.cache.hidden, self.sentences)
        self.flags = flag_repeats(vectors, self.method.tau)

    def penalties(self) -> np.ndarray:
        """[m, 3] first, last, λ of the flagged sentences."""
        flagged = self.flags > 0
        return np.column_stack([self.sentences.spans[flagged], self.flags[flagged]])

    def thoughts(self) -> int:
        """§4: N_o."""
        texts = [self.text(i) for i in self.ids]
        return count_thoughts(self.ids, texts, **self.rules())

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
            texts = [self.text(token) for token in ids]
            alpha = steering_alpha(self.steering, ids, texts, n_prompt=n_prompt, **self.rules())
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
        parts, todo = [np.empty((0, self.decoder.config["vocab"]))], list(tokens)
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
        if m.allocate == "layer":  # all heads or none
            due = range(cache.n_kv) if sum(h.sum() for h in held) >= budgets.sum() else []
        if not due:
            return
        keys, positions, sums = (
            [arrays[layer][h][held[h]] for h in range(cache.n_kv)]
            for arrays in (cache.keys, cache.positions, cache.sums)
        )
        chosen = select(
            m.name, keys, cache.queries[layer], positions=positions, penalties=self.penalties(), budget=budgets,
            window=m.window, mix=m.mix, kernel=m.kernel, sinks=m.sinks, protect=m.protect, prompt=self.n_prompt,
            seed=self.seed, sequence=self.sequence, layer=layer, sums=sums, weights=m.weights, allocate=m.allocate,
        )  # fmt: skip
        scores = (chosen.importance, chosen.redundancy, chosen.penalty, chosen.score)
        for h in due:
            mine = (None if s is None else s[h] for s in scores)
            kept = positions[h][chosen.kept[h]]
            self.trace.append(Compaction(len(self.ids), layer, h, positions[h], kept, *mine))
            cache.compact(layer, h, chosen.kept[h], evict=m.evict)


def replay(
    decoder: Decoder,
    tokens: Sequence[int],
    n_prompt: int,
    method: Method | None = None,
    steering: Steering | None = None,
    *,
    make: type[Row] = Row,
    **row: object,
) -> tuple[np.ndarray, Row]:
    """§1: a recorded text under a method, as if it had been decoded. Logits [n, vocab] and the row."""
    state = make(decoder, method, steering, **row)
    parts = [state.prefill(tokens[:n_prompt]), state.feed(tokens[n_prompt:])]
    return np.concatenate(parts), state


def generate(
    decoder: Decoder,
    tokens: Sequence[int],
    max_new: int,
    method: Method | None = None,
    steering: Steering | None = None,
    *,
    stop: Collection[int] = (),
    **row: object,
) -> tuple[list[int], Row]:
    """The new tokens of greedy decoding, ties to the lower id (§9), and the row. The last new token is not fed."""
    state = Row(decoder, method, steering, **row)
    new = [int(np.argmax(state.prefill(tokens)[-1]))]  # argmax takes the first of equals
    while len(new) < max_new and new[-1] not in stop:
        new.append(int(np.argmax(state.feed(new[-1:])[-1])))
    return new, state


def visibility(trace: Sequence[Compaction], n_layers: int, n_kv: int, n_tokens: int) -> np.ndarray:
    """[n_layers, n_kv, T, T]: which position j the query at position i may still see after the compactions of a trace.

    A compaction at step t comes after position t - 1: queries at t and later lose what it dropped of 0 … t - 1.
    """
    visible = np.ones((n_layers, n_kv, n_tokens, n_tokens), dtype=bool)
    for c in trace:
        dropped = np.setdiff1d(np.arange(c.step), c.kept)
        visible[c.layer, c.head, c.step :, dropped] = False
    return visible
