"""What many tests share: the model in the box, and the backends that this machine runs."""

import signal

import pytest
from harness import VARIANTS

import skipkv


@pytest.fixture(autouse=True)
def interruptible():
    """Python's own SIGINT handler, also where the tests run in the background of a shell that ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="module", params=VARIANTS)
def backend(request):
    """Each CPU variant that runs here, by name; what is loaded meanwhile computes on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPKV_CPU", request.param)
        yield request.param


@pytest.fixture(scope="session")
def model():
    """The model in the box on one thread. Immutable, so all share it."""
    return skipkv.load("tiny", threads=1, progress=False)
