"""The contract of every backward kernel: NaN stays in its token, and nothing else is read.

Would catch: a masked lane or a row of padding that is multiplied into a sum, a maximum that swallows NaN, a token whose
bits depend on another, a row read beyond the last token, an aligned vector load of a tensor that starts elsewhere.
"""

from dataclasses import replace

import pytest
import torch
from helpers import DTYPES, STREAMS
from helpers_backward import BACKWARD, assert_reads_nothing_else, assert_special_values_stay

from mhc_tilelang.checking.inputs import Case

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 67)  # a tail of channels, and most of a second block of tokens empty
LOGITS = Case(4, 1, torch.float32, 127, logit_std=6.0)
PER_HEAD = ("alpha", "bias")  # of a few elements, which every result depends on


def case_of(name: str) -> Case:
    return LOGITS if name == "sinkhorn_backward" else CASE


def fields_of(name: str) -> list[str]:
    arguments = BACKWARD[name].arguments(replace(case_of(name), num_tokens=1))
    return [key for key, value in arguments.items() if isinstance(value, torch.Tensor) and key not in PER_HEAD]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "field"), [(name, field) for name in BACKWARD for field in fields_of(name)])
def test_special_values(name, field, value):
    """Non-finite values stay in one token's gradients, and in the sums over tokens that have its terms."""
    assert_special_values_stay(BACKWARD[name], case_of(name), field, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in BACKWARD if name != "sinkhorn_backward"])
def test_reads_nothing_else(name, dtype):
    """Three tokens, in tiles that have room for more."""
    assert_reads_nothing_else(BACKWARD[name], replace(CASE, num_tokens=3, dtype=dtype))


@pytest.mark.parametrize("n", STREAMS)
def test_sinkhorn_reads_nothing_else(n):
    assert_reads_nothing_else(BACKWARD["sinkhorn_backward"], Case(n, 1, torch.float32, 67))
