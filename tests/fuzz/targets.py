"""The table of what is fuzzed: seeds, valid and made here; how one input is run; its share of all inputs.

Whatever an input is, it is taken, or refused by an exception of skipkv's with one printable line; `attempt` says else.
"""

import argparse
import atexit
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from unittest import mock

import checkpoints
import numpy as np
from fuzz.mutate import mutate
from tokenizers.processors import TemplateProcessing

import skipkv
from skipkv import cli, eval, sentences, viz
from skipkv.errors import LONGEST
from skipkv.eval.runs import parse_methods
from skipkv.eval.summary import summarise
from skipkv.eval.tasks import TASKS, load_items
from skipkv.load import worker
from skipkv.load.checkpoint import Checkpoint
from skipkv.load.files import Fields
from skipkv.load.template import Renderer, Templates
from skipkv.load.texts import read_prompts, read_texts
from skipkv.load.tokenizer import Tokenizer
from skipkv.methods import CLASSES, TABLE
from skipkv.run import Options
from skipkv.steering import parse_run, save_vectors
from skipkv.vectors import import_released

SECONDS, BYTES = 10, 1 << 30  # of computing for one input, and of memory
FOLDER = Path(tempfile.mkdtemp(prefix="skipkv-fuzz-"))
atexit.register(shutil.rmtree, FOLDER)
FILES = {"weights": "model.safetensors", "index": "model.safetensors.index.json", "config": "config.json",
         "generation": "generation_config.json", "words": "tokenizer.json",
         "settings": "tokenizer_config.json"}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """seeds() gives valid inputs; run(bytes) takes one or refuses it by skipkv.Error; inside: see `fuzz.mutate`."""

    seeds: Callable[[], list[bytes]]
    inside: str
    run: Callable[[bytes], object]
    share: float  # of a hundred inputs


# -- a checkpoint's files

CHATML = "{% for m in messages %}{{ '<|' + m.role + '|>' + m['content'] | trim }}\n{% endfor %}{{ eos_token }}"
SETTINGS = {"bos_token": "w1", "eos_token": {"content": "w2"}, "chat_template": CHATML, "split_special_tokens": False,
            "unk_token": None}  # fmt: skip
GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "eos_token_id": [2, 3],
              "repetition_penalty": 1.1}  # fmt: skip
CONFIGS = [
    checkpoints.LLAMA | {"rope_scaling": checkpoints.LLAMA3_ROPE}, checkpoints.QWEN2 | {"sliding_window": 4096},
    checkpoints.QWEN3 | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "beta_fast": 32}},
    checkpoints.MISTRAL | {"sliding_window": None, "layer_types": ["full_attention"] * 2, "eos_token_id": 2},
    checkpoints.SMOLLM3 | {"no_rope_layers": [1, 0], "attention_bias": False, "hidden_act": "silu"},
]  # fmt: skip


@cache
def directory(name):
    """A small checkpoint of this target's own, in which one file changes."""
    folder = FOLDER / name
    checkpoints.write(folder, shards=2 if name == "index" else 1)
    checkpoints.write_tokenizer(folder, 40)
    return folder


def seed_of(name):
    def seeds():
        file = directory(name) / FILES[name]
        made = {"config": CONFIGS, "generation": [GENERATION], "settings": [SETTINGS]}.get(name)
        raw = [json.dumps(values).encode() for values in made] if made else [file.read_bytes()]
        if name == "words":
            made = checkpoints.merging()
            made.add_special_tokens(["<s>"])
            made.add_tokens(["<think>"])
            made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
            raw.append(made.to_str().encode())
        return raw

    return seeds


def open_with(name):
    def run(raw):
        folder = directory(name)
        (folder / FILES[name]).write_bytes(raw)
        with Checkpoint(folder) as checkpoint:
            checkpoints.check_invariants(checkpoint)
        model = skipkv.load(folder, threads=1, progress=False)
        model.generate([1, 2, 3], "rkv:budget=9,window=2", max_new_tokens=2, sampling="checkpoint", progress=False)

    return run


