"""The projection and the coefficients (Eq. 7, 8 and 14 to 18), of a sublayer and of the head."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_tilelang import reference

NAMES = ("h_pre", "h_post", "h_res")


def make_spec(num_streams=4, hidden_size=24, **changes):
    """The paper's constants, every eps 0; a plain object, since the reference asks for no more."""
    constants = {"sinkhorn_iters": 20, "sinkhorn_eps": 0.0, "pre_eps": 0.0, "rms_eps": 0.0, "post_scale": 2.0}
    return SimpleNamespace(num_streams=num_streams, hidden_size=hidden_size, **(constants | changes))


def make_inputs(spec, num_tokens=5, seed=0):
    """x, phi, alpha and bias that give logits of std about 2, with a different alpha for each group."""
    n, C = spec.num_streams, spec.hidden_size
    rng = np.random.default_rng(seed)
    x = 3.0 * rng.standard_normal((num_tokens, n, C))
    phi = 2.0 / np.sqrt(n * C) * rng.standard_normal((n * n + 2 * n, n * C))
    return x, phi, np.array([0.7, 1.1, 1.6]), rng.standard_normal(n * n + 2 * n)


def assert_mappings_close(actual, expected, rtol=1e-12):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, err_msg=name)


def logistic(z):
    return 1 / (1 + np.exp(-z))


def test_dots_and_squares_run_over_streams_then_channels():
    """k = i·C + c. Catches a projection that flattens [C, n], and a phi indexed [K, M]."""
    n, C = 3, 5
    x = np.random.default_rng(0).standard_normal((2, n, C))
    phi = np.zeros((2, n * C))
    phi[0, 2 * C + 1], phi[1, 0 * C + 4] = 1.0, 10.0
    dots, sum_squares = reference.project(x, phi)
    np.testing.assert_array_equal(dots, np.stack([x[:, 2, 1], 10 * x[:, 0, 4]], axis=-1))
    np.testing.assert_allclose(sum_squares, [sum(v * v for v in token.ravel()) for token in x], rtol=1e-14)


def test_rms_scale():
    """Catches a scale inverted, not averaged, or with eps outside the root: 1 / sqrt(12 / 4 + 1) = 1/2."""
    assert reference.rms_scale(12.0, 4, 1.0) == 0.5
    np.testing.assert_allclose(reference.rms_scale([0.0, 4e-40], 4, 1e-20), [1e10, 1e10], rtol=1e-15)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 33), st.integers(0, 1000))
def test_kernel_form_equals_the_papers_form(n, C, seed):
    """Eq. 14 to 19 against Eq. 7 to 9 (normalise, then project). Catches any factor misplaced."""
    spec = make_spec(n, C, sinkhorn_iters=3)
    x, phi, alpha, bias = make_inputs(spec, seed=seed)
    weight = 1 + 0.3 * np.random.default_rng(seed).standard_normal(n * C)

    x_flat = x.reshape(len(x), -1)
    x_norm = weight * x_flat / np.sqrt(np.mean(x_flat**2, axis=-1, keepdims=True))
    z_pre = alpha[0] * (x_norm @ phi[:n].T) + bias[:n]
    z_post = alpha[1] * (x_norm @ phi[n : 2 * n].T) + bias[n : 2 * n]
    z_res = alpha[2] * (x_norm @ phi[2 * n :].T).reshape(-1, n, n) + bias[2 * n :].reshape(n, n)
    expected = logistic(z_pre), 2 * logistic(z_post), reference.sinkhorn(z_res, iters=3, eps=0.0)

    assert_mappings_close(reference.coefficients(x, phi, alpha, bias, spec, weight), expected, rtol=1e-10)


def test_bias_is_not_scaled():
    """Eq. 16. With phi = 0 only the bias is left: catches bias · s, which differs at an rms of 3 or 300."""
    spec = make_spec()
    x, phi, alpha, bias = make_inputs(spec)
    n = spec.num_streams
    h_res = reference.sinkhorn(bias[2 * n :].reshape(n, n), eps=0.0)
    expected = logistic(bias[:n]), 2 * logistic(bias[n : 2 * n]), h_res
    for scale in (1.0, 100.0):
        mappings = reference.coefficients(scale * x, 0 * phi, alpha, bias, spec)
        assert_mappings_close(mappings, [np.broadcast_to(h, (len(x), *h.shape)) for h in expected])


