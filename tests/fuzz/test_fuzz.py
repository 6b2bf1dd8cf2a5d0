"""A few of the inputs that `python -m tests.fuzz` makes, always the same, and every input that ever failed."""

import os
from pathlib import Path

import pytest
from fuzz.targets import TARGETS, attempt, made

pytestmark = [pytest.mark.sanitize, pytest.mark.filterwarnings("ignore:Duplicate name")]  # of members of an archive

INPUTS = 8_000 if os.environ.get("SKIPKV_SANITIZE") else 2_000
CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_taken_or_refused(name):
    for number in range(round(INPUTS * TARGETS[name].share / 100)):
        raw = made(name, 0, number)
        error = attempt(name, raw)
        assert error is None, f"seed 0, target {name}, input {number}: {raw!r:.1000}"


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_once_failed(path):
    error = attempt(path.name.partition("-")[0], path.read_bytes())
    if error is not None:
        raise error
