"""Memory that runs out at any point: one clear error, nothing that was half done is gone on with, nothing leaks."""

import ctypes
import functools
import gc
import itertools
import os
import re
from collections import Counter

import devices
import harness
import numpy as np
import pytest
from generations import PROBLEMS, facts, make, run, stream

import skipkv
from skipkv import CapacityError, ConfigError, Custom, _skipkv

pytestmark = [pytest.mark.sanitize, pytest.mark.clang]

CORE = ctypes.CDLL(_skipkv.__file__)
TEXT = harness.sentences_text(150, 7)
N_PROMPT = 41
SANITIZED = bool(os.environ.get("LD_PRELOAD"))
SEEN = Counter()  # since the refusal: told, and lost, forwards that failed after their rows had advanced
FREE = r"; (cuda:0: \d+ bytes asked, \d+ of \d+ free|\d+ bytes of pinned memory asked)"  # what a device adds


def told(error):
    """An error that names what did not fit."""
    assert re.fullmatch(rf"out of memory for .*?{FREE if 'simt' in SEEN else ''}", str(error)), error
    SEEN["told"] += 1


def plain(value):
    """The same as what can be compared."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(key, plain(item)) for key, item in value.items()]
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class Scenario:
    """A traced, steered row that is compacted and forked, its fork, and a row beside them that is never due.

    What fails is tried again, where that is right.
    """

    def __init__(self, evict, variant=None, **options):
        self.options = {"rows": 3, "trace": 2} | options
        self.model, _ = self.again(harness.build.__wrapped__, variant=variant)
        self.method = harness.make("skipkv", **(harness.RUN | {"budget": 30, "evict": evict}))

    def again(self, work, *arguments, **options):
        try:
            return work(*arguments, **options)
        except CapacityError as error:
            told(error)
            return work(*arguments, **options)

    def open(self, n_prompt):
        return self.again(self.session.open, len(TEXT), n_prompt=n_prompt, steering=harness.STEERING)

    def forward(self, counts):
        """Logits of the next tokens of each row; None where the rows are lost."""
        before = {row: self.session.state(row)["n_tokens"] for row in counts}
        tokens = np.array([t for row, n in counts.items() for t in TEXT[before[row] : before[row] + n]], np.int32)
        spans, logits = np.array(list(counts.items()), np.int32), np.zeros((len(tokens), harness.VOCAB), np.float32)
        try:
            self.session.forward(spans, tokens, logits, True)
        except CapacityError as error:
            told(error)
            advanced = {row: self.session.state(row)["n_tokens"] - before[row] for row in counts}
            if not any(advanced.values()):
                self.session.forward(spans, tokens, logits, True)
                return logits
            SEEN["lost"] += 1
            assert advanced == counts
            for row in counts:
                with pytest.raises(ConfigError, match=f"row {row} ended when its forward failed"):
                    self.session.forward(np.array([[row, 1]], np.int32), np.zeros(1, np.int32))
            return None
        return logits

    def attempt(self):
        """All logits and the slots at the end; None where the rows were lost on the way."""
        row, beside = self.open(N_PROMPT), self.open(1)
        rows, found = [row], []
        while (at := self.session.state(row)["n_tokens"]) < len(TEXT):
            if at > 60 and len(rows) == 1:
                rows.append(self.again(self.session.fork, row, len(TEXT), 1))
            n = self.session.chunk(row, len(TEXT) - at)
            found.append(self.forward(dict.fromkeys(rows, n) | {beside: 1}))
            if found[-1] is None:
                break
        else:
            found += [self.session.positions(r, 1, 1) for r in rows]
        for r in (*rows, beside):
            self.session.close(r)
        ledger = self.session.ledger()
        assert ledger["live_bytes"] == ledger["reserved_bytes"] == 0
        return None if found[-1] is None else found

    def run(self):
        """What an undisturbed session gives, whatever failed on the way."""
        self.session = self.again(harness.open_session, self.model, self.method, **self.options)
        found = plain(self.attempt() or self.attempt())
        del harness.SHAPES[self.model]  # which would keep it
        return found


@functools.cache
def tiny():
    return skipkv.load("tiny", threads=1, progress=False)


def load():
    models = [skipkv.load("tiny", dtype=dtype, threads=1, progress=False) for dtype in ("f32", "bf16", "q8", "bf16a16")]
    return [(model._core.n_bytes, facts(run(model, PROBLEMS[0], max_new_tokens=3)[0])) for model in models]


def generate():
    """Samples that share a prefill, sentences, steering, a trace; a cache of megabytes; a text that is given up."""
    steering = skipkv.Steering.load("tiny", alpha=0.75)
    outs = run(tiny(), PROBLEMS[:2], make("skipkv"), steering, n=2, rows=3, temperature=0.8, trace="scores")
    outs += run(tiny(), PROBLEMS[0], make("custom", evict=False), max_new_tokens=3000, stop="=", trace=True)
    events = stream(tiny(), PROBLEMS[0], make("h2o"))
    begun = [next(events).token for _ in range(5)]
    events.close()
    return [*map(facts, outs), begun]


def replay():
    custom = Custom(lambda c: c.importance, ["importance"], budget=32, interval=16)
    methods = make("rkv", 32, 16, allocate="layer"), custom
    found = [tiny().replay(PROBLEMS[0], method, trace="scores") for method in methods]
    kept = [(c.step, c.kept) for replay in found for c in replay.trace.compactions]
    return plain([kept, *(replay.logprobs for replay in found), tiny().hidden(PROBLEMS[0], [1, 4])])


RNG = np.random.default_rng(3)
KEYS, QUERIES = (RNG.normal(size=size).astype(np.float32) for size in ((2, 90, 16), (4, 8, 16)))
WORDS = harness.vocabulary()


def arrays():
    """What needs no model."""
    found = [skipkv.select(make(name), KEYS, QUERIES) for name in ("skipkv", "custom")]
    segments = _skipkv.segment(np.array(TEXT, np.int32), WORDS, harness.VOCAB, N_PROMPT, 0)
    repeats = skipkv.flag_repeats(KEYS[0], 0.1)
    return plain([*((s.kept, s.score) for s in found), repeats, segments, _skipkv.tensors(harness.config())])


@pytest.mark.skipif(not hasattr(CORE, "skv_test_refuse"), reason="not a build with SKIPKV_TEST=1")
@pytest.mark.parametrize("work, least", [
    (lambda: Scenario(True).run(), (80, 80, 2)),  # the trace grows, and what is grown after a compaction
    (lambda: Scenario(False).run(), (80, 80, 2)),
    (load, (100, 100, 0)),
    (generate, (100, 50, 0)),
    (replay, (50, 50, 0)),
    (arrays, (30, 30, 0)),
], ids=["evict", "record", "load", "generate", "replay", "arrays"])  # fmt: skip
def test_memory_of_the_core_runs_out_anywhere(work, least, request):
    """Every allocation refused in turn; under a sanitizer some."""
    want, total = work(), Counter()
    for k in itertools.count(1, 7 if SANITIZED else 1):
        before = CORE.skv_test_blocks()
        SEEN.clear()
        CORE.skv_test_refuse(k)
        try:
            got = work()
        except CapacityError as error:
            told(error)
            got = None
        if CORE.skv_test_refuse(0):
            assert got == want and not SEEN
            break
        # Nothing is told where the scheduler has another way: rows wait, samples are prefilled one by one.
        assert SEEN["told"] <= 1 and got in (want, None) and (got or SEEN), k
        total += Counter(refused=1) + SEEN
        if CORE.skv_test_blocks() != before:
            gc.collect()
        assert CORE.skv_test_blocks() == before, k
    print(f"{request.node.name}: {dict(total)}")
    assert SANITIZED or all(total[name] >= n for name, n in zip(("refused", "told", "lost"), least, strict=True))


@pytest.mark.simt
def test_memory_of_a_device_runs_out_anywhere():
    """Large forwards, so that their buffers are allocations of their own; sessions and models leave nothing."""
    simt, (now, total) = ctypes.CDLL(devices.library("simt")), (ctypes.c_size_t(), ctypes.c_size_t())

    def drive(k):
        SEEN.clear()
        SEEN["simt"] = 1
        simt.simt_refuse(k)
        got = Scenario(True, "simt", tokens=4096).run()
        simt.cudaMemGetInfo(ctypes.byref(now), ctypes.byref(total))
        return got, now.value, simt.simt_left()

    want = drive(0)
    for k in itertools.count(1):
        *got, left = drive(k)
        assert tuple(got) == want[:2] and SEEN["told"] == (not left), k
        if left:
            break
    simt.simt_refuse(0)
    assert k > 11


# ---------------------------------------------------------------------------------------------------------------------
# Python's own objects, which the module makes


CONFIG, MODEL = harness.config(), harness.build()[0]
METHODS = {name: harness.make(name, **(harness.RUN | {"budget": 30})).as_dict((2, 2)) for name in ("skipkv", "custom")}
ONE_LAYER = {name: method | {"budget": np.full((1, 2), 30, np.int32)} for name, method in METHODS.items()}
POSITIONS = np.tile(np.arange(90, dtype=np.int32), (2, 1))
TOKENS, LAYERS = np.array(TEXT, np.int32), np.array([0, 2], np.int32)
SEQUENCES = np.zeros((2, 3), np.int64)


def opened(name="skipkv"):
    """Arguments of the calls below: a session with a row before its prompt."""
    session = _skipkv.Session(MODEL, rows=3, method=METHODS[name], vocabulary=WORDS, trace=2)
    row = session.open(150, n_prompt=N_PROMPT, steering=harness.STEERING)
    logits, states = np.zeros((N_PROMPT, harness.VOCAB), np.float32), np.zeros((2, N_PROMPT, 32), np.float32)
    return session, row, np.array([[row, N_PROMPT]], np.int32), TOKENS[:N_PROMPT], logits, states


def played():
    """The same, compacted a few times."""
    session, row, *rest = opened()
    harness.replay(session, row, TEXT[:100])
    return session, row, *rest


def forward(session, row, spans, tokens, logits, states):
    return session.forward(spans, tokens, logits, True, LAYERS, states), logits, states


CALLS = {
    "families": (list, _skipkv.families),
    "constants": (list, _skipkv.constants),
    "methods": (list, _skipkv.methods),
    "variants": (list, _skipkv.variants),
    "tensors": (list, lambda: _skipkv.tensors(CONFIG)),
    "method_needs": (list, lambda: _skipkv.method_needs(METHODS["skipkv"])),
    "check_method": (list, lambda: _skipkv.check_method(METHODS["skipkv"], 20)),
    "segment": (list, lambda: _skipkv.segment(TOKENS, WORDS, harness.VOCAB, N_PROMPT, 0)),
    "flag_repeats": (list, lambda: _skipkv.flag_repeats(KEYS[0], 0.1, 0)),
    "select": (list, lambda: _skipkv.select(ONE_LAYER["skipkv"], KEYS, QUERIES, POSITIONS)),
    "select custom": (list, lambda: _skipkv.select(ONE_LAYER["custom"], KEYS, QUERIES, POSITIONS)),
    "Model": (list, lambda: _skipkv.Model(CONFIG, "f32")),
    "Session": (list, lambda: _skipkv.Session(MODEL, rows=3, method=METHODS["skipkv"], vocabulary=WORDS, trace=2)),
    "open": (opened, lambda s, r, *_: s.open(150, n_prompt=N_PROMPT, steering=harness.STEERING)),
    "forward": (opened, forward),
    "forward custom": (lambda: opened("custom"), forward),
    "sample": (played, lambda s, r, spans, tokens, logits, states: s.sample(logits[:2], SEQUENCES, 1, 0.5, 5, 0.9, 0)),
    "row_bytes": (played, lambda s, r, *_: s.row_bytes(150, N_PROMPT)),
    "state": (played, lambda s, r, *_: s.state(r)),
    "positions": (played, lambda s, r, *_: s.positions(r, 1, 1)),
    "sentences": (played, lambda s, r, *_: s.sentences(r, True)),
    "trace": (played, lambda s, r, *_: s.trace()),
    "ledger": (played, lambda s, r, *_: s.ledger()),
}


def seen(result):
    """What a call has given: of a session what becomes of a row in it."""
    if isinstance(result, _skipkv.Session):
        row = result.open(150, n_prompt=N_PROMPT)
        return plain(harness.outcome(result, row, harness.replay(result, row, TEXT)[0]) + result.trace())
    if isinstance(result, dict) and "evict_seconds" in result:
        return plain(result | {"evict_seconds": 0})
    return result.n_bytes if isinstance(result, _skipkv.Model) else plain(result)


@pytest.mark.parametrize("ever", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_memory_of_the_interpreter_runs_out_anywhere(name, ever):
    """The k-th allocation fails, or all from there on; the same call, made again, gives what it should."""
    testing = pytest.importorskip("_testcapi")
    before, call = CALLS[name]
    want, failures, calm = seen(call(*before())), 0, 0
    for k in itertools.count():
        arguments, failed = before(), False
        testing.set_nomemory(k, 0 if ever else k + 1)
        try:
            result = call(*arguments)
        except MemoryError:
            failed = True
        finally:
            testing.remove_mem_hooks()
        failures += failed
        calm = 0 if failed else calm + 1
        session, row, *_ = arguments or (None, None)
        if failed and name.startswith("forward") and session.state(row)["n_tokens"]:
            with pytest.raises(ConfigError, match="row 0 ended when its (forward|custom score) failed"):
                session.forward(np.array([[row, 1]], np.int32), np.zeros(1, np.int32))
            continue
        assert seen(call(*arguments) if failed else result) == want, k
        if calm == 8:
            break
    assert failures
