"""Applying the mappings (Eq. 3): expand, pre, post, their composition, and the plain residual (Eq. 1)."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_tilelang import reference


def make_spec(num_streams=4, hidden_size=24, **changes):
    constants = {"sinkhorn_iters": 20, "sinkhorn_eps": 1e-6, "pre_eps": 1e-6, "rms_eps": 1e-6}
    sizes = {"num_streams": num_streams, "hidden_size": hidden_size, "post_scale": 2.0}
    return SimpleNamespace(**(constants | sizes | changes))


def make_parameters(spec, seed):
    n, C = spec.num_streams, spec.hidden_size
    rng = np.random.default_rng(seed)
    phi = 2.0 / np.sqrt(n * C) * rng.standard_normal((n * n + 2 * n, n * C))
    return phi, np.array([0.7, 1.1, 1.6]), rng.standard_normal(n * n + 2 * n)


def make_mapped(n, C, seed=0):
    """x, layer_output, h_post and h_res, the last one far from symmetric."""
    rng = np.random.default_rng(seed)
    shapes = (3, n, C), (3, C), (3, n), (3, n, n)
    return [rng.standard_normal(shape) for shape in shapes]


def test_expand_repeats_the_embedding():
    """Catches streams laid out [C, n], and views that let a write to one stream reach the others."""
    h = np.random.default_rng(0).standard_normal((2, 3, 5))
    x = reference.expand(h, 4)
    assert x.shape == (2, 3, 4, 5)
    assert all(np.array_equal(x[:, :, i], h) for i in range(4))
    x[:, :, 0] = 0
    assert np.array_equal(x[:, :, 1], h)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_aggregate_by_loops(n, C, seed):
    x, _, h_pre, _ = make_mapped(n, C, seed=seed)
    expected = np.zeros((len(x), C))
    for t, i, c in np.ndindex(x.shape):
        expected[t, c] += h_pre[t, i] * x[t, i, c]
    np.testing.assert_allclose(reference.aggregate(x, h_pre), expected, rtol=1e-12, atol=1e-14)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_post_by_loops(n, C, seed):
    """Catches h_res applied transposed, the most frequent error of all, and h_post of another stream."""
    x, layer_output, h_post, h_res = make_mapped(n, C, seed=seed)
    expected = np.zeros_like(x)
    for t, j, c in np.ndindex(x.shape):
        expected[t, j, c] = h_post[t, j] * layer_output[t, c]
        for i in range(n):
            expected[t, j, c] += h_res[t, j, i] * x[t, i, c]
    actual = reference.post(x, layer_output, h_post, h_res)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


def test_one_entry_of_h_res_moves_one_stream():
    """h_res[j, i] is the weight of input i in output j: catches [in, out] without any arithmetic."""
    x, layer_output, h_post, h_res = make_mapped(4, 8)
    h_res = np.zeros_like(h_res)
    h_res[:, 3, 1] = 1.0
    x_next = reference.post(x, layer_output, 0 * h_post, h_res)
    assert np.array_equal(x_next[:, 3], x[:, 1])
    assert not x_next[:, :3].any()


def test_permuted_streams_permute_post():
    """Inputs in another order with h_res's columns to match change nothing; rows reorder the outputs."""
    x, layer_output, h_post, h_res = make_mapped(4, 8)
    inputs, outputs = [2, 0, 3, 1], [1, 3, 2, 0]
    x_next = reference.post(x, layer_output, h_post, h_res)
    same = reference.post(x[:, inputs], layer_output, h_post, h_res[:, :, inputs])
    np.testing.assert_allclose(same, x_next, rtol=1e-12, atol=1e-14)
    reordered = reference.post(x, layer_output, h_post[:, outputs], h_res[:, outputs])
    np.testing.assert_allclose(reordered, x_next[:, outputs], rtol=1e-12, atol=1e-14)


def test_rows_of_h_res_keep_equal_streams_and_columns_keep_their_sum():
    """Gains (Eq. 6): rows of sum 1 return equal streams as they were, columns of sum 1 keep the total.

    With one iteration only the rows are exact, so a transposed h_res fails the first half.
    """
    rng = np.random.default_rng(1)
    logits = 3.0 * rng.standard_normal((7, 4, 4))
    h, zeros = rng.standard_normal((7, 8)), np.zeros((7, 8))
    x = rng.standard_normal((7, 4, 8))

    rows_exact = reference.sinkhorn(logits, iters=1, eps=0.0)
    equal = reference.post(reference.expand(h, 4), zeros, np.ones((7, 4)), rows_exact)
    np.testing.assert_allclose(equal, reference.expand(h, 4), rtol=1e-12)

    columns_exact = np.swapaxes(rows_exact, -1, -2)
    x_next = reference.post(x, zeros, np.ones((7, 4)), columns_exact)
    np.testing.assert_allclose(x_next.sum(axis=1), x.sum(axis=1), rtol=1e-12, atol=1e-12)


def test_pre_returns_the_aggregate_and_the_mappings_of_post():
    """Catches outputs in another order, and a norm_weight that does not arrive."""
    spec = make_spec()
    x, *_ = make_mapped(4, 24)
    weight = np.linspace(0.5, 1.5, 4 * 24)
    arguments = x, *make_parameters(spec, seed=2), spec, weight
    h_pre, h_post, h_res = reference.coefficients(*arguments)
    expected = reference.aggregate(x, h_pre), h_post, h_res
    for actual, wanted in zip(reference.pre(*arguments), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    assert not np.allclose(expected[0], reference.pre(*arguments[:-1])[0])


def test_post_pre_is_post_then_pre_of_the_next_sublayer():
    """Catches mappings of the old sublayer handed on, and a pre that reads x instead of x_next."""
    spec = make_spec()
    x, layer_output, h_post, h_res = make_mapped(4, 24)
    parameters = *make_parameters(spec, seed=3), spec, np.linspace(0.5, 1.5, 4 * 24)
    x_next = reference.post(x, layer_output, h_post, h_res)
    expected = x_next, *reference.pre(x_next, *parameters)
    actual = reference.post_pre(x, layer_output, h_post, h_res, *parameters)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def test_one_stream_is_the_plain_residual():
    """n = 1: h_res is 1 by itself, σ(40) is 1 in float64, and 2σ(0) = 1. Catches a post_scale of 1."""
    spec = make_spec(num_streams=1, sinkhorn_eps=0.0, pre_eps=0.0)
    phi, alpha, _ = make_parameters(spec, seed=4)
    x, layer_output, _, _ = make_mapped(1, 24)
    layer_input, h_post, h_res = reference.pre(x, 0 * phi, alpha, [40.0, 0.0, 5.0], spec)
    np.testing.assert_allclose(layer_input, x[:, 0], rtol=1e-15)
    x_next = reference.post(x, layer_output, h_post, h_res)
    np.testing.assert_allclose(x_next[:, 0], reference.residual(x[:, 0], layer_output), rtol=1e-14)


def test_residual_adds():
    np.testing.assert_array_equal(reference.residual([[1.0, 2.0]], [[10.0, 20.0]]), [[11.0, 22.0]])
