"""Unconstrained Hyper-Connections (Eq. 5): the orientation of H^res, and what HC leaves unconstrained."""

from types import SimpleNamespace

import numpy as np
import pytest

from mhc_tilelang import reference

NUM_STREAMS, HIDDEN_SIZE, NUM_TOKENS = 4, 24, 5
SPEC = SimpleNamespace(num_streams=NUM_STREAMS, hidden_size=HIDDEN_SIZE, rms_eps=0.0)
ALPHA = np.array([0.3, 0.5, 0.9])


def make_inputs(n=NUM_STREAMS, seed=0):
    """x, theta with tanh arguments of std about 1, and bias."""
    rng = np.random.default_rng(seed)
    x = 3.0 * rng.standard_normal((NUM_TOKENS, n, HIDDEN_SIZE))
    theta = rng.standard_normal((n + 2, HIDDEN_SIZE)) / np.sqrt(HIDDEN_SIZE)
    return x, theta, rng.standard_normal(n * n + 2 * n)


def identity_bias(n, input_stream):
    """HC's own start: read one stream, add the output to all, mix nothing. A Pre-Norm residual."""
    return np.concatenate([np.eye(n)[input_stream], np.ones(n), np.eye(n).ravel()])


def test_coefficients_by_loops():
    """Row j of theta_res meets stream i in h_res[j, i]. Catches H^res transposed and groups out of order."""
    x, theta, bias = make_inputs()
    n = NUM_STREAMS
    h_pre, h_post, h_res = reference.hc_coefficients(x, theta, ALPHA, bias, SPEC)
    for t, i in np.ndindex(NUM_TOKENS, n):
        x_norm = x[t, i] / np.sqrt(np.mean(x[t, i] ** 2))
        np.testing.assert_allclose(h_pre[t, i], 0.3 * np.tanh(theta[0] @ x_norm) + bias[i])
        np.testing.assert_allclose(h_post[t, i], 0.5 * np.tanh(theta[1] @ x_norm) + bias[n + i])
        for j in range(n):
            expected = 0.9 * np.tanh(theta[2 + j] @ x_norm) + bias[2 * n + j * n + i]
            np.testing.assert_allclose(h_res[t, j, i], expected)


def test_form_of_the_hyper_connections_paper():
    """There A_r = tanh(x̃ W_r) is applied as A_r^T x: catches an orientation of only one paper."""
    x, theta, bias = make_inputs()
    layer_output = np.random.default_rng(1).standard_normal((NUM_TOKENS, HIDDEN_SIZE))
    _, h_post, h_res = reference.hc_pre(x, theta, ALPHA, 0 * bias, SPEC)
    x_next = reference.hc_post(x, layer_output, h_post, h_res)
    for t in range(NUM_TOKENS):
        x_norm = x[t] / np.sqrt(np.mean(x[t] ** 2, axis=-1, keepdims=True))
        mixing = ALPHA[2] * np.tanh(x_norm @ theta[2:].T)
        depth = ALPHA[1] * np.tanh(x_norm @ theta[1])
        expected = mixing.T @ x[t] + np.outer(depth, layer_output[t])
        np.testing.assert_allclose(x_next[t], expected, rtol=1e-10, atol=1e-12)


def test_each_stream_has_its_own_norm():
    """Catches mHC's norm over n·C: enlarging stream 2 a thousandfold may change nothing in any mapping."""
    x, theta, bias = make_inputs()
    larger = x.copy()
    larger[:, 2] *= 1000
    actual = reference.hc_coefficients(larger, theta, ALPHA, bias, SPEC)
    for a, e in zip(actual, reference.hc_coefficients(x, theta, ALPHA, bias, SPEC), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12)


def test_norm_weight_scales_the_channels_of_theta():
    x, theta, bias = make_inputs()
    weight = np.linspace(0.5, 1.5, HIDDEN_SIZE)
    actual = reference.hc_coefficients(x, theta, ALPHA, bias, SPEC, weight)
    for a, e in zip(actual, reference.hc_coefficients(x, theta * weight, ALPHA, bias, SPEC), strict=True):
        np.testing.assert_array_equal(a, e)


def test_permuted_streams_permute_the_coefficients():
    """Renaming the streams renames h_pre, h_post, both sides of h_res, and theta_res by output only."""
    x, theta, bias = make_inputs()
    n, order = NUM_STREAMS, np.array([2, 0, 3, 1])
    res = np.arange(2 * n, 2 * n + n * n).reshape(n, n)[order][:, order].ravel()
    rows = np.concatenate([order, n + order, res])
    theta_permuted = theta[np.concatenate([[0, 1], 2 + order])]
    h_pre, h_post, h_res = reference.hc_coefficients(x, theta, ALPHA, bias, SPEC)
    actual = reference.hc_coefficients(x[:, order], theta_permuted, ALPHA, bias[rows], SPEC)
    expected = h_pre[:, order], h_post[:, order], h_res[:, order][:, :, order]
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12)


def test_nothing_is_constrained():
    """Catches a sigmoid or a Sinkhorn left in: entries are negative, and rows do not sum to 1."""
    x, theta, bias = make_inputs()
    h_pre, h_post, h_res = reference.hc_coefficients(x, theta, ALPHA, 0 * bias, SPEC)
    assert min(h_pre.min(), h_post.min(), h_res.min()) < 0
    assert np.abs(h_res.sum(axis=-1) - 1).min() > 1e-3
    for mapping, bound in zip((h_pre, h_post, h_res), ALPHA, strict=True):
        assert bound / 2 < np.abs(mapping).max() < bound  # alpha outside the tanh


@pytest.mark.parametrize("n", [1, 4])
def test_static_identity_is_the_plain_residual(n):
    """theta = 0 and HC's initial bias: the layer sees a stream, and each stream becomes x + layer_output."""
    x, theta, _ = make_inputs(n)
    layer_output = np.random.default_rng(1).standard_normal((NUM_TOKENS, HIDDEN_SIZE))
    spec = SimpleNamespace(num_streams=n, hidden_size=HIDDEN_SIZE, rms_eps=1e-6)
    layer_input, h_post, h_res = reference.hc_pre(x, 0 * theta, ALPHA, identity_bias(n, n - 1), spec)
    np.testing.assert_array_equal(layer_input, x[:, n - 1])
    x_next = reference.hc_post(x, layer_output, h_post, h_res)
    for j in range(n):
        np.testing.assert_allclose(x_next[:, j], reference.residual(x[:, j], layer_output), rtol=1e-14)
