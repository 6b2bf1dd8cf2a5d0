"""The command line, in this process and as one of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import harness
import numpy as np
import pytest
from generations import PROBLEMS, run

import skipkv
from skipkv import viz
from skipkv.cli import main
from skipkv.commands import generate
from skipkv.commands.bench import MOST
from skipkv.engine import MEMORY_MAX
from skipkv.eval import speed
from skipkv.methods import CLASSES, PARAMETERS, SHARED_PARAMETERS, TABLE
from skipkv.steering import parse_run, save_vectors

pytestmark = pytest.mark.filterwarnings("ignore:.*never compacted")

TINY = ["tiny", "--threads", "1", "--quiet"]
SHORT = ["--max-new-tokens", "30"]


@pytest.fixture
def vector(tmp_path):
    path = tmp_path / "v.safetensors"
    rng = np.random.default_rng(0)  # the states of the model in the box are some 2000 long
    save_vectors(path, {i: rng.standard_normal(256).astype(np.float32) * 300 for i in (1, 2)}, {"model": "tiny"})
    return path


def generation(model, prompts, method=None, **options):
    return run(model, prompts, method, **({"max_new_tokens": 30} | options))


def test_a_single_text_is_streamed(skip, model, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *what, **how: pieces.append((what, how)))
    assert main(["generate", *TINY, *SHORT, "--prompt", PROBLEMS[0]]) == 0
    expected = list(model.stream(PROBLEMS[0], max_new_tokens=30))
    assert pieces == [((e.text,), {"end": "", "flush": True}) for e in expected] + [((), {})]
    monkeypatch.undo()
    assert skip("generate", *TINY, *SHORT, "--prompt", PROBLEMS[0]) == (0, "".join(e.text for e in expected) + "\n", "")


def test_the_summary_is_for_people(skip):
    status, out, err = skip("generate", "tiny", "--threads", 1, *SHORT, "--problem", 0, "--method", "rkv:budget=40")
    load, summary = err.strip().splitlines()
    assert status == 0 and load.startswith("tiny: llama, 2.5 M parameters, ") and load.endswith(", 1 threads")
    pattern = (
        r"43 \+ 30 tokens \(length\) in [\d.]+ s; cache \d\.\d\d MB at most, full \d\.\d\d MB; "
        r"1 compactions, 48 slots dropped; \d sentences, \d repeated, \d re-checks"
    )
    assert re.fullmatch(pattern, summary), summary


def test_json_lines_hold_the_generations(skip, model):
    options = {"n": 2, "temperature": 2.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 5, "cache": "f32",
               "stop": ["again", ".\n"], "repetition_penalty": 1.1}  # fmt: skip
    argv = ["--temperature", 2, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01, "--seed", 5, "--stop", "again"]
    argv += ["--stop", ".\n", "-n", 2, "--rows", 3, "--cache", "f32", "--memory-limit", 1 << 21, "--brake", 4]
    argv += ["--repetition-penalty", 1.1]
    method = "snapkv:budget=40,interval=32"
    argv += ["--prompt", "Dot", "--problem", 3, "--method", method]
    status, out, err = skip("generate", *TINY, *SHORT, "--json", *argv)
    assert (status, err) == (0, "")
    wanted = generation(model, ["Dot", PROBLEMS[3]], method, **options)
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == len(wanted) == 4
    for got, want in zip(found, wanted, strict=True):
        assert got.keys() == {"text", "tokens", "finish_reason", "prompt_tokens", "prompt", "sample", "stats"}
        assert all(got[key] == getattr(want, key) for key in got.keys() - {"stats"})
        assert got["stats"]["new_tokens"] == len(want.tokens) and got["stats"]["pool_peak_bytes"] <= 1 << 21


def test_one_text_as_json_is_one_line(skip, model):
    status, out, _ = skip("generate", *TINY, *SHORT, "--prompt", PROBLEMS[1], "--json")
    assert status == 0 and out.count("\n") == 1
    assert json.loads(out)["text"] == generation(model, PROBLEMS[1])[0].text


def test_many_texts_have_headings(skip, model):
    status, out, _ = skip("generate", *TINY, *SHORT, "--prompt", PROBLEMS[0], "--prompt", PROBLEMS[1], "-n", 2)
    outs = generation(model, PROBLEMS[:2], n=2)
    assert out == "".join(f"--- prompt {o.prompt}, sample {o.sample}\n{o.text}\n" for o in outs)


def test_prompts_come_from_a_file(skip, model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    odd = "Dot\u2028= 9."  # a line separator inside of a text ends no line
    values = [PROBLEMS[0], {"prompt": PROBLEMS[1], "answer": "3"}, {"prompt": [1, 3, 9]}, odd]
    path.write_text("\n\n".join(json.dumps(v, ensure_ascii=False) for v in values) + "\n", encoding="utf-8")
    status, out, _ = skip("generate", *TINY, *SHORT, "--json", "--prompts", path, "--prompt", "Leo")
    prompts = [json.loads(line)["prompt_tokens"] for line in out.splitlines()]
    assert status == 0 and prompts == [model.encode(p) for p in ("Leo", PROBLEMS[0], PROBLEMS[1], [1, 3, 9], odd)]


def test_chat_puts_prompts_through_the_template(skip, model):
    content = PROBLEMS[0].removeprefix("<s><|user|>").removesuffix("<|assistant|><think>\n")
    status, out, _ = skip("generate", *TINY, *SHORT, "--json", "--chat", "--prompt", content)
    assert status == 0 and json.loads(out)["prompt_tokens"] == model.encode(PROBLEMS[0])


def test_messages_of_a_file_are_chats_and_variables_reach_the_template(skip, model, tmp_path):
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).symlink_to(Path(skipkv.__file__).parent / "tiny" / file)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }} {{ [a, b, c.d, e] | join(' ') }}")
    variables = ["a=4", 'b="Dot"', 'c={"d": "Leo"}', "e=plums = 9", "a=5"]
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Find"}]
    values = [{"messages": chat, "prompt": None}, {"prompt": chat}, "Find"]
    path.write_text("\n".join(map(json.dumps, values)))
    argv = ["generate", tmp_path, *TINY[1:], *SHORT, "--json", "--prompts", path, "--chat"]
    argv += [part for variable in variables for part in ("--template-var", variable)]
    status, out, _ = skip(*argv)
    assert status == 0
    found = [json.loads(line)["prompt_tokens"] for line in out.splitlines()]
    assert found == [model.encode("Find 5 Dot Leo plums = 9")] * 3
    # A chat is one without --chat, too.
    path.write_text("\n".join(map(json.dumps, values[:2])))
    argv.remove("--chat")
    assert [json.loads(line)["prompt_tokens"] for line in skip(*argv)[1].splitlines()] == found[:2]
    [out] = skipkv.load(tmp_path, threads=1, progress=False).generate(
        [chat], template={"a": 5, "b": "Dot", "c": {"d": "Leo"}, "e": "plums = 9"}, max_new_tokens=1, progress=False)
    assert out.prompt_tokens == found[0]
    # Templates ask whether a variable is false, which the text "False" is not.
    (tmp_path / "chat_template.jinja").write_text("{{ 5 if a is true and b is false and c is none else 6 }}")
    variables = [part for text in ("a=True", "b=False", "c=None") for part in ("--template-var", text)]
    status, out, _ = skip("generate", tmp_path, *TINY[1:], *SHORT, "--json", "--chat", "--prompt", "a", *variables)
    assert status == 0 and json.loads(out)["prompt_tokens"] == model.encode("5")


@pytest.mark.parametrize("scores", [False, True])
def test_traces_are_saved(skip, model, tmp_path, scores):
    path = tmp_path / "t.npz"
    options = ["--method", "rkv:budget=40", "--trace", path, *(["--trace-scores"] if scores else [])]
    status, _, err = skip("generate", *TINY, *SHORT, "--problem", 0, *options)
    assert (status, err) == (0, f"trace: {path}\n")
    trace = skipkv.Trace.load(path)
    assert trace.steps == [43] and str(trace.method) == "rkv:budget=40" and bool(trace.compactions[0].scores) == scores
    status, _, err = skip("generate", *TINY, *SHORT, "--problem", 0, "-n", 2, *options)
    assert err == "".join(f"trace: {tmp_path / f't-{i}.npz'}\n" for i in range(2))
    assert [skipkv.Trace.load(tmp_path / f"t-{i}.npz").settings["sample"] for i in range(2)] == [0, 1]


def test_a_method_may_carry_its_steering(skip, model, vector):
    method, steering = parse_run(f"skipkv:budget=40+steer:{vector},layer=2,alpha=1.5,scope=generation")
    assert method == skipkv.SkipKV(40) and (steering.layer, steering.alpha, steering.scope) == (2, 1.5, "generation")
    assert parse_run("full")[1] is None
    text = f"full+steer:{vector},layer=2,alpha=1.5,scope=generation"
    status, out, _ = skip("generate", *TINY, *SHORT, "--problem", 0, "--json", "--method", text)
    wanted = model.generate(PROBLEMS[0], None, steering, max_new_tokens=30, progress=False)[0]
    found = json.loads(out)
    assert status == 0 and found["tokens"] == wanted.tokens and found["stats"]["steered"] == wanted.stats.steered > 0
    assert wanted.tokens != generation(model, PROBLEMS[0])[0].tokens


ONE = ["generate", *TINY, "--prompt", "a"]
BAD = [
    (["generate", *TINY, "--problem", "7", "--chat"],
     "problem 7 is in the chat template already; --chat is for other prompts"),
    *(([*ONE, "--template-var", text], f"template-var is {text!r}; allowed: NAME=VALUE") for text in ("a", "=1", "")),
    ([*ONE, "--template-var", "a=1"], "template is {'a': 1}; allowed with chat messages only, found 'a'"),
    (["generate", *TINY, "--problem", "7", "--trace-scores"], "--trace-scores needs --trace FILE.npz"),
    (["generate", *TINY], "no prompt; allowed: --prompt TEXT, --prompts FILE, --problem N"),
    (["generate", *TINY, "--problem", "1000"], "problem is 1000; allowed: 0 to 999"),
    (["generate", *TINY, "--problem", "-1"], "problem is -1; allowed: 0 to 999"),
    (["generate", "elsewhere", "--problem", "1"], "problem is 1; allowed with the model tiny only, found 'elsewhere'"),
    (["generate", *TINY, "--prompt", ""], "prompt 0 is empty; allowed: at least one token"),
    ([*ONE, "-n", "0"], "n is 0; allowed: integers from 1 to 2147483647"),
    ([*ONE, "--top-p", "2"], "top_p is 2.0; allowed: numbers from 0 to 1"),
    ([*ONE, "--stop", ""], "stop is ['']; allowed: texts that are not empty"),
    ([*ONE, "--method", "lru"], f"method is 'lru'; allowed: {', '.join(CLASSES)}"),
    ([*ONE, "--method", "rkv"], "method 'rkv': rkv needs a budget"),
    ([*ONE, "--method", "rkv:budget=8"],
     "budget is 8; allowed: more than the 8 newest slots that rkv always keeps"),
    ([*ONE, "--memory-limit", "5"],
     "prompt 0 needs 8650752 bytes of cache; memory_limit is 5"),
    ([*ONE, "--threads", "0"], "threads is 0; allowed: integers from 1 to 1024"),
    ([*ONE, "--device", "tpu"], "device is 'tpu'; allowed: cpu, cuda, cuda:N"),
    (["compare", *TINY, "x", "--methods", " ; "], "methods is ' ; '; allowed: methods separated by \";\""),
    *((["bench", *more], "bench: expected a model or --random-weights SHAPE, one of them")
      for more in ([], ["tiny", "--random-weights", "smollm2-135m"])),
    (["bench", "--random-weights", "gpt"], f"shape is 'gpt'; allowed: {', '.join(speed.SHAPES)}"),
    (["bench", "tiny", "--device", "gpu"], "device is 'gpu'; allowed: cpu, cuda, cuda:N"),
    (["bench", "--random-weights", "smollm2-135m", "--device", "gpu"], "device is 'gpu'; allowed: cpu, cuda, cuda:N"),
    (["bench", "tiny", "--methods", ";"], "methods is ';'; allowed: methods separated by \";\""),
    (["bench", *TINY, "--contexts", "9,4048"],
     "contexts is 4048; allowed: integers that leave room for 49 steps in the model's context of 4096"),
    (["bench", *TINY, "--methods", "rkv:budget=4000"],
     "rkv:budget=4000 takes 4768 tokens to measure; the model's context is 4096"),
    (["bench", "tiny", "--memory-limit", "0"], f"memory_limit is 0; allowed: integers from 1 to {MEMORY_MAX}"),
    (["bench", *TINY, "--memory-limit", "9", "--length", "35"],
     "length is 35; allowed: integers from 36 to 4096"),
    (["bench", "tiny", "--rows", "1;2"], "rows is '1;2'; allowed: integers separated by commas"),
    *((["bench", "tiny", f"--{name}", value], f"{name} is {value}; allowed: integers from 1 to {most}")
      for name, most in MOST.items() for value in ("0", f"{most + 1}", "9" * 30)),
    (["compare", *TINY, "x", "--methods", "full", "--plot", "p.bmp"],
     "plot is 'p.bmp'; allowed: names that end in .png, .pdf, .svg"),
]  # fmt: skip


@pytest.mark.parametrize("argv, message", BAD, ids=["-".join(argv)[:50] for argv, _ in BAD])
def test_what_is_refused_is_one_line_and_status_2(skip, argv, message):
    assert skip(*argv) == (2, "", f"skipkv: {message}\n")


@pytest.mark.parametrize("text", ["Unable to allocate 12.0 GiB", ""])
def test_what_no_memory_holds_is_one_line_and_status_2(skip, monkeypatch, text):
    def measure(*_, **__):
        raise MemoryError(*[text] * bool(text))

    monkeypatch.setattr(speed, "measure", measure)
    status, _, error = skip("bench", "tiny", "--threads", 1, "--quiet")
    assert (status, error) == (2, f"skipkv: {text or 'out of memory'}\n")


@pytest.mark.parametrize(
    "argv", ["", "fly", "generate", "generate tiny --cache q4", "generate tiny -n x", "compare tiny a"]
)  # fmt: skip
def test_what_argparse_refuses_is_status_2(skip, argv):
    status, out, err = skip(*argv.split())
    assert (status, out) == (2, "") and err.startswith("usage: skipkv")


def test_files_that_are_wrong_are_one_line_and_status_2(skip, tmp_path, vector):
    prompts = tmp_path / "p.jsonl"
    no_text = "expected a JSON text or an object with a prompt or messages"
    for content, message in (
        (b'"a"\n{', f"{prompts}: line 2: {no_text}"),
        *((raw, f"{prompts}: line 1: {no_text}") for raw in (b"5", b'{"text": "a"}', b'{"prompt": 5}', b"[1]",
           b'{"messages": "a"}', b'{"messages": []}', b'{"messages": [1]}', b'{"messages": {}}')),
        (b"\n", "no prompt; allowed: --prompt TEXT, --prompts FILE, --problem N"),
        (b'"\xff"', f"{prompts}: expected UTF-8"),
    ):
        prompts.write_bytes(content)
        assert skip("generate", *TINY, "--prompts", prompts) == (2, "", f"skipkv: {message}\n")
    for prompt, shown in (([1, 3], "[1, 3]"), ([], "[]")):
        prompts.write_text(json.dumps({"prompt": prompt}))
        status, _, err = skip("generate", *TINY, "--chat", "--prompts", prompts)
        assert (status, err) == (2, f"skipkv: prompt is {shown}; allowed with --chat: a text or messages\n")
    missing = tmp_path / "none"
    for argv in (
        ["generate", *TINY, "--prompts", missing],
        [*ONE, "--method", f"full+steer:{missing}"],
        ["generate", missing / "model", "--prompt", "a"],
        [*ONE, "--trace", missing / "t.npz"],
        ["compare", *TINY, missing, "--methods", "full"],
    ):
        status, _, err = skip(*argv)
        assert status == 2 and err.startswith("skipkv: ") and err.count("\n") == 1 and "none" in err
    for text in (f"full+steer:{vector}", f"full+steer:{vector},layer=3", f"full+steer:{vector},layer=1,beta=2"):
        status, _, err = skip(*ONE, "--method", text)
        assert status == 2 and err.startswith("skipkv: ") and err.count("\n") == 1 and "allowed: " in err


def test_ctrl_c_prints_what_there_is_and_says_130(skip, monkeypatch):
    seen = []

    def count(self, event=None, original=skipkv.run.Run._step):
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(skipkv.run.Run, "_step", count)
    status, out, _ = skip("generate", *TINY, "--problem", 0, "--problem", 0)
    assert status == 130 and out.startswith("First find") and len(out) < 80
    seen.clear()
    status, out, _ = skip("generate", *TINY, "--prompt", PROBLEMS[0], "--prompt", PROBLEMS[1], "--json")
    reasons = [json.loads(line)["finish_reason"] for line in out.splitlines()]
    assert status == 130 and reasons == ["interrupted"] * 2


def test_a_second_ctrl_c_ends_the_run_and_loses_nothing(skip, monkeypatch):
    done = []

    def finish(self, row, reason, original=skipkv.run.Run._finish):
        done.append(original(self, row, reason))
        if len(done) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return done[-1]

    monkeypatch.setattr(skipkv.run.Run, "_finish", finish)
    prompts = [part for text in PROBLEMS[:3] for part in ("--prompt", text)]
    status, out, _ = skip("generate", *TINY, *prompts, "--rows", 1, "--max-new-tokens", 5, "--json")
    assert status == 130 and [json.loads(line)["text"] for line in out.splitlines()] == [g.text for g in done]


def test_methods_are_listed(skip):
    status, out, err = skip("methods")
    assert (status, err) == (0, "")
    for name in CLASSES:
        assert f"{name:10s} {TABLE[name]['summary']}\n" in out
    for name, p in PARAMETERS.items():
        assert re.search(rf"^{name} +{re.escape(p['summary'])} \(", out, re.M)
    assert re.search(r"^budget +slots that a KV head keeps after a compaction \(1 to 16777216; required\)$", out, re.M)
    assert all(re.search(rf"^{name} +\w", out, re.M) for name in SHARED_PARAMETERS)
    found = json.loads(skip("methods", "--json")[1])
    assert found == {"methods": TABLE, "parameters": PARAMETERS} and set(found["methods"]) == {*CLASSES, "custom"}


def test_compare_reports_full_and_budgets_that_hold_everything(skip, model, tmp_path, vector):
    path = tmp_path / "texts.jsonl"
    outs = generation(model, PROBLEMS[:2], max_new_tokens=90)
    texts = [{"prompt": prompt, "output": out.text} for prompt, out in zip(PROBLEMS, outs, strict=False)]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    steered = f"full+steer:{vector},layer=1,scope=generation"
    methods = f"full; skipkv:budget=500;rkv:budget=50,interval=32 ;{steered};"
    argv = ["compare", *TINY, path, "--methods", methods, "--bootstrap", 50]
    status, out, err = skip(*argv, "--json")
    assert (status, err) == (0, "")
    full, wide, rkv, turned = json.loads(out, parse_constant=lambda name: pytest.fail(name))  # no NaN: that is no JSON
    positions = sum(len(model.encode(text["prompt"] + text["output"])) - 1 for text in texts)
    keys = {"run", "nll", "delta_nll", "kl", "same", "peak_bytes", "texts", "positions", "flagged"}
    assert full.keys() == wide.keys() == rkv.keys() == keys
    assert full["kl"] == full["delta_nll"] == wide["kl"] == [0.0] * 3 and full["same"] == wide["same"] == [1.0] * 3
    assert (full["texts"], wide["texts"], rkv["texts"]) == (2, 0, 2)
    assert full["positions"] == wide["positions"] == positions > rkv["positions"]
    assert rkv["kl"][0] > 0 and rkv["peak_bytes"] <= full["peak_bytes"] == wide["peak_bytes"]
    assert turned["run"] == "full+steer:layer=1,alpha=1" and turned["kl"][0] > 0
    table = skip(*argv)[1].splitlines()
    assert len(table) == 5 and table[2].startswith("skipkv:budget=500 (never compacted) ")
    shorter = json.loads(skip(*argv, "--json", "--limit", 1, "--tokens", 60)[1])
    assert shorter[0]["positions"] == 59
    types = ["--dtype", "bf16a16", "--reference-dtype", "f32", "--reference-cache", "f32"]
    costs = json.loads(skip(*argv, "--json", *types)[1])
    assert costs[0]["kl"][0] > 0 and costs[0]["positions"] == positions
    assert skip(*argv, "--plot", tmp_path / "p.png")[0] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "p.png").stat().st_size > 5000


def test_view_draws_one_trace_or_two(skip, model, tmp_path):
    paths = []
    for method in ("rkv:budget=40,interval=16", "skipkv:budget=40,interval=16"):
        [out] = generation(model, [PROBLEMS[0]], trace=True)
        trace = model.replay(out.trace.tokens, method, n_prompt=out.trace.n_prompt, trace=True).trace
        paths.append(tmp_path / f"{method[:3]}.npz")
        trace.save(paths[-1])
    page = tmp_path / "page.html"
    step = trace.steps[0]
    for given, draw_it in ((paths[:1], viz.kept), (paths, viz.compare)):
        traces = [skipkv.Trace.load(path) for path in given]
        assert skip("view", *given, "-o", page) == (0, f"{page}\n", "")
        assert page.read_text(encoding="utf-8") == draw_it(*traces).html
        assert skip("view", *given, "--step", step, "--layers", "0,2", "--heads", 1, "-o", page)[0] == 0
        assert page.read_text(encoding="utf-8") == draw_it(*traces, step, [0, 2], [1]).html


def test_an_output_that_cannot_be_written_is_refused_before_the_work(skip, tmp_path, monkeypatch):
    monkeypatch.setattr("skipkv.model.load", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "folder").mkdir()
    nowhere = tmp_path / "nowhere" / "a"
    for argv in (
        ["generate", *TINY, "--problem", 0, "--trace"],
        ["generate", *TINY, "--problem", 0, "-n", 2, "--trace"],
        ["demo", "--out"],
        ["compare", *TINY, "x.jsonl", "--methods", "full", "--plot"],
        ["steer", "extract", "tiny", "--problems", "x.jsonl", "--out"],
        ["view", "x.npz", "--out"],
    ):
        name = argv[-1].removeprefix("--")
        error = f"skipkv: {name} is '{nowhere}'; there is no directory '{nowhere.parent}'\n"
        assert skip(*argv, nowhere) == (2, "", error)
        error = f"skipkv: {name} is '{tmp_path / 'folder'}', a directory; allowed: a file\n"
        assert skip(*argv, tmp_path / "folder") == (2, "", error)


def test_ctrl_c_between_two_events_ends_the_text_and_saves_its_trace(skip, model, tmp_path, monkeypatch):
    printed = []

    def show(*what, original=print, **how):
        printed.append(what)
        if len(printed) == 5:
            signal.raise_signal(signal.SIGINT)
        original(*what, **how)

    monkeypatch.setattr(generate, "print", show, raising=False)
    before = signal.getsignal(signal.SIGINT)
    status, out, err = skip("generate", *TINY, "--problem", 0, "--trace", tmp_path / "t.npz")
    free = list(model.stream(PROBLEMS[0], max_new_tokens=5))
    assert (status, out) == (130, "".join(e.text for e in free) + "\n") and signal.getsignal(signal.SIGINT) is before
    assert skipkv.Trace.load(tmp_path / "t.npz").tokens == model.encode(PROBLEMS[0]) + [e.token for e in free]


def test_a_checkpoints_recommendation(skip, tmp_path):
    for file in (path for path in harness.TINY.iterdir() if path.suffix in (".json", ".safetensors")):
        shutil.copy(file, tmp_path)
    advice = {"eos_token_id": 2, "do_sample": True, "temperature": 1.5, "repetition_penalty": 1.2}
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    argv = ["generate", tmp_path, "--threads", 1, *SHORT, "--prompt", PROBLEMS[0], "--seed", 4]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, out, err = skip(*argv)
        assert "recommends temperature=1.5, top_k=50, repetition_penalty=1.2, which this run leaves out" in err
        _, out, err = skip(*argv, "--sampling", "checkpoint", "--top-k", 7, "--json")
    assert "recommends" not in err
    settings = {"temperature": 1.5, "top_k": 7, "repetition_penalty": 1.2, "seed": 4}
    recommending = skipkv.load(tmp_path, threads=1, progress=False)
    assert json.loads(out)["tokens"] == generation(recommending, PROBLEMS[0], **settings)[0].tokens


def test_an_output_may_be_a_device_or_a_link(skip, tmp_path):
    (tmp_path / "link.html").symlink_to("page.html")
    skipkv.Trace([1, 2], ["a", "b"], 1, 1, 1, "full").save(tmp_path / "t.npz")
    assert skip("view", tmp_path / "t.npz", "-o", "/dev/null")[0] == 0
    assert skip("view", tmp_path / "t.npz", "-o", tmp_path / "link.html")[0] == 0
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "page.html").read_text().startswith("<!doctype")


def test_warnings_are_one_line_and_may_be_left_out(skip):
    argv = ["generate", "tiny", "--threads", 1, "--max-new-tokens", 2, "--problem", 0, "--method", "rkv:budget=400"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, warning, _ = skip(*argv)[2].splitlines()
        assert warning == "skipkv: rkv:budget=400 never compacted: the longest of 1 rows has 45 tokens"
        assert skip(*argv, "--quiet")[2] == ""


def process(*argv, stdout=subprocess.PIPE):
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "skipkv", *argv]
    return subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", env=environment, stdout=stdout)


def test_the_module_runs_and_sets_the_exit_status(model):
    done = process("generate", *TINY, *SHORT, "--problem", "0")
    assert (done.returncode, done.stdout, done.stderr) == (0, generation(model, PROBLEMS[0])[0].text + "\n", "")
    done = process("generate", *TINY)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("skipkv: no prompt; ")


@pytest.mark.parametrize("argv", [["methods"], ["generate", *TINY, *SHORT, "--problem", "0"]])
def test_a_reader_that_goes_away_is_no_error(argv):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        done = process(*argv, stdout=gone)
    assert (done.returncode, done.stderr) == (0, "")
