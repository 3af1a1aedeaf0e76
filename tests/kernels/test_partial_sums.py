"""The sums over blocks of tokens: every block once, in an order that the sizes fix.

Would catch: a block left out or added twice, an element beyond the last, an order that moves bits.
"""

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from helpers_backward import in_nan

from mhc_tilelang import launch
from mhc_tilelang.checking import tolerance
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.kernels import plans

pytestmark = pytest.mark.usefixtures("poisoned")
# Up to 16 blocks are added in one lane, more in 16; a block of the kernel has 256 elements.
BLOCKS = (1, 2, 8, 16, 17, 31, 32, 33, 1000)
ELEMENTS = (1, 5, 27, 255, 256, 257, 1000)


def drawn(blocks, elements):
    return torch.randn(blocks, elements, generator=torch.Generator().manual_seed(blocks * 10_007 + elements))


def in_order(partial):
    """Block p belongs to lane p mod lanes; a lane adds its own ascending, then the lanes are added ascending."""
    lanes = plans.partial_lanes(len(partial))
    sums = torch.zeros(lanes, partial.shape[1])
    for p, row in enumerate(partial):
        sums[p % lanes] += row
    total = torch.zeros(partial.shape[1])
    for lane in sums:
        total += lane
    return total


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_bits_of_the_order(blocks, elements):
    partial = drawn(blocks, elements)
    assert_same_bits([launch.sum_partials(partial)], [in_order(partial)])


def test_the_order_shows():
    """Tests the test above: added in one lane, or backwards, the bits are others."""
    partial = drawn(1000, 257)
    backwards, one_lane = in_order(partial.flip(0)), torch.zeros(257)
    for row in partial:
        one_lane += row
    for other in (backwards, one_lane):
        assert (other != in_order(partial)).float().mean() > 0.1


@pytest.mark.parametrize("blocks", [8, 1000])
def test_matches_float64(blocks):
    partial = drawn(blocks, 257)
    bound = tolerance.sum_over_tokens(numpy64(partial).T, np.zeros((257, blocks)))
    assert (np.abs(numpy64(launch.sum_partials(partial)) - numpy64(partial).sum(0)) <= bound).all()


@pytest.mark.parametrize("blocks", [3, 17])
def test_reads_nothing_else(blocks):
    """NaN around the partial sums. Catches a lane without a block that is read and multiplied by zero."""
    partial = drawn(blocks, 27)
    for offset in (0, 1):
        assert_same_bits([launch.sum_partials(in_nan(partial, offset))], [in_order(partial)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("blocks", [3, 17])
def test_special_values(blocks, value):
    """A special value stays in its own element and in no other."""
    partial = drawn(blocks, 27)
    partial[2, 5] = value
    expected = torch.arange(27) != 5
    assert torch.equal(torch.isfinite(launch.sum_partials(partial)), expected)