def use_words(raw):
    """Everything that is asked of a tokenizer.json."""
    (directory("words") / FILES["words"]).write_bytes(raw)
    made = Tokenizer(directory("words"), 64)
    stream = made.stream()
    assert len(made.token_bytes) == len(made.token_texts) == 64
    pieces = [stream.push(i) for i in range(64)]
    assert "".join([*pieces, stream.flush()]) == made.decode(range(64))
    sentences.vocabulary(made, "official", "official")
    for text in ("w1 w2", "<s>Über 日本\n\n<think> x", "\U0001f600\0 </think>"):
        with contextlib.suppress(skipkv.Error):
            made.decode(made.encode(text))


# -- chats

CHATS = [
    {"template": CHATML, "variables": {"tools": [{"name": "f"}], "x": 1},
     "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"text": "b"}],
                   "reasoning_content": "c", "tool_calls": [{"name": "f"}]}]},
    {"template": "{%- set n = namespace(i=0) %}{% macro f(x) %}{{ x | tojson }}{% endmacro %}{% generation %}"
     "{% for m in messages if m.content is string %}{% set n.i = n.i + loop.index0 %}{{ f(m) }}{% break %}{% endfor %}"
     "{% endgeneration %}{{ raise_exception('no ' ~ n.i) if n.i > 3 else strftime_now('%Y') }}{{ 'a' * 3 }}",
     "messages": [{"role": "system", "content": "x"}] * 3, "variables": {"enable_thinking": False}},
]  # fmt: skip


def envelope(raw):
    """The object in which several inputs stand; what is none stands for an empty one."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


RENDERER = Renderer()  # one child for all inputs: what is rendered is more than what is parsed


def parse_template(raw):
    """What is looked at in this process: the settings, and the template's syntax."""
    return Templates(FOLDER / "none", Fields(FOLDER / "a", {"chat_template": envelope(raw).get("template")}))


def render(raw):
    found, made = envelope(raw), parse_template(raw)
    made._renderer = RENDERER
    variables = found.get("variables")
    with mock.patch.object(worker, "SECONDS", 1):
        assert isinstance(made.render(found.get("messages"), {}, variables if isinstance(variables, dict) else {}), str)


# -- a model's runs

@cache
def model():
    return skipkv.load(directory("model"), threads=1, progress=False)


def trace_seeds():
    ids, made = np.random.default_rng(0).integers(1, 40, 60).tolist(), []
    for method, trace in (("skipkv:budget=12,interval=8,window=2", "scores"), ("h2o:budget=20", True), ("full", True)):
        model().replay(ids, method, n_prompt=9, trace=trace).trace.save(FOLDER / "seed.npz")
        made.append((FOLDER / "seed.npz").read_bytes())
    return made


def use_trace(raw):
    path = FOLDER / "t.npz"
    path.write_bytes(raw)
    trace = skipkv.Trace.load(path)
    for use in (viz.kept, lambda t: viz.survival(t, 0), lambda t: viz.compare(t, t), lambda t: t.held(9, 0, 0)):
        with contextlib.suppress(skipkv.Error):
            use(trace)
    trace.save(path)
    again = skipkv.Trace.load(path)
    assert [again.texts, again.sentences] == [trace.texts, trace.sentences]
    assert [str(c.scores) for c in again.compactions] == [str(c.scores) for c in trace.compactions]


ARGUMENTS = {f.name: f.default for f in fields(Options)} | {
    "max_new_tokens": 3, "context": 20, "stop": ["w3"], "stop_ids": [3], "memory_limit": 2**30, "trace": "scores",
    "full_length": 9.0, "template": {}, "sampling": "checkpoint"}  # fmt: skip
