"""lm-evaluation-harness: its own transformers model and ours say the same; tasks, options, discovery."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from harness import TINY

import skipkv
from skipkv import BackendError, ConfigError, devices
from skipkv.tiny.problems import draw

pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra [harness])")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from skipkv.eval.harness import LM  # noqa: E402

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).parents[2]
SMALL = "streaming:budget=24,interval=8"
# Sums over tokens of float32 computations in different orders.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
WINDOW = 200  # tokens of the context of the checkpoint in these tests: shorter than its texts
F32 = {"dtype": "f32", "cache": "f32", "threads": 1}
PROBLEMS = [problem["prompt"] for problem in draw(40)[::8]]


@pytest.fixture(scope="module", params=["no BOS", "BOS"])
def directory(request, tmp_path_factory):
    """The model in the box with a short context, and a tokenizer that adds a beginning of text or not."""
    path = tmp_path_factory.mktemp("tiny")
    for name in ("model.safetensors", "tokenizer_config.json", "generation_config.json"):
        (path / name).symlink_to(TINY / name)
    config = json.loads((TINY / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": WINDOW}))
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    if request.param == "BOS":
        begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [begin, text],
                                       "pair": [begin, text, text | {"Sequence": {"id": "B", "type_id": 0}}],
                                       "special_tokens": special}  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(scope="module")
def theirs(directory):
    return HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def ours(directory):
    return LM(str(directory), rows=5, **F32)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


@pytest.fixture(scope="module")
def texts(ours):
    """Problems and what the model writes of them, longer than the context."""
    outs = skipkv.load("tiny", progress=False).generate(PROBLEMS, max_new_tokens=400, progress=False)
    return [PROBLEMS[out.prompt] + out.text for out in outs]


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers


def test_log_likelihoods(ours, theirs, texts):
    pairs = [("", texts[0][:80]), ("", "<s> Dot"), ("<s>", "<|user|>"), (texts[1], " Wait"),
             (texts[2][:30] + "  \n", "Leo = 4.")]  # fmt: skip
    for text in texts:
        cuts = ((60, 61), (60, 64), (60, 160), (200, 230), (len(text) // 2, len(text) // 2 + 200))
        pairs += [(text[:at], text[at:end]) for at, end in cuts]
        pairs += [(PROBLEMS[0], choice) for choice in ("1", " 12", " Dot", "Wait, 1 + 2 = 3.")]
    pairs = [(a, b) for a, b in pairs if not a or ours._encode_pair(a, b)[1]]  # theirs takes none of no tokens
    got = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    want = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert {greedy for _, greedy in want} == {True, False}
    np.testing.assert_allclose(np.array(got, float), np.array(want, float), **CLOSE)


def test_rolling_log_likelihoods(ours, theirs, texts):
    requests = instances("loglikelihood_rolling", [(text,) for text in ("", "Dot", *texts)])
    assert max(len(ours.tok_encode(text)) for text in texts) > 2 * WINDOW
    want = theirs.loglikelihood_rolling(requests[1:], disable_tqdm=True)
    got = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    begins = len(ours.tok_encode("")) > 0
    assert got[0] == 0.0 or begins
    np.testing.assert_allclose(got[1:], want, **CLOSE)


@pytest.mark.parametrize("until", [[".", "\n"], "=", ["no such text"]], ids=str)
def test_greedy_texts(ours, theirs, until):
    options = {"until": until, "max_gen_toks": 40, "do_sample": False, "temperature": 0.0, "num_beams": 1}
    prompts = [*PROBLEMS, PROBLEMS[0] * 5]  # the last does not fit beside its new tokens
    requests = instances("generate_until", [(prompt, options) for prompt in prompts])
    got = ours.generate_until(requests, disable_tqdm=True)
    assert got == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(got)) > 1


@pytest.mark.parametrize("chat", [
    [{"role": "user", "content": "Dot = 9."}],
    [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C = 1."}],
], ids=len)  # fmt: skip
@pytest.mark.parametrize("goes_on", [False, True])
def test_chats(ours, theirs, chat, goes_on):
    text = ours.apply_chat_template(chat, add_generation_prompt=not goes_on)
    assert text == theirs.apply_chat_template(chat, add_generation_prompt=not goes_on)
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_texts_of_no_tokens(ours):
    pairs = [("Dot = 9.", ""), ("", "<s>"), (" ", "Dot = 9.")]
    none, begin, space = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert none == begin == (0.0, True) and space[0] < 0


# ---------------------------------------------------------------------------------------------------------------------
# Tasks

TASKS = {
    "choices": {"output_type": "multiple_choice", "doc_to_choice": ["1", "12", "Dot"], "doc_to_target": 1,
                "metric_list": [{"metric": "acc"}]},
    "perplexity": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
                   "metric_list": [{"metric": "bits_per_byte"}]},
    "texts": {"output_type": "generate_until", "doc_to_target": "{{answer}}", "fewshot_split": "test",
              "generation_kwargs": {"until": ["Wait"], "max_gen_toks": 50}, "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files, and of their data."""
    path = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": problem, "answer": "12"}) + "\n" for problem in PROBLEMS]
    (path / "data.jsonl").write_text("".join(lines))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path / "data.jsonl")}},
            "test_split": "test", "doc_to_text": "{{question}}"}  # fmt: skip
    for name, task in TASKS.items():  # JSON is YAML
        (path / f"{name}.yaml").write_text(json.dumps({"task": name} | data | task))
    return path


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def evaluate(model, tasks, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, limit=4, **options
    )


