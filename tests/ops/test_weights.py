"""Matrices whose inputs are rounded, too, have the bits of their formula, in every variant, at sizes that fill no group
evenly."""

import numpy as np
import pytest
import spec
from ops.library import DTYPES, World

pytestmark = pytest.mark.sanitize


@pytest.fixture(params=spec.ROUNDED)
def dtype(request):
    return request.param


@pytest.fixture
def w(library, variant, dtype):
    with World(library, variant, tokens=100, hidden=37, weights=dtype) as world:
        yield world


def formula(dtype, x, weights):
    return spec.ROUNDED[dtype][1](x, weights)


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def assert_same_bits(found, wanted):
    assert found.dtype == wanted.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)  # NaN equals NaN


@pytest.mark.parametrize("n_in", [1, 31, 32, 100, 515, 1544])
@pytest.mark.parametrize("n_out", [1, 33, 130])
def test_linear_is_its_formula_whatever_the_batch(w, dtype, n_in, n_out):
    weights, bias, x = normal(n_out, n_in), normal(n_out), normal(97, n_in)
    wanted = formula(dtype, x, weights)
    assert np.abs(wanted - x @ weights.T).max() < 0.05 * np.sqrt(n_in)
    for n in (*range(1, 8), 13, 97):
        assert_same_bits(w.linear(weights, x[:n], bias, dtype), wanted[:n] + bias)
        assert_same_bits(w.linear(weights, x[:n], dtype=dtype, host=True), wanted[:n])
    assert (w.best(weights, x, dtype) == wanted.argmax(1)).all()


def test_threads_share_what_they_made_of_the_inputs(library, variant, dtype):
    weights, x = normal(515, 300), normal(97, 300)  # enough for threads to make inputs, too
    for threads in (1, 2, 3):
        with World(library, variant, threads=threads, weights=dtype) as w:
            assert_same_bits(w.linear(weights, x, dtype=dtype, host=True), formula(dtype, x, weights))


@pytest.mark.parametrize("dtype", ["q8"], indirect=True)
@pytest.mark.parametrize("scale", [0, 1e-45, 1e-37, 3e-36, 1, 3e38])
def test_sizes_of_numbers_in_8_bits(w, scale):
    """Zeros and subnormal scales count for nothing; the largest floats are weights, and inputs, like all others."""
    small, large = normal(40, 70) / 1000, np.clip(normal(40, 70), -1, 1) * np.float32(scale)
    assert_same_bits(w.linear(small, large, dtype="q8", host=True), spec.linear_q8(large, small))
    assert_same_bits(w.linear(large, small, dtype="q8", host=True), spec.linear_q8(small, large))
    if not scale:
        assert (w.linear(small, large, dtype="q8", host=True) == 0).all()


def test_opposite_extremes_do_not_saturate(w, dtype):
    signs = np.where(np.arange(640).reshape(10, 64) % 3 > 0, np.float32(1), np.float32(-1))
    for x, weights in ((np.ones((7, 64)), -np.ones((10, 64))), (signs[:7], signs), (-signs[:7], signs)):
        found = w.linear(weights, x, dtype=dtype, host=True)
        assert_same_bits(found, formula(dtype, x, weights))
        np.testing.assert_allclose(found, x @ weights.T, rtol=0.005, atol=0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_row_and_output(w, dtype, bad):
    weights, x = normal(35, 70), normal(9, 70)
    weights[33, 69] = x[2, 40] = bad
    with np.errstate(invalid="ignore"):
        wanted = formula(dtype, x, weights)
    found = w.linear(weights, x, dtype=dtype, host=True)
    assert_same_bits(found, wanted)
    spoilt = np.zeros(found.shape, bool)
    spoilt[2] = spoilt[:, 33] = True
    assert (~np.isfinite(found) == spoilt).all()


def test_a_row_of_an_embedding_is_its_weights(w, dtype):
    table, ids = normal(70, 37), [0, 69, 31, 32, 33, 5, 5]
    w.begin([len(ids)], ids)
    x = np.zeros((len(ids), 37), np.float32)
    w.call("embed", DTYPES[dtype], 70, table, x)
    assert_same_bits(x, spec.ROUNDED[dtype][0](table)[ids].astype(np.float32))
    assert np.abs(x - table[ids]).max() <= np.abs(table).max() / 250
