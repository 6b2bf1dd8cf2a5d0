"""Every argument of every public call × values of every wrong kind: taken, or refused by an exception of skipkv's."""

import inspect
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from generations import PROBLEMS, recorded

import skipkv
from skipkv import eval, vectors, viz
from skipkv.methods import CLASSES, SHARED_PARAMETERS, Method
from skipkv.run import Options

pytestmark = pytest.mark.sanitize


class Broken:
    """Whatever asks it anything gets an error of its own."""

    def _fails(self, *_, **__):
        raise ZeroDivisionError

    __repr__ = __str__ = __int__ = __index__ = __float__ = __len__ = __iter__ = __bool__ = __hash__ = __eq__ = _fails
    __array__ = __fspath__ = __getitem__ = __contains__ = _fails


VALUES = [
    None, True, -1, 0, 2, 2**31, 2**70, 10**400, 10**5000, 1.5, float("nan"), float("inf"), -float("inf"), -1e300, 1j,
    Fraction(1, 3), Fraction(10**400), Decimal("1e999"), timedelta(1), np.timedelta64(5), np.float32(2),
    np.uint64(2**63), "", "x", "\0", "\ud800", "x" * 300, b"x", [], (), {}, {"a": 1}, {1: 2}, set(), [None], ["x"],
    ["\ud800"], [1.5], [True], [-1], [2**70], [10**5000], [[1], [2, 3]], [[]], [{}], [(1, 2)], [float("nan")],
    np.array(3), np.array("x"), np.zeros(3), np.zeros(3, int), np.zeros((2, 2)), np.zeros(0), np.zeros((0, 3)),
    np.full((4, 4), 3e38), np.array(["a"]), np.array([1j]), np.array([None]), np.zeros(3, "m8[s]"),
    np.zeros(3, "i4,f4"), range(3), object(), Broken(), [Broken()],
]  # fmt: skip

