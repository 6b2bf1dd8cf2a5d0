"""What many tests share: the model in the box, and the backends that this machine runs."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tests run beside each other; read when torch is loaded

import skipkv  # noqa: E402
from skipkv.cli import main  # noqa: E402

pytest.register_assert_rewrite("harness", "generations")

import devices  # noqa: E402
from devices import DEVICES  # noqa: E402
from harness import VARIANTS  # noqa: E402


def pytest_configure(config):
    """Tests of whole runs say nothing of how many examples they take: that is the backends' affair."""
    few = any(name in config.option.markexpr for name in DEVICES)
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    count = 2 if few else 60 // len(VARIANTS)
    settings.register_profile("runs", max_examples=count, deadline=None, print_blob=True, suppress_health_check=checks)
    settings.load_profile("runs")


def pytest_collection_modifyitems(config, items):
    """What takes a device, or minutes in its place, runs where -m asks for it."""
    left_out = [name for name in DEVICES if name not in config.option.markexpr]
    items[:] = [item for item in items if not any(map(item.get_closest_marker, left_out))]


@pytest.fixture(autouse=True)
def interruptible():
    """Python's own SIGINT handler, also where the tests run in the background of a shell that ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """Each CPU variant that runs here, by name; what is loaded meanwhile computes on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPKV_CPU", request.param)
        yield request.param


@pytest.fixture(scope="module", params=devices.params([*VARIANTS, *DEVICES]))
def backend(request):
    """The same and CUDA's, for the models of `harness.build`, `harness.tiny` and the worlds of tests/ops."""
    devices.where(request.param)  # or skips
    return request.param


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
