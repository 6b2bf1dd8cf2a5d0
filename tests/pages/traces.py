"""Traces and results for the tests of pages: random ones of any shape, and words that try to break out of a page."""

import numpy as np

from skipkv import Compaction, Steering, Trace, parse_method
from skipkv.eval import Fidelity, Outcome
from skipkv.trace import Sentence

PROMPT = "<s><|user|> Dot = 9. Leo = Dot + plums. plums = 4.Find Leo.<|assistant|><think>\n"
HOSTILE = [
    "</script>", "<script>alert(1)</script>", "<!--", "-->", "]]>", "&amp;", "&", '"', "'", "\\", "`${x}`", "\u2028",
    "\u2029", "\u202e", "\ufffd", "\ufffd\ufffd", "", "\n", "\r\n", "\t", "\0", "<think>", "{{data}}", "\U0001f600",
    "\u200b", "\u2066x\u2069", "\ud800", "\udc80\ud800", "\x1b[2J\x1b[31m", "http://example.org/x.js", ".\n\n", "é",
    "漢", "w" * 4000,
]  # fmt: skip


def build(rng, n, layers, heads, steps, texts=None, method="rkv:budget=8", share=0.7, scores=(), order=False):
    """A trace of random nested kept sets; each head has its own budgets and skips some steps."""
    compactions = []
    for layer, head in np.ndindex(layers, heads):
        slots, fed = np.zeros(0, np.int32), 0
        for step in steps:
            if rng.random() > share:
                continue
            slots, fed = np.concatenate([slots, np.arange(fed, step, dtype=np.int32)]), step
            size = int(rng.integers(0, len(slots) + 1))
            kept = slots[np.sort(rng.choice(len(slots), size, replace=False))]
            kept = rng.permutation(kept) if order else kept
            n_candidates = int(rng.integers(0, len(slots) + 1))
            values = {name: rng.normal(size=n_candidates).astype(np.float32) for name in scores}
            compactions.append(Compaction(step, layer, head, len(slots), kept, values or None))
            slots = kept
    compactions.sort(key=lambda c: (c.step, c.layer, c.head))
    texts = texts or [f" t{p}" for p in range(n)]
    return Trace(
        list(range(n)), texts, min(2, n), layers, heads, method, compactions, sentences_of(rng, texts), {0: 1.25},
        [(step, 100 * step) for step in sorted({c.step for c in compactions})], {"model": "random"},
    )  # fmt: skip


def sentences_of(rng, texts):
    """A sentence up to every token that ends with a line break, of a random kind."""
    ends = [p for p, text in enumerate(texts) if text.endswith("\n")]
    starts = [0, *(p + 1 for p in ends)]
    pairs = zip(starts, ends, strict=False)
    return [Sentence(a, b, b, int(rng.integers(2)), float(rng.random()), 0) for a, b in pairs]


def outcome(method, right, layer=None, alpha=1.0):
    """An outcome of ``right`` of 10, steered if there is a layer."""
    steering = None if layer is None else Steering(np.ones(8), layer, alpha=alpha)
    share = right / 10
    return Outcome(parse_method(method), steering, right, 10, share - 0.05, share + 0.04, 300.0, 0, 1e6, 0.5, 0, 10.0)


def fidelity(method, kl):
    figures = (1.0, 0.9, 1.1), (0.1, 0.0, 0.2), kl, (0.9, 0.8, 0.95)
    return Fidelity(parse_method(method), None, *figures, 10**6, 3, 100, 0.1)


LONG = "skipkv:budget={},interval=32,tau=0.88,window=8,protect=sinks:4"
RUNS = [
    outcome("full", 9), *(outcome(f"rkv:budget={b},interval=32", r) for b, r in [(64, 2), (128, 5), (256, 8)]),
    *(outcome(LONG.format(b), 7, 2, 1.25) for b in (64, 256)),
]  # fmt: skip
