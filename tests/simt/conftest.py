"""The kernels of kernels.cu in a shared object, and the programs of bugs.cu."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from simt.build import CLANG, Missing, build

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def built():
    """Builds sources of this folder."""

    def build_or_skip(compiler, sanitizer, *names, shared):
        try:
            return build([HERE / f"{name}.cu" for name in names], compiler, sanitizer, shared)
        except Missing as missing:
            pytest.skip(str(missing))

    return build_or_skip


class Device:
    """The shared object's functions, and arrays that live in its memory."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.held = []

    def call(self, name, *arguments):
        """The status of a function of the runtime, of cuBLAS or of kernels.cu. Every integer fills a register."""
        return getattr(self.library, name)(*(ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments))

    def ok(self, name, *arguments):
        assert self.call(name, *arguments) == 0, f"{name}: {self.error()}"

    def error(self):
        """The name of the last error, which is forgotten with that."""
        self.library.cudaGetErrorName.restype = ctypes.c_char_p
        return self.library.cudaGetErrorName(self.library.cudaGetLastError()).decode()

    def fails(self, name, *arguments):
        """The name of the error, which is the last one, too."""
        assert self.call(name, *arguments) == self.library.cudaPeekAtLastError() != 0
        return self.error()

    def made(self, create, *arguments):
        """A handle or a pointer that a function of the runtime writes to its first argument."""
        handle = ctypes.c_void_p()
        self.ok(create, ctypes.byref(handle), *arguments)
        return handle.value

    def empty(self, n_bytes):
        self.held.append(self.made("cudaMalloc", n_bytes))
        return self.held[-1]

    def put(self, array):
        pointer = self.empty(array.nbytes)
        self.ok("cudaMemcpy", pointer, array.ctypes.data, array.nbytes, 1)
        return pointer

    def get(self, pointer, shape, dtype=np.float32):
        self.ok("cudaDeviceSynchronize")
        array = np.zeros(shape, dtype)
        self.ok("cudaMemcpy", array.ctypes.data, pointer, array.nbytes, 2)
        return array

    def run(self, kernel, *arguments, shape, dtype=np.float32):
        """Launches a kernel whose last argument is its result."""
        out = self.put(np.zeros(shape, dtype))
        self.ok(f"run_{kernel}", *[self.put(a) if isinstance(a, np.ndarray) else a for a in arguments], out)
        return self.get(out, shape, dtype)


@pytest.fixture(scope="session", params=["g++", CLANG])
def library(request, built):
    return built(request.param, None, "kernels", shared=True)


@pytest.fixture(params=["forward", "reverse", "random"])
def schedule(request, monkeypatch):
    monkeypatch.setenv("SIMT_SCHEDULE", request.param)
    return request.param


@pytest.fixture
def device(library):
    device = Device(library)
    yield device
    for pointer in device.held:
        device.ok("cudaFree", pointer)


@pytest.fixture
def stream(device):
    handle = device.made("cudaStreamCreateWithFlags", 1)  # that does not wait for the default stream
    yield handle
    device.ok("cudaStreamDestroy", handle)


@pytest.fixture
def rng():
    return np.random.default_rng(5)
