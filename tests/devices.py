"""The CUDA backend under test: on the host runtime of tests/simt, built once for these sources; or on a device."""

import functools
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from simt import build

import skipkv
from skipkv.devices import find

ROOT = Path(__file__).resolve().parents[1]
CORE = [ROOT / "csrc" / name for name in ("error.c", "heap.c", "dtypes.c")]  # what the backend uses of the core
DEVICES = "simt", "cuda"  # each a marker, whose tests run where the command line names it


@functools.cache
def library(backend):
    """Path of the shared object that has this backend, None for a variant of the CPU. Skips where there is none."""
    if backend == "simt":
        try:
            return str(_simt(os.environ.get("SIMT_SANITIZER")))
        except build.Missing as missing:
            pytest.skip(str(missing))
    if backend != "cuda":
        return None
    try:
        return find("cuda")[1]
    except skipkv.BackendError as missing:
        pytest.skip(str(missing))


def _simt(sanitizer):
    """sanitizer: one of build.SANITIZERS; Python then needs its runtime in LD_PRELOAD."""
    compiler = build.CLANG if sanitizer == "thread" else "g++"
    inputs = sorted(p for folder in (build.CUDA, build.HERE, ROOT / "csrc") for p in folder.glob("*.[chp]*"))
    state = hashlib.sha256(repr((compiler, sanitizer)).encode() + b"".join(p.read_bytes() for p in inputs))
    target = ROOT / "build" / f"simt-{state.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        kernels, made = sorted(build.CUDA.glob("*.cu")), Path(folder, "library.so")
        objects = [Path(folder, f"{source.stem}.o") for source in (*kernels, *CORE)]
        how = build.flags(compiler, sanitizer)
        build.compile_all((how, *pair) for pair in zip(kernels, objects, strict=False))
        for source, object_ in zip(CORE, objects[len(kernels) :], strict=True):
            build.run(["cc", "-std=c17", "-O2", "-fPIC", "-fvisibility=hidden", "-c", source, "-o", object_])
        link = [*build.SANITIZERS[sanitizer], "-shared", "-Wl,-Bsymbolic"]
        build.run([compiler, *link, *objects, *build.runtime(compiler, sanitizer), "-pthread", "-o", made])
        made.replace(target)  # another session may build the same
    return target
