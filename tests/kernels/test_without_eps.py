"""sinkhorn_eps = 0, the paper's Eq. 9: logits however far apart give what float64 gives, forward and backward.

Would catch: a row that lies far below the maxima of its columns divided by its own underflown sum, in any function that
has the mappings; a row's maximum taken before the columns', or of D − r without w; a way back through d_1.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import CPU, STREAMS, assert_matches_float64, assert_same_bits, assert_special_values_stay_in_their_token

from mhc_tilelang import launch, ops, reference
from mhc_tilelang.checking import plain_torch, tolerance
from mhc_tilelang.checking.comparison import Comparison, compare, numpy64
from mhc_tilelang.checking.inputs import Case, Gradients
from mhc_tilelang.compiler import simt

pytestmark = pytest.mark.usefixtures("poisoned")
# What lucidrains' static logits are divided by; their own are 0 and -8, and training moves them.
TEMPERATURE = 0.05


@dataclass(frozen=True)
class WithoutEps(Case):
    """A case with the paper's sinkhorn_eps."""

    @property
    def spec(self):
        return replace(super().spec, sinkhorn_eps=0.0)


def assert_close(name, got, expected, bound):
    assert compare(Comparison(name, numpy64(got), expected, expected, bound, np.ones_like(expected))).passed


def assert_both_ways(logits, iters=20):
    """Forward and backward of the logits within the bounds of `checking`; returns h_res and g_logits."""
    g_h_res = Gradients.of(Case(logits.shape[-1], 1, torch.float32, len(logits)), CPU).g_h_res
    exact, gradient, no_bound = numpy64(logits), numpy64(g_h_res), np.zeros(logits.shape)
    h_res = ops.sinkhorn(logits, iters, 0.0)
    assert_close("h_res", h_res, reference.sinkhorn(exact, iters, 0.0), tolerance.sinkhorn(no_bound, exact, iters))
    g_logits = launch.sinkhorn_backward(g_h_res, logits, iters, 0.0)
    bound = tolerance.sinkhorn_backward(gradient, no_bound, exact, iters)
    assert_close("g_logits", g_logits, reference.sinkhorn_backward(gradient, exact, iters, 0.0), bound)
    return h_res, g_logits


def logits_of(n, std, num_tokens=129):
    return std * torch.randn(num_tokens, n, n, generator=torch.Generator().manual_seed(5))


def far_row(n, below):
    logits = torch.zeros(1, n, n)
    logits[0, -1] = -below
    return logits


@pytest.mark.parametrize("below", [105.0, 745.0, 800.0, 1e6, 1e38])
@pytest.mark.parametrize("n", STREAMS)
def test_a_row_far_below_counts_as_any_other(n, below):
    """Its ratios are those of the other rows: everything is 1/n, to the bit, also in float64 and in plain torch."""
    logits, even = far_row(n, below), torch.full((1, n, n), 1 / n)
    assert_same_bits([ops.sinkhorn(logits, 20, 0.0)], [even])
    np.testing.assert_array_equal(reference.sinkhorn(numpy64(logits), 20, 0.0), numpy64(even))
    torch.testing.assert_close(plain_torch.sinkhorn(logits, 20, 0.0), even, rtol=1e-6, atol=0)


def test_gradient_of_a_row_far_below_is_that_of_any_other():
    """Rows that differ by a constant have the gradients of rows that do not, but for the softmax's last step.

    A shift of a row changes nothing after the first iteration at one iteration: by differences, in float64.
    """
    logits = logits_of(4, 1.0, 3)
    logits[:, 2] -= 200
    g_logits = numpy64(assert_both_ways(logits, 3)[1])
    gradient = numpy64(Gradients.of(Case(4, 1, torch.float32, 3), CPU).g_h_res)
    step = 1e-6 * np.random.default_rng(1).standard_normal(logits.shape)
    ahead, behind = (reference.sinkhorn(numpy64(logits) + h, 3, 0.0) for h in (step, -step))
    by_differences = (gradient * (ahead - behind)).sum() / 2
    assert abs((g_logits * step).sum() - by_differences) < 1e-4 * np.abs(g_logits * step).sum()
    assert np.abs(g_logits[:, 2]).max() > 0.01


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("std", [64.0, 8.0 / TEMPERATURE, 1e4])
@pytest.mark.parametrize("n", STREAMS)
def test_wide_logits(n, std, iters):
    assert_both_ways(logits_of(n, std), iters)