IDS = [1, 3, 9, 12]
KEYS, QUERIES = (np.random.default_rng(0).standard_normal(shape) for shape in ((2, 40, 16), (4, 8, 16)))
OUTCOME = eval.Outcome(skipkv.Full(), None, 1, 2, 0.1, 0.9, 10.0, 0, 1e6, 0.1, 0, 1.0)
RUN = {"prompts": IDS, "method": "full", "steering": None, "progress": False}
OPTIONS = {name: f.default for name, f in Options.__dataclass_fields__.items()} | {"max_new_tokens": 2}
# The functions, and arguments that are right; a name may stand for what takes a model, or a trace, first.
CALLS = {
    "generate": (lambda m, t, **a: m.generate(**a), RUN | OPTIONS),
    "stream": (lambda m, t, **a: list(m.stream(**a)), RUN | OPTIONS),
    "replay": (lambda m, t, **a: m.replay(**a), {
        "tokens": IDS, "method": "full", "steering": None, "n_prompt": 1, "sequence": (0, 0), "logits": False,
        "trace": False, "cache": "f32"}),
    "logits": (lambda m, t, **a: m.logits(**a), {"tokens": IDS, "cache": "f32"}),
    "hidden": (lambda m, t, **a: m.hidden(**a), {"tokens": IDS, "layers": 1, "positions": None, "cache": "f32"}),
    "encode": (lambda m, t, **a: m.encode(**a), {"prompt": "a", "template": None}),
    "save": (lambda m, t, **a: t.save(**a), {"path": "t.npz"}),
    "held": (lambda m, t, **a: t.held(**a), {"step": 50, "layer": 0, "head": 0}),
    "Page.save": (lambda m, t, **a: viz.kept(t).save(**a), {"path": "p.html"}),
    "with_": (lambda m, t, **a: skipkv.RKV(64).with_(**a), {"budget": 64, "mix": 0.1, "compat": None}),
    "load": (skipkv.load, {"source": "tiny", "device": "cpu", "dtype": "auto", "threads": 1, "progress": False}),
    "Trace.load": (skipkv.Trace.load, {"path": "x"}),
    "Steering.load": (skipkv.Steering.load, {"path": "tiny", "layer": 2, "alpha": 1.0}),
    "Steering": (skipkv.Steering, {
        "vector": np.ones(256), "layer": 1, "alpha": 1, "gamma": 0.1, "alpha_max": 2, "scope": "all"}),
    "Sampling": (skipkv.Sampling, {name: OPTIONS[name] for name in skipkv.Sampling.__dataclass_fields__}),
    "Options": (skipkv.Options, OPTIONS),
    "parse_method": (skipkv.parse_method, {"method": "full"}),
    "Custom": (skipkv.Custom, {
        "score": len, "needs": (), "budget": 64, "interval": 32, "window": 8, "tau": 0.9, "protect": "none",
        "allocate": "head", "evict": True, "compat": None}),
    "select": (skipkv.select, {
        "method": "rkv", "keys": KEYS, "queries": QUERIES, "positions": None, "penalties": None, "sums": None,
        "prompt": 0, "sequence": (0, 0), "layer": 0, "compat": None, "budget": 20, "window": 8, "mix": 0.1}),
    "segment": (skipkv.segment, {
        "ids": [1, 2], "texts": ["a", "b\n"], "delimiters": "auto", "markers": "auto", "n_prompt": 0, "compat": None}),
    "flag_repeats": (skipkv.flag_repeats, {"vectors": KEYS[0], "tau": 0.9, "compat": None}),
    "eval.compare": (eval.compare, {
        "model": 0, "texts": [IDS], "runs": [(skipkv.Full(), None)], "prompts": [1], "cache": "bf16", "resamples": 10,
        "seed": 0, "progress": False}),
    "fidelity_table": (eval.fidelity_table, {"results": []}),
    "demo_table": (eval.demo_table, {"runs": []}),
    "grade": (eval.grade, {"kind": "boxed", "text": "\\boxed{1}", "answer": "1", "rule": "default"}),
    "wilson": (eval.wilson, {"right": 1, "n": 2}),
    "bootstrap": (eval.bootstrap, {"sums": [(1.0, 2)], "resamples": 10, "seed": 0}),
    "mcnemar": (eval.mcnemar, {"b": 1, "c": 2}),
    "pass_at_k": (eval.pass_at_k, {"n": [3], "c": [1], "k": 2}),
    "fragmentation": (eval.fragmentation, {"trace": 0}),
    "summarise": (eval.summarise, {"records": [], "runs": {}, "official": []}),
    "Store": (eval.Store, {"directory": None, "create": False}),
    "evaluate": (eval.evaluate, {
        "task": "tiny", "model": 0, "methods": "full", "data": None, "prompt": None, "out": None, "samples": 1,
        "limit": 1, "unsafe": False, "fragmentation": False, "progress": False, "command": "", "max_new_tokens": 2}),
    "demo": (lambda **a: next(eval.demo(**a)), {
        "model": 0, "problems": [{"prompt": "<s>", "answer": "1"}], "shares": (0.5,), "steering": None,
        "protect": "none", "tau": 0.8, "progress": False}),
    "side_by_side": (eval.side_by_side, {"model": 0, "runs": []}),
    "kept": (viz.kept, {"trace": 0, "step": None, "layers": None, "heads": None}),
    "viz.compare": (viz.compare, {"a": 0, "b": 0, "step": None, "layers": None, "heads": None}),
    "survival": (viz.survival, {"trace": 0, "layer": 0, "heads": None}),
    "curve": (viz.curve, {"results": [OUTCOME], "y": None, "x": "budget", "title": None}),
    "label": (vectors.label, {"step": "Wait"}),
    "steps": (vectors.steps, {"model": 0, "ids": IDS, "n_prompt": 0}),
    "extract": (vectors.extract, {"model": 0, "texts": [(IDS, 1)], "layers": [1], "progress": False}),
    "read_torch_tensor": (vectors.read_torch_tensor, {"path": "x"}),
    "import_released": (vectors.import_released, {"path": "x", "layer": 1, "out": "x", "negate": True}),
} | {
    made.__name__: (made, {key: 64 if key == "budget" else made.__dataclass_fields__[key].default
                           for key in (*made._parameters(), *SHARED_PARAMETERS)})
    for made in CLASSES.values()
}  # fmt: skip
# Plain records of what was found; exceptions; and what is tested where it stands.
RECORDS = {
    "Compaction", "Event", "Generation", "Model", "Replay", "Selection", "Sentence", "Sentences", "Stats", "Trace",
    "Fidelity", "Figure", "Grade", "Item", "Outcome", "Record", "Results", "Run", "RunSummary", "Summary", "Table",
    "Page", "Picture", "Extraction", "Step", "Method",
}  # fmt: skip
UNTRIED = {"load": {"source"}, "generate": {"admit"}, "Options": {"admit"}, "stream": OPTIONS.keys()}  # as of generate


def test_every_public_call_is_here():
    found = {name.rpartition(".")[2] for name in CALLS}
    for of in (skipkv, eval, viz, vectors):
        public = {name for name in of.__all__ if callable(getattr(of, name)) and name not in RECORDS}
        public = {n for n in public if not (inspect.isclass(getattr(of, n)) and issubclass(getattr(of, n), Exception))}
        assert public - found == set()
    assert issubclass(skipkv.RKV, Method) and set(SHARED_PARAMETERS) <= CALLS["RKV"][1].keys()


@pytest.fixture(scope="module")
def trace(model):
    return recorded(model, "rkv:budget=48,interval=32", PROBLEMS[:1])[0].trace


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_no_argument_brings_another_exception(name, model, trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, right = CALLS[name]
    own = {"model": model} | dict.fromkeys(("trace", "a", "b"), trace)
    right = {key: own[key] if key in own and value == 0 else value for key, value in right.items()}
    call = (lambda **a: function(model, trace, **a)) if "m" in inspect.signature(function).parameters else function
    wrong = []
    for key in right.keys() - UNTRIED.get(name, set()):
        for i, value in enumerate(VALUES):
            try:
                call(**right | {key: value})
            except (skipkv.Error, OSError) as error:
                if len(str(error)) > 1000 or not str(error).isprintable():
                    wrong.append(f"{key}, value {i}: {str(error)!r:.80}")
            except Exception as error:
                wrong.append(f"{key}, value {i}: {error!r:.80}")
    assert not wrong
