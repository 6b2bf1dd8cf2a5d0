"""What a checkpoint recommends, followed or said once; a repetition penalty, which it may ask for."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import tokenizers
from generations import PROBLEMS, alone, run, same, stream
from harness import TINY, refused
from tokenizers import processors

import skipkv

QUIET = {"max_new_tokens": 12, "progress": False}
THINKER = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01}


@pytest.fixture
def checkpoint(tmp_path):
    """Loads a copy of the model in the box under another generation_config.json."""

    def load(**generation):
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / name, tmp_path / name)
        (tmp_path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 2}))
        return skipkv.load(tmp_path, threads=1, progress=False)

    return load


def said(call):
    """The warnings of a call, none of them at a line of skipkv."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(not Path(w.filename).is_relative_to(TINY.parent) and w.category is UserWarning for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("generation, listed, given", [
    (THINKER, "temperature=0.6, top_k=20, top_p=0.95, min_p=0.01", {"temperature": 0}),
    ({"do_sample": True}, "temperature=1, top_k=50", {"temperature": 0.7}),
    ({"repetition_penalty": 1.05, "do_sample": None}, "repetition_penalty=1.05", {"repetition_penalty": 1}),
    ({"do_sample": True, "top_k": 0, "repetition_penalty": 1.2}, "temperature=1, repetition_penalty=1.2",
     {"temperature": 0, "repetition_penalty": 1}),
])  # fmt: skip
def test_a_recommendation_that_is_not_followed_is_said_once(checkpoint, generation, listed, given):
    model = checkpoint(**generation)
    for silent in (given, {"sampling": "checkpoint"}):
        assert said(lambda silent=silent: run(model, PROBLEMS[0], **silent, **QUIET)) == []
    found = said(lambda: [run(model, PROBLEMS[0], **QUIET), list(stream(model, PROBLEMS[1], max_new_tokens=2))])
    assert found == [f"{model.name} recommends {listed}, which this run leaves out; sampling='checkpoint' follows it"]


def test_what_recommends_nothing_says_nothing(checkpoint):
    for generation in ({}, {"temperature": 0.6, "top_p": 0.9}, {"do_sample": False, "repetition_penalty": 1.0}):
        assert said(lambda g=generation: run(checkpoint(**g), PROBLEMS[0], **QUIET)) == []


@pytest.mark.parametrize("generation, taken", [
    (THINKER, {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01}),
    ({"do_sample": True, "top_p": 0.8, "top_k": None}, {"temperature": 1.0, "top_k": 50, "top_p": 0.8}),
    ({"do_sample": True, "temperature": 1.5, "repetition_penalty": 1.3},
     {"temperature": 1.5, "top_k": 50, "repetition_penalty": 1.3}),
    ({"temperature": 0.6, "repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ({}, {}),
], ids=str)  # fmt: skip
def test_a_recommendation_is_followed_in_what_the_call_does_not_say(checkpoint, generation, taken):
    model = checkpoint(**generation)
    options = {"n": 2, "trace": True, "seed": 5, "max_new_tokens": 40}
    for given in ({}, {"temperature": 2.0}, {"top_k": 3, "repetition_penalty": 1.1}, {"temperature": 0}):
        with warnings.catch_warnings():
            warnings.simplefilter("error" if generation else "ignore")
            got = run(model, PROBLEMS[:2], sampling="checkpoint", **options, **given)
        same(got, run(model, PROBLEMS[:2], **options, **(taken | given)))
        wanted = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} | taken | given
        assert wanted.items() <= got[0].trace.settings.items()


def test_a_checkpoint_without_a_recommendation_says_so_where_it_is_asked_for(checkpoint):
    model = checkpoint()
    found = said(lambda: [run(model, PROBLEMS[0], sampling="checkpoint", **QUIET) for _ in range(2)])
    assert found == [f"{model.name} recommends no sampling; greedy where the call says nothing else"]


@pytest.mark.parametrize("wrong, message", [
    ({"do_sample": "yes"}, "do_sample is 'yes'; allowed: False, True"),
    ({"temperature": "hot"}, "temperature is 'hot'; allowed: numbers from 0 to 1000"),
    ({"top_k": 2.5}, "top_k is 2.5; allowed: integers from 0 to 2147483647"),
    ({"top_p": [0.9]}, "top_p is [0.9]; allowed: numbers from 0 to 1"),
    ({"min_p": True}, "min_p is True; allowed: numbers from 0 to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0; allowed: numbers from 1e-30 to 1e+30"),
])  # fmt: skip
def test_a_malformed_recommendation_is_refused_where_it_is_used(checkpoint, wrong, message):
    model = checkpoint(**(THINKER | wrong))
    assert said(lambda: run(model, PROBLEMS[0], **QUIET)) == []
    for call in (model.generate, model.stream):
        with refused(f"{model.name}: generation_config.json: {message}", skipkv.CheckpointError):
            call(PROBLEMS[0], sampling="checkpoint")


def test_a_second_beginning_of_text_is_said_once(checkpoint, tmp_path):
    model = checkpoint()
    assert said(lambda: run(model, [PROBLEMS[0], "<s><s>", "<s>", "aa", "Dot"], **QUIET)) == []
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = skipkv.load(tmp_path, threads=1, progress=False)
    ids = model.encode("Dot")
    assert said(lambda: [model.encode(p) for p in ("Dot", "aa", "", "</s>", ids, [1, 1, 5])]) == []
    [text] = said(lambda: [run(model, [p], **QUIET) for p in (PROBLEMS[0], PROBLEMS[1])])
    assert text == "the prompt begins with '<s>', and the tokenizer adds another: leave one out"
    assert model.encode(PROBLEMS[0])[:2] == [1, 1]  # said, not changed


@pytest.mark.parametrize("method", ["full", "skipkv:budget=48,interval=32"])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_penalised_text_is_the_same_alone_in_a_batch_forked_and_streamed(model, method, temperature):
    options = {"repetition_penalty": 2.0, "temperature": temperature, "seed": 3, "max_new_tokens": 80}
    outs = run(model, PROBLEMS[:3], method, n=3, rows=8, **options)
    same(run(model, PROBLEMS[:3], method, n=3, rows=2, **options), outs)
    same([e.generation for e in sorted(stream(model, PROBLEMS[:3], method, n=3, rows=5, **options),
                                       key=lambda e: (e.prompt, e.sample)) if e.generation], outs)  # fmt: skip
    for out in outs[::4]:
        same([alone(model, PROBLEMS[:3], method, None, out.prompt, out.sample, **options)], [out])
    free = run(model, PROBLEMS[:3], method, n=3, **(options | {"repetition_penalty": 1.0}))
    assert [out.tokens for out in outs] != [out.tokens for out in free]
    same(free, run(model, PROBLEMS[:3], method, n=3, **{k: v for k, v in options.items() if k != "repetition_penalty"}))