def test_scale_of_the_stream_is_invisible_without_rms_eps():
    """RMSNorm. Catches a mean over the wrong elements, and an rms_eps that is ignored."""
    x, phi, alpha, bias = make_inputs(make_spec())
    expected = reference.coefficients(x, phi, alpha, bias, make_spec())
    assert_mappings_close(reference.coefficients(1000 * x, phi, alpha, bias, make_spec()), expected)
    h_pre, *_ = reference.coefficients(x, phi, alpha, bias, make_spec(rms_eps=1.0))
    assert np.abs(h_pre - expected[0]).max() > 1e-3


@pytest.mark.parametrize("group", [0, 1, 2])
def test_alpha_and_rows_belong_to_their_group(group):
    """Catches groups in another order, or of another size: a change in one may show in its mapping only."""
    spec = make_spec(num_streams=3)
    x, phi, alpha, bias = make_inputs(spec)
    before = reference.coefficients(x, phi, alpha, bias, spec)
    changed_alpha, changed_phi = alpha.copy(), phi.copy()
    changed_alpha[group] *= 2
    changed_phi[[slice(0, 3), slice(3, 6), slice(6, 15)][group]] *= 2
    for after in (
        reference.coefficients(x, phi, changed_alpha, bias, spec),
        reference.coefficients(x, changed_phi, alpha, bias, spec),
    ):
        same = [np.array_equal(a, b) for a, b in zip(after, before, strict=True)]
        assert same == [index != group for index in range(3)]


def test_res_rows_are_row_major_out_in():
    """Catches res rows read as [in, out]: logit (j=2, i=0) must raise h_res[2, 0] above the rest."""
    spec = make_spec(num_streams=3)
    x, phi, alpha, bias = make_inputs(spec)
    bias = np.zeros_like(bias)
    bias[2 * 3 + 2 * 3 + 0] = 4.0
    _, _, h_res = reference.coefficients(x, 0 * phi, alpha, bias, spec)
    assert (h_res.reshape(len(x), 9).argmax(axis=-1) == 2 * 3 + 0).all()


def test_permuted_streams_permute_the_coefficients():
    """Renaming the streams renames h_pre, h_post and both sides of h_res. Catches any index out of place."""
    spec = make_spec(sinkhorn_iters=3)
    n, C = spec.num_streams, spec.hidden_size
    x, phi, alpha, bias = make_inputs(spec)
    order = [2, 0, 3, 1]
    res = np.arange(2 * n, 2 * n + n * n).reshape(n, n)[order][:, order].ravel()
    rows = np.concatenate([order, n + np.array(order), res])
    phi_permuted = phi[rows].reshape(-1, n, C)[:, order].reshape(phi.shape)

    h_pre, h_post, h_res = reference.coefficients(x, phi, alpha, bias, spec)
    permuted = reference.coefficients(x[:, order], phi_permuted, alpha, bias[rows], spec)
    assert_mappings_close(permuted, (h_pre[:, order], h_post[:, order], h_res[:, order][:, :, order]))


def test_constants_of_the_spec_reach_their_mapping():
    """Catches a constant ignored, or pre_eps applied to h_post (the released code has none there)."""
    x, phi, alpha, bias = make_inputs(make_spec())
    h_pre, h_post, _ = reference.coefficients(x, phi, alpha, bias, make_spec())
    spec = make_spec(pre_eps=0.25, post_scale=3.0, sinkhorn_iters=2, sinkhorn_eps=0.1)
    actual = reference.coefficients(x, phi, alpha, bias, spec)

    dots, sum_squares = reference.project(x, phi)
    scale = reference.rms_scale(sum_squares, phi.shape[1], 0.0)
    logits = reference.compute_logits(dots, scale, reference.alpha_per_row(alpha, 4), bias)
    h_res = reference.sinkhorn(reference.split_groups(logits, 4)[2], 2, 0.1)
    assert_mappings_close(actual, (h_pre + 0.25, 1.5 * h_post, h_res))


def test_sigmoid_is_accurate_in_both_tails():
    """Catches (1 + tanh) / 2, which is 0 at −40, and exp(−z), which overflows at −800."""
    with np.errstate(over="raise"):
        tails = reference.gate_pre([-800.0, -40.0, 0.0, 40.0, 800.0], pre_eps=0.0)
    np.testing.assert_allclose(tails, [0.0, np.exp(-40.0), 0.5, 1.0, 1.0], rtol=1e-14)
    z = np.linspace(-30, 30, 101)
    both = reference.gate_pre(z, pre_eps=0.0) + reference.gate_pre(-z, pre_eps=0.0)
    np.testing.assert_allclose(both, 1.0, rtol=1e-14)


