"""The core and ops.c as one shared library; and a world on a backend."""

from __future__ import annotations

import ctypes
import os
import runpy
import shlex
import sysconfig
from pathlib import Path

import devices
import numpy as np
import pytest
from simt import build

from skipkv import _skipkv
from skipkv.methods import BITS

ROOT = Path(__file__).resolve().parents[2]
TERMS = ("position", "sums", "importance", "redundancy", "penalty", "noise", "key_norm", "key_likeness")
DTYPES = {"f32": 0, "bf16": 1, "q8": 3, "bf16a16": 4}
ADD, CLOSE, EXTEND, NONE = range(4)  # skv_mark


def load() -> ctypes.CDLL:
    """The module, where it was built with ops.c; else csrc but for its binding, and ops.c, by setup.py's own flags."""
    library = ctypes.CDLL(_skipkv.__file__)
    if not hasattr(library, "ops_open"):
        library = ctypes.CDLL(build_alone())
    library.ops_open.restype = ctypes.c_void_p
    library.ops_error.restype = ctypes.c_char_p
    library.ops_slots.restype = library.ops_sum_sentences.restype = ctypes.c_size_t
    return library


def build_alone() -> Path:
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    flags = [*setup["FLAGS"], *(setup["SANITIZERS"] if setup["SANITIZE"] else []), "-fPIC", f"-I{ROOT / 'csrc'}"]
    sources = [p for p in (ROOT / "csrc").rglob("*.c") if p.parent.name != "python"]
    jobs = [([*compiler, *flags, *setup["VARIANTS"].get(p.name, [])], p) for p in sorted(sources)
            if setup["X86"] or p.name not in setup["VARIANTS"]]  # fmt: skip
    objects = build.compile_all([*jobs, ([*compiler, *flags], Path(__file__).with_name("ops.c"))])
    return build.link([*compiler, *(f for f in flags if f.startswith(("-f", "-g")))], [*objects, "-lm"])


class _Eviction(ctypes.Structure):
    _fields_ = [
        ("weights", ctypes.c_float * len(TERMS)), ("kernel", ctypes.c_int32), ("first", ctypes.c_int32),
        ("n_penalties", ctypes.c_int32), ("n_sentences", ctypes.c_int32), ("seed", ctypes.c_double),
        ("compat", ctypes.c_uint), ("budgets", ctypes.c_void_p), ("newest", ctypes.c_void_p),
        ("penalties", ctypes.c_void_p), ("sentences", ctypes.c_void_p), ("put", ctypes.c_void_p),
        ("held", ctypes.c_void_p), ("n_held", ctypes.c_int32), ("end", ctypes.c_int32),
    ]  # fmt: skip


def pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def floats(array: object) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32).copy()


def integers(array: object) -> np.ndarray:
    return np.ascontiguousarray(array, np.int32)