def said(results):
    """What the model answered, task by task."""
    return {task: [doc["resps"] for doc in docs] for task, docs in results["samples"].items()}


def test_tasks(ours, theirs, tasks):
    options = {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": True}
    got, want = (evaluate(lm, tasks, **options) for lm in (ours, theirs))
    a, b = said(got), said(want)
    assert a["texts"] == b["texts"]
    for task in ("choices", "perplexity"):
        np.testing.assert_allclose(np.array(a[task], float), np.array(b[task], float), **CLOSE)
    assert got["results"].keys() == want["results"].keys() == TASKS.keys()
    assert got["config"]["method"] == "full"


def test_a_compressing_method_answers_as_its_replay(model, tasks):
    lm = LM(model, SMALL, rows=3)
    results, full = evaluate(lm, tasks), evaluate(LM(model), tasks)
    assert results["config"]["method"] == SMALL
    assert {task: said(results)[task] == said(full)[task] for task in TASKS} == dict.fromkeys(TASKS, False)
    for doc in results["samples"]["choices"]:
        for (context, text), [(logprob, _)] in zip(doc["arguments"], doc["resps"], strict=True):
            context, text = lm._encode_pair(context, text)
            replay = model.replay(context + text, SMALL, n_prompt=len(context))
            assert logprob == pytest.approx(replay.logprobs[len(context) - 1 :].sum(), abs=1e-9)
    for doc in results["samples"]["texts"]:
        prompt = lm.tok_encode(doc["arguments"][0][0])
        assert doc["resps"] == [[model.generate(prompt, SMALL, max_new_tokens=50, stop="Wait")[0].text]]
    assert said(evaluate(LM(model, SMALL, rows=16), tasks)) == said(results)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and options


@pytest.mark.parametrize("arguments, method", [
    ("", "full"),
    (",method=skipkv:budget=48,tau=0.9,interval=16", "skipkv:budget=48,interval=16,tau=0.9"),
    (",method=rkv:budget=48,protect=sinks:4,evict=false", "rkv:protect=sinks:4,evict=False,budget=48"),
    (",method=rkv,budget=48", "rkv:budget=48"),
    (",method=random:budget=48/32/32/16,seed=3", "random:budget=48/32/32/16,seed=3"),
    (",method=rkv:budget=48+steer:tiny,alpha=0.5,scope=all", "rkv:budget=48+steer:layer=3,alpha=0.5"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("make", ["string", "command line"])
def test_arguments_in_a_line(arguments, method, make):
    text = f"pretrained=tiny,threads=1,max_gen_toks=9{arguments}"
    if make == "string":
        lm = LM.create_from_arg_string(text, {"batch_size": 4, "device": None})
    else:
        from lm_eval._cli.utils import key_val_to_dict

        lm = LM.create_from_arg_obj(key_val_to_dict(text), {"batch_size": "4", "device": "cpu"})
    assert lm.get_model_info()["method"] == method and lm.options["rows"] == 4 and lm.max_gen_toks == 9


def usable(device):
    try:
        return bool(devices.find(device))
    except BackendError:
        return False


def test_the_harness_names_a_gpu_by_itself_and_an_argument_goes_before_it():
    for text in ("pretrained=tiny", "pretrained=tiny,device=cpu"):
        if "cpu" in text or usable("cuda:0"):
            LM.create_from_arg_string(text, {"device": "cuda:0"})
        else:
            with pytest.warns(UserWarning, match="device is 'cuda:0': .*; the CPU computes"):
                LM.create_from_arg_string(text, {"device": "cuda:0"})
    with pytest.raises(ConfigError, match="device is 'mps'"):
        LM.create_from_arg_string("pretrained=tiny", {"device": "mps"})


def test_a_method_object_takes_parameters_too(model):
    assert LM(model, skipkv.RKV(budget=48), interval=16).method == skipkv.RKV(budget=48, interval=16)


@pytest.mark.parametrize("arguments, text", [
    ({"method": "rkv:budget=48", "tua": 1}, "'tua' is no parameter of it"),
    ({"method": skipkv.RKV(budget=48), "tua": 1}, "no parameter 'tua'"),
    ({"row": 3}, "'row' is no parameter of it"),
    ({"method": "rkw:budget=48"}, "method is 'rkw'"),
    ({"method": 5}, "method is 5"),
    ({"chat_template_args": "enable_thinking"}, "chat_template_args"),
    ({"rows": 0}, "rows is 0"),
    ({"cache": "f16"}, "cache is 'f16'"),
    ({"max_gen_toks": 0}, "max_new_tokens is 0"),
    ({"max_length": 10**6}, "max_length is 1000000"),
    ({"steering": "tiny"}, "steering is 'tiny'"),
])  # fmt: skip
def test_wrong_arguments_are_refused(model, arguments, text):
    with pytest.raises(ConfigError, match=text):
        LM(model, **arguments)


def generate(lm, options, prompts=PROBLEMS[:2]):
    return lm.generate_until(instances("generate_until", [(prompt, options) for prompt in prompts]), disable_tqdm=True)


@pytest.mark.parametrize("options, text", [
    ({"num_beams": 4}, "generation option 'num_beams' is unknown; allowed: until, do_sample, max_gen_toks"),
    ({"n": 2}, "'n' is unknown"),
    ({"top_p": 2.0}, "top_p is 2.0"),
    ({"max_gen_toks": 4096}, "max_gen_toks is 4096; allowed: integers from 1 to 4095"),
])  # fmt: skip
def test_wrong_options_are_refused(model, options, text):
    with pytest.raises(ConfigError, match=text):
        generate(LM(model), options)


def test_options_of_generations(model):
    lm = LM(model, max_gen_toks=30)
    greedy = generate(lm, {"do_sample": False, "temperature": 0.9, "top_p": 0.5})
    assert greedy == [out.text for out in model.generate(PROBLEMS[:2], max_new_tokens=30, progress=False)]
    assert generate(lm, {}) == generate(lm, {"until": [""], "max_new_tokens": 30}) == greedy
    sampled = {"do_sample": True, "top_k": 50, "seed": 5, "repetition_penalty": 1.5}
    want = model.generate(PROBLEMS[:2], temperature=1.0, top_k=50, seed=5, repetition_penalty=1.5, max_new_tokens=30)
    assert generate(lm, sampled) == [out.text for out in want] != greedy
    assert len(set(generate(lm, {"temperature": 3.0}, PROBLEMS[:1] * 4))) == 4


def test_only_the_answer(model):
    options = {"until": ["</s>"], "max_gen_toks": 1500}
    whole, answer = (generate(LM(model, think_end_token=token), options) for token in (None, "</think>"))
    assert answer == [text.split("</think>")[1].lstrip() for text in whole] != whole


def test_a_chat_template_of_variables_and_without_a_system(model, monkeypatch):
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = refusal + "{{ x + messages[0].content }}"
    monkeypatch.setattr(model.tokenizer._templates, "_texts", {"default": ("a template", template)})
    lm, user = LM(model, chat_template_args={"x": "X: "}), {"role": "user", "content": " Dot "}
    with pytest.warns(UserWarning, match="system message"):
        assert lm.apply_chat_template([{"role": "system", "content": "S"}, user]) == "X:  Dot "
    assert lm.apply_chat_template([user], add_generation_prompt=False) == "X:  Dot"
    with pytest.raises(ConfigError, match="no"):
        lm.apply_chat_template([{"role": "system", "content": "S"}])


def test_answers_are_kept_as_they_come(model, tmp_path, monkeypatch):
    """In the harness's cache: what was answered before an interruption, and none of the rest."""
    lm = CachingLM(LM(model, rows=1), str(tmp_path / "answers.db"))
    kwargs = {"until": [], "max_gen_toks": 20}
    requests = instances("generate_until", [(prompt, kwargs) for prompt in PROBLEMS[:3]])
    stream = model.stream

    def interrupted(*args, **options):
        for event in stream(*args, **options):
            if event.prompt == 1 and event.generation:
                event.generation.__dict__["finish_reason"] = "interrupted"
            yield event

    monkeypatch.setattr(lm.lm.model, "stream", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        lm.generate_until(requests)
    assert len(lm.dbdict) == 1
    monkeypatch.undo()
    texts = lm.generate_until(requests)
    pairs = instances("loglikelihood", [(PROBLEMS[0], " Dot"), (PROBLEMS[0], " 12")])
    rolling = instances("loglikelihood_rolling", [("Dot = 9.",)])
    found = lm.loglikelihood(pairs), lm.loglikelihood_rolling(rolling)
    assert len(lm.dbdict) == 3 + 2 + 1
    monkeypatch.setattr(lm.lm, "model", None)  # from the cache alone
    assert lm.generate_until(requests) == texts
    assert (lm.loglikelihood(pairs), lm.loglikelihood_rolling(rolling)) == found


# ---------------------------------------------------------------------------------------------------------------------
# Discovery


def test_the_entry_point_is_this_class():
    tomllib = pytest.importorskip("tomllib")
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert {name: EntryPoint(name, text, "lm_eval.models").load() for name, text in entries.items()} == {"skipkv": LM}
    assert get_model("skipkv") is LM


def test_skipkv_does_not_import_it():
    code = "import sys, skipkv, skipkv.eval, skipkv.cli; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_command(tasks, tmp_path):
    """Our own, which is the harness's with this model in it; where there is no GPU, though its default is one."""
    arguments = f"pretrained=tiny,dtype=f32,cache=f32,threads=1,method={SMALL}"
    # Reading the harness's own tasks takes a minute.
    code = "import functools, runpy, lm_eval.tasks as t; t.TaskManager = functools.partial(t.TaskManager, "
    code += "include_defaults=False); runpy.run_module('skipkv.eval.harness', run_name='__main__')"
    command = [sys.executable, "-c", code, "--model", "skipkv", "--model_args", arguments, "--tasks", "choices",
               "--include_path", tasks, "--limit", "2", "--output_path", tmp_path / "out"]  # fmt: skip
    places = {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert usable("cuda:0") or "device is 'cuda:0'" in done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["method"] == SMALL and "acc,none" in results["results"]["choices"]
