"""pre, backward: n inner products over the channels of a token, by the CPU's tile and, on the CPU, by the GPU's.

Would catch: channels left out at the end of a row, or read from the next one, a sum in 16 bits.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, DTYPES, assert_matches_float64, crosses
from helpers_backward import BACKWARD, assert_reads_nothing_else, assert_special_values_stay

from mhc_tilelang import launch
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.kernels import numpy64
from mhc_tilelang.kernels import plans

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
FUNCTION = BACKWARD["aggregate_backward"]


@pytest.mark.parametrize("case", crosses())
def test_matches_float64(case):
    assert_matches_float64("aggregate_backward", case)


@pytest.mark.parametrize("case", [CASE, Case(8, 1031, torch.float32, 5)])
def test_gpu_tile_matches_float64(case, monkeypatch):
    """Tiles of 256 and 512 channels, the last of which hangs over."""
    tile = plans.reduction_tile(case.hidden_size, case.dtype.itemsize, "cuda")
    monkeypatch.setattr(plans, "reduction_tile", lambda *_: tile)
    assert_matches_float64("aggregate_backward", case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_channel_counts_once(dtype):
    """Zeros and ones: counts of channels, exact in every dtype."""
    inputs = Inputs.of(Case(4, 333, dtype, 7), CPU)
    x, g = (inputs.x > 0).to(dtype), (inputs.layer_output > 0).to(dtype)
    counts = np.einsum("tc,tic->ti", numpy64(g), numpy64(x))
    np.testing.assert_array_equal(numpy64(launch.aggregate_backward(g, x)), counts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["g_layer_input", "x"])
def test_special_values(field, value):
    assert_special_values_stay(FUNCTION, CASE, field, value)


def test_reads_nothing_else():
    assert_reads_nothing_else(FUNCTION, replace(CASE, num_tokens=3))