class World:
    """A device of one backend, and the caches of a few rows; see ops.c. Arrays go in and come out as NumPy's."""

    def __init__(self, library, backend, *, n_layers=1, n_kv=2, group=2, head_dim=16, hidden=24, window=4, rows=1,
                 tokens=512, slots=512, weights="f32", cache="f32", needs=(), threads=2):  # fmt: skip
        self.library, self.n_layers, self.n_kv, self.group, self.dim = library, n_layers, n_kv, group, head_dim
        self.hidden, self.width, self.window, self.rows, self.slots = hidden, -(-hidden // 16) * 16, window, rows, slots
        self.terms = [name for name in TERMS if name in needs]
        flags = {**BITS, "query_heads": BITS["queries"] << 4, "by_layer": BITS["queries"] << 5}
        bits = sum(flags[name] for name in needs)
        shape = integers([n_layers, n_kv * group, n_kv, head_dim, hidden, window, rows, tokens, slots,
                          DTYPES[weights]])  # fmt: skip
        variant, path = devices.where(backend)
        if path and cache == "q8":
            pytest.skip("CUDA has no such cache")
        self.exact = backend not in devices.DEVICES
        where = path and path.encode(), variant.encode()
        self.world = ctypes.c_void_p(library.ops_open(*where, threads, pointer(shape), DTYPES[cache], bits))
        assert self.world.value

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.ops_close(self.world)

    def call(self, name: str, *arguments: object) -> int:
        made = [pointer(a) if isinstance(a, np.ndarray) else ctypes.c_float(a) if isinstance(a, float)
                else ctypes.c_size_t(a) if isinstance(a, int) else a for a in arguments]  # fmt: skip
        result = getattr(self.library, f"ops_{name}")(self.world, *made)
        assert self.library.ops_error(self.world) == b""
        return result

    def linear(self, weights, x, bias=None, dtype="f32", host=False) -> np.ndarray:
        y = np.zeros((len(x), len(weights)), np.float32)
        w, x, bias = floats(weights), floats(x), None if bias is None else floats(bias)
        self.call("linear", DTYPES[dtype], *w.shape, w, bias, x, len(x), y, int(host), None)
        return y

    def best(self, weights, x, dtype="f32") -> np.ndarray:
        w, x, found = floats(weights), floats(x), np.zeros(len(x), np.int32)
        y = np.zeros((len(x), len(w)), np.float32)
        self.call("linear", DTYPES[dtype], *w.shape, w, None, x, len(x), y, 1, found)
        return found

    def begin(self, counts, ids=None, alphas=None, marks=None, lengths=None, rows=None) -> int:
        """Feed counts[p] tokens to row rows[p]; returns how many in all."""
        n = sum(counts)
        rows = integers(range(len(counts)) if rows is None else rows)
        given = [integers(np.zeros(n) if a is None else a) for a in (ids, marks, lengths)]
        alphas = floats(np.full(n, np.nan) if alphas is None else alphas)
        self.held = [rows, integers(counts), *given, alphas]  # the batch is used until the next one begins
        self.call("begin", len(counts), rows, self.held[1], given[0], alphas, given[1], given[2])
        return n

    def inplace(self, name, array, *before) -> np.ndarray:
        """An op that changes its array."""
        array = floats(array)
        self.call(name, *before, array)
        return array

    def attend(self, layer, q, k, v) -> np.ndarray:
        out = np.zeros(q.shape, np.float32)
        self.call("attend", layer, floats(q), floats(k), floats(v), out)
        return out

    def cache(self, row, layer, head) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(keys, values, positions, sums) of a head's slots."""
        keys, values = (np.zeros((self.slots, self.dim), np.float32) for _ in range(2))
        positions, sums = np.zeros(self.slots, np.int32), np.zeros(self.slots, np.float32)
        n = self.call("slots", row, layer * self.n_kv + head, keys, values, positions, sums)
        return keys[:n], values[:n], positions[:n], sums[:n]

    def evict(self, weights, budgets, newest, *, kernel=7, first=0, penalties=(), sentences=(), seed=0, compat=0,
              put=None, held=None, end=0):  # fmt: skip
        """Score, select and compact all heads of all rows. Arrays [rows, n_layers, n_kv, …] of what came back."""
        jobs = (self.rows, self.n_layers, self.n_kv)
        flat = np.array([(int(a), int(b), value) for a, b, value in penalties],
                        [("first", np.int32), ("last", np.int32), ("lambda", np.float32)])  # fmt: skip
        e = _Eviction(kernel=kernel, first=first, n_penalties=len(penalties), n_sentences=len(sentences), seed=seed,
                      compat=compat, n_held=0 if held is None else len(held), end=end)  # fmt: skip
        for i, name in enumerate(TERMS):
            e.weights[i] = weights.get(name, 0)
        arrays = {
            "budgets": integers(np.broadcast_to(budgets, jobs[1:])),
            "newest": integers(np.broadcast_to(newest, jobs[1:])),
            "penalties": flat, "sentences": integers(sentences), "put": None if put is None else floats(put),
            "held": None if held is None else integers(held),
        }  # fmt: skip
        for name, array in arrays.items():
            setattr(e, name, None if array is None else array.ctypes.data)
        terms = np.zeros((*jobs, len(TERMS), self.slots), np.float32)
        score, keys = np.zeros((*jobs, self.slots), np.float32), np.zeros((*jobs, self.slots, self.dim), np.float32)
        queries = np.zeros((*jobs, self.group, self.window, self.dim), np.float32)
        kept, virtual = (np.zeros((*jobs, self.slots), np.int32) for _ in range(2))
        n_kept, alive = np.zeros(jobs, np.int32), np.zeros((self.rows, len(sentences)), np.uint8)
        self.library.ops_evict(self.world, ctypes.byref(e), *map(pointer, (
            terms, score, keys, queries, kept, n_kept, alive, virtual)))  # fmt: skip
        assert self.library.ops_error(self.world) == b""
        return terms, score, keys, queries, kept, n_kept, alive, virtual
