"""The CUDA backend under test: on the host runtime of tests/simt, built once for these sources; or on a device."""

import functools
import os

import pytest
from simt import build

import skipkv
from skipkv.devices import find

DEVICES = "simt", "cuda"  # each a marker, whose tests run where the command line names it


EXACT = "simt:deterministic", "cuda:deterministic"  # of them what promises the same bits whatever the batch


def params(names):
    """Of fixtures and tests, each name of a device with its marker."""
    return [pytest.param(n, marks=[getattr(pytest.mark, d) for d in DEVICES if n.startswith(d)]) for n in names]


def where(backend):
    """(variant, shared object) of a backend; no shared object for a variant of the CPU. Skips where there is none."""
    path = library(backend.partition(":")[0])
    return (backend, None) if path is None else ("cuda:0" + ":deterministic" * (backend in EXACT), path)


@functools.cache
def library(backend):
    if backend == "simt":
        try:
            return str(build.backend(os.environ.get("SIMT_SANITIZER")))
        except build.Missing as missing:
            pytest.skip(str(missing))
    if backend != "cuda":
        return None
    try:
        return find("cuda")[1]
    except skipkv.BackendError as missing:
        pytest.skip(str(missing))
