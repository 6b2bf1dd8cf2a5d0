"""Methods as Python sees them: classes from the core's table, defaults, strings that name them again."""

from dataclasses import fields

import spec
from harness import ALL
from hypothesis import given, settings
from hypothesis import strategies as st

import skipkv
from skipkv import RKV, Custom, SkipKV, SnapKV, parse_method
from skipkv.methods import CLASSES, COMPAT, PARAMETERS, SHARED_PARAMETERS, TABLE

SETTINGS = settings(max_examples=200, deadline=None, print_blob=True)


@st.composite
def chosen_methods(draw):
    name = draw(st.sampled_from(list(CLASSES)))
    values = {}
    for key in TABLE[name]["parameters"].split():
        p = PARAMETERS[key]
        if key == "budget":
            number = st.integers(600, 2000)
            row = st.lists(number, min_size=1, max_size=3)
            head = number.map(lambda x: [x, x]) if name in spec.SHARED else row
            array = st.lists(head, min_size=1, max_size=3).filter(lambda a: len({*map(len, a)}) == 1)
            values[key] = draw(st.one_of(number, row, array))
        elif draw(st.booleans()):
            low, high = int(p["low"]), min(int(p["high"]), 500 if key != "seed" else 2**53)
            number = st.floats(low, high) if p["kind"] == "f" else st.integers(low, high - 1)
            values[key] = draw(number.map(lambda x, odd=p["kind"] == "o": x | 1 if odd else x))
    if draw(st.booleans()):
        values["protect"] = draw(st.sampled_from(["none", "prompt", "sinks:3", "sinks:2+prompt"]))
    if draw(st.booleans()):
        values["allocate"] = draw(st.sampled_from(["head"] if name in spec.SHARED else ["head", "layer"]))
    if draw(st.booleans()):
        values["evict"] = draw(st.booleans())
    names = st.lists(st.sampled_from(["official", *COMPAT]), max_size=3)
    values["compat"] = draw(st.one_of(st.none(), st.sampled_from(["official", *COMPAT]), names))
    if name == "h2o":
        values["budget"] = 2000
    if name == "blend" and not any(values.get(term) for term in spec.TERMS):
        values["key_norm"] = -1
    return CLASSES[name](**values)


@SETTINGS
@given(chosen_methods())
def test_strings_name_the_method_again(method):
    assert parse_method(str(method)) == method
    assert hash(parse_method(str(method))) == hash(method)
    assert parse_method(method) is method


def test_strings_by_example():
    assert str(RKV(1024)) == "rkv:budget=1024" and str(skipkv.Full()) == "full"
    assert str(RKV([512, 256], mix=0.07, evict=False)) == "rkv:evict=False,budget=512/256,mix=0.07"
    heads = SkipKV([[64, 32], [32, 16]], protect="sinks:2+prompt")
    assert str(heads) == "skipkv:protect=sinks:2+prompt,budget=64+32/32+16"
    assert str(SnapKV(64, compat=["pairs", "lost-heads"])) == "snapkv:compat=pairs/lost-heads,budget=64"
    assert parse_method(None) == skipkv.Full()
    assert parse_method("rkv:budget=64+32/32+16").budget == ((64, 32), (32, 16))
    assert parse_method("rkv:budget=+64") == RKV([64]) == RKV([[64]]) == RKV(64.0)
    assert str(RKV(64, allocate="layer")) == "rkv:allocate=layer,budget=64"
    assert parse_method("rkv:budget=64,allocate=layer") == RKV(64, allocate="layer") != RKV(64, allocate="head")
    assert str(skipkv.Blend(64, importance=0.5, key_norm=-2)) == "blend:budget=64,importance=0.5,key_norm=-2"
    assert RKV([[64], [32]]) == RKV((64, 32)) and RKV(64, compat=()) == RKV(64) == RKV(64, compat=None)
    assert RKV(64, compat="pairs") == RKV(64, compat=["pairs"]) and RKV(64, compat=["official"]).compat == "official"


def test_classes_come_from_the_cores_table():
    assert {*CLASSES, "custom"} == {*TABLE} == {*ALL}
    for name, cls in CLASSES.items():
        own = [f.name for f in fields(cls) if f.name not in SHARED_PARAMETERS]
        assert sorted(own) == sorted(TABLE[name]["parameters"].split())
        for f in fields(cls):
            if f.name in PARAMETERS and f.name != "budget":
                assert f.default == PARAMETERS[f.name]["default"]
    # METHOD §0
    assert {key: p["default"] for key, p in PARAMETERS.items()} == {
        "budget": None, "interval": 128, "window": 8, "mix": 0.1, "kernel": 7, "sinks": 4, "tau": 0.95, "seed": 0,
    } | dict.fromkeys(spec.TERMS, 0)  # fmt: skip


def test_with_changes_one_parameter():
    assert RKV(64, mix=0.3).with_(budget=32) == RKV(32, mix=0.3)
    custom = Custom(len, ["sums"], budget=64).with_(budget=32, protect="prompt")
    assert (custom.budget, custom.protect, custom.score, custom.needs_) == (32, "prompt", len, ("sums",))
