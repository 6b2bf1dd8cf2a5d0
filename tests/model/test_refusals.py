"""What cannot work is refused before it runs, by name, value and what is allowed: one table of exact sentences."""

import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta

import harness
import numpy as np
import pytest
import spec
from generations import PROBLEMS, like, run
from harness import EVICTING, TINY, refused

import skipkv
from skipkv import H2O, RKV, Custom, H2OLast, Random, SkipKV, Steering, Streaming, _skipkv, parse_method, select
from skipkv.eval import compare
from skipkv.methods import CLASSES

pytestmark = pytest.mark.sanitize

NAMES = ", ".join(CLASSES)
SLOTS = "an integer, or integers [n_layers] or [n_layers, n_kv_heads]"
NUMBER, COUNT, FROM_0 = "a number", "integers from 1 to 2147483647", "integers from 0 to 2147483647"
DEVIATIONS = ("None, 'official' or some of pairs, lost-heads, score-order, latest-flag, empty-sentences, "
              "prompt-marker, thoughts-anywhere, thoughts-on-grid, steer-prompt-end")  # fmt: skip
NEEDS = "some of queries, sums, penalties, importance, redundancy"
RKV_KNOWS = "budget, interval, window, mix, kernel, tau"
SHARED = "protect, allocate, evict, compat"
RKV_TAKES = f"{RKV_KNOWS}, {SHARED}"
NO_WEIGHT = "blend weighs no term; allowed: at least one weight that is not 0"
NAN, INF, HUGE = float("nan"), float("inf"), 10**400

# ---------------------------------------------------------------------------------------------------------------------
# One parameter out of its range: "NAME is VALUE; allowed: RANGE"

OPTIONS = [  # of generate and stream
    ("max_new_tokens", (0, 1.0), COUNT),
    ("n", (0, True), COUNT),
    ("rows", (-1, 2**31), COUNT),
    ("brake", (-1,), "integers from 0 to 2147483647"),
    ("memory_limit", (0, "1GB"), "integers from 1 to 4611686018427387904"),
    ("cache", ("f16",), "'bf16', 'f32', 'q8'"),
    ("padding", ("left",), "'none', 'reserve'"),
    ("grouping", (1,), "False, True"),
    ("trace", ("all", 2), "False, True, 'scores'"),
    ("full_length", (0, "long", NAN), "numbers above 0"),
    ("stop", ("", ["a", ""], 5, None), "texts that are not empty"),
    ("stop_ids", (2.5,), "integers from 0 to 230"),
    ("temperature", (-0.1, NAN, "hot", None), "numbers from 0 to 1000"),
    ("top_k", (-1, 0.5), "integers from 0 to 2147483647"),
    ("top_p", (1.01,), "numbers from 0 to 1"),
    ("min_p", (-1,), "numbers from 0 to 1"),
    ("seed", (-1, 2**64), "integers from 0 to 18446744073709551615"),
    ("template", (5, ["a"], {1: 2}), "a mapping of names to JSON values"),
    ("repetition_penalty", (0, -1.1, NAN, "high", None), "numbers from 1e-30 to 1e+30"),
    ("sampling", ("best", True), "'checkpoint'"),
    ("method", (5,), "a method or its string"),
    ("prompts", (5, None, {"a": "b"}), "a text, token ids, messages, or many of them"),
]
REPLAY = [
    ("n_prompt", (0, 44), "integers from 1 to 43"),
    ("trace", ("all",), "False, True, 'scores'"),
    ("cache", ("f16",), "'bf16', 'f32', 'q8'"),
    ("sequence", (5,), "two integers from 0"),
    ("steering", ("x",), "a Steering or None"),
]
PARAMETERS = [  # of a method
    (RKV, "budget", (0, 1 << 25), "integers from 1 to 16777216"),
    (RKV, "budget", (2.5, "x", None, True, [], [[[9]]], INF, 1e300, [64, INF], np.uint64(2**63), 10**30, -INF, -1e300,
                     timedelta(9), np.timedelta64(9), ["9"], [9j], -(2**40)), SLOTS),
    (RKV, "mix", (-0.1, 1.5, NAN), "numbers from 0 to 1"),
    (RKV, "mix", ("a",), NUMBER),
    (RKV, "kernel", (4, 257), "odd integers from 1 to 255"),
    (RKV, "window", (0, 2.5), "integers from 1 to 256"),
    (RKV, "interval", (0,), "integers from 1 to 1048576"),
    (SkipKV, "tau", (2.5,), "numbers from -1 to 2"),
    (Streaming, "sinks", (-1,), "integers from 0 to 1048576"),
    (Random, "seed", (-1, 2**53), "integers from 0 to 9007199254740991"),
    (RKV, "protect", ("first", "sinks:-1"), "none, prompt, sinks:N"),
    (RKV, "allocate", ("x", "", None, True, 5), "head, layer"),
    (RKV, "evict", ("no", 1, None), "False, True"),
    (RKV, "compat", ("pear", 7), DEVIATIONS),
]
LOAD = [
    ("dtype", ("f16", None), "auto, f32, bf16, q8, bf16a16"),
    ("threads", (0, 1025, True, 2.0, "2"), "integers from 1 to 1024"),
]
RANGES = [
    *((lambda m, k=k, v=v: generate(m, **{k: v}), k, v, allowed) for k, vs, allowed in OPTIONS for v in vs),
    *((lambda m, k=k, v=v: m.replay(PROBLEMS[0], **{k: v}), k, v, allowed) for k, vs, allowed in REPLAY for v in vs),
    *((lambda m, c=c, k=k, v=v: c(**({"budget": 30} | {k: v})), k, v, allowed)
      for c, k, vs, allowed in PARAMETERS for v in vs),
    *((lambda m, k=k, v=v: load(**{k: v}), k, v, allowed) for k, vs, allowed in LOAD for v in vs),
]  # fmt: skip


