"""sinkhorn, backward: exact after any number of iterations, in float32 as in float64.

Would catch: a step left out or undone in another order, the gradient of the limit instead of that of 20 iterations,
small elements lost in P − eps, denominators that do not fit where they are kept.
"""

import numpy as np
import pytest
import torch
from helpers import CPU, STREAMS, assert_matches_float64
from helpers_backward import BACKWARD

from mhc_tilelang import launch, reference
from mhc_tilelang.checking import tolerance
from mhc_tilelang.checking.comparison import Comparison, compare, numpy64
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.errors import GradientError
from mhc_tilelang.kernels import plans

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 1, torch.float32, 127, logit_std=6.0)
FUNCTION = BACKWARD["sinkhorn_backward"]


def drawn(n=4, std=3.0, num_tokens=127):
    """Upstream gradient and logits."""
    case = Case(n, 1, torch.float32, num_tokens, logit_std=std, seed=2)
    return Gradients.of(case, CPU).g_h_res, Inputs.of(case, CPU).logits


def passes(got, expected, g_h_res, logits, iters):
    """Return whether the result is within the bound of `checking`, which holds for any eps."""
    bound = tolerance.sinkhorn_backward(numpy64(g_h_res), np.zeros(logits.shape), numpy64(logits), iters)
    exact = np.asarray(expected)
    return compare(Comparison("g_logits", numpy64(got), exact, exact, bound, np.ones_like(bound))).passed


def assert_close(g_h_res, logits, iters=20, eps=1e-6):
    """Within the bound of the float64 definition; returns the kernel's."""
    got = launch.sinkhorn_backward(g_h_res, logits, iters, eps)
    expected = reference.sinkhorn_backward(numpy64(g_h_res), numpy64(logits), iters, eps)
    assert passes(got, expected, g_h_res, logits, iters)
    return got


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 63, 64, 65, 127, 4097, 65_537])
@pytest.mark.parametrize("n", STREAMS)
def test_matches_float64(n, num_tokens):
    assert_matches_float64("sinkhorn_backward", Case(n, 1, torch.float32, num_tokens))


@pytest.mark.parametrize("n", STREAMS)
def test_wide_logits(n):
    assert_matches_float64("sinkhorn_backward", Case(n, 1, torch.float32, 511, logit_std=6.0))


@pytest.mark.parametrize("std", [3.0, 6.0])
@pytest.mark.parametrize(
    ("n", "iters", "eps"),
    [(4, iters, 1e-6) for iters in (1, 2, 3, 20, 50)]
    + [(n, 2, 1e-6) for n in (2, 8)]
    + [(4, iters, eps) for iters in (1, 2, 20) for eps in (0.0, 1e-2)],
)
def test_every_step_counts(n, iters, eps, std):
    """One iteration more is rejected where it makes a difference, and the gradient without eps where eps is 0.01."""
    g_h_res, logits = drawn(n, std)
    got = assert_close(g_h_res, logits, iters, eps)
    others = [(iters + 1, eps)] + ([(iters, 0.0)] if eps == 1e-2 else [])
    for other in others:
        expected = reference.sinkhorn_backward(numpy64(g_h_res), numpy64(logits), *other)
        assert not passes(got, expected, g_h_res, logits, iters)


@pytest.mark.parametrize("n", STREAMS)
def test_logits_far_apart(n):
    """Up to ±50: elements of P down to 1e-43 and denominators down to eps. Catches P_0 − eps for the softmax."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.rand(127, n, n, generator=generator) * 100 - 50
    assert_close(drawn(n)[0], logits)


def test_small_elements_keep_their_gradient():
    """A logit 20 below the others of its column: a gradient of about 1e-9, right to 1e-4 of itself.

    The bound, which is absolute, does not see it. Catches a softmax taken as P_0 − eps.
    """
    logits = drawn(4, 1.0)[1]
    logits[:, 1, 2] = logits.amax((1, 2)) - 20
    g_h_res = drawn()[0]
    got = numpy64(launch.sinkhorn_backward(g_h_res, logits, 20, 1e-6))[:, 1, 2]
    expected = reference.sinkhorn_backward(numpy64(g_h_res), numpy64(logits), 20, 1e-6)[:, 1, 2]
    assert np.abs(expected).max() < 1e-7
    assert (np.abs(got - expected) <= 1e-4 * np.abs(expected).max()).all()


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_constant_gradients_show_nothing(iters):
    """Rows sum to one, so of `.sum().backward()` the gradient is zero, whatever the kernel did on the way.

    Why no test here and no check uses one.
    """
    _, logits = drawn()
    got = assert_close(torch.ones_like(logits), logits, iters, 0.0)
    assert got.abs().max() < 1e-5


def test_gradient_of_a_shifted_column_is_zero():
    """A shift of a column changes no result, so the gradients of a column add up to zero; those of a row do not."""
    g_h_res, logits = drawn()
    got = numpy64(assert_close(g_h_res, logits, 3))
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-6)
    assert np.abs(got.sum(2)).max() > 0.1


@pytest.mark.parametrize("n", STREAMS)
def test_most_iterations(n):
    """The largest count that a CPU keeps on chip works; one more is refused by name and with that number."""
    fits = [k for k in range(1, 3000) if all(plans.sinkhorn_backward_sizes(n, k, "cpu"))]
    most = max(fits)
    assert fits == list(range(1, most + 1))
    g_h_res, logits = drawn(n, 1.0, num_tokens=65)
    assert_close(g_h_res, logits, most)
    with pytest.raises(
        GradientError, match=rf"^sinkhorn: .*at most {most} iterations for {n} streams on cpu, got {most + 1}$"
    ):
        launch.sinkhorn_backward(g_h_res, logits, most + 1, 1e-6)


@pytest.mark.parametrize("iters", [10_000, 700])
def test_coefficients_have_the_same_limit(iters):
    """Before anything is compiled. Catches a limit that only Sinkhorn alone knows."""
    case = Case(4, 64, torch.float32, 3)
    function = BACKWARD["coefficients_backward"]
    spec = type(case.spec)(64, sinkhorn_iters=iters)
    with pytest.raises(GradientError, match=rf"expected at most \d+ iterations .*got {iters}"):
        function({**function.arguments(case), "spec": spec})


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("n", STREAMS)
def test_denominators_fit(n, kind):
    """Denominators fit at every count: whole vectors or warps, never more bytes than there are; few kernels.

    Never more tokens for more iterations.
    """
    sizes = [plans.sinkhorn_backward_sizes(n, k, kind) for k in range(1, 3000)]
    most = {"cpu": 2048, "cuda": 320}[kind] // n
    assert all(capacity >= k for k, (capacity, _) in enumerate(sizes[:most], start=1))
    assert set(sizes[most:]) == {(0, 0)}
    blocks = [block for _, block in sizes]
    assert blocks == sorted(blocks, reverse=True)
    assert set(blocks) <= {0, 16, 32, 64}
    assert all(block * (2 * capacity - 2) * n * 4 <= plans.DENOMINATOR_BYTES[kind] for capacity, block in sizes)
    assert len(set(sizes[:most])) <= 4
    assert sizes[19] == {"cpu": (512 // n, 64), "cuda": (20, 32)}[kind]  # the default
