"""Log-likelihoods of continuations under a method, as `Model.replay` gives them, for many at once.

pairs → by context → a row each, prefilled once → a fork for each further continuation → fed as if it were decoded
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from skipkv import _skipkv
from skipkv.engine import FORWARD_TOKENS
from skipkv.errors import CapacityError
from skipkv.methods import Method
from skipkv.model import LOGIT_TOKENS, Model, log_probability
from skipkv.steering import Steering


def likelihoods(
    model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], method: Method,
    steering: Steering | None = None, *, rows: int = 16, cache: str = "bf16", memory_limit: int | None = None,
) -> Iterator[tuple[int, tuple[float, bool]]]:  # fmt: skip
    """Score continuations; contexts that are the same are prefilled once.

    Parameters
    ----------
    pairs : sequence of (context, continuation)
        Token ids, at least one each; together one more than the model's context at most, as the last is never fed.
    method, steering, rows, cache, memory_limit
        As for `Model.generate`.

    Yields
    ------
    (int, (float, bool))
        Index of the pair, log p(continuation | context), and whether each of its tokens is the most likely one; in
        the order in which they are done.

    Raises
    ------
    ConfigError, CapacityError
        The method cannot hold a context; the cache of one pair does not fit.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(i)
    waiting = deque((context, i[at : at + rows]) for context, i in groups.items() for at in range(0, len(i), rows))
    session = model._session(method, cache, rows=rows, tokens=max(FORWARD_TOKENS, rows), memory_limit=memory_limit)
    texts = [text for _, text in pairs]
    vector = steering.as_tuple() if steering else None
    while waiting:
        opened, n_rows, n_tokens = {}, 0, 0
        # Long contexts fill forwards on their own, and side by side they would only take memory.
        while waiting and n_rows + len(waiting[0][1]) <= rows and n_tokens < FORWARD_TOKENS:
            context, indices = waiting[0]
            capacity = len(context) + max(len(texts[i]) for i in indices) - 1
            try:
                number = session.open(capacity, n_prompt=len(context), steering=vector)
            except CapacityError:
                if opened:
                    break
                raise
            opened[number] = *waiting.popleft(), capacity
            n_rows, n_tokens = n_rows + len(indices), n_tokens + capacity
        heads = dict(_feed(model, session, {number: context for number, (context, *_) in opened.items()}, every=False))
        found, active = {}, {}  # results by index, indices by row
        for number, (context, indices, capacity) in opened.items():
            longer = [i for i in indices if len(texts[i]) > 1]  # others need no more than the logits after the context
            try:
                while len(longer) > 1:
                    active[session.fork(number, capacity, 0)] = longer[0]
                    del longer[0]
            except CapacityError:  # context and copy do not fit together: the others' is prefilled again
                waiting.appendleft((context, longer[:-1]))
                indices = [i for i in indices if i not in longer[:-1]]
            active.update((number, i) for i in longer[-1:])
            found.update((i, _judge(heads[number], texts[i][:1])) for i in indices)
        fed = dict.fromkeys(active, 1)
        for number, logits in _feed(model, session, {row: texts[i][:-1] for row, i in active.items()}, every=True):
            i, first = active[number], fed[number]
            fed[number] += len(logits)
            logprob, greedy = _judge(logits, texts[i][first : fed[number]])
            found[i] = found[i][0] + logprob, found[i][1] and greedy
        for number in opened.keys() | active.keys():
            session.close(number)
        yield from found.items()


def _feed(
    model: Model, session: _skipkv.Session, texts: Mapping[int, Sequence[int]], every: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Feed ids to rows side by side; (row, logits [n, vocab]) of every token of each part, or of its last."""
    fed, limit = dict.fromkeys(texts, 0), LOGIT_TOKENS if every else FORWARD_TOKENS
    while True:
        spans, tokens = [], []
        for number, ids in texts.items():
            n = min(len(ids) - fed[number], limit - len(tokens))
            if n:
                n = session.chunk(number, n)
                spans.append((number, n))
                tokens += ids[fed[number] : fed[number] + n]
                fed[number] += n
        if not spans:
            return
        logits = np.empty((len(tokens) if every else len(spans), model.config.vocab), np.float32)
        session.forward(np.array(spans, np.int32), np.array(tokens, np.int32), logits, every)
        ends = np.cumsum([n if every else 1 for _, n in spans])
        yield from zip((number for number, _ in spans), np.split(logits, ends[:-1]), strict=True)


def _judge(logits: np.ndarray, tokens: Sequence[int]) -> tuple[float, bool]:
    """Log-probability of tokens [n] by logits [n, vocab], and whether each is the most likely one."""
    ids = np.array(tokens)
    return float(log_probability(logits, ids).sum()), bool((logits.argmax(axis=1) == ids).all())
