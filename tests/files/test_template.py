"""template.py: whatever a chat template does, the process that loads and asks it keeps its time, memory and Ctrl-C."""

import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from checkpoints import byte_level
from harness import refused

from skipkv import BackendError, CheckpointError, ConfigError
from skipkv.load import worker
from skipkv.load.template import Renderer
from skipkv.load.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "hi"}]
MEMORY, TIME = "needs more memory", "needs more time"
GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x | length }}"


def grow(start, following):
    return GROW.replace("START", start).replace("NEXT", following)


HOSTILE = {
    # constants that jinja folds while it compiles
    "product": ("{{ 'a' * 10 ** 10 }}", MEMORY),
    "list": ("{{ [0] * 10 ** 10 }}", MEMORY),
    "format": ("{{ '%10000000000d' % 1 }}", MEMORY),
    "format method": ("{{ '{:10000000000d}'.format(1) }}", MEMORY),
    "center": ("{{ 'a' | center(10 ** 10) }}", MEMORY),
    "join": ("{{ range(9999) | join('a' * 10 ** 6) }}", MEMORY),
    "indent": ("{{ 'a\nb' | indent(10 ** 10) }}", MEMORY),
    "tojson": ("{{ [1] | tojson(indent=10 ** 10) }}", MEMORY),
    "replace": ("{{ 'a' | replace('a', 'b' * 10 ** 9) }}", MEMORY),
    "power": ("{{ 7 ** (10 ** 9) }}", TIME),
    "power of a variable": ("{% set n = 10 ** 9 %}{{ 7 ** n }}", TIME),
    "unused branch": ("{% if false %}{{ 'a' * 10 ** 10 }}{% endif %}{{ 'b' * 10 ** 10 }}", MEMORY),
    "macro's default": ("{% macro f(a='a' * 10 ** 10) %}{{ a }}{% endmacro %}{{ f() }}", MEMORY),
    # what only rendering does
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "recursive loop": ("{% for a in [[]] recursive %}{{ loop([[], []]) }}{% endfor %}", "recursion"),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", TIME),
    "endless macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "doubled text": (grow("'a'", "ns.x ~ ns.x"), MEMORY),
    "doubled list": (grow("[1]", "ns.x + ns.x"), MEMORY),
    "doubled join": (grow("'a'", "[ns.x, ns.x] | join"), MEMORY),
    "squares": (grow("3", "ns.x * ns.x").replace("| length", "> 0"), TIME),
    "nested lists": (grow("[]", "[ns.x, ns.x]").replace("| length", "| string"), f"{TIME}|{MEMORY}"),
    "batch": ("{{ messages | batch(10 ** 10, 'a') | list | length }}", MEMORY),
    "product of variables": ("{% set n = 10 ** 10 %}{{ messages[0].content * n }}", MEMORY),
    "width of a variable": ("{% set n = 10 ** 10 %}{{ '%*d' | format(n, 1) }}", MEMORY),
    "sort": ("{% for i in range(99999) %}{% set x = range(99999) | sort | list %}{% endfor %}", TIME),
    "long text": ("{% set n = 10 ** 8 %}{{ 'a' * n }}", "a text of at most 16777216 characters, found 100000000"),
    "long wide text": ("{% for i in range(9999) %}{{ '語' * 10 ** 4 }}{% endfor %}", "at most 16777216 characters"),
    "long refusal": ("{{ raise_exception('a\x1b[2J' * 10 ** 6) }}", r"(a \[2J){200}"),
    "nested loops": ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
    "unknown filter": ("a\n{{ 1 | nothing }}", "line 2: No filter named 'nothing'."),
    "surrogate": ("{{ '\\ud83d' }}", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("[a-z]+")


@pytest.fixture
def load(tmp_path, tokenizer):
    """Our tokenizer with this template."""

    def opened(template):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        return Tokenizer(tmp_path, 400)

    return opened


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 2)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_sentence_within_its_limits(load, hurry, tmp_path, name):
    template, expected = HOSTILE[name]
    begun = time.monotonic()
    ours = load(template)
    assert time.monotonic() - begun < 1  # nothing of it runs yet
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as error:
        ours.chat(CHAT)
    message = str(error.value)
    assert time.monotonic() - begun < 2 * worker.SECONDS + 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
    assert len(message) < 1200 and message.isprintable()
    if expected is None:
        assert message.startswith("text: expected Unicode text")
        return
    assert message.startswith(f"{tmp_path}/tokenizer_config.json: chat_template: ")
    assert re.search(expected, message), message
    if expected in (MEMORY, TIME):
        assert message.endswith(f"expected a template that renders within 2 s and 512 MiB, found one that {expected}")


def test_a_deep_template_is_refused_when_it_is_read(load, tmp_path):
    with pytest.raises(CheckpointError, match="chat_template: .*recursion depth exceeded"):
        load("{{" + "(" * 9999)


def test_what_a_chat_costs_once_the_process_stands(load):
    ours = load("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    ours.render(CHAT)
    costs = []
    for _ in range(200):
        begun = time.perf_counter()
        ours.render(CHAT)
        costs.append(time.perf_counter() - begun)
    assert sorted(costs)[100] < 0.003


def pid(renderer):
    return renderer._worker._process.pid


def alive(number):
    """Whether there is such a process, a zombie too."""
    return os.path.exists(f"/proc/{number}")


@pytest.fixture
def renderer():
    made = Renderer()
    assert made.render("T", "{{ a }}", {"a": 1}) == "1"
    return made


def test_one_process_renders_until_it_ends_and_ends_with_its_owner(renderer, hurry):
    first = pid(renderer)
    with pytest.raises(ConfigError):
        renderer.render("T", "{{ a.b.c }}", {})
    assert renderer.render("T", "b", {}) == "b" and pid(renderer) == first
    for template in (HOSTILE["product"][0], HOSTILE["loops"][0]):
        before = pid(renderer)
        with pytest.raises(ConfigError):
            renderer.render("T", template, {})
        assert not alive(before)
        assert renderer.render("T", "c", {}) == "c" and pid(renderer) != before


def test_a_process_that_was_dropped_is_gone():
    renderer = Renderer()
    renderer.render("T", "a", {})
    number = pid(renderer)
    assert alive(number)
    del renderer
    gc.collect()
    assert not alive(number)


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_killed_from_outside_is_started_again(renderer, signal_):
    first = pid(renderer)
    os.kill(first, signal_)
    assert renderer.render("T", "b{{ a }}", {"a": "é\ud83d"}) == "bé\ud83d"
    assert pid(renderer) != first and not alive(first)


def test_a_process_that_stands_still_is_given_up(renderer, hurry):
    first = pid(renderer)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(ConfigError, match=TIME):
        renderer.render("T", "b", {"a": "x" * 10**7})  # more than the pipe holds
    assert not alive(first) and renderer.render("T", "b", {}) == "b"


def test_ctrl_c_ends_a_rendering_at_once(renderer):
    first = pid(renderer)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    begun = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        renderer.render("T", HOSTILE["loops"][0], {})
    assert time.monotonic() - begun < 1.5
    assert not alive(first) and renderer.render("T", "b", {}) == "b"


def test_a_terminals_ctrl_c_does_not_reach_the_process(renderer):
    assert os.getsid(pid(renderer)) != os.getsid(0)


def test_threads_take_turns(renderer):
    found = {}

    def work(name):
        found[name] = [renderer.render("T", "{{ a }}{{ b }}", {"a": name, "b": i}) for i in range(50)]

    threads = [threading.Thread(target=work, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [f"{name}{i}" for i in range(50)] for name in "xyz"}


def in_a_fork(work):
    """The exit status of a fork that does this."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fork_renders_by_a_process_of_its_own(renderer):
    first = pid(renderer)

    def work():
        same = renderer.render("T", "c", {}) == "c" and pid(renderer) != first
        renderer._worker.end()
        return 7 if same else 8

    with renderer._lock:  # as if another thread were rendering just now
        assert in_a_fork(work) == 7
    assert renderer.render("T", "p", {}) == "p" and pid(renderer) == first


PROGRAM = """
import sys
from skipkv.load.template import Renderer
renderer = Renderer()
renderer.render("T", "a", {})
print(renderer._worker._process.pid)
sys.stdout.flush()
"""


@pytest.mark.parametrize("ending, status", [
    ("", 0), ("raise ValueError", 1), ("import os; os.kill(os.getpid(), 9)", -9), ("import os; os._exit(5)", 5),
])  # fmt: skip
def test_the_process_ends_with_python_however_that_ends(ending, status):
    ended = subprocess.run([sys.executable, "-c", PROGRAM + ending], capture_output=True, text=True, timeout=60)
    assert ended.returncode == status
    deadline = time.monotonic() + 10
    while alive(int(ended.stdout)) and b") Z " not in Path(f"/proc/{int(ended.stdout)}/stat").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_template_sees_no_secrets_and_writes_nowhere(monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "secret")
    renderer = Renderer()
    renderer.render("T", "a", {})
    assert b"secret" not in Path(f"/proc/{pid(renderer)}/environ").read_bytes()
    os.kill(pid(renderer), signal.SIGABRT)
    renderer.render("T", "a", {})
    assert capfd.readouterr() == ("", "")


def test_where_no_process_can_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with refused("chat templates need a process of '/nowhere/python': No such file or directory", BackendError):
        Renderer().render("T", "a", {})
    monkeypatch.undo()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # what other tests left would give its descriptors back meanwhile
    first = os.dup(0)
    os.close(first)
    for spare in range(4):  # descriptors, fewer than a process takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (first + spare, before[1]))
        try:
            with refused(f"chat templates need a process of {sys.executable!r}: Too many open files", BackendError):
                Renderer().render("T", "a", {})
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        with open(os.dup(0)) as following:
            assert following.fileno() == first
