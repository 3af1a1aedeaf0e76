"""sinkhorn: every step in its place, by float64 at few iterations and wide logits, and by what must hold.

Would catch: rows before columns, an eps in the wrong place, an iteration too many, exp without its maximum.
"""

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    STREAMS,
    assert_matches_float64,
    assert_same_bits,
    assert_special_values_stay_in_their_token,
)

from mhc_tilelang import ops, reference
from mhc_tilelang.checking import tolerance
from mhc_tilelang.checking.comparison import Comparison, compare, numpy64
from mhc_tilelang.checking.inputs import Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 1, torch.float32, 127, logit_std=3.0)


def call(inputs, case):
    return (ops.sinkhorn(inputs.logits),)


def float64(inputs, case):
    return (reference.sinkhorn(numpy64(inputs.logits)),)


def logits_of(n=4, std=3.0, num_tokens=127):
    return Inputs.of(Case(n, 1, torch.float32, num_tokens, logit_std=std, seed=2), CPU).logits


def transposed(matrices):
    return np.swapaxes(matrices, -1, -2)


def verdict(got, expected, logits, iters):
    """Compare by the bound of `checking`, which holds for any eps: it comes from the number of steps and the logits."""
    bound = tolerance.sinkhorn(np.zeros(logits.shape), numpy64(logits), iters)
    return compare(Comparison("h_res", numpy64(got), numpy64(got), expected, bound, np.ones_like(expected)))


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 63, 64, 65, 127, 4097, 65_537])
@pytest.mark.parametrize("n", STREAMS)
def test_matches_float64(n, num_tokens):
    assert_matches_float64("sinkhorn", Case(n, 1, torch.float32, num_tokens))


@pytest.mark.parametrize("std", [3.0, 6.0])
@pytest.mark.parametrize(
    ("n", "iters", "eps"),
    [(4, 1, 1e-6), (4, 2, 1e-6), (4, 3, 1e-6), (4, 20, 1e-6), (2, 2, 1e-6), (8, 2, 1e-6)]
    + [(4, iters, eps) for iters in (1, 2, 20) for eps in (0.0, 1e-2)],
)
def test_every_step_counts(n, iters, eps, std):
    """Few iterations on wide logits, where the steps' order shows: the other order is far outside the bound.

    So is a result without eps, where eps is 0.01.
    """
    logits = logits_of(n, std)
    got, expected = ops.sinkhorn(logits, iters, eps), reference.sinkhorn(numpy64(logits), iters, eps)
    assert verdict(got, expected, logits, iters).passed
    rows_first = transposed(reference.sinkhorn(transposed(numpy64(logits)), iters, eps))
    assert not verdict(got, rows_first, logits, iters).passed
    if eps == 1e-2:
        assert not verdict(got, reference.sinkhorn(numpy64(logits), iters, 0.0), logits, iters).passed


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_rows_sum_to_one_but_for_eps(eps):
    """S / (S + eps) with S the sums before the last step, to the rounding of n + 2 operations.

    Catches a last step that is not the rows'. Columns are as far off as 20 iterations leave them. S, a sum of
    n entries near 1, has their error, which moves the result by at most 2 · eps times as much.
    """
    logits = logits_of()
    before = reference.sinkhorn(numpy64(logits), 19, eps)
    before = (before / (before.sum(-2, keepdims=True) + eps)).sum(-1)
    got = numpy64(ops.sinkhorn(logits, 20, eps))
    entry = tolerance.sinkhorn(np.zeros(logits.shape), numpy64(logits), 20).max()
    allowed = (4 + 2) * tolerance.U32 + 2 * eps * 4 * entry
    np.testing.assert_allclose(got.sum(-1), before / (before + eps), rtol=0, atol=allowed)
    assert np.abs(got.sum(-2) - 1).max() > 1e-3


def test_permuted_streams_permute_the_result():
    """Catches a row or column treated specially. Sums change their order: both sides are within one bound."""
    logits, outputs, inputs = logits_of(), [2, 0, 3, 1], [1, 3, 2, 0]
    permuted = logits[:, outputs][:, :, inputs].contiguous()
    expected = reference.sinkhorn(numpy64(logits), 2)[:, outputs][:, :, inputs]
    assert verdict(ops.sinkhorn(permuted, 2), expected, permuted, 2).passed


def test_a_shift_of_a_column_changes_no_bit():
    """The maximum over j is taken out exactly where the shift is: integers on integers. Catches one over i."""
    logits = logits_of().round()
    shift = torch.tensor([3.0, -40.0, 0.0, 70.0])
    assert_same_bits([ops.sinkhorn(logits + shift, 2)], [ops.sinkhorn(logits, 2)])


def test_logits_far_apart():
    """Up to ±3e38: exp must not overflow, differences may, to −infinity. With eps no row can vanish."""
    logits = torch.randn(63, 4, 4, generator=torch.Generator().manual_seed(3))
    logits = torch.cat([logits * 100, logits * 1e4, torch.where(logits > 0, 3e38, -3e38)])
    got = numpy64(ops.sinkhorn(logits))
    np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-5)
    assert (got >= 0).all()


def test_extreme_logits_are_exact():
    """Logits of −200 off the diagonal vanish in float32: the identity, and NaN nowhere, even with eps 0."""
    logits = torch.full((3, 4, 4), -200.0)
    logits.diagonal(dim1=1, dim2=2).zero_()
    assert_same_bits([ops.sinkhorn(logits, 20, 0.0)], [torch.eye(4).expand(3, 4, 4).contiguous()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_special_values(value):
    """NaN and +infinity make the matrix NaN; −infinity is a plain zero weight and must stay finite."""
    if value == float("-inf"):
        logits = logits_of()
        logits[5, 1, 2] = value
        expected = reference.sinkhorn(numpy64(logits))
        bounded = logits.clamp(min=-30.0)  # the bound grows with the largest |logit|; −infinity rounds nothing
        assert verdict(ops.sinkhorn(logits), expected, bounded, 20).passed
    else:
        assert_special_values_stay_in_their_token(call, float64, CASE, "logits", value)
