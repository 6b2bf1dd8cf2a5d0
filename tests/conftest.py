"""What many tests share: the model in the box, and the backends that this machine runs."""

import signal

import pytest

import skipkv
from skipkv.cli import main

pytest.register_assert_rewrite("harness", "generations")

from harness import VARIANTS  # noqa: E402


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


@pytest.fixture
def skip(capsys):
    """Runs one command; (exit status, stdout, stderr)."""

    def run(*argv):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as ended:  # argparse's own refusals
            status = ended.code
        return status, *capsys.readouterr()

    return run
