"""What cannot work is refused by name before it runs, and never hangs, takes all memory or means something else."""

import json
import os
import shutil
from importlib.resources import files

import numpy as np
import pytest

import skipkv
from skipkv import RKV, Custom, Steering, select

PROMPT = "<s><|user|> Kim = 4. Find Kim.<|assistant|><think>\n"
KEYS, QUERIES = (np.random.default_rng(0).standard_normal(shape) for shape in ((2, 40, 16), (4, 8, 16)))
ONES = np.ones(256, np.float32)


@pytest.fixture(scope="module")
def model():
    return skipkv.load("tiny", threads=1, progress=False)


def selected(**changes):
    return select("rkv", **{"keys": KEYS, "queries": QUERIES, "budget": 16} | changes)


NAN = np.where(np.arange(16) == 3, np.nan, KEYS)
REFUSED = [
    (lambda m: selected(prompt=2**31 - 1), "prompt is 2147483647"),
    (lambda m: selected(layer=-1), "layer is -1"),
    (lambda m: selected(sequence=5), "sequence is 5"),
    (lambda m: selected(positions=np.arange(40) - 100), "positions: expected integers from 0"),
    (lambda m: selected(positions=np.arange(40) + 2**32), "positions: expected integers from 0"),
    (lambda m: selected(positions=np.arange(40)[::-1]), "positions: expected integers from 0"),
    (lambda m: selected(positions=np.arange(40.0)), "positions: expected integers from 0"),
    (lambda m: selected(positions=[[1], [2, 3]]), r"positions: expected \[40\]"),
    (lambda m: selected(penalties=[[0, 2**31 - 1, 1]]), "penalties: expected positions from 0"),
    (lambda m: selected(penalties=5), "penalties: expected "),
    (lambda m: selected(penalties=[[1, 2, 3], [4]]), "penalties: expected "),
    (lambda m: selected(keys=NAN), "keys: expected finite numbers"),
    (lambda m: selected(keys=KEYS * 1j), "keys: expected numbers"),
    (lambda m: select("rkv:budget=16", KEYS, QUERIES, foo=1), "rkv has no parameter 'foo'"),
    (lambda m: skipkv.flag_repeats(np.eye(3), np.nan), "tau is nan"),
    *((lambda m, b=b: RKV(budget=b), "budget is ") for b in (np.inf, 1e300, [64, np.inf], np.uint64(2**63), 10**30)),
    (lambda m: RKV(budget=64, interval=10**400), "interval is 1000"),
    (lambda m: RKV(budget=64, compat=[["a"]]), r"compat is \['a'\]"),
    (lambda m: RKV(budget=64).with_(foo=1), "rkv has no parameter 'foo'"),
    (lambda m: Custom(len, None, budget=64), "needs is None"),
    (lambda m: Custom(len, [["a"]], budget=64), r"needs is \['a'\]"),
    (lambda m: Steering("abc", 0), "steering vector: expected finite numbers"),
    (lambda m: Steering(ONES, 0, alpha=1e39), r"alpha is 1e\+39"),
    (lambda m: Steering(ONES, 0, alpha=10**400), "alpha is 1000"),
    (lambda m: skipkv.steering.parse_steering("tiny,alpha=1,alpha=2"), "steering alpha is given twice"),
    (lambda m: m.logits([2**70]), "text holds token 1180591620717411303424"),
    (lambda m: m.hidden(PROMPT, 9), "layers is 9"),
    (lambda m: m.replay(PROMPT, sequence=5), "sequence is 5"),
    (lambda m: m.replay(PROMPT, None, Steering(ONES, 2**40)), "steering layer is 1099511627776"),
    (lambda m: m.generate(PROMPT, n=10**9), "1 prompts with n=1000000000"),
    (lambda m: skipkv.load(None), "source is None"),
]  # fmt: skip


@pytest.mark.parametrize("run, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(model, run, message):
    with pytest.raises(skipkv.ConfigError, match=message):
        run(model)


def test_a_long_interval_takes_no_more_room_than_the_row(model):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outs = [model.generate(PROMPT, f"full:interval={i}", max_new_tokens=20, progress=False)[0] for i in (128, 1 << 20)]
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
        model.generate(PROMPT, None, steering, max_new_tokens=50, progress=False)


def test_numbers_of_numpy_are_numbers(model):
    options = {"top_p": np.float32(0.9), "temperature": np.float32(0.5), "max_new_tokens": np.int64(2)}
    assert len(model.generate(PROMPT, progress=False, **options)[0].tokens) == 2
    assert skipkv.load("tiny", threads=np.int64(1), progress=False).threads == 1
    assert RKV(budget=64, interval=16.0).interval == 16


@pytest.mark.parametrize("eos", ["2", ["2"], 999, -1, True, {"a": 2}, 2.0, [[2]]])
def test_an_end_of_text_that_no_token_is(tmp_path, eos):
    box = files("skipkv.tiny")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(box / name), tmp_path / name)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(skipkv.CheckpointError, match="generation_config.json: eos_token_id is "):
        skipkv.load(str(tmp_path), threads=1, progress=False)


def test_a_fork_that_left_the_threads_behind_says_so(model):
    many = skipkv.load("tiny", threads=2, progress=False)
    one = model.generate(PROMPT, max_new_tokens=3, progress=False)[0].tokens
    many.generate(PROMPT, max_new_tokens=3, progress=False)
    child = os.fork()
    if child == 0:
        try:
            many.generate(PROMPT, max_new_tokens=3, progress=False)
        except skipkv.BackendError:
            os._exit(7 if model.generate(PROMPT, max_new_tokens=3, progress=False)[0].tokens == one else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
