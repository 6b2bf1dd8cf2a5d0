"""The forward on the tiny checkpoint: equal to tests/reference.py, the same in any batch, chunk and thread count."""

import numpy as np
import pytest
import reference
from test_tables import CONFIG

import skipkv
from skipkv import _skipkv
from skipkv.checkpoint import open_checkpoint

VARIANTS = [name for name, runs in _skipkv.variants().items() if runs]
TOKENS = np.random.default_rng(5).integers(0, CONFIG["vocab"], 150).astype(np.int32)


def load(variant):
    with open_checkpoint("tiny") as checkpoint:
        model = _skipkv.Model(checkpoint.config.as_dict(), "bf16", variant)
        for name, tensor in checkpoint.tensors.items():
            model.bind(name, tensor.dtype.lower(), tensor.shape, checkpoint.view(name), 2)
    return model


def feed(session, row, tokens, chunk=512):
    out = np.empty((len(tokens), CONFIG["vocab"]), np.float32)
    for i in range(0, len(tokens), chunk):
        part = tokens[i : i + chunk]
        session.forward(np.array([[row, len(part)]], np.int32), part, out[i : i + chunk], True)
    return out


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return load(request.param)


@pytest.fixture(scope="module")
def alone(model):
    session = _skipkv.Session(model)
    return feed(session, session.open(200), TOKENS)


@pytest.fixture(scope="module")
def expected():
    with open_checkpoint("tiny") as checkpoint:
        weights = {
            name: (checkpoint.view(name).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
            for name, tensor in checkpoint.tensors.items()
        }
    return reference.Decoder(CONFIG, weights).logits(TOKENS)


def test_logits_equal_the_reference(alone, expected):
    assert np.abs(alone - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_bf16_cache_stays_near_the_reference(model, expected):
    session = _skipkv.Session(model, cache="bf16")
    got = feed(session, session.open(200), TOKENS)
    # bf16 keeps 8 bits of each key and value: close, and not the same numbers.
    assert 1e-6 < np.abs(got - expected).max() / np.abs(expected).max() < 0.1


@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_and_threads_change_no_bit(model, alone, chunk, threads):
    session = _skipkv.Session(model, threads=threads)
    assert np.array_equal(feed(session, session.open(200), TOKENS, chunk), alone)


def test_a_long_row_decodes_the_same_on_any_number_of_threads(model):
    tokens = np.resize(TOKENS, 700)  # more than 8 pages: a decode step then spreads the pages over the threads
    rows = []
    for threads in (1, 2, 3):
        session = _skipkv.Session(model, tokens=700, threads=threads)
        row = session.open(800)
        rows.append(np.concatenate([feed(session, row, tokens), feed(session, row, tokens[:40], 1)]))
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


def test_a_row_is_the_same_among_seven_others(model, alone):
    lengths = [3, 150, 20, 1, 77, 64, 65, 128]
    session = _skipkv.Session(model, rows=8, tokens=600, threads=2)
    spans = np.array([[session.open(200), n] for n in lengths], np.int32)
    out = np.empty((sum(lengths), CONFIG["vocab"]), np.float32)
    session.forward(spans, np.concatenate([TOKENS[:n] for n in lengths]), out, True)
    for n, first in zip(lengths, np.cumsum([0, *lengths]), strict=False):
        assert np.array_equal(out[first : first + n], alone[:n])
    last = np.empty((2, CONFIG["vocab"]), np.float32)  # decode of one row beside prefill of another
    session.forward(np.array([[0, 1], [3, 149]], np.int32), np.concatenate([TOKENS[3:4], TOKENS[1:]]), last, False)
    assert np.array_equal(last, alone[[3, 149]])


def test_a_step_calls_no_allocator_and_pages_come_back(model):
    session = _skipkv.Session(model)
    row = session.open(300)
    before = session.ledger()["n_allocator_calls"]
    feed(session, row, TOKENS, 1)
    ledger = session.ledger()
    page = 64 * (2 * 32 * 4 + 4)
    assert ledger["n_allocator_calls"] == before
    assert ledger["live_bytes"] == 4 * 4 * 3 * page and ledger["reserved_bytes"] == 4 * 4 * 5 * page
    session.close(row)
    ledger = session.ledger()
    assert ledger["live_bytes"] == ledger["reserved_bytes"] == 0 and ledger["pool_bytes"] == 4 * 4 * 5 * page


@pytest.mark.parametrize(
    "spans, tokens, message",
    [
        ([[0, 1]], [231], "token 0 is 231; allowed: 0 to 230"),
        ([[1, 1]], [0], "span 0: row 1 is not open"),
        ([[0, 1], [0, 1]], [0, 0], "spans 0 and 1: both feed row 0"),
        ([[0, 9]], [0] * 9, "span 0: 9 tokens for row 0, which has room for 8"),
    ],
)
def test_bad_batches_are_refused(model, spans, tokens, message):
    session = _skipkv.Session(model, rows=2)
    session.open(8)
    with pytest.raises(skipkv.Error) as error:
        out = np.empty((len(spans), 231), np.float32)
        session.forward(np.array(spans, np.int32), np.array(tokens, np.int32), out, False)
    assert str(error.value) == message


def test_the_memory_limit_is_a_hard_cap(model):
    session = _skipkv.Session(model, rows=4, memory_limit=4 * 4 * 64 * 260 * 2)
    session.open(128)
    with pytest.raises(skipkv.CapacityError, match="memory_limit is 532480"):
        session.open(64)


def test_missing_and_wrong_tensors_are_named():
    model = _skipkv.Model(CONFIG)
    with pytest.raises(skipkv.CheckpointError, match='"model.embed_tokens.weight" is missing'):
        _skipkv.Session(model)
    with pytest.raises(skipkv.CheckpointError, match='"nonsense" is not part'):
        model.bind("nonsense", "f32", (1,), np.zeros(4, np.uint8), 1)
    with pytest.raises(skipkv.CheckpointError, match='"model.norm.weight": expected shape'):
        model.bind("model.norm.weight", "f32", (2,), np.zeros(8, np.uint8), 1)
