"""Every command, as a process of its own, whose standard output or file takes nothing, or no more than ASCII."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from generations import PROBLEMS

from skipkv import Trace
from skipkv.cli import COMMANDS
from skipkv.steering import save_vectors

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
TINY = ["tiny", "--threads", "1", "--quiet"]
QUICK = ["--prefill", "8", "--contexts", "8", "--rows", "1", "--steps", "1", "--repeats", "1"]
COMMAND = {
    "demo": ["demo", "--problems", "1", "--steps", "1", "--budgets", "1", *TINY[1:], "--out", "é.html"],
    "generate": ["generate", *TINY, "--problem", "0", "--max-new-tokens", "9", "--trace", "é.npz"],
    "bench": ["bench", *TINY, *QUICK],
    "compare": ["compare", *TINY, "é.jsonl", "--methods", "full", "--plot", "é.png"],
    "view": ["view", "é-in.npz", "--out", "é.html"],
    "steer": ["steer", "show", "é.safetensors"],
    "methods": ["methods"],
    "devices": ["devices"],
    "eval": ["eval", *TINY, "--methods", "full", "--limit", "1", "--max-new-tokens", "9", "--out", "é"],
}  # fmt: skip
OUTPUT = {"demo": "é.html", "generate": "é.npz", "compare": "é.png", "view": "é.html"}


@pytest.fixture
def run(tmp_path):
    """One command in a directory that has what it reads; (exit status, standard output, standard error)."""
    (tmp_path / "é.jsonl").write_text(json.dumps(PROBLEMS[0] + "é") + "\n")
    Trace([1, 2], ["a", "é"], 1, 1, 1, "full").save(tmp_path / "é-in.npz")
    save_vectors(tmp_path / "é.safetensors", {0: np.ones(1)}, {"model": "é"})

    def run(name, stdout=subprocess.PIPE, before=None, encoding="utf-8", left_out=None):
        environment = os.environ | {
            "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "",
            "PYTHONUTF8": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "skipkv", *(part for part in COMMAND[name] if part != left_out)]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, cwd=tmp_path,
                              preexec_fn=before)  # fmt: skip
        return done.returncode, done.stdout, done.stderr.decode()

    return run


each_command = pytest.mark.parametrize("name", COMMANDS)


@each_command
def test_a_closed_output_is_refused_before_the_work(run, tmp_path, name):
    status, _, error = run(name, None, lambda: os.close(1))
    assert (status, error) == (2, "skipkv: standard output is closed; allowed: a terminal, a file, a pipe\n")
    assert name not in OUTPUT or not (tmp_path / OUTPUT[name]).exists()


@each_command
def test_a_full_output_is_one_sentence(run, name):
    with open("/dev/full", "w") as full:
        status, _, error = run(name, full)
    assert (status, error) == (2, "skipkv: standard output: No space left on device\n")


@each_command
def test_what_an_output_cannot_encode_is_escaped(run, name):
    status, output, error = run(name, encoding="ascii")
    assert status == 0 and output.isascii() and output and "Error" not in error
    if name in ("demo", "view", "steer"):
        assert b"\\xe9" in output


@each_command
@pytest.mark.parametrize("before", [
    lambda: os.close(2), lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 2),
], ids=["closed", "full"])  # fmt: skip
def test_a_standard_error_that_takes_nothing_leaves_the_output_as_it_is(run, name, before):
    status, output, _ = run(name, before=before, left_out="--quiet")
    if name == "bench":  # figures are never the same twice
        assert status == 0 and output.startswith(b"tiny, ")
    elif name != "demo":
        assert (status, output) == run(name)[:2]


@pytest.mark.parametrize("name", OUTPUT)
def test_a_file_that_cannot_be_written_is_one_sentence(run, tmp_path, name):
    path = tmp_path / OUTPUT[name]
    path.write_bytes(b"before")
    status, _, error = run(name, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("skipkv: [Errno 27] File too large: '") and OUTPUT[name] in error
    assert path.read_bytes() == b"before" and not list(tmp_path.glob(".*"))
