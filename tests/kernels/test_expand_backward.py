"""expand, backward: the sum over the streams, ascending in float32, rounded once.

Would catch: a stream left out or taken twice, a sum in the stream's dtype, another order.
"""

import pytest
import torch
from helpers import CPU, DTYPES, STREAMS, assert_same_bits
from helpers_backward import BACKWARD

from mhc_tilelang import launch
from mhc_tilelang.checking.inputs import Case, Gradients

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
FUNCTION = BACKWARD["expand_backward"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", STREAMS)
def test_bits(n, dtype):
    """acc += g_x[i], i ascending from 0, then one rounding."""
    g_x = Gradients.of(Case(n, 192, dtype, 127), CPU).g_x
    acc = torch.zeros(127, 192)
    for i in range(n):
        acc += g_x[:, i].float()
    assert_same_bits([launch.expand_backward(g_x)], [acc.to(dtype)])
