"""Every separate kernel against float64: n, dtypes, widths, token counts and logits that name the path they take.

Would catch: a tail of channels or tokens that is dropped or read twice, a dtype that rounds where it must not, a width
or an n forgotten in a constant, a dot that is dropped or underflows in 16 bits, a sigmoid that saturates too early.
Fused kernels have such tests beside what is theirs alone.
"""

from dataclasses import replace

import pytest
import torch
from helpers import CPU, DTYPES, STREAMS, assert_matches_float64, crosses

from mhc_tilelang.checking.inputs import Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned")
CROSSED = (
    *("expand", "project", "coefficients", "aggregate", "post", "head"),
    *("expand_backward", "project_backward_aggregated", "aggregate_backward", "aggregate_gradients", "post_backward"),
)
PROJECTED = ("coefficients", "head")
THROUGH_LOGITS = ("coefficients_backward", "head_coefficients_backward")


@pytest.mark.parametrize("case", crosses())
@pytest.mark.parametrize("kernel", CROSSED)
def test_paths(kernel, case):
    assert_matches_float64(kernel, case)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 63, 64, 65, 127, 4097])
@pytest.mark.parametrize("kernel", THROUGH_LOGITS)
def test_tokens(kernel, num_tokens):
    """A CPU's block has 64 tokens; 4097 of them leave 65 partial sums."""
    assert_matches_float64(kernel, Case(4, 64, torch.bfloat16, num_tokens))


@pytest.mark.parametrize("hidden_size", [1, 7, 1280])
@pytest.mark.parametrize("kernel", THROUGH_LOGITS)
def test_widths(kernel, hidden_size):
    """Only ρ knows the width, by 1/K. Catches n or C forgotten in it."""
    assert_matches_float64(kernel, Case(4, hidden_size, torch.bfloat16, 63))


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize(
    ("kernel", "std"), [*((k, 6.0) for k in PROJECTED), *((k, std) for k in THROUGH_LOGITS for std in (2.0, 6.0))]
)
def test_wide_logits(kernel, n, std):
    """Standard deviation 6: sigmoids saturate and Sinkhorn has not converged after 20 iterations."""
    assert_matches_float64(kernel, Case(n, 192, torch.float32, 511, logit_std=std))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", PROJECTED)
def test_small_phi(kernel, dtype):
    """phi ~ 1e-4 with alpha as much larger. Catches a dot that is dropped, or that underflows in 16 bits."""
    case = Case(4, 192, dtype, 127)
    inputs = Inputs.of(case, CPU)
    shrink = 1e-4 / inputs.phi.std()
    assert_matches_float64(kernel, case, replace(inputs, phi=inputs.phi * shrink, alpha=inputs.alpha / shrink))
