"""aggregate, backward: n inner products over the channels of a token, by the CPU's tile and, on the CPU, by the GPU's.

Would catch: channels left out at the end of a row, or read from the next one, a sum in 16 bits.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, DTYPES, assert_matches_float64, assert_same_bits
from helpers_backward import BACKWARD

from mhc_tilelang import launch
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.kernels import plans

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
FUNCTION = BACKWARD["aggregate_backward"]


@pytest.mark.parametrize("case", [CASE, Case(8, 1031, torch.float32, 5)])
@pytest.mark.parametrize("kernel", ["aggregate_backward", "aggregate_gradients"])
def test_gpu_tile_matches_float64(kernel, case, monkeypatch):
    """Tiles of 256 and 512 channels, the last of which hangs over."""
    tile = plans.reduction_tile(case.hidden_size, case.dtype.itemsize, "cuda")
    monkeypatch.setattr(plans, "reduction_tile", lambda *_: tile)
    assert_matches_float64(kernel, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_channel_counts_once(dtype):
    """Zeros and ones: counts of channels, exact in every dtype."""
    inputs = Inputs.of(Case(4, 333, dtype, 7), CPU)
    x, g = (inputs.x > 0).to(dtype), (inputs.layer_output > 0).to(dtype)
    counts = np.einsum("tc,tic->ti", numpy64(g), numpy64(x))
    np.testing.assert_array_equal(numpy64(launch.aggregate_backward(g, x)), counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_subset_of_gradients(dtype):
    """A gradient needed alone has the bits of both together; g_h_pre has those of its kernel alone."""
    inputs, g = Inputs.of(replace(CASE, dtype=dtype), CPU), Gradients.of(replace(CASE, dtype=dtype), CPU).g_h
    g_x, g_h_pre = launch.aggregate_gradients(g, inputs.x, inputs.h_pre)
    alone, absent = launch.aggregate_gradients(g, inputs.x, inputs.h_pre, needs_g_h_pre=False)
    assert absent is None
    assert_same_bits([alone, launch.aggregate_backward(g, inputs.x)], [g_x, g_h_pre])
