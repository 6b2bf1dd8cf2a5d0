"""The matrix finds faults of the backend: each of these, seeded into a copy of its sources, makes a test of it fail,
and each of those that only a tool sees is seen. Without faults the same tests pass, as -m simt shows, and no tool finds
anything.
"""

import os
import re
import subprocess
import sys

import pytest
from simt import build

pytestmark = pytest.mark.simt
OPS, FORWARD = "tests/ops/test_ops.py", "tests/engine/test_forward.py"
GREEDY = f"{FORWARD}::test_greedy_rows_are_those_of_the_plain_kernels[cuda-full]"
LINEAR, ATTENTION = f"{OPS} -k test_linear", f"{OPS} -k attention_append"
TERMS, SELECT = f"{OPS} -k test_terms", f"{OPS} -k select_and_compact"

# What is wrong → file, what is there, what takes its place, the tests
FAULTS = {
    "a graph of another batch": (
        "device.cu", "hash = cu_hash(hash, &step.hash, sizeof step.hash)", "hash += step.hash > 0", GREEDY),
    "a scale is missing": ("device.cu", "float(factor * s)", "float(s)", f"{FORWARD} -k yarn"),
    "the host reads before the stream is done": (
        "device.cu", 'cu_check(d, cudaStreamSynchronize(d->stream), "the device");', "", f"{OPS} -k rmsnorm"),
    "what is written may change before it is copied": (
        "device.cu", "cu_of(base)->uploads.back().data(), bytes", "from, bytes", f"{OPS} -k test_terms"),
    "rows without their padding": ("linear.cu", "id) * row", "id) * min(row, n_in)", f"{OPS} -k test_embed"),
    "activations are rounded once": (
        "linear.cu", "= __float2bfloat16_rn(value - __bfloat162float(part))", "= __float2bfloat16_rn(0.0f)", LINEAR),
    "a page's first slot goes to the page before": (
        "attention.cu", "*page = head.pages[slot /", "*page = head.pages[max(slot - 1, 0) /", ATTENTION),
    "the oldest query of a window is lost": (
        "attention.cu", "t < part.first + part.n - window", "t <= part.first + part.n - window", TERMS),
    "probabilities are not divided by their sum": (
        "attention.cu", "- stat[0]) / stat[1]", "- stat[0])", ATTENTION),
    "turned the other way": (
        "pointwise.cu", "second * cosine[at] + first * sine[at]", "second * cosine[at] - first * sine[at]",
        f"{OPS} -k test_rope"),
    "a sentence begins with the one before": (
        "pointwise.cu", "if (i < hidden) part.sum[i] = 0;", "", f"{OPS} -k test_sentence"),
    "the last head of a group is left out": (
        "score.cu", "r < min(int32_t(QUERIES), end - g); r++", "r < min(int32_t(QUERIES), end - g) - 1; r++", TERMS),
    "a similar key counts": ("score.cu", "- lost[slot - first])", "- 0 * lost[slot - first])", TERMS),
    "ties go to the higher slot": ("evict.cu", "tie < ties", "n_ties - 1 - tie < ties", SELECT),
    "minus zero is less than zero": ("evict.cu", "(score + 0.0f)", "(score)", SELECT),
    "sums stay where they were": ("evict.cu", "if (first || cache.sums) close_words", "if (first) close_words", SELECT),
    "the oldest query of a window that is not full": (
        "jobs.cu", "(due->n_tokens - to->n_queries) % window", "due->n_tokens % window", TERMS),
    "all rows have the first one's sentences": (
        "jobs.cu", "if (!i || job->due != jobs[i - 1].due)", "if (!i)", SELECT),
}  # fmt: skip


def matrix(library, tests):
    """Runs tests of the matrix on a shared object, as if it had a device; (exit status, output)."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-x", "-p", "no:cacheprovider", *tests.split()]
    environment = os.environ | {"SKIPKV_CUDA_LIBRARY": str(library), "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        build.backend()
    except build.Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    *fault, tests = FAULTS[name]
    status, report = matrix(build.backend(faults=(tuple(fault),)), tests)
    assert status == 1 and "AssertionError" in report or "Fatal Python error" in report, report


# ---------------------------------------------------------------------------------------------------------------------
# What a tool sees in a run of engine.c: tool → faults, settings, what the report must say

SHORT = (  # of memory for keys and positions, where it is set aside and where it is asked for
    ("jobs.cu", "w->fetches ? w->scored_slots", "false ? w->scored_slots"),
    ("jobs.cu", "n * (dim + 1) * sizeof(float)", "n * dim / 2 * sizeof(float)"),
)
SEEN = {
    "guard": (SHORT, {"SIMT_GUARD": "1"}, "overrun of device memory"),
    "address": (SHORT, {}, "heap-buffer-overflow .*fetch_kernel"),
    # Threads of select_kernel that mark the same sentence as alive write the same. One after another, a block's threads
    # take each other's place in ThreadSanitizer's table of 256, which then sees no race; in a random order they do not.
    "thread": ([("score.cu", "__syncwarp(); /* all lanes have read what the first one writes */", "")],
               {"TSAN_OPTIONS": "suppressions={}", "SIMT_SCHEDULE": "random", "SIMT_SEED": "1"},
               "data race .*importance"),
    "memory": ([("score.cu", "if (threadIdx.x == 0) pairs = 0;", "")], {}, "use-of-uninitialized-value.*search_kernel"),
}  # fmt: skip


@pytest.mark.parametrize("tool", SEEN)
def test_a_tool_sees_its_fault_and_nothing_else(tool, tmp_path):
    seeded, settings, words = SEEN[tool]
    known = tmp_path / "known"
    known.write_text("race:mark_alive\n")
    environment = os.environ | {name: value.format(known) for name, value in settings.items()}
    for faults in (tuple(seeded), ()):
        program = build.backend(tool, faults, program=True)
        done = subprocess.run([program], env=environment, capture_output=True, text=True)
        if faults:
            assert done.returncode != 0 and re.search(words, done.stderr, re.DOTALL), done.stderr
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
