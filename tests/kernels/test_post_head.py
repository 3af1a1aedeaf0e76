"""The boundary after the last sublayer: post and head in one, to the bit what they give apart, and its backward.

Would catch: a sublayer's rows, alpha or partial sums where a head has its own, a head's gradient that does not reach
what was mixed, the separate kernels' path called with arguments in another order.
"""

import pytest
import torch
from helpers import (
    CPU,
    MIXED_DTYPES,
    assert_matches_float64,
    assert_same_bits,
    every_n_and_dtype,
    named,
)

from mhc_tilelang import launch
from mhc_tilelang.checking.families.expand_pre import parameters
from mhc_tilelang.checking.families.post_head import of_head
from mhc_tilelang.checking.families.post_pre import mixed
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.kernels import boundary_plans

pytestmark = pytest.mark.usefixtures("poisoned")
CASES = every_n_and_dtype(67)
CASES += [named("odd-tail", Case(4, 333, torch.bfloat16, 67))]
CASES += [named("one-channel", Case(4, 1, torch.bfloat16, 67), pytest.mark.full)]
TOKENS = [named("tokens", Case(4, 192, torch.bfloat16, tokens)) for tokens in (0, 1, 770)]
GPU_CASES = [case for case in every_n_and_dtype(67, "gpu-plan") if case.values[0].num_streams == 4]
SMALL = Case(4, 333, torch.bfloat16, 70)


def fused(inputs, case):
    return launch.post_head(*mixed(inputs), *parameters(of_head(case, inputs)), case.spec)


@pytest.mark.parametrize("case", CASES + TOKENS)
def test_fused_equals_separate(case):
    """post, then head's three kernels."""
    inputs = Inputs.of(case, CPU)
    phi, alpha, bias = parameters(of_head(case, inputs))
    x_next = launch.post(*mixed(inputs))
    plan = launch.projection_plan(x_next, case.num_streams)
    h_pre, projected = launch.head_coefficients(launch.project(x_next, phi, plan), alpha, bias, case.spec, plan)
    assert_same_bits(fused(inputs, case), (x_next, launch.aggregate(x_next, h_pre), h_pre, projected))


@pytest.mark.parametrize(("dtype", "layer_dtype"), MIXED_DTYPES)
def test_a_layer_of_another_dtype(dtype, layer_dtype):
    """16 bits in a float32 stream, as under autocast, or float32 in a 16-bit one."""
    case = Case(8, 192, dtype, 67, layer_dtype=layer_dtype)
    inputs = Inputs.of(case, CPU)
    phi, alpha, bias = parameters(of_head(case, inputs))
    x_next = launch.post(*mixed(inputs))
    plan = launch.projection_plan(x_next, case.num_streams)
    h_pre, projected = launch.head_coefficients(launch.project(x_next, phi, plan), alpha, bias, case.spec, plan)
    assert_same_bits(fused(inputs, case), (x_next, launch.aggregate(x_next, h_pre), h_pre, projected))


@pytest.mark.parametrize("case", CASES + TOKENS)
def test_backward_matches_float64(case):
    """Every gradient, by the check's bounds."""
    assert_matches_float64("post_head_backward", case)


@pytest.fixture
def gpu_plan(monkeypatch):
    """The GPU's plan; the kernels still run on the CPU."""
    plan = boundary_plans.boundary_backward_plan
    monkeypatch.setattr(boundary_plans, "boundary_backward_plan", lambda *sizes: plan(*sizes[:4], "cuda", "another"))


@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.usefixtures("gpu_plan")
def test_gpu_plan_matches_float64(case):
    """A head's few rows: other tiles than a sublayer's, and mostly rows of padding."""
    assert_matches_float64("post_head_backward", case)


@pytest.mark.parametrize("outside", [True, False])
def test_separate_kernels_give_the_same(outside, monkeypatch):
    """The form of GPUs at n = 8, with a gradient of x_next and without: within its two additional roundings."""
    inputs, upstream = Inputs.of(SMALL, CPU), Gradients.of(SMALL, CPU)
    last, forward = of_head(SMALL, inputs), fused(inputs, SMALL)
    left = (forward.x_next, forward.h_pre, forward.projected, SMALL.spec)

    def backward():
        g_x_next = upstream.g_x if outside else None
        return launch.post_head_backward(g_x_next, upstream.g_h, *mixed(inputs), *parameters(last), *left)

    expected = backward()
    monkeypatch.setattr(boundary_plans, "backward_is_fused", lambda *_: False)
    for got, wanted in zip(backward()[:7], expected[:7], strict=True):
        assert got.dtype == wanted.dtype
        assert (got.float() - wanted.float()).norm() <= 2.0**-7 * wanted.float().norm()