def test_backward_from_what_a_forward_keeps():
    """scaled = s·dots and s, and the forward's arguments: the form of the kernels, with no sum over x but the last.

    Catches an rms_eps taken for 0 in ρ: it is 1 here, as large as the mean of x².
    """
    spec = make_spec(rms_eps=1.0, sinkhorn_eps=1e-2, sinkhorn_iters=3, post_scale=3.0)
    n, K = spec.num_streams, spec.num_streams * spec.hidden_size
    x, phi, alpha, bias = make_inputs(spec)
    x /= 3.0
    rng = np.random.default_rng(1)
    upstream = [rng.standard_normal((len(x), *shape)) for shape in ((n,), (n,), (n, n))]
    dots, sum_squares = reference.project(x, phi)
    scale = reference.rms_scale(sum_squares, K, spec.rms_eps)[:, None]
    scaled, alpha_rows = scale * dots, reference.alpha_per_row(alpha, n)

    z_pre, z_post, z_res = reference.split_groups(alpha_rows * scaled + bias, n)
    g_z_pre = upstream[0] * logistic(z_pre) * (1 - logistic(z_pre))
    g_z_post = upstream[1] * 3.0 * logistic(z_post) * (1 - logistic(z_post))
    g_z_res = reference.sinkhorn_backward(upstream[2], z_res, 3, 1e-2)
    g_z = np.concatenate([g_z_pre, g_z_post, g_z_res.reshape(len(x), -1)], axis=-1)
    g_dots = g_z * alpha_rows * scale
    rho = -(scale**2) / K * (g_z * alpha_rows * scaled).sum(axis=-1, keepdims=True)
    g_alpha_rows = (g_z * scaled).sum(axis=0)
    g_alpha = [g_alpha_rows[:n].sum(), g_alpha_rows[n : 2 * n].sum(), g_alpha_rows[2 * n :].sum()]
    x_flat = x.reshape(len(x), K)
    expected = (g_dots @ phi + rho * x_flat).reshape(x.shape), g_dots.T @ x_flat, g_alpha, g_z.sum(axis=0)

    *actual, absent = reference.coefficients_backward(*upstream, x, phi, alpha, bias, spec)
    assert absent is None
    for name, a, e in zip(("x", "phi", "alpha", "bias"), actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-11, atol=1e-13, err_msg=name)


def test_gradient_by_x_is_orthogonal_to_x_without_rms_eps():
    """No scale of the stream is seen, so no gradient points along it. Catches a ρ of another size or sign."""
    x, phi, alpha, bias = make_inputs(make_spec())
    upstream = [np.random.default_rng(1).standard_normal((5, *shape)) for shape in ((4,), (4,), (4, 4))]
    for rms_eps, orthogonal in ((0.0, True), (1.0, False)):
        g_x, *_ = reference.coefficients_backward(*upstream, x, phi, alpha, bias, make_spec(rms_eps=rms_eps))
        along = np.abs((g_x * x).sum(axis=(1, 2))) / np.linalg.norm(g_x * x, axis=(1, 2))
        assert (along < 1e-11).all() if orthogonal else (along > 1e-3).all()


def test_sigmoid_slope_is_accurate_in_both_tails():
    """Catches σ(z)·(1 − σ(z)), which is 0 at 40: a saturated gate would not train in the reference."""
    spec = make_spec(num_streams=1, hidden_size=1)
    for z in (-40.0, 40.0):
        *_, g_bias, _ = reference.coefficients_backward(
            [1.0], None, None, [[1.0]], np.zeros((3, 1)), np.ones(3), [z, 0, 0], spec
        )
        np.testing.assert_allclose(g_bias, [np.exp(-40.0), 0.0, 0.0], rtol=1e-14)


def test_head_is_the_pre_group_alone():
    """Catches a head with its own normalisation, gate or eps: its n rows are the first n of a sublayer."""
    spec = make_spec(pre_eps=1e-2, rms_eps=1e-1)
    n = spec.num_streams
    x, phi, alpha, bias = make_inputs(spec)
    weight = np.linspace(0.5, 1.5, phi.shape[1])
    h_pre, _, _ = reference.coefficients(x, phi, alpha, bias, spec, weight)
    head = x, phi[:n], alpha[:1], bias[:n], spec, weight
    np.testing.assert_allclose(reference.head_coefficients(*head), h_pre, rtol=1e-13)
    np.testing.assert_allclose(reference.head(*head), reference.aggregate(x, h_pre), rtol=1e-12)

    g_h_pre = np.random.default_rng(1).standard_normal(h_pre.shape)
    g_x, g_phi, g_alpha, g_bias, g_weight = reference.coefficients_backward(
        g_h_pre, None, None, x, phi, alpha, bias, spec, weight
    )
    expected = g_x, g_phi[:n], g_alpha[:1], g_bias[:n], g_weight
    for actual, wanted in zip(reference.head_coefficients_backward(g_h_pre, *head), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-13)
