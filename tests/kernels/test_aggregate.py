"""pre: the aggregation to the bit of its contract, and the public function made of coefficients and aggregation.

Would catch: streams mixed up or left out, a sum in the stream's dtype, the coefficients of another token.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    STREAMS,
    assert_same_bits,
    fma32,
)

from mhc_tilelang import launch, ops
from mhc_tilelang.checking.inputs import Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)


def aggregate(inputs, case):
    return (launch.aggregate(inputs.x, inputs.h_pre),)


def pre(inputs, case):
    return ops.pre(inputs.x, inputs.phi, inputs.alpha, inputs.bias, case.spec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", STREAMS)
def test_bits_of_the_aggregation(n, dtype):
    """acc = fma(h_pre[i], x[i], acc), i ascending from 0, then one rounding."""
    inputs = Inputs.of(Case(n, 192, dtype, 127), CPU)
    x, h_pre = inputs.x.float().numpy(), inputs.h_pre.numpy()
    acc = np.zeros_like(x[:, 0])
    for i in range(n):
        acc = fma32(h_pre[:, i, None], x[:, i], acc)
    assert_same_bits(aggregate(inputs, None), [torch.from_numpy(acc).to(dtype)])


@pytest.mark.parametrize("case", [Case(4, 333, torch.bfloat16, 127), Case(8, 192, torch.float32, 127)])
def test_public_function_hands_on_its_coefficients(case):
    """layer_input by its own h_pre, h_post and h_res untouched. Catches outputs swapped on the way."""
    inputs = Inputs.of(case, CPU)
    layer_input, h_post, h_res = pre(inputs, case)
    h_pre, *others = ops.coefficients(inputs.x, inputs.phi, inputs.alpha, inputs.bias, case.spec)
    assert_same_bits([layer_input, h_post, h_res], [launch.aggregate(inputs.x, h_pre), *others])


def test_norm_weight_is_multiplied_into_phi():
    """Catches a norm_weight that is accepted and ignored, or applied to x, which layer_input would show."""
    inputs = Inputs.of(CASE, CPU)
    weight = 0.5 + torch.rand(inputs.phi.shape[1])
    weighted = ops.pre(inputs.x, inputs.phi, inputs.alpha, inputs.bias, CASE.spec, norm_weight=weight)
    assert_same_bits(weighted, pre(replace(inputs, phi=inputs.phi * weight), CASE))
