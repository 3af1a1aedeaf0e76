"""The host time of a call: measured with kernels that return at once, and nothing of them stays behind.

Would catch: kernels that run within it, a prepared call of idle kernels that outlives it, a row of `bench` that names
another function's time.
"""

from __future__ import annotations

import pytest
import torch
from helpers import CPU, assert_same_bits

from mhc_tilelang import compiler, ops
from mhc_tilelang.operators import prepared
from mhc_tilelang.perf.calls import cases
from mhc_tilelang.perf.calls.every_call import Given
from mhc_tilelang.perf.measure.host import PUBLIC, host_seconds, returning_at_once

GIVEN = Given.of(cases.Shape(6, 4, 64, "bfloat16"), CPU)


def test_rows_are_those_of_bench() -> None:
    every = (*cases.KERNELS, *cases.BACKWARD_KERNELS, *cases.BOUNDARY_KERNELS, *cases.FLOAT8_KERNELS)
    assert set(PUBLIC) <= {*every, cases.SUBLAYER_INPUT}
    assert host_seconds("project", GIVEN) is None


@pytest.mark.parametrize("kernel", ["expand", "post"])
def test_kernels_return_at_once(kernel: str) -> None:
    """Ordinary calls, recorded and replayed ones; before and behind it they compute."""
    h, kernels = GIVEN.h, compiler._kernels
    expected = PUBLIC[kernel](GIVEN)
    buffer = torch.full((6, 4, 64), 7.0, dtype=torch.bfloat16)
    with returning_at_once():
        for _ in range(4):
            ops.expand(h, 4, out=buffer)
    assert (buffer == 7).all()
    seconds = host_seconds(kernel, GIVEN)
    assert seconds is not None
    assert 0 < seconds < 1
    assert compiler._kernels is kernels
    assert not prepared._ready
    assert_same_bits([PUBLIC[kernel](GIVEN) for _ in range(4)], [expected] * 4)
