"""Compiles .cu files, unmodified, for the CPU, with the SIMT runtime of this folder; the CUDA backend, among others.

What is made lies in build/simt under a hash of what it is made from, so that tests and sessions share it.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build" / "simt"
CUDA = ROOT / "cuda"
CORE = [ROOT / "csrc" / name for name in ("error.c", "heap.c", "dtypes.c")]  # what the CUDA backend uses of the core
SCHEDULER = [HERE / "simt.cpp", HERE / "warp.cpp"]
RUNTIME = [*SCHEDULER, HERE / "device.cpp", HERE / "stream.cpp", HERE / "cublas.cpp"]
CLANG = next(filter(shutil.which, ("clang++", "clang++-14")), "clang++")
SANITIZERS = {
    None: ["-O2"],
    "address": ["-O1", "-g", "-DSIMT_ASAN", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-DSIMT_TSAN", "-fsanitize=thread"],
    "memory": ["-O1", "-g", "-DSIMT_MSAN", "-fsanitize=memory"],
}


class Missing(Exception):
    """A compiler or CUDA's headers are not here; the text says which."""


def includes():
    """Folders with the headers of the CUDA runtime and of cuBLAS: the toolkit's, and those of the wheels."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in spec.submodule_search_locations] if spec else []
    folders = [home / "include", *(folder for place in wheels for folder in place.glob("*/include"))]
    for header in ("cuda_runtime_api.h", "cublas_v2.h"):
        if not any((folder / header).exists() for folder in folders):
            raise Missing(f"{header}: neither in {home}/include (CUDA_HOME) nor in a wheel nvidia-*")
    return folders


def flags(compiler, sanitizer=None):
    """The command that compiles, but for its files."""
    if not shutil.which(compiler):
        raise Missing(f"{compiler}: no such compiler")
    if sanitizer in ("thread", "memory") and "clang" not in compiler:
        raise Missing(f"{sanitizer.title()}Sanitizer needs clang++: g++ cannot gather static shared arrays")
    found = [part for folder in includes() for part in ("-isystem", folder)]
    warn = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    language = ["-x", "c++", "-std=c++17", "-fPIC", "-fno-strict-aliasing", "-I", HERE, "-I", CUDA]
    return [compiler, *language, *warn, *found, *SANITIZERS[sanitizer]]


def run(command):
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stderr


@functools.cache
def headers():
    """The text of all that a source may include."""
    folders = (CUDA, ROOT / "csrc", HERE)
    return b"".join(p.read_bytes() for folder in folders for p in sorted(folder.rglob("*.*h")))


def made(command, ending, read=b""):
    """What a command writes to the path behind -o, its last argument, made once, whoever wants it at the same time.

    read: the bytes of what it reads, where its arguments do not tell.
    """
    state = hashlib.sha256(repr([str(part) for part in command]).encode() + read).hexdigest()[:20]
    path = BUILT / f"{state}{ending}"
    BUILT.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            begun = path.with_suffix(".begun")
            run([*command, "-o", begun])
            begun.replace(path)
    return path


def compile_all(jobs):
    """The objects of (flags, source)."""

    def compile_one(job):
        how, source = job
        return made([*how, "-c", source], ".o", source.read_bytes() + headers())

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, jobs))


def link(how, objects, shared=True):
    """how: the compiler and what it needs to know."""
    kind = ["-shared", "-Wl,-Bsymbolic"] if shared else []
    return made([*how, *kind, *objects, "-pthread", "-ldl", "-lm"], ".so" if shared else "")


def compile_core(compiler="g++", tool=None, sources=CORE):
    """The objects of C sources."""
    language = ["-x", "c", "-std=c17", "-fPIC", "-fvisibility=hidden", "-I", ROOT / "csrc"]
    return compile_all(([compiler, *language, *SANITIZERS[tool]], source) for source in sources)


def runtime(compiler, sanitizer):
    """The runtime's objects."""
    seen = flags(compiler, sanitizer)
    unseen = [flag for flag in seen if flag != "-fsanitize=thread"]  # the scheduler stands for all threads itself
    return compile_all((unseen if source in SCHEDULER else seen, source) for source in RUNTIME)


def build(sources, compiler="g++", sanitizer=None, shared=True):
    """Builds sources with the runtime.

    Parameters
    ----------
    sources : paths of .cu files
    sanitizer : None, "address" (and undefined behaviour), "thread" or "memory"; the latter two need clang++
    shared : a shared object, or a program

    Returns
    -------
    Its path.

    Raises
    ------
    Missing
        no compiler or no headers, so that a test can skip
    RuntimeError
        the sources do not compile without warnings, in the compiler's words
    """
    how = flags(compiler, sanitizer)
    objects = compile_all((how, source) for source in sources)
    return link([compiler, *SANITIZERS[sanitizer]], [*objects, *runtime(compiler, sanitizer)], shared)


@functools.cache
def backend(sanitizer=None, faults=(), program=False):
    """The CUDA backend.

    Parameters
    ----------
    sanitizer : one of SANITIZERS, or "guard" for SIMT_GUARD; Python then needs its runtime in LD_PRELOAD. Each block of
        device memory is an allocation of its own, as what is cut from a larger one is not watched.
    faults : (file, what is there once, what takes its place)
    program : a program that runs engine.c in place of a shared object

    Returns
    -------
    Its path.
    """
    compiler = CLANG if sanitizer in ("thread", "memory") else "g++"
    tool = None if sanitizer == "guard" else sanitizer
    how = flags(compiler, tool)
    if sanitizer:
        faults = (*faults, ("device.cu", "LARGEST = 18", "LARGEST = 0"))
    jobs = [(how, changed(source, faults)) for source in sorted(CUDA.glob("*.cu"))]
    core = [*ROOT.glob("csrc/*.c"), HERE / "engine.c"] if program else CORE
    objects = [*compile_all(jobs), *compile_core(compiler, tool, core)]
    return link([compiler, *SANITIZERS[tool]], [*objects, *runtime(compiler, tool)], not program)


def changed(source, faults):
    """The path of a source with these faults."""
    text = source.read_text()
    for name, right, wrong in faults:
        if name == source.name:
            assert text.count(right) == 1, f"{name}: {text.count(right)} times, not once: {right}"
            text = text.replace(right, wrong)
    if text == source.read_text():
        return source
    path = BUILT / hashlib.sha256(text.encode()).hexdigest()[:20] / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_suffix(f".{os.getpid()}")  # whole at once, for whoever reads it
    begun.write_text(text)
    begun.replace(path)
    return path


def preload(sanitizer):
    """LD_PRELOAD for a Python that loads such a shared object; g++'s libraries serve clang++'s objects, too."""
    names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[sanitizer]
    found = (subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in names)
    return " ".join(done.stdout.strip() for done in found)