del ARGUMENTS["admit"]
CALLS = {
    "generate": ({"prompts": [[1, 2, 3], [4, 5]], "method": "rkv:budget=9,interval=4,window=2"} | ARGUMENTS,
                 lambda a: model().generate(**a, progress=False)),
    "replay": ({"tokens": [1, 2, 3, 4] * 5, "method": "h2o:budget=8", "n_prompt": 4, "sequence": [0, 0], "logits": True,
                "trace": True, "cache": "q8"}, lambda a: model().replay(**a)),
    "hidden": ({"tokens": [1, 2, 3], "layers": [0, 2], "positions": [0, 2], "cache": "f32"},
               lambda a: model().hidden(**a)),
    "steer": ({"vector": [0.5] * 16, "layer": 1, "alpha": 1.0, "gamma": 0.5, "alpha_max": 2.0, "scope": "all"},
              lambda a: model().generate([1, 2], None, skipkv.Steering(**a), max_new_tokens=2, progress=False)),
    "select": ({"method": "skipkv", "keys": [[[0.5, -1.0, 2.0, 1.0]] * 12] * 2, "positions": [*range(12)],
                "queries": [[[1.0, 2.0, 0.5, 1.0]] * 4] * 4, "penalties": [[0, 3, 0.9]], "sums": [[0.5] * 12] * 2,
                "budget": 8, "window": 4, "mix": 0.1, "prompt": 2, "sequence": [0, 1], "layer": 1, "compat": ["pairs"],
                "protect": "sinks:1"},
               lambda a: skipkv.select(**a)),
    "segment": ({"ids": [1, 2, 3, 1], "texts": ["a", ".\n", "Wait", "</think>"], "delimiters": [2], "markers": [3],
                 "n_prompt": 1, "compat": "official"}, lambda a: skipkv.segment(**a)),
    "flag_repeats": ({"vectors": [[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]], "tau": 0.9, "compat": None},
                     lambda a: skipkv.flag_repeats(**a)),
    "pass_at_k": ({"n": [3], "c": [1], "k": 2}, lambda a: eval.pass_at_k(**a)),
    "bootstrap": ({"sums": [[1.0, 2]] * 3, "resamples": 9, "seed": 1}, lambda a: eval.bootstrap(**a)),
} | {
    name: ({n: 8 if n == "budget" else CLASSES[name].__dataclass_fields__[n].default
            for n in (*TABLE[name]["parameters"].split(), "protect", "allocate", "evict", "compat")},
           lambda a, name=name: model().replay([1, 2, 3, 4] * 5, CLASSES[name](**a), n_prompt=3))
    for name in CLASSES
}  # fmt: skip
MANY = {"n": 32, "resamples": 1000}  # what may be asked for in thousands, and then takes its time


def use_call(raw):
    """{"call", arguments …}: those that the call has; what is missing is as it was."""
    given = envelope(raw)
    name = given.pop("call", None)
    if not isinstance(name, str) or name not in CALLS:
        return
    for key, most in MANY.items():
        if isinstance(given.get(key), (int, float)) and most < given[key] < 2**31:
            given[key] = most
    right, call = CALLS[name]
    call({key: given.get(key, value) for key, value in right.items()})


def call_seeds():
    return [json.dumps({"call": name} | right).encode() for name, (right, _) in CALLS.items()]


# -- steering

