import signal

import pytest


@pytest.fixture(autouse=True)
def interruptible():
    """Python's own SIGINT handler, also where the tests run in the background of a shell that ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
