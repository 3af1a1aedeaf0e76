"""expand: n exact copies, at every width, dtype, alignment and token count.

Would catch: elements left unwritten, a tile that hangs over, a 16-bit value that is converted on the way.
"""

import pytest
import torch
from helpers import (
    assert_same_bits,
)

from mhc_tilelang import ops
from mhc_tilelang.checking.inputs import Case

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)


def call(inputs, case):
    return (ops.expand(inputs.h, case.num_streams),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_pattern_survives(dtype):
    """All 65536, so NaN payloads, infinities and subnormals. Catches a copy that goes through float32."""
    h = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    x = ops.expand(h, 2)
    for i in range(2):
        assert_same_bits([x[:, i]], [h])
