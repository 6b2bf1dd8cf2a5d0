"""The ops of every backend, on arrays."""

import pytest
from ops import library as ops_library


@pytest.fixture(scope="session")
def library():
    return ops_library.load()


@pytest.fixture
def world(library, backend):
    """Makes a world on the backend under test; those made are closed at the end."""
    made = []

    def make(**shape):
        made.append(ops_library.World(library, backend, **shape))
        return made[-1]

    yield make
    for one in made:
        one.__exit__()
