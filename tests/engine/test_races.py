"""ThreadSanitizer looks at the CPU's threads, in a run of the engine without Python."""

import os
import subprocess

import pytest
from simt import build

CPU = build.ROOT / "csrc" / "cpu"
SOURCES = [*build.ROOT.glob("csrc/*.c"), *CPU.glob("*.c"), CPU / "kernels" / "kernels_generic.c",
           build.HERE / "engine.c"]  # fmt: skip
SHARE = ("threads.c", "SMALL = 1 << 14", "SMALL = 1")  # which all ops of a small model do then
EARLY = ("threads.c", "(&t->left.value, memory_order_acquire)", "(&t->left.value, memory_order_relaxed)")


def run(*faults):
    sanitize = ["-O1", "-g", "-fsanitize=thread"]
    flags = ["gcc", "-std=c17", *sanitize, "-DON_CPU", "-I", build.ROOT / "csrc", "-I", CPU]
    objects = build.compile_all((flags, build.changed(source, faults)) for source in SOURCES)
    program = build.link(["gcc", *sanitize], objects, shared=False)
    return subprocess.run([program], capture_output=True, text=True, env=os.environ | {"TSAN_OPTIONS": ""})


def test_no_two_threads_race():
    if not os.path.isabs(build.preload("thread")):
        pytest.skip("gcc has no ThreadSanitizer here")
    done = run(SHARE, EARLY)
    assert done.returncode and "data race" in done.stderr, done.stderr  # what it would say
    done = run(SHARE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
