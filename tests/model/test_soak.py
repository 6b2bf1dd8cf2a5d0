"""A minute of tests/soak.py; `python -m tests.soak --minutes 20` goes on for longer."""

import pytest
from soak import soak


@pytest.mark.soak
def test_a_minute_of_everything():
    soak(minutes=1, seed=1)
