"""head, backward: the coefficients' backward with the pre group alone, one alpha and n rows.

Would catch: rows or partial sums counted as for a whole sublayer, an alpha that is read beyond its one element.
"""

import numpy as np
import pytest
import torch
from helpers import STREAMS, assert_same_bits
from helpers_backward import BACKWARD

from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 67)
FUNCTION = BACKWARD["head_coefficients_backward"]


def test_saturated_gates_keep_their_slope():
    """z from −80 to 80. Catches σ·(1 − σ), which is 0 from z = 17 on."""
    arguments = FUNCTION.arguments(Case(4, 333, torch.bfloat16, 161))
    arguments["projected"][:4] = torch.arange(-80.0, 81.0)
    arguments |= {"alpha": torch.ones(1), "bias": torch.zeros(4)}
    got = numpy64(FUNCTION(arguments)["g_projected"])[:4]
    np.testing.assert_allclose(got, FUNCTION.float64(arguments)["g_projected"][:4], rtol=2e-6)


@pytest.mark.parametrize("n", STREAMS)
def test_is_the_pre_group_of_coefficients(n):
    """Rows, alpha and ρ are equal to the bit. Catches two copies of the gate that drift apart."""
    case = Case(n, 333, torch.bfloat16, 67)
    whole = BACKWARD["coefficients_backward"]
    arguments = FUNCTION.arguments(case)
    sublayer = whole.arguments(case)
    sublayer["projected"][:n], sublayer["projected"][-1] = arguments["projected"][:n], arguments["projected"][-1]
    expected = whole({**sublayer, "g_h_post": None, "g_h_res": None})
    got = FUNCTION(arguments)
    rows = [expected["g_projected"][:n], expected["g_alpha"][:1], expected["g_bias"][:n]]
    assert_same_bits([got["g_projected"][:n], got["g_alpha"], got["g_bias"]], rows)
    torch.testing.assert_close(got["g_projected"][n], expected["g_projected"][-1], rtol=0, atol=0)  # but for −0


def test_no_token_gives_zero():
    got = FUNCTION(FUNCTION.arguments(Case(4, 333, torch.bfloat16, 0)))
    assert not got["g_alpha"].any()
    assert not got["g_bias"].any()
