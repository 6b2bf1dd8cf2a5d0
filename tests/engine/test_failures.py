"""Memory that runs out at any point: one clear error, and nothing that was half done is gone on with."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import devices
import harness
import numpy as np
import pytest

from skipkv import CapacityError, ConfigError

pytestmark = pytest.mark.sanitize

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

extern void *__libc_calloc(size_t count, size_t size);
static long left;

void refuse(long k) { left = k; } /* the k-th call from skipkv's module, counted from now; 0: none */
long remaining(void) { return left; }

void *calloc(size_t count, size_t size) {
    Dl_info from;
    if (left && dladdr(__builtin_return_address(0), &from) && strstr(from.dli_fname, "_skipkv") && !--left) return NULL;
    return __libc_calloc(count, size);
}
"""
TEXT = harness.sentences_text(150, 7)
N_PROMPT = 41


class Scenario:
    """A traced, steered row that is compacted and forked, its fork, and a row beside them that is never due.

    What fails is tried again, where that is right. lost: forwards that failed after their rows had advanced.
    """

    def __init__(self, evict, variant=None, **options):
        self.failures = self.lost = 0
        self.message = ""
        self.options = {"rows": 3, "trace": 2} | options
        self.model, _ = self.again(harness.build.__wrapped__, variant=variant)
        self.method = harness.make("skipkv", **(harness.RUN | {"budget": 30, "evict": evict}))

    def again(self, work, *arguments, **options):
        try:
            return work(*arguments, **options)
        except (CapacityError, MemoryError) as error:
            self.failures, self.message = self.failures + 1, str(error)
            return work(*arguments, **options)

    def open(self, n_prompt):
        return self.again(self.session.open, len(TEXT), n_prompt=n_prompt, steering=harness.STEERING)

    def forward(self, counts):
        """Logits of the next tokens of each row; None where the rows are lost."""
        before = {row: self.session.state(row)["n_tokens"] for row in counts}
        tokens = np.array([t for row, n in counts.items() for t in TEXT[before[row] : before[row] + n]], np.int32)
        spans, logits = np.array(list(counts.items()), np.int32), np.zeros((len(tokens), harness.VOCAB), np.float32)
        try:
            self.session.forward(spans, tokens, logits, True)
        except (CapacityError, MemoryError):
            self.failures += 1
            advanced = {row: self.session.state(row)["n_tokens"] - before[row] for row in counts}
            if not any(advanced.values()):
                self.session.forward(spans, tokens, logits, True)
                return logits
            self.lost += 1
            assert advanced == counts
            for row in counts:
                with pytest.raises(ConfigError, match=f"row {row} ended when its forward failed"):
                    self.session.forward(np.array([[row, 1]], np.int32), np.zeros(1, np.int32))
            return None
        return logits

    def attempt(self):
        """All logits and the slots at the end; None where the rows were lost on the way."""
        row, beside = self.open(N_PROMPT), self.open(1)
        rows, found = [row], []
        while (at := self.session.state(row)["n_tokens"]) < len(TEXT):
            if at > 60 and len(rows) == 1:
                rows.append(self.again(self.session.fork, row, len(TEXT), 1))
            n = self.session.chunk(row, len(TEXT) - at)
            found.append(self.forward(dict.fromkeys(rows, n) | {beside: 1}))
            if found[-1] is None:
                break
        else:
            found += [self.session.positions(r, 1, 1) for r in rows]
        for r in (*rows, beside):
            self.session.close(r)
        ledger = self.session.ledger()
        assert ledger["live_bytes"] == ledger["reserved_bytes"] == 0
        return None if found[-1] is None else found

    def run(self):
        """What an undisturbed session gives, whatever failed on the way."""
        self.session = self.again(harness.open_session, self.model, self.method, **self.options)
        found = self.attempt() or self.attempt()
        del harness.SHAPES[self.model]  # which would keep it
        return found


def drive(refuse, remaining, *arguments, **options):
    """Every allocation refused in turn: what was said of each, and how many lost their rows."""
    want, lost, messages = Scenario(*arguments, **options).run(), 0, []
    while True:
        k = len(messages) + 1
        refuse(k)
        scenario = Scenario(*arguments, **options)
        got = scenario.run()
        if remaining():
            refuse(0)
            assert scenario.failures == 0
            return messages, lost
        assert scenario.failures == 1, k
        messages.append(scenario.message)
        assert all(map(np.array_equal, got, want)) and len(got) == len(want), k
        lost += scenario.lost


@pytest.mark.skipif(bool(os.environ.get("LD_PRELOAD")), reason="a sanitizer has the allocator")
@pytest.mark.parametrize("evict", [True, False])
def test_memory_of_the_core_runs_out_anywhere(tmp_path, evict):
    (tmp_path / "shim.c").write_text(SHIM)
    library = tmp_path / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "shim.c", "-ldl"], check=True)
    code = "import ctypes, test_failures as t; c = ctypes.CDLL(None); m, n = t.drive(c.refuse, c.remaining, {}); "
    code += "print(len(m), n)"
    paths = [Path(__file__).parent, Path(__file__).parents[1], Path(harness.TINY).parents[1]]
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", code.format(evict)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    n, lost = map(int, done.stdout.split())
    assert n > 80 and lost >= 2  # the trace grows, and what is grown after a compaction


@pytest.mark.simt
def test_memory_of_a_device_runs_out_anywhere():
    """Large forwards, so that their buffers are allocations of their own."""
    simt = ctypes.CDLL(devices.library("simt"))
    free, after, total = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_size_t()
    simt.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    messages, _ = drive(simt.simt_refuse, simt.simt_left, True, "simt", tokens=4096)
    simt.cudaMemGetInfo(ctypes.byref(after), ctypes.byref(total))
    assert after.value == free.value  # sessions and models are gone, whatever they were refused
    assert len(messages) > 10
    asked = r"out of memory for .*; (cuda:0: \d+ bytes asked, \d+ of \d+ free|\d+ bytes of pinned memory asked)"
    assert all(re.fullmatch(asked, message) for message in messages), messages


def test_memory_of_the_interpreter_runs_out_after_a_forward():
    """What a forward tells of its steered tokens are Python's objects, made when its rows have advanced."""
    testing = pytest.importorskip("_testcapi")
    lost = 0
    for k in range(30):
        scenario = Scenario(True)
        session = scenario.session = harness.open_session(scenario.model, scenario.method)
        row = scenario.open(N_PROMPT)
        spans, tokens = np.array([[row, N_PROMPT]], np.int32), np.array(TEXT[:N_PROMPT], np.int32)
        testing.set_nomemory(k, k + 1)
        try:
            session.forward(spans, tokens)
            failed = False
        except MemoryError:
            failed = True
        finally:
            testing.remove_mem_hooks()
        if failed and session.state(row)["n_tokens"]:
            lost += 1
            with pytest.raises(ConfigError, match="row 0 ended when its forward failed"):
                session.forward(np.array([[row, 1]], np.int32), np.zeros(1, np.int32))
    assert lost
