"""The contract of every function: tokens of their own, any leading dimensions, views that start anywhere.

Would catch: a leading axis that is lost or hard-wired, an aligned vector load of a tensor that starts elsewhere, a
masked or padded lane multiplied into a neighbour, a maximum or a clamp that swallows NaN or infinity.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    STREAMS,
    assert_leading_dimensions_are_tokens,
    assert_special_values_stay_in_their_token,
    assert_views_can_start_anywhere,
)

from mhc_tilelang import launch, ops, reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.families.aggregate_norm import EPS, rms_norm_weight
from mhc_tilelang.checking.inputs import Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
LOGITS = Case(4, 1, torch.float32, 127, logit_std=3.0)


@dataclass(frozen=True)
class Contract:
    """A function on inputs, the same in float64, and the inputs in which NaN and infinities are put."""

    call: Callable
    float64: Callable
    fields: tuple[str, ...]


def projected(i: Inputs, n: int | None = None) -> tuple:
    return (i.x, i.phi, i.alpha, i.bias) if n is None else (i.x, i.phi[:n], i.alpha[:1], i.bias[:n])


def mixed(i: Inputs) -> tuple:
    return i.x, i.layer_output, i.h_post, i.h_res


def exact(tensors: tuple) -> list:
    return [numpy64(tensor) for tensor in tensors]


def normed(i: Inputs, c: Case) -> tuple:
    return (launch.aggregate_norm(i.x, i.h_pre, rms_norm_weight(c, CPU), EPS),)


def normed64(i: Inputs, c: Case) -> tuple:
    u = reference.aggregate(numpy64(i.x), numpy64(i.h_pre))
    return (reference.rms_norm(u, numpy64(rms_norm_weight(c, CPU)), EPS),)


CONTRACTS = {
    "expand": Contract(lambda i, c: (ops.expand(i.h, c.num_streams),), lambda *_: (), ()),
    "aggregate": Contract(
        lambda i, _: (ops.aggregate(i.x, i.h_pre),),
        lambda i, _: (reference.aggregate(*exact((i.x, i.h_pre))),),
        ("x", "h_pre"),
    ),
    "post": Contract(
        lambda i, _: (ops.post(*mixed(i)),),
        lambda i, _: (reference.post(*exact(mixed(i))),),
        ("x", "layer_output", "h_post", "h_res"),
    ),
    # A token with one NaN or infinity is NaN throughout where it is projected, since its norm is.
    "coefficients": Contract(
        lambda i, c: ops.coefficients(*projected(i), c.spec),
        lambda i, c: reference.coefficients(*exact(projected(i)), c.spec),
        ("x",),
    ),
    "pre": Contract(
        lambda i, c: ops.pre(*projected(i), c.spec),
        lambda i, c: reference.pre(*exact(projected(i)), c.spec),
        ("x",),
    ),
    "head": Contract(
        lambda i, c: (ops.head(*projected(i, c.num_streams), c.spec),),
        lambda i, c: (reference.head(*exact(projected(i, c.num_streams)), c.spec),),
        ("x",),
    ),
}
every_function = pytest.mark.parametrize("name", CONTRACTS)
every_special = pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])


@every_special
@pytest.mark.parametrize(("name", "field"), [(name, field) for name, c in CONTRACTS.items() for field in c.fields])
def test_special_values(name, field, value):
    contract = CONTRACTS[name]
    assert_special_values_stay_in_their_token(contract.call, contract.float64, CASE, field, value)


@every_special
@pytest.mark.parametrize("field", ["x", "h_pre"])
def test_special_values_before_a_norm(field, value):
    assert_special_values_stay_in_their_token(normed, normed64, CASE, field, value)


@every_function
def test_leading_dimensions(name):
    assert_leading_dimensions_are_tokens(CONTRACTS[name].call, CASE)


def test_leading_dimensions_of_matrices_and_norms():
    assert_leading_dimensions_are_tokens(lambda i, _: (ops.sinkhorn(i.logits),), LOGITS)
    assert_leading_dimensions_are_tokens(
        lambda i, c: ops.pre(*projected(i), c.spec, rms_norm_weight=rms_norm_weight(c, CPU), rms_norm_eps=EPS), CASE
    )


@pytest.mark.parametrize("dtype", DTYPES)
@every_function
def test_views_start_anywhere(name, dtype):
    assert_views_can_start_anywhere(CONTRACTS[name].call, replace(CASE, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_before_a_norm_start_anywhere(dtype):
    assert_views_can_start_anywhere(normed, replace(CASE, dtype=dtype))


@pytest.mark.parametrize("n", STREAMS)
def test_views_of_matrices_start_anywhere(n):
    assert_views_can_start_anywhere(lambda i, _: (ops.sinkhorn(i.logits),), replace(LOGITS, num_streams=n))
