"""What the tests of whole generations share: the tiny problems, runs on them, and what may not depend on the machine.

    [out] = run(model, PROBLEMS[:1], make("skipkv"))
    same(run(model, PROBLEMS, rows=2), run(model, PROBLEMS, rows=8))
"""

from collections import deque
from dataclasses import asdict, replace

import harness
import numpy as np

from skipkv import Model
from skipkv.methods import SUMS
from skipkv.tiny.problems import draw

PROBLEMS = [problem["prompt"] for problem in draw(200)]
VECTOR = np.random.default_rng(8).standard_normal(256).astype(np.float32) * 0.05


def like(model, tokenizer="same", **changes):
    """The same weights under a changed configuration."""
    kept = model.tokenizer if tokenizer == "same" else tokenizer
    return Model(model._core, replace(model.config, **changes), kept, model.name, model.generation, model.threads)


def make(name, budget=48, interval=32, **parameters):
    """A method of this name that compacts within a few tokens, and flags something in so short a text."""
    return harness.make(name, **({"budget": budget, "interval": interval, "tau": 0.9} | parameters))


def page_bytes(name, cache):
    """Bytes of a page of the model in the box under this method."""
    return 64 * (2 * {"bf16": 64, "f32": 128, "q8": 36}[cache] + 4 + 4 * bool(make(name).needs & SUMS))


def run(model, prompts, method=None, steering=None, **options):
    return model.generate(prompts, method, steering, **({"max_new_tokens": 40, "progress": False} | options))


def recorded(model, method, prompts=PROBLEMS[:2], **options):
    """Generations with traces, long enough for several compactions."""
    return run(model, prompts, method, **({"max_new_tokens": 150, "stop_ids": (), "trace": True} | options))


def stream(model, prompts, method=None, steering=None, **options):
    return model.stream(prompts, method, steering, **({"max_new_tokens": 40} | options))


def work_of(model, prompts, method=None, steering=None, **options):
    """The scheduler's own object, before it runs."""
    return model._run(prompts, method, steering, **({"max_new_tokens": 40, "rows": 1} | options))


def alone(model, prompts, method, steering, prompt, sample, **options):
    """This one sequence, with nothing shared or beside it: its row prefills its own prompt."""
    one = work_of(model, prompts, method, steering, n=sample + 1, **options)
    one.queue = deque([(prompt, sample)])
    list(one.events())
    return one.outputs[prompt, sample]


def facts(out, trace=True):
    """All of a generation that may not depend on the machine or the batch."""
    stats = asdict(out.stats) if out.stats else {}
    for name in ("seconds", "pool_bytes", "pool_peak_bytes"):
        stats.pop(name, None)
    found = [out.text, out.tokens, out.finish_reason, out.prompt_tokens, out.prompt, out.sample, stats]
    if trace and out.trace:
        t = out.trace
        found += [t.tokens, t.sentences, t.alphas, t.bytes]
        found += [(c.step, c.layer, c.head, c.before, c.kept.tobytes()) for c in t.compactions]
        found += [a.tobytes() for c in t.compactions for _, a in sorted((c.scores or {}).items())]
    return found


def running(events):
    """After each event: the sequences that have begun and not ended."""
    open_now = set()
    for event in events:
        open_now.add((event.prompt, event.sample))
        yield event, set(open_now)
        if event.generation:
            open_now.discard((event.prompt, event.sample))


def same(outs, others):
    assert len(outs) == len(others)
    for out, other in zip(outs, others, strict=True):
        assert facts(out) == facts(other), (out.prompt, out.sample)


def same_compactions(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a.step, a.layer, a.head, a.before) == (b.step, b.layer, b.head, b.before)
        assert a.kept.dtype == b.kept.dtype == np.int32 and np.array_equal(a.kept, b.kept)
        assert (a.scores is None) == (b.scores is None)
        if a.scores is not None:
            assert a.scores.keys() == b.scores.keys()
            assert all(a.scores[k].dtype == np.float32 and np.array_equal(a.scores[k], b.scores[k]) for k in a.scores)