@pytest.mark.parametrize("n", STREAMS)
def test_exact_where_the_logits_are(n):
    """Logits that are multiples of 1/8 below 2^20: differences are exact, and the bound is that of small logits.

    Catches a logarithm of the column sums added to them, which rounds by as much as the logits are large.
    """
    logits = (logits_of(n, 1.0) * 8).round() / 8 + (2.0**16 * logits_of(n, 1.0)[:, :, :1]).round()
    exact, iters = numpy64(logits), 20
    bound = tolerance.sinkhorn(np.zeros(logits.shape), np.ones(logits.shape), iters)
    assert_close("h_res", ops.sinkhorn(logits, iters, 0.0), reference.sinkhorn(exact, iters, 0.0), bound)


@pytest.mark.parametrize("n", STREAMS)
def test_static_logits(n):
    """0 on the diagonal, -8 elsewhere, over the temperature; then one stream that nothing prefers."""
    logits = torch.full((2, n, n), -8.0 / TEMPERATURE)
    logits[0].diagonal().zero_()
    logits[1, 0] = 0
    h_res, _ = assert_both_ways(logits)
    assert_same_bits([h_res], [torch.stack([torch.eye(n), torch.full((n, n), 1 / n)])])


def phi_of_one(n, hidden_size, dtype):
    """phi of standard deviation 1, as TransformerEngine's tests have it: logits of √K, up to ±300."""
    return WithoutEps(n, hidden_size, dtype, 127, logit_std=(n * hidden_size) ** 0.5)


@pytest.mark.parametrize(
    "function", ["coefficients", "aggregate_mappings", "post_pre", "coefficients_backward", "post_pre_backward"]
)
def test_phi_of_standard_deviation_one(function):
    """Logits like these have, in 3.6 % of cases, a row that exp alone makes NaN."""
    assert_matches_float64(function, phi_of_one(4, 1280, torch.bfloat16))


@pytest.mark.parametrize("function", ["coefficients", "coefficients_backward"])
@pytest.mark.parametrize("n", [2, 8])
def test_other_numbers_of_streams(n, function):
    """Logits of a standard deviation of 70, as of n = 4 and C = 1280."""
    assert_matches_float64(function, WithoutEps(n, 192, torch.float32, 127, logit_std=70.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values(value):
    def call(inputs, case):
        return (ops.sinkhorn(inputs.logits, 20, 0.0),)

    def float64(inputs, case):
        return (reference.sinkhorn(numpy64(inputs.logits), 20, 0.0),)

    case = Case(4, 1, torch.float32, 65, logit_std=160.0)
    assert_special_values_stay_in_their_token(call, float64, case, "logits", value)


def test_a_weight_of_zero():
    """−infinity is one, and the rest of its row and column is as finite as before."""
    logits = logits_of(4, 160.0)
    logits[:, 1, 2] = -float("inf")
    got, expected = ops.sinkhorn(logits, 20, 0.0), reference.sinkhorn(numpy64(logits), 20, 0.0)
    assert_close("h_res", got, expected, tolerance.sinkhorn(np.zeros(got.shape), numpy64(logits.clamp(min=-600)), 20))
    assert (got[:, 1, 2] == 0).all()


def test_generated_cuda_code():
    """Both kernels as a GPU would run them."""
    with simt.executing():
        assert_both_ways(logits_of(4, 160.0))