def pickled(kind="FloatStorage", n=4):
    """A vector as torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00((X\x07\x00\x00\x00storageq\x01ctorch\n%s\nq\x02"
            b"X\x01\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04K%ctq\x05QK\x00K%c\x85q\x06K\x01\x85q\x07\x89"
            b"ccollections\nOrderedDict\nq\x08)Rq\ttq\nRq\x0b.") % (kind.encode(), n, n))  # fmt: skip
        archive.writestr("archive/data/0", np.arange(n, dtype=np.float64).astype("<f4").tobytes() * 2)
    return out.getvalue()


def steering_seeds():
    path, made = FOLDER / "seed.safetensors", []
    for layers in ((1,), (0, 1)):
        extras = {"model": "m", "counts": '{"execution": 2, "reflection": 1}', "norms": '{"1": [1.0, 2.0, 3.0]}',
                  "examples": '{"execution": ["a"]}'}  # fmt: skip
        save_vectors(path, {layer: np.linspace(-1, 1, 16, dtype=np.float32) for layer in layers}, extras)
        made.append(path.read_bytes())
    return made


def use_steering(raw):
    path = FOLDER / "v.safetensors"
    path.write_bytes(raw)
    command("steer", "show", path)
    command("steer", "show", path, "--json")
    model().generate([1, 2], None, skipkv.Steering.load(path), max_new_tokens=2, progress=False)


def use_torch(raw):
    (FOLDER / "v.pt").write_bytes(raw)
    import_released(FOLDER / "v.pt", 1, str(FOLDER / "out.safetensors"))


# -- lines of JSON

LINES = [
    ["a text", {"prompt": "w1 w2", "output": "w3"}, {"text": "w1"}, {"messages": [{"role": "user", "content": "x"}]},
     {"prompt": [1, 2]}],
    [{"id": "a", "problem": "p", "answer": "1"}, {"question": "q", "answer": "x #### 1,000"},
     {"ID": 7, "Problem": "p", "Answer": "025"},
     {"task_id": "t", "prompt": "def f():", "canonical_solution": "", "entry_point": "f", "test": "t"}],
]  # fmt: skip


def lines(values):
    return b"\n".join(json.dumps(value).encode() for value in values)


def use_lines(raw):
    path = FOLDER / "p.jsonl"
    path.write_bytes(raw)
    reads = [lambda name=name: load_items(name, path) for name in TASKS if name != "tiny"]
    reads += [lambda: model().encode_all(read_prompts(str(path)))]
    reads += [lambda: read_texts(str(path), model().tokenizer, 128)]
    for read in reads:
        with contextlib.suppress(skipkv.Error):
            read()


def store_seeds():
    from eval.stored import RECORDS, RUNS

    records = [json.loads(json.dumps(asdict(record))) for record in RECORDS]
    graded = {name: records[0][name] for name in ("task", "item", "sample", "run", "grade")} | {"rule": "official"}
    runs = [run | {"items": {"n": 4, "samples": 2}} for run in RUNS.values()]
    return [json.dumps({"runs": runs, "results": records, "grades": [graded]}).encode()]


def use_store(raw):
    """A store of results as the commands that read one do."""
    given, folder = envelope(raw), FOLDER / "store"
    folder.mkdir(exist_ok=True)
    for name in ("runs", "results", "grades"):
        of = given.get(name)
        (folder / f"{name}.jsonl").write_bytes(lines(of if isinstance(of, list) else [of]) + b"\n")
    for more in ([], ["--json"], ["--item", "a"]):
        command("eval", "show", folder, *more)
    store = eval.Store(folder)
    summary = summarise(store.records(), store.runs(), store.records(rule="official"))
    for _, part in summary.comparisons():
        part.table().markdown(), part.behaviour()._repr_html_(), str(part.table())
    summary.csv(), json.dumps(summary.as_dict())


# -- texts

METHODS = [
    "full", "rkv:budget=1024,mix=0.07,kernel=5", "skipkv:budget=25%,interval=32,tau=0.8+steer:tiny,alpha=0.75,layer=3",
    "rkv:budget=64+32/32+16,protect=sinks:4+prompt,allocate=layer,evict=False", "random:budget=9,seed=5;tova:budget=3",
    "blend:budget=1024,importance=0.1,key_likeness=-0.9", "h2o:budget=512/256/128/128,compat=pairs/lost-heads",
    "snapkv:budget=64,window=8,compat=official",
]  # fmt: skip


def use_method(raw):
    text = raw.decode("utf-8", "surrogateescape")
    for run in (*parse_methods(text), *([] if "%" in text else parse_methods(parse_run(text)[0]))):
        method = run.method
        assert skipkv.parse_method(str(method)) == method and isinstance(run.name, str)
        with contextlib.suppress(skipkv.ConfigError):
            method.as_dict((2, 2))


PARSER = cache(cli.parser)  # takes longer to make than most commands take


def command(*argv):
    """One command in this process: done, or refused by a sentence."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with streams[0], streams[1], mock.patch.object(cli, "parser", PARSER):
        try:
            status = cli.main([str(argument) for argument in argv])
        except SystemExit as ended:  # argparse's own
            status = ended.code
    assert status in (0, 2) and "Traceback" not in err.getvalue(), f"{status}: {err.getvalue():.300}"
    return status


