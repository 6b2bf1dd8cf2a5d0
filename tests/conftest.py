"""What many tests share: the model in the box, and the backends that this machine runs."""

import os
import signal
from collections import defaultdict
from itertools import combinations_with_replacement

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
    """Tests of whole runs say nothing of how many examples they take: that is the backends' and the build's affair."""
    few = any(name in config.option.markexpr for name in DEVICES)
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    count = 2 if few else 5 if os.environ.get("SKIPKV_SANITIZE") else 60 // len(VARIANTS)
    settings.register_profile("runs", max_examples=count, deadline=None, print_blob=True, suppress_health_check=checks)
    settings.load_profile("runs")


@pytest.hookimpl(trylast=True)  # what -k and -m leave out stands for nothing
def pytest_collection_modifyitems(config, items):
    """What takes a device, or minutes in its place, runs where -m asks for it. There and under sanitizers, tests of the
    engine and of its ops run with what `cover` asks for in place of every product of their parameters."""
    left_out, tests = [name for name in (*DEVICES, "soak") if name not in config.option.markexpr], defaultdict(dict)
    items[:] = [item for item in items if not any(map(item.get_closest_marker, left_out))]
    for item in items:
        slow = any(map(item.get_closest_marker, DEVICES)) or os.environ.get("SKIPKV_SANITIZE")
        if slow and item.path.parent.name in ("engine", "ops") and hasattr(item, "callspec"):
            tests[item.parent.nodeid, item.originalname][item] = cover(item)
    thin = set()
    for of_item in tests.values():
        missing = set().union(*of_item.values())
        while missing:
            best = max(of_item, key=lambda item: len(of_item[item] & missing))
            missing -= of_item.pop(best)
        thin |= of_item.keys()
    items[:] = [item for item in items if item not in thin]


def cover(item):
    """What a test stands for: any two values of its parameters; where a sanitizer looks, but at the CPU's ops, any one.

    "rkv:allocate=layer" is two values. What no device has is only itself.
    """
    values = []
    for name, value in item.callspec.params.items():
        parts = [*value.split(":"), ""] if isinstance(value, str) else [repr(value)]
        values += [(name, place, part) for place, part in enumerate(parts[:2])]
    found = {*combinations_with_replacement(sorted(values), 2)}
    found = {pair for pair in found if "q8" in (pair[0][2], pair[1][2])} or found
    few = os.environ.get("SIMT_SANITIZER") or os.environ.get("SKIPKV_SANITIZE") and item.path.parent.name == "engine"
    return {pair for pair in found if pair[0] == pair[1]} if few else found


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
