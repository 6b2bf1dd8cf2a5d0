"""What the tests of the engine share: small models of any family beside their reference, a vocabulary, runs of both.

    model, decoder = build("qwen2", 2, 3)              # two KV heads, three query heads each
    session = open_session(model, method)
    logits, alphas = replay(session, session.open(200, n_prompt=30), tokens)
    want, row = reference_run(decoder, method, tokens, 30)
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from pathlib import Path

import devices
import numpy as np
import pytest
import spec

import skipkv
from skipkv import ConfigError, _skipkv, methods
from skipkv.load.checkpoint import open_checkpoint
from skipkv.methods import CLASSES, Custom
from skipkv.sentences import classify, joined

VARIANTS = [name for name, (runs_here, _) in _skipkv.variants().items() if runs_here]
EVICTING = [name for name, row in methods.TABLE.items() if row["needs"] & methods.COMPACTS]
ALL = list(methods.TABLE)
# Those whose heads may share their layer's budgets, doing so.
SHARING = [f"{name}:allocate=layer" for name in EVICTING if name not in spec.SHARED]
TINY = Path(skipkv.__file__).parent / "tiny"


@contextmanager
def refused(message, kind=ConfigError):
    """What runs inside is refused with exactly this sentence."""
    with pytest.raises(kind) as error:
        yield error
    assert str(error.value) == message


# Delimiters, markers (whole and in pieces), blank lines that close nothing, think markers of one and of three tokens.
TEXTS = ["\n", ".\n\n", " Wait", "Alter", "natively", "a", "ga", "in", " again", ":\n", ":\n\n", "<think>", "</think>",
         "<th", "ink", ">", "</th", " ", "wait", ".\n", "A", "\n\n", " a", "alternatively "]  # fmt: skip
TEXTS += [f" w{i}" for i in range(40 - len(TEXTS))]
WORDS = list(range(TEXTS.index(" w0"), 40))
TEXTS += [">\n"]  # ends a think marker and a sentence at once
VOCAB = len(TEXTS)
ID = {text: i for i, text in enumerate(TEXTS)}
OPEN, CLOSE, WAIT, BLANK, LINE = (ID[text] for text in ("<think>", "</think>", " Wait", ".\n\n", ".\n"))
THINK = tuple(
    [[ID[whole]], [ID[first], ID["ink"], ID[">"]], [ID[first], ID["ink"], ID[">\n"]]]
    for whole, first in (("<think>", "<th"), ("</think>", "</th"))
)


def vocabulary(texts=TEXTS, delimiters="auto", markers="auto"):
    """The core's view: (flags, marker runs, the tokens' bytes, their starts)."""
    return *classify(texts, delimiters, markers), *joined([text.encode() for text in texts])


FAMILIES = _skipkv.families()


def config(family="llama", n_kv=2, group=2, **changes):
    return {
        "family": family, "n_layers": 2, "n_heads": n_kv * group, "n_kv_heads": n_kv, "head_dim": 16, "hidden": 32,
        "ffn": 48, "vocab": VOCAB, "context": 4096, "norm_eps": 1e-6, "tied": False, "qkv_bias": family == "qwen2",
        "o_bias": False, "mlp_bias": False, "rope_type": "default", "rope_theta": 10000.0,
        "rope_factor": 1.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context": 4096,
        "rope_beta_fast": 32.0, "rope_beta_slow": 1.0, "rope_truncate": True, "rope_attention_factor": 1.0,
        "unrotated": (1,) if FAMILIES[family]["skips_rope"] else (),
    } | changes  # fmt: skip


SPLIT = 2e-4  # of the largest logit: what CUDA, which splits float32 activations into two bf16, loses to bf16 weights
# A block's worth of everything: several pages a head, flagged sentences, steering.
STEERING = (np.linspace(-0.5, 0.5, 32, dtype=np.float32), 1, 1.0, 0.05, 1.2, "all")
RUN = {"window": 4, "interval": 16, "kernel": 3, "mix": 0.3, "tau": 0.9, "sinks": 3, "seed": 5}
VECTOR = np.linspace(-0.6, 0.9, 32, dtype=np.float32)
SHAPES = {}  # (n_layers, n_kv_heads) of the models built


def core(config, dtype, backend):
    """A model without weights on a backend of conftest.py."""
    return _skipkv.Model(config, dtype, *(devices.where(backend) if backend else ()))


@functools.cache
def build(family="llama", n_kv=2, group=2, variant=None, seed=0, damp=1.0, dtype="f32", **changes):
    """(model, decoder) with the same random float32 weights; biases and norms too.

    damp: of what the blocks add to the residual stream. Near 0 a token's final state is its embedding's, so that equal
    sentences have equal vectors wherever they stand.
    """
    c = config(family, n_kv, group, **changes)
    rng = np.random.default_rng(seed)
    model, weights = core(c, dtype, variant), {}
    for name, shape, _ in _skipkv.tensors(c):
        weights[name] = rng.normal(1.0 * ("norm" in name), 0.2, shape).astype(np.float32)
        if "o_proj" in name or "down_proj" in name:
            weights[name] *= np.float32(damp)
        model.bind(name, "f32", shape, weights[name].view(np.uint8).reshape(-1), 1)
    SHAPES[model] = c["n_layers"], c["n_kv_heads"]
    return model, spec.RoundedDecoder(c, weights, dtype) if dtype in spec.ROUNDED else spec.Decoder(c, weights)


@functools.cache
def tiny(backend=None, dtype="bf16"):
    """The model in the box as the core has it, with one thread's work at loading."""
    with open_checkpoint("tiny") as checkpoint:
        model = core(checkpoint.config.as_dict(), dtype, backend)
        for name, tensor in checkpoint.tensors.items():
            model.bind(name, tensor.dtype.lower(), tensor.shape, checkpoint.read(name), 1)
    return model