def generate(m, prompts=PROBLEMS[0], method=None, steering=None, **options):
    """Both calls; a stream, too, refuses when it is made."""
    messages = []
    for call in (m.generate, m.stream):
        with pytest.raises(skipkv.Error) as error:
            call(prompts, method, steering, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    raise error.value


def load(**options):
    skipkv.load("tiny", progress=False, **options)


@pytest.mark.parametrize("call, name, value, allowed", RANGES, ids=[f"{k}={v!r}"[:40] for _, k, v, _ in RANGES])
def test_a_parameter_out_of_range(model, call, name, value, allowed):
    with refused(f"{name} is {value!r}; allowed: {allowed}"):
        call(model)


# ---------------------------------------------------------------------------------------------------------------------
# Everything else

KEYS, QUERIES = (np.random.default_rng(0).standard_normal(shape) for shape in ((2, 40, 16), (4, 8, 16)))
PLENTY = {"keys": KEYS.shape, "queries": QUERIES.shape, "sums": (2, 40)}
WITH_NAN = np.where(np.arange(16) == 3, np.nan, KEYS)
ONES, NO_IDS = np.ones(256, np.float32), np.zeros(0, int)
EMPTY = "none may be empty, head_dim at most 512, query heads a multiple of KV heads"
ONE_SET = ("budget differs between the KV heads of layer 0; "
           "allowed: one number a layer, as h2o-last keeps one set for all heads")  # fmt: skip
CHAT = [{"role": "user", "content": "Dot"}]
NO_MESSAGES = "template holds 'messages'; allowed: other variables, as the prompt is the messages"
PROMPT = "a text, token ids, or a list of messages"
POSITIONS = "positions: expected integers from 0 to 1073741823, ascending; found others"
STEERINGS = "steering: expected a Steering, or one or None for each of 1 prompts"
STREAM_TAKES = ("max_new_tokens, context, stop, stop_ids, n, rows, memory_limit, trace, cache, grouping, padding, "
                "full_length, brake, template, sampling, admit, temperature, top_k, top_p, min_p, seed, "
                "repetition_penalty")  # fmt: skip


def at_open(method, n_prompt=1, **options):
    session = harness.open_session(harness.build()[0], method)
    return session.open(200, n_prompt=n_prompt, **options)


def steered(n=32, layer=1, scope="all"):
    return at_open(harness.make("full"), steering=(np.zeros(n, np.float32), layer, 1, 0, 2, scope))


def selected(method="rkv", keys=KEYS, queries=QUERIES, **options):
    return select(method, keys, queries, **({"budget": 20} | options))


def newest(name, budget, n):
    return f"budget is {budget}; allowed: more than the {n} newest slots that {name} always keeps"


def protected(budget, least, first, n, padding=""):
    return (f"budget is {budget}{padding}; allowed: at least {least}, as the first {first} positions and the {n} "
            "newest slots are protected")  # fmt: skip


def one_set(name):
    return f"allocate is layer; allowed: head, as {name} keeps one set for all heads"


def sizes(keys, queries):
    return f"keys {list(keys)} and queries {list(queries)}: {EMPTY}"


REFUSED = [
    # budgets
    (lambda m: RKV(budget=8), newest("rkv", 8, 8)),
    (lambda m: RKV(30, window=30), newest("rkv", 30, 30)),
    (lambda m: H2O(8), newest("h2o", 8, 8)),
    (lambda m: H2OLast(1), newest("h2o-last", 1, 1)),
    (lambda m: Custom(len, budget=8), newest("custom", 8, 8)),
    (lambda m: Streaming(4), protected(4, 5, 4, 0)),
    (lambda m: RKV(30, protect="sinks:23"), protected(30, 31, 23, 8)),
    (lambda m: H2OLast([[30, 31], [30, 30]]), ONE_SET),
    (lambda m: selected("h2o-last", budget=[20, 21]), ONE_SET),
    (lambda m: at_open(RKV([30, 30, 30])), "budget: expected a number, [2] or [2, 2], found shape [3]"),
    (lambda m: at_open(RKV([[30, 30, 30]])), "budget: expected a number, [2] or [2, 2], found shape [1, 3]"),
    (lambda m: generate(m, method=RKV([48] * 3)), "budget: expected a number, [4] or [4, 4], found shape [3]"),
    *((lambda m, b=b: generate(m, method=RKV(b)), f"budget: expected a number, [4] or [4, 4], found shape {list(s)}")
      for b, s in (([[48, 50, 52, 54]], (1, 4)), ([[48, 50]], (1, 2)), ([[48, 50]] * 4, (4, 2)))),
    (lambda m: selected(budget=[20] * 3), "budget: expected a number or [2], found shape [3]"),
    (lambda m: at_open(RKV(30, protect="prompt"), 23), protected(30, 31, 23, 8)),
    (lambda m: at_open(RKV([[30, 40], [29, 50]], protect="prompt"), 22), protected(29, 30, 22, 8)),
    (lambda m: at_open(H2O(40, protect="prompt"), 21), protected(40, 41, 21, 20)),
    (lambda m: at_open(RKV(30), reserve=22), protected(8, 9, 0, 8, " after the padding reserve")),
    (lambda m: generate(m, method="rkv:budget=30,protect=prompt"), protected(30, 51, 43, 8)),
    (lambda m: selected(protect="prompt", prompt=13), protected(20, 21, 13, 8)),
    # methods and their strings
    (lambda m: RKV(budget=64, interval=HUGE), f"interval is {str(HUGE)[:80]}; allowed: numbers from 1 to 1048576"),
    (lambda m: RKV(30, compat=["pairs", "pear"]), f"compat is 'pear'; allowed: {DEVIATIONS}"),
    (lambda m: RKV(30, compat=[["a"]]), f"compat is ['a']; allowed: {DEVIATIONS}"),
    (lambda m: RKV(budget=64).with_(foo=1), f"rkv has no parameter 'foo'; allowed: {RKV_TAKES}"),
    (lambda m: parse_method("rvk:budget=30"), f"method is 'rvk'; allowed: {NAMES}"),
    (lambda m: parse_method("custom:budget=30"), f"method is 'custom'; allowed: {NAMES}"),
    (lambda m: parse_method(7), "method is 7; allowed: a method or its string"),
    (lambda m: parse_method("rkv"), "method 'rkv': rkv needs a budget"),
    (lambda m: parse_method("rkv:budget=30,depth=3"),
     f"method 'rkv:budget=30,depth=3': 'depth' is no parameter of it; allowed: {RKV_TAKES}"),
    (lambda m: parse_method("rkv:budget=30,budget=40"),
     f"method 'rkv:budget=30,budget=40': 'budget' is given twice; allowed: {RKV_TAKES}"),
    (lambda m: parse_method("rkv:budget"), f"method 'rkv:budget': 'budget' has no value; allowed: {RKV_TAKES}"),
    (lambda m: parse_method("full:budget=30"),
     f"method 'full:budget=30': 'budget' is no parameter of it; allowed: interval, tau, {SHARED}"),
    (lambda m: parse_method("rkv:budget=x"), f"budget is 'x'; allowed: {NUMBER}"),
    (lambda m: parse_method("rkv:budget=9/x"), f"budget is '9/x'; allowed: {NUMBER}"),
    (lambda m: parse_method("rkv:budget=40+30/50"), f"budget is ((40, 30), 50); allowed: {SLOTS}"),
    (lambda m: parse_method("rkv:budget=30,evict=maybe"), "evict is 'maybe'; allowed: False, True"),
    (lambda m: generate(m, method="rkv"), "method 'rkv': rkv needs a budget"),
    (lambda m: generate(m, method="rkv:budget=many"), f"budget is 'many'; allowed: {NUMBER}"),
    (lambda m: skipkv.Blend(64), NO_WEIGHT),
    (lambda m: skipkv.Blend(64, importance=0.0), NO_WEIGHT),
    (lambda m: parse_method("blend:budget=64"), NO_WEIGHT),
    (lambda m: selected("blend"), NO_WEIGHT),
    *((lambda m, name=name: CLASSES[name](64, allocate="layer"), one_set(name)) for name in spec.SHARED),
    *((lambda m, name=name: selected(f"{name}:budget=20,allocate=layer"), one_set(name)) for name in spec.SHARED),
    (lambda m: parse_method("rkv:budget=64,allocate=x"), "allocate is 'x'; allowed: head, layer"),
    (lambda m: generate(m, method="full:allocate=rows"), "allocate is 'rows'; allowed: head, layer"),
    (lambda m: Custom(3, budget=30), "score is 3; allowed: a function"),
    (lambda m: Custom(len, ["query"], budget=30), f"needs is 'query'; allowed: {NEEDS}"),
    (lambda m: Custom(len, "sums", budget=30), f"needs is 'sums'; allowed: {NEEDS}"),
    (lambda m: Custom(len, None, budget=64), f"needs is None; allowed: {NEEDS}"),
    (lambda m: Custom(len, [["a"]], budget=64), f"needs is ['a']; allowed: {NEEDS}"),
    (lambda m: Custom(len, budget=30, mix=1), "custom has no parameter 'mix'; allowed: budget, interval, window, tau"),
    # select
    (lambda m: selected("rvk"), f"method is 'rvk'; allowed: {NAMES}"),
    (lambda m: select("rkv", KEYS, QUERIES), "rkv needs a budget"),
    (lambda m: selected(depth=3), f"rkv has no parameter 'depth'; allowed: {RKV_KNOWS}"),
    (lambda m: select("rkv:budget=16", KEYS, QUERIES, foo=1), f"rkv has no parameter 'foo'; allowed: {RKV_TAKES}"),
    (lambda m: selected(keys=KEYS[0]), "keys: expected [n_kv_heads, L, head_dim], found shape [40, 16]"),
    (lambda m: selected(keys="x"), "keys: expected numbers [n_kv_heads, L, head_dim], found str"),
    (lambda m: selected(keys=KEYS * 1j), "keys: expected numbers [n_kv_heads, L, head_dim], found ndarray"),
    (lambda m: selected(keys=WITH_NAN), "keys: expected finite numbers, found others"),
    (lambda m: selected(queries=QUERIES[0]), "queries: expected [n_heads, W, head_dim], found shape [8, 16]"),
    (lambda m: selected(queries=QUERIES[..., :8]), "queries: expected shape [n, n, 16], found [4, 8, 8]"),
    (lambda m: selected(queries=QUERIES[:3]), sizes((2, 40, 16), (3, 8, 16))),
    (lambda m: selected(keys=KEYS[:, :0]), sizes((2, 0, 16), (4, 8, 16))),
    (lambda m: selected(queries=QUERIES[:, :0]), sizes((2, 40, 16), (4, 0, 16))),
    (lambda m: selected("rkv", np.zeros((2, 4, 520)), np.zeros((4, 8, 520))), sizes((2, 4, 520), (4, 8, 520))),
    (lambda m: selected(positions=range(39)), "positions: expected [40] or [2, 40], found shape [39]"),
    (lambda m: selected(positions=np.zeros((3, 40))), "positions: expected [40] or [2, 40], found shape [3, 40]"),
    (lambda m: selected(positions=[[1], [2, 3]]), "positions: expected [40] or [2, 40], found list"),
    *((lambda m, p=p: selected(positions=p), POSITIONS)
      for p in (np.arange(40) - 100, np.arange(40) + 2**32, np.arange(40)[::-1], np.arange(40.0))),
    (lambda m: selected("skipkv", penalties=np.zeros((3, 2))), "penalties: expected [n, 3], found shape [3, 2]"),
    (lambda m: selected(penalties=5), "penalties: expected [n, 3], found shape []"),
    (lambda m: selected(penalties=[[1, 2, 3], [4]]), "penalties: expected numbers [n, 3], found list"),
    *((lambda m, p=p: selected(penalties=[p]),
       "penalties: expected whole positions from 0 to 16777216, first ≤ last; found others")
      for p in ([0, 2**31 - 1, 1], [0.5, 1, 1], [2, 3.5, 1], [9, 3, 1], [-1, 3, 1], [0, 2**24 + 1, 1])),
    *((lambda m, k=k: selected(**{k: np.full(PLENTY[k], 2e17)}),
       f"{k}: expected numbers from -1e+17 to 1e+17, found others") for k in PLENTY),
    (lambda m: selected("h2o"), "h2o needs sums, the attention received by every slot"),
    (lambda m: selected("h2o", sums=np.zeros((2, 39))), "sums: expected shape [2, 40], found [2, 39]"),
    (lambda m: selected(prompt=2**31 - 1), "prompt is 2147483647; allowed: integers from 0 to 1073741824"),
    (lambda m: selected(layer=-1), "layer is -1; allowed: integers from 0 to 2147483647"),
    (lambda m: selected(sequence=5), "sequence is 5; allowed: two integers from 0"),
    # sentences
    (lambda m: skipkv.segment([1, 2], ["a"]), "texts: expected 2 as there are ids, found 1"),
    (lambda m: skipkv.segment([1], ["a"], delimiters="official"),
     "delimiters is 'official'; allowed: 'auto' or ids"),
    (lambda m: skipkv.flag_repeats(np.zeros(3)), "vectors: expected [n, D], found shape [3]"),
    (lambda m: skipkv.flag_repeats([["a"]]), "vectors: expected numbers [n, D], found list"),
    *((lambda m, t=t: skipkv.segment([1, 2], ["a", t]), f"texts is {t!r}; allowed: a text") for t in (2, None, b"b")),
    (lambda m: skipkv.segment([1], 5), "texts is 5; allowed: a text of each token"),
    *((lambda m, i=i: skipkv.segment([i], ["a"]), f"ids is {i!r}; allowed: {FROM_0}") for i in ("1", 1.5, True, -1)),
    *((lambda m, k=k, v=v: skipkv.segment([1], ["a"], **{k: [v]}), f"{k} is {v!r}; allowed: {FROM_0}")
      for k in ("delimiters", "markers") for v in (1.5, None)),
    (lambda m: skipkv.segment([1], ["a"], delimiters=None), f"delimiters is None; allowed: {FROM_0}"),
    *((lambda m, n=n: skipkv.segment([1], ["a"], n_prompt=n), f"n_prompt is {n!r}; allowed: {FROM_0}")
      for n in ("1", 2**40, 0.5)),
    *((lambda m, v=v: skipkv.flag_repeats([[v, 1.0]]), "vectors: expected finite numbers, found others")
      for v in (NAN, INF, 1e39)),
    (lambda m: skipkv.flag_repeats(np.eye(3), HUGE), f"tau is {str(HUGE)[:80]}; allowed: {NUMBER}"),
    (lambda m: skipkv.flag_repeats(np.zeros((3, 4)), compat="x"), f"compat is 'x'; allowed: {DEVIATIONS}"),
    (lambda m: skipkv.flag_repeats(np.eye(3), np.nan), f"tau is nan; allowed: {NUMBER}"),
    # steering
    (lambda m: steered(n=31), "steering vector: expected shape [32], found [31]"),
    (lambda m: steered(layer=2), "steering layer is 2; allowed: 0 to 1"),
    (lambda m: steered(scope="some"), 'scope is "some"; allowed: think, generation, all'),
    (lambda m: Steering("abc", 0), "steering vector: expected numbers [hidden], found str"),
    (lambda m: Steering(ONES, 0, alpha=1e39), "alpha is 1e+39; allowed: finite numbers"),
    (lambda m: Steering(ONES, 0, alpha=HUGE), f"alpha is {str(HUGE)[:80]}; allowed: finite numbers"),
    (lambda m: skipkv.steering.parse_steering("tiny,alpha=1,alpha=2"), "steering alpha is given twice"),
    *((lambda m, v=v: Steering.load("tiny", v), f"layer is {v!r}; allowed: integers from 0") for v in ([1], "2", -1)),
    (lambda m: Steering.load("tiny", beta=1),
     "steering has no parameter 'beta'; allowed: layer, alpha, gamma, alpha_max, scope"),
    *((lambda m, s=s: generate(m, steering=s), STEERINGS) for s in ("v", 5, [None, None])),
    (lambda m: generate(m, steering=Steering(np.ones(255), 0)), "steering vector: expected shape [256], found [255]"),
    (lambda m: generate(m, steering=[Steering(ONES, 4)]), "steering layer is 4; allowed: 0 to 3"),
    (lambda m: generate(m, PROBLEMS[:3], None, [None, None, Steering(ONES, 9)], rows=1),
     "steering layer is 9; allowed: 0 to 3"),
    (lambda m: m.replay(PROBLEMS[0], None, Steering(ONES, 2**40)), "steering layer is 1099511627776; allowed: 0 to 3"),
    # prompts and texts
    *((lambda m, p=p: generate(m, p), "prompt 0 is empty; allowed: at least one token") for p in ("", [NO_IDS])),
    *((lambda m, p=p: generate(m, p), f"prompt is {p[-1]}; allowed: {PROMPT}") for p in ([[]], ["a", 5], [[1, 2.5]])),
    (lambda m: generate(m, np.array(3)), "prompts is array(3); allowed: a text, token ids, messages, or many of them"),
    # fidelity
    (lambda m: compare(m, [[5, 6]] * 2, [], prompts=[1]), "prompts: expected 2 as there are texts, found 1"),
    *((lambda m, r=r: compare(m, [[5, 6]], [r]), f"runs is {r!r}; allowed: pairs of a Method and a Steering or None")
      for r in ("full", ("full", None), 5)),
    (lambda m: compare(m, None, []), "prompts is None; allowed: a text, token ids, messages, or many of them"),
    (lambda m: compare(m, [None], []), f"prompt is None; allowed: {PROMPT}"),
    (lambda m: generate(m, ["a", [5, 231]]), "prompt 1 holds token 231; allowed: 0 to 230"),
    (lambda m: generate(m, [[-1]]), "prompt 0 holds token -1; allowed: 0 to 230"),
    (lambda m: generate(m, [[5] * 4097]), "prompt 0 has 4097 tokens; allowed: up to the context of 4096"),
    (lambda m: generate(m, n=10**9), "1 prompts with n=1000000000; allowed: up to 1048576 texts"),
    (lambda m: generate(m, stop_ids=[231]), "stop_ids is 231; allowed: integers from 0 to 230"),
    (lambda m: generate(m, stop_ids=["a"]), "stop_ids is 'a'; allowed: integers from 0 to 230"),
    (lambda m: generate(m, max_tokens=5), f"option 'max_tokens' is unknown; allowed: {STREAM_TAKES}"),
    (lambda m: generate(m, CHAT, template={"messages": []}), NO_MESSAGES),
    (lambda m: m.encode(CHAT, {"messages": []}), NO_MESSAGES),
    (lambda m: m.encode(CHAT, 5), "template is 5; allowed: a mapping of names to JSON values"),
    (lambda m: generate(m, CHAT, template={"a": {1}}),
     "template: 'a': expected JSON values: Object of type set is not JSON serializable"),
    (lambda m: generate(m, CHAT, template={"tools": [len]}),
     "template: 'tools': expected JSON values: Object of type builtin_function_or_method is not JSON serializable"),
    (lambda m: generate(m, CHAT, template={"tools": {}}), "template: 'tools': expected a list of objects, found {}"),
    *((lambda m, p=p: generate(m, [CHAT, p], template={"a": 1}),
       f"template is {{'a': 1}}; allowed with chat messages only, found {p}") for p in ([5], [[]])),
    (lambda m: m.encode("Dot", {"a": 1}), "template is {'a': 1}; allowed with chat messages only, found 'Dot'"),
    (lambda m: generate(m, [{"content": "a"}]), "messages[0]: expected a dict with a role, found {'content': 'a'}"),
    (lambda m: m.replay(PROBLEMS[0], sequence=(0, -1)), "sequence is -1; allowed: integers from 0 to 2147483647"),
    (lambda m: m.replay([1, 231]), "text holds token 231; allowed: 0 to 230"),
    (lambda m: m.replay(""), "text has 0 tokens; allowed: 1 to the context of 4096"),
    (lambda m: m.replay([5] * 4097), "text has 4097 tokens; allowed: 1 to the context of 4096"),
    (lambda m: m.logits([2**70]), "text holds token 1180591620717411303424; allowed: 0 to 230"),
    (lambda m: m.logits([5, -1]), "text holds token -1; allowed: 0 to 230"),
    (lambda m: m.logits("abc", cache="f16"), "cache is 'f16'; allowed: 'bf16', 'f32', 'q8'"),
    (lambda m: m.hidden("abc", [5]), "layers is 5; allowed: integers from 0 to 4"),
    (lambda m: m.hidden("abc", 9), "layers is 9; allowed: integers from 0 to 4"),
    # loading
    (lambda m: skipkv.load(None), "source is None; allowed: a directory, a hub id, or tiny"),
    (lambda m: load(device="gpu"), "device is 'gpu'; allowed: cpu, cuda, cuda:N"),
    (lambda m: load(device="cuda:x"), "device is 'cuda:x'; allowed: cpu, cuda, cuda:N"),
    (lambda m: load(device=0), "device is 0; allowed: cpu, cuda, cuda:N"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_refused(model, call, message):
    with refused(message) as error:
        call(model)
    assert type(error.value) is skipkv.ConfigError


@pytest.mark.parametrize("name", EVICTING)
def test_the_core_itself_refuses_a_method_without_a_budget(name):
    with refused(f"{name} needs a budget"):
        _skipkv.Session(harness.build()[0], method={"name": name} | ({"score": len} if name == "custom" else {}))


def test_the_least_budgets_run():
    """One less is refused above."""
    for method in (RKV(9), H2OLast(2), Streaming(5), RKV(30, protect="sinks:22")):
        assert at_open(method) == 0
    assert at_open(RKV(30, protect="prompt"), 22) == at_open(H2O(40, protect="prompt"), 20) == 0
    assert at_open(RKV(30), reserve=21) == 0


@pytest.mark.parametrize("prompts, options, message", [
    ("a", {}, "tiny has no tokenizer; allowed: prompts as token ids"),
    ([{"role": "user", "content": "a"}], {}, "tiny has no tokenizer; allowed: prompts as token ids"),
    ([5], {"stop": "a"}, "stop needs a tokenizer, which this model has not"),
    ([5], {"brake": 2}, "brake needs a tokenizer, which this model has not"),
])  # fmt: skip
def test_without_a_tokenizer(model, prompts, options, message):
    with refused(message):
        generate(like(model, tokenizer=None), prompts, **options)


def test_a_long_interval_takes_no_more_room_than_the_row(model):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outs = [run(model, PROBLEMS[0], f"full:interval={i}", max_new_tokens=20)[0] for i in (128, 1 << 20)]
    assert outs[0].tokens == outs[1].tokens
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; it was 600 000


def test_a_steering_keeps_its_own_vector():
    given = np.ones(8, np.float32)
    steering = Steering(given, 0)
    given[0] = np.nan
    assert steering.vector.tolist() == [1.0] * 8


def test_logits_that_are_not_finite_end_the_run(model):
    steering = Steering(2 * ONES, 1, alpha=3e38, alpha_max=3e38, scope="all")
    with pytest.raises(skipkv.BackendError, match="the logits are not finite"):
        run(model, PROBLEMS[0], None, steering, max_new_tokens=50)


def test_numbers_of_numpy_are_numbers(model):
    options = {"top_p": np.float32(0.9), "temperature": np.float32(0.5), "max_new_tokens": np.int64(2)}
    assert len(run(model, PROBLEMS[0], **options)[0].tokens) == 2
    assert skipkv.load("tiny", threads=np.int64(1), progress=False).threads == 1
    assert RKV(budget=64, interval=16.0).interval == 16


@pytest.mark.parametrize("eos", ["2", ["2"], 999, -1, True, {"a": 2}, 2.0, [[2]]])
def test_an_end_of_text_that_no_token_is(tmp_path, eos):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    config = json.loads((TINY / "config.json").read_text()) | {"eos_token_id": eos}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(skipkv.CheckpointError, match="/config.json: eos_token_id is "):
        skipkv.load(str(tmp_path), threads=1, progress=False)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    skipkv.load(str(tmp_path), threads=1, progress=False)  # and that of config.json is not asked for
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(skipkv.CheckpointError, match="generation_config.json: eos_token_id is "):
        skipkv.load(str(tmp_path), threads=1, progress=False)


FORKS = """
import os, signal
import numpy as np
import skipkv

PROMPT = [1, 3, 9, 12]
many, one = (skipkv.load("tiny", threads=n, progress=False) for n in (3, 1))
want = one.generate(PROMPT, max_new_tokens=6, progress=False)[0].tokens
stream = many.stream(PROMPT, max_new_tokens=6)
next(stream)
works = [
    lambda: [event.token for event in stream] == want[1:],
    lambda: many.generate(PROMPT, max_new_tokens=6, progress=False)[0].tokens == want,
    lambda: (many.hidden(PROMPT, 1) == one.hidden(PROMPT, 1)).all(),
    lambda: min(many._core.limits(1 << 20, 2)) > 0,
    lambda: skipkv.load("tiny", threads=2, progress=False).generate(PROMPT, max_new_tokens=6)[0].tokens == want,
]
for work in works:
    if not os.fork():
        signal.alarm(60)
        os._exit(0 if work() else 1)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
print([event.token for event in stream] == want[1:])
"""


def test_a_fork_computes_with_threads_of_its_own():
    """Also what the parent has begun; and so does the parent."""
    command = [sys.executable, "-c", FORKS]
    environment = os.environ | {"PYTHONPATH": str(TINY.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["0"] * 5 + ["True"], done.stdout + done.stderr