# What each command needs besides its numbers; `bench` measures the machine before it looks at any.
COMMANDS = {
    "generate": ["{model}", "--prompt", "w1 w2", "--max-new-tokens", "2", "--quiet"],
    "compare": ["{model}", "{lines}", "--methods", "full;rkv:budget=8", "--quiet"],
    "view": ["{trace}", "-o", "{out}"],
}


@cache
def options_of(name):
    """The options of a command that are numbers."""
    cli.COMMANDS[name].add(parser := argparse.ArgumentParser())
    return [action.option_strings[-1] for action in parser._actions if action.type in (int, float)]


def command_seeds():
    alone = [{"command": name, option: "1"} for name in COMMANDS for option in options_of(name)]
    together = [{"command": name} | dict.fromkeys(options_of(name), "2") for name in COMMANDS]
    return [json.dumps(values).encode() for values in alone + together]


@cache
def command_files():
    found = {"model": directory("model"), "lines": FOLDER / "c.jsonl", "trace": FOLDER / "c.npz"}
    found["trace"].write_bytes(trace_seeds()[0])
    found["lines"].write_bytes(lines(["w1 w2 w3 w4"] * 2))
    return found | {"out": FOLDER / "c.html"}


def use_command(raw):
    given = envelope(raw)
    name = given.get("command")
    if isinstance(name, str) and name in COMMANDS:
        words = [part.format(**command_files()) for part in COMMANDS[name]]
        wanted = [option for option in options_of(name) if option in given and option.lstrip("-") not in MANY]
        command(name, *words, *(f"{option}={given[option]}" for option in wanted))


TARGETS = {
    "weights": Target(seed_of("weights"), "safetensors", open_with("weights"), 8),
    "index": Target(seed_of("index"), "json", open_with("index"), 4),
    "config": Target(seed_of("config"), "json", open_with("config"), 13),
    "generation": Target(seed_of("generation"), "json", open_with("generation"), 4),
    "words": Target(seed_of("words"), "json", use_words, 5),
    "settings": Target(seed_of("settings"), "json", open_with("settings"), 3),
    "templates": Target(lambda: [json.dumps(c).encode() for c in CHATS], "json", parse_template, 5),
    "chats": Target(lambda: [json.dumps(c).encode() for c in CHATS], "json", render, 1),
    "traces": Target(trace_seeds, "archive", use_trace, 5),
    "steering": Target(steering_seeds, "safetensors", use_steering, 5),
    "torch": Target(lambda: [pickled(), pickled("BFloat16Storage", 7)], "archive", use_torch, 8),
    "lines": Target(lambda: [*map(lines, LINES)], "lines", use_lines, 5),
    "store": Target(store_seeds, "json", use_store, 2),
    "methods": Target(lambda: [m.encode() for m in METHODS], "text", use_method, 16),
    "calls": Target(call_seeds, "json", use_call, 14),
    "commands": Target(command_seeds, "json", use_command, 2),
}


@cache
def seeds_of(name):
    return TARGETS[name].seeds()


def made(name, seed, number):
    """The input of this number."""
    return mutate(random.Random(f"{seed} {name} {number}"), seeds_of(name), TARGETS[name].inside)


class Hang(BaseException):
    pass


def _late(*_):
    raise Hang(f"more than {SECONDS} s of computing")


def attempt(name, raw):
    """Runs one input in limits of time and memory; None, or the exception that should not have come."""
    before, most = signal.signal(signal.SIGPROF, _late), resource.getrlimit(resource.RLIMIT_AS)
    if not os.environ.get("LD_PRELOAD"):  # a sanitizer takes more address space than any limit
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, most[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            TARGETS[name].run(raw)
    except skipkv.Error as error:
        text = str(error)
        if len(text) > LONGEST + 3 or not text.isprintable() or not text:
            return AssertionError(f"a message of {len(text)} characters: {text!r:.200}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, most)
    return None
