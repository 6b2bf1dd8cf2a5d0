"""The forward on the model in the box against the reference; its pages and its memory."""

import harness
import numpy as np
import pytest
from devices import DEVICES
from generations import PROBLEMS, VECTOR, make, recorded
from harness import (
    ALL,
    FAMILIES,
    RUN,
    SPLIT,
    STEERING,
    TINY,
    VARIANTS,
    VOCAB,
    build,
    feed,
    open_session,
    refused,
    replay,
    sentences_text,
    tiny,
    tiny_decoder,
)

import skipkv
from skipkv import _skipkv
from skipkv.load.config import ModelConfig

pytestmark = [pytest.mark.sanitize, pytest.mark.clang]

CONFIG = ModelConfig.from_json(TINY / "config.json").as_dict()
TOKENS = np.random.default_rng(5).integers(0, CONFIG["vocab"], 150).astype(np.int32)


@pytest.fixture(scope="module")
def core(backend):
    return tiny(backend)


@pytest.mark.parametrize("cache, low, high", [
    ("f32", 0, 1e-4),
    ("bf16", 1e-6, 0.1),  # 8 bits of each key and value: close, and not the same numbers
    ("q8", 1e-6, 0.1),
])  # fmt: skip
def test_logits_equal_the_reference(core, backend, cache, low, high):
    if cache == "q8" and backend in DEVICES:
        with refused('cache is "q8"; allowed on CUDA: bf16, f32'):
            _skipkv.Session(core, cache=cache)
        return
    expected = tiny_decoder().logits(TOKENS)
    session = _skipkv.Session(core, cache=cache)
    got = feed(session, session.open(200), TOKENS)
    high = max(high, SPLIT) if backend in DEVICES else high
    assert low <= np.abs(got - expected).max() / np.abs(expected).max() <= high


