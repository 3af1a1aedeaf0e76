"""coefficients, backward: from the gradients of the three mappings to the projection's rows, ρ, alpha and bias.

Would catch: an alpha of another group, a post_scale left out, 1 − σ(z) where it is zero, a gradient that is read though
it was not given, blocks of tokens that are missing from the parameters' gradients.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers import assert_matches_float64
from helpers_backward import BACKWARD
from test_coefficients import Changed

from mhc_tilelang import MHCSpec
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case
from mhc_tilelang.launch.coefficients import run_in_parts

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 67)
FUNCTION = BACKWARD["coefficients_backward"]
GIVEN = ("g_h_pre", "g_h_post", "g_h_res")


@pytest.mark.parametrize(
    ("name", "value"), [("post_scale", 3.0), ("sinkhorn_eps", 0.01), ("sinkhorn_eps", 0.0), ("sinkhorn_iters", 3)]
)
def test_every_constant_of_the_spec(name, value):
    """One constant at a time far from its default; the default's gradient is another."""
    case = Changed(4, 192, torch.bfloat16, 127, constants=((name, value),))
    assert_matches_float64("coefficients_backward", case)
    arguments = FUNCTION.arguments(case)
    default = FUNCTION({**arguments, "spec": MHCSpec.deepseek_v4(192)})
    difference = FUNCTION(arguments)["g_projected"] - default["g_projected"]
    assert difference.abs().max() > (1e-5 if value == 0.0 else 1e-2)


@pytest.mark.parametrize("given", list(product([False, True], repeat=3)))
def test_every_subset_of_gradients(given):
    """None is a gradient of zeros: the same numbers, up to the sign of a zero."""
    arguments = FUNCTION.arguments(CASE)
    none, zeros = dict(arguments), dict(arguments)
    for name, is_given in zip(GIVEN, given, strict=True):
        if not is_given:
            none[name], zeros[name] = None, torch.zeros_like(arguments[name])
    got, expected = FUNCTION(none), FUNCTION(zeros)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert got["g_projected"].any() == any(given)


@pytest.mark.parametrize("given", GIVEN)
def test_groups_do_not_mix(given):
    """A gradient of one mapping reaches its own rows, its own alpha and ρ. Catches the neighbour's rows or alpha."""
    arguments = FUNCTION.arguments(CASE)
    got = FUNCTION({**arguments, **{name: None for name in GIVEN if name != given}})
    n, group = CASE.num_streams, GIVEN.index(given)
    rows = torch.tensor([0] * n + [1] * n + [2] * n * n) == group
    assert got["g_alpha"].bool().tolist() == [k == group for k in range(3)]
    assert torch.equal(got["g_bias"] != 0, rows)
    assert torch.equal((got["g_projected"][:-1] != 0).all(1), rows)
    assert (got["g_projected"][-1] != 0).all()


def test_saturated_gates_keep_their_slope():
    """z from −80 to 80: σ(z)·σ(−z) to a few roundings of itself. Catches σ·(1 − σ), which is 0 from z = 17 on."""
    arguments = FUNCTION.arguments(replace(CASE, num_tokens=161))
    arguments["projected"][:8] = torch.arange(-80.0, 81.0)
    arguments |= {"alpha": torch.ones(3), "bias": torch.zeros(24), "g_h_res": None}
    exact = {**arguments, "g_h_res": torch.zeros(161, 4, 4)}
    got = numpy64(FUNCTION(arguments)["g_projected"])[:8]
    expected = FUNCTION.float64(exact)["g_projected"][:8]
    assert (np.abs(expected) > 1e-38).all()
    np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_zero_scale_of_the_norm():
    """s = 0 of a huge stream, and 1e10 of a zero one under the paper's spec: products with it, and nothing else."""
    arguments = FUNCTION.arguments(CASE)
    arguments["projected"][:, 3] = 0
    arguments["projected"][:-1, 5], arguments["projected"][-1, 5] = 0, 1e10
    got, expected = FUNCTION(arguments), FUNCTION.float64(arguments)
    assert not got["g_projected"][:, 3].any()
    np.testing.assert_allclose(numpy64(got["g_projected"][:, 5]), expected["g_projected"][:, 5], rtol=1e-3)
    for name in ("g_alpha", "g_bias"):
        np.testing.assert_allclose(numpy64(got[name]), expected[name], rtol=0, atol=1e-3)


def test_no_token_gives_zero():
    """Not the memory that was allocated for the sums; `poisoned` fills that with NaN."""
    got = FUNCTION(FUNCTION.arguments(replace(CASE, num_tokens=0)))
    assert got["g_projected"].shape == (25, 0)
    assert not got["g_alpha"].any()
    assert not got["g_bias"].any()


def test_alpha_of_each_row():
    """Alphas far apart, one of them zero: its rows get nothing, and its own gradient does not vanish."""
    arguments = {**FUNCTION.arguments(CASE), "alpha": torch.tensor([100.0, 0.0, 0.01])}
    arguments["projected"][:4] *= 0.01
    got, expected = FUNCTION(arguments), FUNCTION.float64(arguments)
    assert not got["g_projected"][4:8].any()
    assert got["g_alpha"].all()
    for name, tensor in got.items():
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(numpy64(tensor), expected[name], rtol=0, atol=1e-4 * largest)


def test_partial_sums_have_a_row_per_block():
    """There are as many rows as the kernel writes, and a row of zeros where there is no token."""
    for num_tokens, rows in ((0, 1), (1, 1), (64, 1), (65, 2), (4097, 65)):
        projected = torch.empty(25, num_tokens)
        partial = run_in_parts(lambda **_: None, 64, projected, torch.empty(3), torch.empty(24), projected)
        assert partial.shape == (rows, 27)
        assert partial.isnan().all() == (num_tokens > 0)
