"""Sinkhorn-Knopp (Eq. 9, 19): limits, the order of its two steps, the conventions of other projects."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mhc_tilelang import reference


def square_logits(bound):
    """[T, n, n] with entries in [−bound, bound]."""
    shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4, 8])).map(lambda s: (s[0], s[1], s[1]))
    return hnp.arrays(np.float64, shapes, elements=st.floats(-bound, bound))


def transposed(matrices):
    return np.swapaxes(matrices, -1, -2)


def deepseek_comb(logits, iters, eps):
    """The released code on comb [in, out] = h_res transposed: softmax over the last axis, then columns."""
    comb = np.exp(logits - logits.max(-1, keepdims=True))
    comb = comb / comb.sum(-1, keepdims=True) + eps
    comb /= comb.sum(-2, keepdims=True) + eps
    for _ in range(iters - 1):
        comb /= comb.sum(-1, keepdims=True) + eps
        comb /= comb.sum(-2, keepdims=True) + eps
    return comb


def test_one_iteration_by_hand():
    """Catches a softmax over i, rows before columns, and a transposed result: each changes these numbers."""
    logits = np.log([[1.0, 3.0], [1.0, 1.0]])  # columns: [1, 1]/2 and [3, 1]/4
    expected = [[0.5 / 1.25, 0.75 / 1.25], [0.5 / 0.75, 0.25 / 0.75]]
    np.testing.assert_allclose(reference.sinkhorn(logits, iters=1, eps=0.0), expected, rtol=1e-15)


def test_eps_is_added_to_the_softmax_and_to_each_sum():
    """Catches an eps missing from either place, or added to the exponentials: eps = 0.5 is not small."""
    logits = np.log([[1.0, 3.0], [1.0, 1.0]])
    expected = [[1.0 / 2.75, 1.25 / 2.75], [1.0 / 2.25, 0.75 / 2.25]]
    np.testing.assert_allclose(reference.sinkhorn(logits, iters=1, eps=0.5), expected, rtol=1e-15)


@settings(deadline=None)
@given(square_logits(bound=8.0), st.integers(1, 30))
def test_rows_sum_to_one_after_any_iteration(logits, iters):
    """Catches columns normalised last: then rows would sum to 1 only in the limit."""
    h_res = reference.sinkhorn(logits, iters, eps=0.0)
    assert (h_res >= 0).all()
    np.testing.assert_allclose(h_res.sum(axis=-1), 1.0, rtol=1e-14)


@settings(deadline=None)
@given(square_logits(bound=2.0))
def test_limit_is_doubly_stochastic(logits):
    """Eq. 6. Catches one direction normalised twice.

    Two steps contract Hilbert's metric by tanh(d/4)², d ≤ 8 for entries within ±2: 0.93^500 < 1e-15.
    """
    h_res = reference.sinkhorn(logits, iters=500, eps=0.0)
    np.testing.assert_allclose(h_res.sum(axis=-1), 1.0, rtol=1e-13)
    np.testing.assert_allclose(h_res.sum(axis=-2), 1.0, rtol=1e-12)


@settings(deadline=None)
@given(square_logits(bound=8.0), st.integers(1, 5))
def test_equation_9_as_printed(logits, iters):
    """exp, then T_r(T_c(·)): catches a softmax that is not T_c, and an iteration too many or too few."""
    matrix = np.exp(logits)
    for _ in range(iters):
        matrix = matrix / matrix.sum(axis=-2, keepdims=True)
        matrix = matrix / matrix.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(reference.sinkhorn(logits, iters, eps=0.0), matrix, rtol=1e-12)


@pytest.mark.parametrize("iters", [1, 2, 3])
def test_order_of_the_steps_shows_at_std_3(iters):
    """Tests the other tests: rows first must be far from columns first on such data, or none could tell."""
    logits = 3.0 * np.random.default_rng(0).standard_normal((64, 4, 4))
    columns_first = reference.sinkhorn(logits, iters)
    rows_first = transposed(reference.sinkhorn(transposed(logits), iters))
    difference = np.abs(columns_first - rows_first).max(axis=(-1, -2))
    assert np.median(difference) > 0.05


@pytest.mark.parametrize("iters", [1, 2, 3, 20])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_deepseek_comb_is_the_transpose(iters, eps):
    """The released semantics, eps and all, seen through h_res = comb^T: any other order or eps fails."""
    logits = 3.0 * np.random.default_rng(1).standard_normal((64, 4, 4))
    comb = deepseek_comb(transposed(logits), iters, eps)
    np.testing.assert_allclose(reference.sinkhorn(logits, iters, eps), transposed(comb), rtol=1e-12)


@pytest.mark.parametrize("iters", [1, 3, 20])
def test_liger_convention_is_reached_by_two_transposes(iters):
    """Liger runs the same steps on h_res [out, in] itself: rows first, columns last."""
    logits = 3.0 * np.random.default_rng(2).standard_normal((64, 4, 4))
    liger = deepseek_comb(logits, iters, eps=1e-6)
    ours = transposed(reference.sinkhorn(transposed(logits), iters, eps=1e-6))
    np.testing.assert_allclose(ours, liger, rtol=1e-12)
    np.testing.assert_allclose(liger.sum(axis=-2), 1.0, atol=1e-4)  # its exact side is the columns


def test_permuted_streams_permute_the_result():
    """Catches an index treated specially, and rows and columns confused: the two permutations differ."""
    rng = np.random.default_rng(3)
    logits = 3.0 * rng.standard_normal((16, 4, 4))
    outputs, inputs = [2, 0, 3, 1], [1, 3, 2, 0]
    permuted = reference.sinkhorn(logits[:, outputs][:, :, inputs], iters=2)
    np.testing.assert_allclose(permuted, reference.sinkhorn(logits, iters=2)[:, outputs][:, :, inputs], rtol=1e-14)


def test_a_shift_of_a_column_is_invisible_even_with_eps():
    """The first step is a softmax over j. Catches one over i, which sees such a shift when eps > 0."""
    rng = np.random.default_rng(4)
    logits, shift = rng.standard_normal((16, 4, 4)), 5.0 * rng.standard_normal((16, 1, 4))
    expected = reference.sinkhorn(logits, eps=1e-2)
    np.testing.assert_allclose(reference.sinkhorn(logits + shift, eps=1e-2), expected, rtol=1e-12)


def test_huge_logits_stay_finite():
    """Catches exp without the maximum taken out, which overflows at 710."""
    logits = 1e4 * np.random.default_rng(5).standard_normal((16, 4, 4))
    h_res = reference.sinkhorn(logits)
    assert ((h_res >= 0) & (h_res <= 1)).all()  # false for NaN as well


def implicit_backward(g_h_res, h_res):
    """g_logits[j, i] = h_res[j, i] · (g_h_res[j, i] − u[j] − v[i]), with u and v such that rows and columns sum to 0.

    The derivative of the limit, where h_res[j, i] = u'[j]·exp(logits[j, i])·v'[i] with sums of 1: what one gets by
    differentiating the constraints instead of the iterations.
    """
    weighted = g_h_res * h_res
    g_logits = np.empty_like(h_res)
    for token, matrix in enumerate(h_res):
        rows, columns = np.diag(matrix.sum(axis=1)), np.diag(matrix.sum(axis=0))
        system = np.block([[rows, matrix], [matrix.T, columns]])
        sums = np.concatenate([weighted[token].sum(axis=1), weighted[token].sum(axis=0)])
        u, v = np.split(np.linalg.lstsq(system, sums)[0], 2)
        g_logits[token] = weighted[token] - matrix * (u[:, None] + v)
    return g_logits


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_gradient_is_that_of_the_iterations_not_of_the_limit(n):
    """Implicit differentiation is right where the iterations have converged, and only there.

    At std 6 and 20 iterations some matrices have not, so a kernel that used it would train another function.
    """
    rng = np.random.default_rng(6)
    logits, g_h_res = rng.standard_normal((2, 32, n, n))
    for std, iters, differs in [(1.0, 500, False), (1.0, 1, True), (1.0, 2, True), (6.0, 3, True), (6.0, 20, True)]:
        exact = reference.sinkhorn_backward(g_h_res, std * logits, iters, eps=0.0)
        implicit = implicit_backward(g_h_res, reference.sinkhorn(std * logits, iters, eps=0.0))
        error = relative_error(implicit, exact)
        assert error > 1e-2 if differs else error < 1e-10, (std, iters, error)

        step = 6e-6 * rng.standard_normal(logits.shape)
        ahead, behind = (reference.sinkhorn(std * logits + h, iters, eps=0.0) for h in (step, -step))
        np.testing.assert_allclose(2 * (exact * step).sum(), (g_h_res * (ahead - behind)).sum(), rtol=1e-6)


@settings(deadline=None)
@given(square_logits(bound=8.0), st.integers(1, 30), st.sampled_from([0.0, 1e-6, 1e-2]))
def test_gradient_has_no_part_that_shifts_a_column(logits, iters, eps):
    """Σ_j g_logits[j, i] = 0, as no such shift is seen. Catches a softmax backward over i, or left out."""
    g_h_res = np.random.default_rng(7).standard_normal(logits.shape)
    g_logits = reference.sinkhorn_backward(g_h_res, logits, iters, eps)
    np.testing.assert_allclose(g_logits.sum(axis=-2), 0.0, atol=1e-13 * (1 + np.abs(g_logits).max()))


def test_gradient_of_huge_logits_is_finite():
    """Catches an overflowing exp, and a rebuilt matrix that divides where the forward multiplied."""
    logits, g_h_res = np.random.default_rng(8).standard_normal((2, 16, 4, 4))
    assert np.isfinite(reference.sinkhorn_backward(g_h_res, 1e4 * logits)).all()


def test_zero_iterations_are_refused():
    with pytest.raises(ValueError, match="iters: expected at least 1, got 0"):
        reference.sinkhorn(np.zeros((2, 2)), iters=0)
    with pytest.raises(ValueError, match="iters: expected at least 1, got 0"):
        reference.sinkhorn_backward(np.ones((2, 2)), np.zeros((2, 2)), iters=0)