ROPES = [
    {},
    {"rope_type": "linear", "rope_factor": 3.0},
    {"rope_type": "dynamic", "rope_factor": 3.0},  # the text is shorter than the context
    {"rope_type": "llama3", "rope_factor": 8.0, "rope_original_context": 24},
    {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_context": 20, "rope_attention_factor": 1.3},
    {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_context": 20, "rope_beta_fast": 2.0,
     "rope_truncate": False},
    {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_context": 1, "rope_truncate": False},  # no ramp
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: " ".join(map(str, rope.values())))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_rope_equals_the_reference(family, rope, backend):
    model, decoder = build(family, variant=backend, head_dim=32, **rope)
    tokens = TOKENS[:80] % VOCAB
    expected = decoder.logits(tokens)
    session, got = _skipkv.Session(model), np.empty_like(expected, np.float32)
    session.forward(np.array([[session.open(80), 80]], np.int32), tokens, got, True)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    other = build(family, variant=backend, head_dim=32, rope_type="linear", rope_factor=30.0)[1].logits(tokens)
    assert np.abs(got - other).max() > 1e-3 * np.abs(expected).max()  # the bound tells one scaling from another


@pytest.mark.parametrize(("dtype", "median"), [("q8", 1e-6), ("bf16a16", 1e-3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_rounded_inputs_equals_the_reference(family, dtype, median, variant):
    """But for tokens of which float32 puts some number on the other side of a rounding."""
    model, decoder = build(family, variant=variant, head_dim=32, dtype=dtype)
    tokens = TOKENS[:80] % VOCAB
    expected, full = decoder.logits(tokens), build(family, variant=variant, head_dim=32)[1].logits(tokens)
    session, got = _skipkv.Session(model), np.empty_like(expected, np.float32)
    session.forward(np.array([[session.open(80), 80]], np.int32), tokens, got, True)
    error = np.abs(got - expected).max(1) / np.abs(expected).max()
    assert np.median(error) <= median
    assert error.max() <= 0.005 < np.abs(full - expected).max() / np.abs(full).max()


def test_rows_that_come_and_go_have_their_own_pages(core):
    """In changing order and over a page's edge, while one is copied and another one's place is taken."""
    session, alone = _skipkv.Session(core, rows=3), _skipkv.Session(core, rows=2)
    texts = TOKENS[:70], TOKENS[70:140]
    wanted = [feed(alone, alone.open(100), text) for text in texts]
    rows = [(session.open(100), text) for text in range(2)]
    for number, text in rows:
        feed(session, number, texts[text][:61])
    got = np.empty((3, CONFIG["vocab"]), np.float32)
    for at in range(61, 69):
        if at == 66:
            session.close(rows[0][0])
            rows[0] = session.open(100), 1 - rows[0][1]
            feed(session, rows[0][0], texts[rows[0][1]][:at])
        if at == 63:
            rows.append((session.fork(rows[1][0], 100, 1), rows[1][1]))
        rows.reverse()
        tokens = np.array([texts[text][at] for _, text in rows], np.int32)
        session.forward(np.array([(number, 1) for number, _ in rows], np.int32), tokens, got[: len(rows)])
        for line, (_, text) in zip(got, rows, strict=False):
            assert np.abs(line - wanted[text][at]).max() <= SPLIT * np.abs(wanted[text]).max()


@pytest.mark.parametrize("rows", [3, 6])
def test_ids_of_the_largest_logits_in_their_place(core, backend, rows):
    """Which a device then keeps to itself."""
    session = _skipkv.Session(core, rows=2 * rows)
    numbers = [session.open(40) for _ in range(2 * rows)]
    logits, untouched = np.empty((2, rows, CONFIG["vocab"]), np.float32), np.float32(-7)
    for step in range(4):
        tokens = TOKENS[step * rows : (step + 1) * rows]
        ids = np.empty(rows, np.int32)
        logits[1] = untouched
        for half, best in ((0, None), (1, ids)):
            spans = np.array([(row, 1) for row in numbers[half::2]], np.int32)
            session.forward(spans, tokens, logits[half], best=best)
        assert np.array_equal(ids, logits[0].argmax(1))
        assert np.array_equal(logits[1], np.full_like(logits[0], untouched) if backend in DEVICES else logits[0])


def test_a_step_calls_no_allocator_and_pages_come_back(core):
    session = _skipkv.Session(core)
    row = session.open(300)
    before = session.ledger()["n_allocator_calls"]
    feed(session, row, TOKENS[:120])
    feed(session, row, TOKENS[120:], 1)  # over a page's edge
    ledger = session.ledger()
    page = 64 * (2 * 32 * 4 + 4)
    assert ledger["n_allocator_calls"] == before
    assert ledger["live_bytes"] == 4 * 4 * 3 * page and ledger["reserved_bytes"] == 4 * 4 * 5 * page
    session.close(row)
    ledger = session.ledger()
    assert ledger["live_bytes"] == ledger["reserved_bytes"] == 0 and ledger["pool_bytes"] == 4 * 4 * 5 * page


@pytest.mark.parametrize("spans, tokens, message", [
    ([[0, 1]], [231], "token 0 is 231; allowed: 0 to 230"),
    ([[1, 1]], [0], "span 0: row 1 is not open"),
    ([[0, 1], [0, 1]], [0, 0], "spans 0 and 1: both feed row 0"),
    ([[0, 9]], [0] * 9, "span 0: 9 tokens for row 0, which has room for 8"),
])  # fmt: skip
def test_bad_batches_are_refused(core, spans, tokens, message):
    session = _skipkv.Session(core, rows=2)
    session.open(8)
    with refused(message, skipkv.Error):
        out = np.empty((len(spans), 231), np.float32)
        session.forward(np.array(spans, np.int32), np.array(tokens, np.int32), out, False)


@pytest.mark.parametrize("variant", VARIANTS)  # what a device counts beside the cache: see test_devices.py
def test_the_memory_limit_is_a_hard_cap(variant):
    session = _skipkv.Session(tiny(variant), rows=4, memory_limit=4 * 4 * 64 * 260 * 2)
    session.open(128)
    with pytest.raises(skipkv.CapacityError, match="memory_limit is 532480"):
        session.open(64)


@pytest.mark.filterwarnings("ignore:.*never compacted")
@pytest.mark.parametrize("name", ["full", "skipkv", "rkv", "h2o"])
def test_greedy_text_is_that_of_the_plain_kernels(name, backend):
    prompt, steering = PROBLEMS[:1], skipkv.Steering(VECTOR, 2, scope="all")
    texts, stock = [], skipkv.load("tiny", progress=False)
    for where in ("generic", backend):
        core = tiny(where, "f32")
        model = skipkv.Model(core, stock.config, stock.tokenizer, stock.name, stock.generation, stock.threads)
        [out] = recorded(model, make(name), prompt, steering=steering, max_new_tokens=100)
        assert out.stats.steered and len(out.tokens) == 100 and (out.stats.compactions > 0) == (name != "full")
        texts.append(out.tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", [name for name in ALL if name != "knorm"])  # which scores equal tokens alike
def test_greedy_rows_are_those_of_the_plain_kernels(name, backend):
    """A family each: a steered row and one that is not, together for 60 tokens, then the latter alone."""
    texts = []
    for where in ("generic", backend):
        model, _ = build([*FAMILIES][ALL.index(name) % len(FAMILIES)], variant=where)
        session = open_session(model, harness.make(name, budget=24, **RUN), rows=2)
        rows = [session.open(150, n_prompt=40, steering=steering, prompt=1) for steering in (None, STEERING)]
        logits = [replay(session, row, sentences_text(40, 5))[0][-1] for row in rows]
        texts.append([[], []])
        for step in range(100):
            spans = np.array([(row, 1) for row in (rows if step < 60 else rows[1:])], np.int32)
            tokens = np.array([line.argmax() for line in logits], np.int32)[-len(spans) :]
            logits = np.empty((len(spans), VOCAB), np.float32)
            session.forward(spans, tokens, logits)
            for text, token in zip(texts[-1][-len(spans) :], tokens.tolist(), strict=True):
                text.append(token)
        assert session.state(rows[1])["steered"] > 0 and min(len(set(text)) for text in texts[-1]) > 3
    assert texts[0] == texts[1]


def test_missing_and_wrong_tensors_are_named():
    model = _skipkv.Model(CONFIG)
    with pytest.raises(skipkv.CheckpointError, match='"model.embed_tokens.weight" is missing'):
        _skipkv.Session(model)
    with pytest.raises(skipkv.CheckpointError, match='"nonsense" is not part'):
        model.bind("nonsense", "f32", (1,), np.zeros(4, np.uint8), 1)
    with pytest.raises(skipkv.CheckpointError, match='"model.norm.weight": expected shape'):
        model.bind("model.norm.weight", "f32", (2,), np.zeros(8, np.uint8), 1)
