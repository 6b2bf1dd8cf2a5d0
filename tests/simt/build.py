"""Compiles .cu files, unmodified, for the CPU, with the SIMT runtime of this folder."""

import atexit
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "cuda"
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


def flags(compiler, sanitizer):
    if not shutil.which(compiler):
        raise Missing(f"{compiler}: no such compiler")
    if sanitizer in ("thread", "memory") and "clang" not in compiler:
        raise Missing(f"{sanitizer.title()}Sanitizer needs clang++: g++ cannot gather static shared arrays")
    found = [part for folder in includes() for part in ("-isystem", folder)]
    warn = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    language = ["-std=c++17", "-fPIC", "-fno-strict-aliasing", "-I", HERE, "-I", CUDA]
    return [compiler, *language, *warn, *found, *SANITIZERS[sanitizer]]


def run(command):
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stderr  # warnings


def compile_all(jobs):
    """Runs (flags, source, object); the warnings."""
    with ThreadPoolExecutor(2) as pool:
        return "".join(pool.map(run, ([*how, "-x", "c++", "-c", source, "-o", made] for how, source, made in jobs)))


@functools.cache
def runtime(compiler, sanitizer):
    """The runtime's objects, built once a session."""
    folder = Path(tempfile.mkdtemp(prefix="simt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    objects = [folder / f"{source.stem}.o" for source in RUNTIME]
    seen = flags(compiler, sanitizer)
    unseen = [flag for flag in seen if flag != "-fsanitize=thread"]  # the scheduler stands for all threads itself
    compile_all(
        (unseen if source in SCHEDULER else seen, source, made)
        for source, made in zip(RUNTIME, objects, strict=True)
    )
    return objects


def build(sources, out, compiler="g++", sanitizer=None, shared=True, defines=()):
    """Builds sources with the runtime.

    Parameters
    ----------
    sources : paths of .cu files
    out : path of the shared object or program
    sanitizer : None, "address" (and undefined behaviour), "thread" or "memory"; the latter two need clang++
    defines : "NAME" or "NAME=value"

    Returns
    -------
    The compiler's warnings.

    Raises
    ------
    Missing
        no compiler or no headers, so that a test can skip
    RuntimeError
        the sources do not compile, in the compiler's words
    """
    objects = [f"{out}.{i}.o" for i in range(len(sources))]
    how = [*flags(compiler, sanitizer), *(f"-D{name}" for name in defines)]
    warnings = compile_all((how, source, made) for source, made in zip(sources, objects, strict=True))
    kind = ["-shared", "-Wl,-Bsymbolic"] if shared else []
    run([compiler, *SANITIZERS[sanitizer], *kind, *objects, *runtime(compiler, sanitizer), "-pthread", "-o", out])
    for made in objects:
        os.remove(made)
    return warnings


def preload(sanitizer):
    """LD_PRELOAD for a Python that loads such a shared object; g++'s libraries serve clang++'s objects, too."""
    names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[sanitizer]
    found = (subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in names)
    return " ".join(done.stdout.strip() for done in found)