@functools.cache
def tiny_decoder():
    return spec.Decoder(*decoder_parts("tiny"))


def decoder_parts(source):
    """(config, float32 weights) of a checkpoint, for the reference."""
    types = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    with open_checkpoint(source) as checkpoint:
        weights = {}
        for name, tensor in checkpoint.tensors.items():
            raw = checkpoint.read(name).view(types[tensor.dtype]).reshape(tensor.shape)
            wide = (raw.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else raw.astype(np.float32)
            weights[name] = wide
        return checkpoint.config.as_dict(), weights


def shape_of(decoder):
    return decoder.config["n_layers"], decoder.config["n_kv_heads"]


def like_skipkv(c):
    """SkipKV's score as a function of arrays, in the order in which the core computes it."""
    mix, rest = np.float32(0.1), np.float32(1 - 0.1)
    return mix * c.importance - rest * c.redundancy[: c.n_candidates] - c.penalties[: c.n_candidates]


BLEND = {"position": 1e-4, "sums": 0.01, "importance": 0.5, "redundancy": -0.7, "penalty": -1, "noise": 1e-3,
         "key_norm": 0.02, "key_likeness": -0.03}  # fmt: skip


def make(name, **parameters):
    """The method of this name; of the parameters those it takes. `custom` scores as skipkv, `blend` by all terms.

    The name may say what it allocates by, as in `SHARING`.
    """
    name, _, allocate = name.partition(":allocate=")
    parameters |= {"allocate": allocate} if allocate else {}
    known = (*methods.TABLE[name]["parameters"].split(), *methods.SHARED_PARAMETERS)
    taken = {key: value for key, value in parameters.items() if key in known}
    if name == "blend":
        taken = BLEND | taken
    if name == "custom":
        return Custom(like_skipkv, ["importance", "redundancy", "penalties"], **taken)
    return CLASSES[name](**taken)


def reference_name(name):
    """The specification's name of a method. `custom` scores as skipkv does, see `make`."""
    name = name.partition(":")[0]
    return "skipkv" if name == "custom" else name


def room_of(name, budget, window):
    """How many slots may be protected besides the newest, in the head of the least budget."""
    kept = {int(b): spec.newest_kept(reference_name(name), int(b), window) for b in np.ravel(budget)}
    return min(b - newest - (newest == 0) for b, newest in kept.items())


def weights_of(method):
    """The weights of a blend, None of any other method."""
    return {term: getattr(method, term) for term in spec.TERMS if getattr(method, term, 0)} or None


def as_reference(method, shape):
    """The reference's method of the same parameters; budgets [n_layers, n_kv]."""
    names = [n for n in methods.TABLE[method.name]["parameters"].split() if n != "seed" and n not in spec.TERMS]
    values = {name: getattr(method, name) for name in (*names, "protect", "evict", "allocate")}
    values["weights"] = weights_of(method)
    if "budget" in values:
        values["budget"] = method.as_dict(shape)["budget"]
    return spec.Method(reference_name(method.name), **values)


def open_session(model, method, *, delimiters="auto", markers="auto", **options):
    words = vocabulary(delimiters=delimiters, markers=markers)
    if options.get("cache") == "q8" and model.variant not in VARIANTS:
        pytest.skip("CUDA has no such cache")
    return _skipkv.Session(model, method=method.as_dict(SHAPES[model]), vocabulary=words, **options)


def replay(session, row, tokens, step=512):
    """Feeds tokens, at most `step` at once. Logits [n, vocab] and {position: α} of the steered tokens."""
    [out], [alphas] = replay_together(session, [row], [tokens], [step])
    return out, alphas


def replay_together(session, rows, texts, steps):
    """Feeds several rows in common forwards, row r at most steps[r] tokens at once. As `replay`, a list each."""
    out = [np.empty((len(tokens), VOCAB), np.float32) for tokens in texts]
    begin = [session.state(row)["n_tokens"] for row in rows]
    at, alphas = [0] * len(rows), [{} for _ in rows]
    while any(a < len(tokens) for a, tokens in zip(at, texts, strict=True)):
        todo = [r for r, tokens in enumerate(texts) if at[r] < len(tokens)]
        counts = [session.chunk(rows[r], min(steps[r], len(texts[r]) - at[r])) for r in todo]
        flat = [(r, i) for r, n in zip(todo, counts, strict=True) for i in range(at[r], at[r] + n)]
        logits = np.empty((len(flat), VOCAB), np.float32)
        spans = np.array([(rows[r], n) for r, n in zip(todo, counts, strict=True)], np.int32)
        pairs = session.forward(spans, np.array([texts[r][i] for r, i in flat], np.int32), logits, True)
        for (r, i), line in zip(flat, logits, strict=True):
            out[r][i], at[r] = line, i + 1
        for index, alpha in pairs:
            r, i = flat[index]
            alphas[r][begin[r] + i] = alpha
    return out, alphas


def play(model, method, tokens, n_prompt, step=512, *, trace=0, cache="f32", threads=1, **opened):
    """A whole run of one row: (session, row, logits, {position: α})."""
    session = open_session(model, method, trace=trace, cache=cache, threads=threads)
    row = session.open(len(tokens), n_prompt=n_prompt, **opened)
    return session, row, *replay(session, row, tokens, step)


def feed(session, row, tokens, chunk=512):
    """Logits of tokens fed to the model in the box, `chunk` at once."""
    out = np.empty((len(tokens), 231), np.float32)
    for i in range(0, len(tokens), chunk):
        part = np.array(tokens[i : i + chunk], np.int32)
        session.forward(np.array([[row, len(part)]], np.int32), part, out[i : i + chunk], True)
    return out


class Watched(spec.Row):
    """A row of the reference that remembers the keys of every compaction and how near a similarity came to τ."""

    def __post_init__(self):
        self.before, self.margins = {}, {}
        super().__post_init__()

    def compact_layer(self, layer):
        for h in range(self.cache.n_kv):
            self.before[len(self.ids), layer, h] = self.cache.keys[layer][h][self.cache.held[layer][h]]
        super().compact_layer(layer)

    def update_flags(self):
        super().update_flags()
        vectors = spec.sentence_vectors(self.cache.hidden, self.sentences)
        pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
        self.margins[len(self.ids)] = np.abs(pairs - self.method.tau).min(initial=np.inf)


def reference_run(decoder, method, tokens, n_prompt, steering=None, **row):
    """Logits [n, vocab] and the row."""
    options = {"texts": TEXTS, "seed": getattr(method, "seed", 0), "make": Watched} | row
    return spec.replay(decoder, tokens, n_prompt, as_reference(method, shape_of(decoder)), steering, **options)


def sentences_text(n, seed, first=(), marked=True):
    """n tokens: sentences out of a small stock, so that some come back, with blank lines, markers and think markers."""
    rng = np.random.default_rng(seed)
    closing = [ID["\n"], ID[".\n\n"], ID[".\n"], ID["\n\n"]]
    pieces = [[ID[" Wait"]], [ID["Alter"], ID["natively"]], [ID["a"], ID["ga"], ID["in"]], [ID[":\n"]], []]
    stock = []
    for _ in range(6):
        words = rng.choice(WORDS, rng.integers(3, 8)).tolist()
        piece = pieces[rng.integers(len(pieces))] if marked else []
        stock.append([*words[:2], *piece, *words[2:], int(rng.choice(closing))])
    out = list(first)
    while len(out) < n:
        out += stock[rng.integers(len(stock))]
        if rng.random() < 0.15:
            out.append(int(rng.choice([ID["\n"], ID[":\n\n"]])))
    return [int(token) for token in out[:n]]


def steered_run(backend, tokens, n_prompt, steering, method=None, step=512, **options):
    """(logits, {position: α}, state and trace) of a run; steering: a spec.Steering, or None."""
    s, (model, _) = steering, build(variant=backend, **options)
    values = None if s is None else (s.vector, s.layer, s.alpha, s.gamma, s.alpha_max, s.scope)
    method = method or make("full", interval=16)
    session, row, logits, alphas = play(model, method, tokens, n_prompt, step, trace=1, steering=values)
    state = session.state(row)
    assert state["steered"] == len(alphas)
    return logits, alphas, state | {"trace": session.trace()}


def thinking_text(n, seed):
    """A prompt's line, then a thought: blank lines outside and inside, the marker of three tokens where seed is odd."""
    opening = THINK[0][seed % 2]
    inside = [*opening, WORDS[0], WAIT, BLANK, *sentences_text(n, seed)]
    after = [WORDS[2], WAIT, BLANK, WORDS[3], ID["\n\n"], WORDS[4], BLANK]
    return [WORDS[1], BLANK, *inside, BLANK, *THINK[1][seed % 2], *after]


# ---------------------------------------------------------------------------------------------------------------------
# METHOD §9's rule


SIZE = {"keydiff": 1}  # of what a score is the sum of, where it says less by itself


def judge(selection, head, kept, keys, margin=1e-6, rtol=1e-5, size=0):
    """ "equal", "tie" (exact, but for the reference's own float64 rounding), "near" or "different"."""
    if np.array_equal(kept, selection.kept[head]):
        return "equal"
    if spec.near_tie(selection, head, kept, rtol=1e-12, size=size):
        return "tie"
    if spec.near_tie(selection, head, kept, rtol=rtol, size=size):
        return "near"
    return "near" if selection.redundancy is not None and spec.cosine_margin(keys) < margin else "different"


def judge_layer(scores, kept, wanted, keys, rtol=1e-5, margin=1e-6, size=0):
    """The same of heads that share their budgets: all of them as if they were one. scores: {name: [C]} of each head."""
    starts = np.cumsum([0, *(len(s["score"]) for s in scores)])
    names = [n for n in ("importance", "redundancy", "penalty", "score") if scores[0].get(n) is not None]
    joined = {name: [np.concatenate([s[name] for s in scores])] for name in names}
    mine, theirs = (
        np.concatenate([k[k < len(s["score"])] + at for k, s, at in zip(heads, scores, starts, strict=False)])
        for heads in (kept, wanted)
    )
    none = dict.fromkeys(("importance", "redundancy", "penalty"))
    selection = spec.Selection(**(none | joined | {"kept": [theirs]}))
    verdict = judge(selection, 0, mine, keys[0], 0, rtol, size)
    near = selection.redundancy is not None and any(spec.cosine_margin(k) < margin for k in keys)
    return "near" if verdict == "different" and near else verdict


def same_scores(got, want, keys, rtol, margin=1e-6):
    """Asserts that a head's scores agree, {name: array} each; the score relative to the terms that it is the sum of.

    False: the redundancy, and so the score, may differ, as a cosine within `margin` of 0.5 decides an r(i).
    """
    parts = [np.abs(want[key]) for key in ("importance", "redundancy", "penalty") if want.get(key) is not None]
    excused = False
    for key, value in got.items():
        size = sum(parts) if key == "score" and parts else np.abs(want[key])
        if key == "score" and not parts:  # a term by itself; a cosine near 0 is a sum of products that are not
            size = np.full(len(want[key]), np.abs(want[key]).max(initial=0))
        agrees = len(value) == len(size) and bool((np.abs(value - want[key]) <= rtol * size + 1e-30).all())
        if not agrees and key in ("redundancy", "score") and want.get("redundancy") is not None:
            excused = excused or spec.cosine_margin(keys) < margin
            agrees = excused
        assert agrees, key
    return not excused


def close(got, want, rtol, atol=0.0):
    """Largest difference in units of the tolerance, at most 1 if close."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float((np.abs(got - want) / (atol + rtol * np.abs(want) + 1e-30)).max(initial=0.0))


def captured(model, method, records, tokens, *, row, **options):
    """The same run with its kept sets given: what stood before the core at every compaction, and the logits.

    A custom score that is above 0 where `records` (a trace) has the slot as kept repeats the run, bit for bit, and sees
    the stored keys, the queries and the sums that decided.
    """
    seen, todo = [], iter(records)

    def score(c):
        _, _, layer, head, _, kept, _ = next(todo)
        assert (c.layer, c.head) == (layer, head)
        seen.append(c)
        rank = {position: len(kept) - place for place, position in enumerate(kept.tolist())}  # keeps their order, too
        return [rank.get(position, 0) for position in c.positions[: c.n_candidates].tolist()]

    twin = Custom(
        score, ["queries", "sums", "penalties"], budget=method.budget, interval=method.interval, tau=method.tau,
        window=getattr(method, "window", 1), protect=method.protect, evict=method.evict,
        compat=method.compat, allocate=method.allocate,
    )  # fmt: skip
    session = open_session(model, twin, **options)
    return seen, replay(session, session.open(len(tokens), **row), tokens)[0]


def select_captured(method, layer, heads, shape, *, n_prompt, sequence):
    """The reference's selection for the captured heads {head: arrays} of one layer."""
    some = next(iter(heads.values()))
    every = [heads.get(h, some) for h in range(shape[1])]  # a head that is not due is not looked at: any arrays do
    flagged = [[p, p, value] for c in every for p, value in zip(c.positions, c.penalties, strict=True) if value > 0]
    m = as_reference(method, shape)
    return spec.select(
        m.name, [c.keys for c in every], np.concatenate([c.queries for c in every]), budget=m.budget[layer],
        positions=[c.positions for c in every], penalties=np.array(flagged).reshape(-1, 3), window=m.window, mix=m.mix,
        kernel=m.kernel, sinks=m.sinks, protect=m.protect, prompt=n_prompt, seed=getattr(method, "seed", 0),
        sequence=sequence, layer=layer, sums=[c.sums for c in every], weights=m.weights, allocate=m.allocate,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# All that a run leaves behind, to be compared bit for bit


def slots(session, row, shape=(2, 2)):
    return [session.positions(row, layer, head) for layer in range(shape[0]) for head in range(shape[1])]


def outcome(session, row, logits):
    state = session.state(row)
    del state["peak_bytes"]  # of the pages that this very row has had: a fork starts with fewer
    spans, vectors = session.sentences(row, True)
    return [logits, *slots(session, row), np.array([[*state.values()]]), np.array(spans), vectors]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x, y, equal_nan=x.dtype.kind == "f")


def assert_same_logits(backend, got, want, rtol=1e-4):
    """Bit for bit; on CUDA, where cuBLAS sums in an order that may depend on the batch, to rtol of the largest."""
    limit = rtol * np.nanmax(np.abs(want), initial=0) if backend in devices.DEVICES else 0
    np.testing.assert_allclose(got, want, rtol=0, atol=limit)


def assert_same_run(backend, a, b, row=0):
    """Two runs, (outcome, trace with scores) each: bit for bit; on CUDA as `assert_same_logits`, to the first near tie.

    row: the second's, of whose trace other rows' records are left out.
    """
    (first, trace), (second, others) = a, b
    others = [record for record in others if record[0] == row]
    assert len(trace) == len(others) and len(first) == len(second)
    end = _first_tie(backend, trace, others)
    assert_same_logits(backend, second[0][:end], first[0][:end])
    for x, y in zip(first[1:], second[1:], strict=True) if end is None else ():
        if x.dtype.kind == "f":
            assert_same_logits(backend, y, x)
        else:
            assert np.array_equal(x, y)


def _first_tie(backend, a, b):
    """The step of the first selection in which two traces differ, None: there is none; up to it the scores agree."""
    held = {}
    for x, y in zip(a, b, strict=True):
        step, layer, head = x[1:4]
        assert x[1:5] == y[1:5] and x[6].keys() == y[6].keys()
        for name, values in x[6].items():
            assert_same_logits(backend, y[6][name], values)
        if not np.array_equal(x[5], y[5]):
            assert backend in devices.DEVICES
            kept, before = held.get((layer, head), ((), 0))
            slots = [*kept, *range(before, step)]
            swapped = x[6]["score"][[slots.index(p) for p in np.setxor1d(x[5], y[5])]]
            assert np.ptp(swapped) <= 1e-4 * np.abs(x[6]["score"]).max()
            return step
        held[layer, head] = x[5], step
    return None
