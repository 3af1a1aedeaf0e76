"""head: its own coefficients, n rows only, and the aggregation by them.

Would catch: rows of `coefficients` in the head's place, pre_eps left out, streams mixed up.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    assert_same_bits,
)

from mhc_tilelang import ops
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)


def arguments(inputs, case):
    n = case.num_streams
    return inputs.x, inputs.phi[:n], inputs.alpha[:1], inputs.bias[:n]


def call(inputs, case):
    return (ops.head(*arguments(inputs, case), case.spec),)


def test_one_stream_chosen():
    """Gates closed but for one stream's: that stream, to the bit, as pre_eps is 0 here. Catches swapped streams."""
    inputs = Inputs.of(CASE, CPU)
    spec = replace(CASE.spec, pre_eps=0.0)
    for chosen in range(4):
        bias = torch.full((4,), -1e4)
        bias[chosen] = 1e4
        h = ops.head(inputs.x, torch.zeros(4, 4 * 333), torch.ones(1), bias, spec)
        assert_same_bits([h], [inputs.x[:, chosen]])


def test_pre_eps():
    """Closed gates leave pre_eps times the sum of the streams. Catches an eps that is left out."""
    inputs = Inputs.of(CASE, CPU)
    spec = replace(CASE.spec, pre_eps=0.5)
    h = ops.head(inputs.x, torch.zeros(4, 4 * 333), torch.ones(1), torch.full((4,), -1e4), spec)
    np.testing.assert_allclose(numpy64(h), numpy64(inputs.x).sum(1) / 2, rtol=2**-8, atol=2**-20)


def test_norm_weight_is_multiplied_into_phi():
    """Catches a norm_weight that is accepted and ignored."""
    inputs = Inputs.of(CASE, CPU)
    weight = 0.5 + torch.rand(inputs.phi.shape[1])
    x, phi, alpha, bias = arguments(inputs, CASE)
    weighted = ops.head(x, phi, alpha, bias, CASE.spec, norm_weight=weight)
    assert_same_bits([weighted], [ops.head(x, phi * weight, alpha, bias, CASE.spec)])
    assert (weighted.float() - call(inputs, CASE)[0].float()).abs().max() > 0.1
