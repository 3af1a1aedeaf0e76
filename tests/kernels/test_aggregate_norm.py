"""pre with the layer's own norm: the kernel, and pre and post_pre, which hand it their coefficients.

Would catch: a norm over streams or tokens, a weight or an eps that is ignored, u rounded before it is normalised, a row
of padding in the mean, a token's bits that depend on its batch, a norm in one form and not in another.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, DTYPES, STREAMS, assert_matches_float64, assert_same_bits, every_n_and_dtype, map_tokens, named

from mhc_tilelang import launch, ops, reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.families.aggregate_norm import EPS, rms_norm_weight
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.kernels import plans

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
KEPT = plans.MAX_THREADS * plans.KEPT_CHANNELS
CASES = every_n_and_dtype(127)
CASES += [named("width", Case(4, size, torch.bfloat16, 5)) for size in (1, 7, 200, 1000, 333)]
CASES += [named("tokens", Case(4, 192, torch.bfloat16, tokens)) for tokens in (0, 1, 3)]
CASES += [named("nothing-kept", Case(2, KEPT + 8, torch.bfloat16, 3))]
CASES += [
    named("full-cross", Case(n, size, dtype, 63, seed=1), pytest.mark.full)
    for n in STREAMS
    for dtype in DTYPES
    for size in (1, 7, 64, 200, 333, 1000, 2560, 7168, KEPT + 1)
]


def normed(inputs, case, **changes):
    weight = rms_norm_weight(case, CPU)
    return (launch.aggregate_norm(inputs.x, inputs.h_pre, **{"weight": weight, "eps": EPS, **changes}),)


def normed64(inputs, case):
    u = reference.aggregate(numpy64(inputs.x), numpy64(inputs.h_pre))
    return (reference.rms_norm(u, numpy64(rms_norm_weight(case, CPU)), EPS),)


def pre(inputs, case, **changes):
    form = {"rms_norm_weight": rms_norm_weight(case, CPU), "rms_norm_eps": EPS, **changes}
    return ops.pre(inputs.x, inputs.phi, inputs.alpha, inputs.bias, case.spec, **form)


def post_pre(inputs, case, **changes):
    form = {"rms_norm_weight": rms_norm_weight(case, CPU), "rms_norm_eps": EPS, **changes}
    mixed = (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
    return ops.post_pre(*mixed, inputs.phi, inputs.alpha, inputs.bias, case.spec, **form)


@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_float64(case):
    assert_matches_float64("aggregate_norm", case)


@pytest.mark.parametrize("case", [CASE, Case(8, 1031, torch.float32, 3), Case(2, KEPT + 8, torch.float16, 2)])
def test_gpu_tile_matches_float64(case, monkeypatch):
    """Tiles that hang over; the last one reads x twice."""
    tile = plans.norm_tile(case.hidden_size, case.dtype.itemsize, "cuda")
    monkeypatch.setattr(plans, "norm_tile", lambda *_: tile)
    assert_matches_float64("aggregate_norm", case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_x_twice_gives_the_same_bits(dtype, monkeypatch):
    case = replace(CASE, dtype=dtype)
    inputs = Inputs.of(case, CPU)
    kept = normed(inputs, case)
    tile = replace(plans.norm_tile(case.hidden_size, dtype.itemsize, "cpu"), kept=False)
    monkeypatch.setattr(plans, "norm_tile", lambda *_: tile)
    assert_same_bits(normed(inputs, case), kept)


def test_weight_and_eps_count():
    """Twice the weight is twice the result, to the bit; without eps it is larger by the root of the means' ratio."""
    inputs = Inputs.of(CASE, CPU)
    weight, [got] = rms_norm_weight(CASE, CPU), normed(inputs, CASE)
    assert_same_bits(normed(inputs, CASE, weight=2 * weight), [2 * got])
    u = reference.aggregate(numpy64(inputs.x), numpy64(inputs.h_pre))
    mean = np.square(u).mean(-1, keepdims=True)
    expected = numpy64(got) * np.sqrt((mean + EPS) / (mean + 4.0))
    # Both are rounded to 8 bits.
    np.testing.assert_allclose(numpy64(normed(inputs, CASE, eps=4.0)[0]), expected, rtol=2.0**-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_has_a_mean_square_of_one(dtype):
    """A weight of one and no eps give a mean square of 1; the mean is over channels alone, not tokens or streams."""
    case = replace(CASE, dtype=dtype)
    inputs = Inputs.of(case, CPU)
    inputs = replace(inputs, h_pre=inputs.h_pre * torch.logspace(-3, 3, case.num_tokens).unsqueeze(-1))
    [got] = normed(inputs, case, weight=torch.ones(case.hidden_size), eps=0.0)
    np.testing.assert_allclose(np.square(numpy64(got)).mean(-1), 1.0, rtol=2 * torch.finfo(dtype).eps)


def test_the_sum_is_not_rounded_before_the_norm():
    """Two rounding contracts, told apart: of bfloat16 results a good part differs from a norm of pre's result.

    One rounding is off by U/√3 of a result at most, the two together by more: so float64 decides which one this is.
    """
    inputs = Inputs.of(CASE, CPU)
    weight, [got] = rms_norm_weight(CASE, CPU), normed(inputs, CASE)
    u = launch.aggregate(inputs.x, inputs.h_pre)
    twice = torch.nn.functional.rms_norm(u.float(), u.shape[-1:], weight, EPS).to(u.dtype)
    [exact] = normed64(inputs, CASE)
    assert not torch.equal(got, twice)
    once_error, twice_error = (np.linalg.norm(numpy64(each) - exact) for each in (got, twice))
    # Independent roundings: √2 between the two, and 21,000 elements.
    assert once_error < 0.8 * twice_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_of_the_streams_dtype(dtype):
    """It is read as it is: the bits of the same numbers in float32. So is its gradient's dtype its own."""
    case = replace(CASE, dtype=dtype)
    inputs, weight = Inputs.of(case, CPU), rms_norm_weight(case, CPU).to(dtype)
    assert_same_bits(normed(inputs, case, weight=weight), normed(inputs, case, weight=weight.float()))
    leaf = weight.clone().requires_grad_()
    layer_input, *_ = pre(inputs, case, rms_norm_weight=leaf)
    layer_input.backward(inputs.layer_output)
    assert leaf.grad.dtype == dtype


@pytest.mark.parametrize("case", [CASE, Case(8, 192, torch.float32, 127)])
def test_public_functions_hand_on_their_coefficients(case):
    """pre, its delayed form, and both at a boundary: the kernel's bits of the right stream and h_pre."""
    inputs, weight = Inputs.of(case, CPU), rms_norm_weight(case, CPU)
    x_next = launch.post(inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
    for given in ({}, {"h_pre": inputs.h_pre}):
        got_next, *at_boundary = post_pre(inputs, case, **given)
        assert_same_bits([got_next], [x_next])
        for x, results in ((inputs.x, pre(inputs, case, **given)), (x_next, at_boundary)):
            layer_input, h_post, h_res, *own = results
            h_pre, *others = ops.coefficients(x, inputs.phi, inputs.alpha, inputs.bias, case.spec)
            expected = launch.aggregate_norm(x, given.get("h_pre", h_pre), weight, EPS)
            assert_same_bits([layer_input, h_post, h_res], [expected, *others])
            assert_same_bits(own, [h_pre] if given else [])


@pytest.mark.parametrize("call", [pre, post_pre])
def test_a_token_has_the_same_bits_in_every_batch(call):
    inputs = Inputs.of(CASE, CPU)
    whole = call(inputs, CASE)
    for tokens in (slice(0, 1), slice(20, 47), slice(62, 63)):
        part = call(map_tokens(inputs, lambda t, tokens=tokens: t[tokens]), CASE)
        assert_same_bits(part, [output[tokens] for output in whole])


@pytest.mark.parametrize("call", [pre, post_pre])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rms_norm_weight": torch.ones(332)}, ValueError, r"rms_norm_weight: expected shape \[333\], got \[332\]"),
        ({"rms_norm_weight": torch.ones(333).double()}, TypeError, "rms_norm_weight: expected dtype torch.float32"),
        ({"rms_norm_weight": torch.ones(333).half()}, TypeError, "expected dtype torch.float32 or torch.bfloat16"),
        ({"rms_norm_weight": None}, ValueError, "rms_norm_eps: expected a rms_norm_weight beside it, got 0.01"),
        ({"rms_norm_eps": -1.0}, ValueError, "rms_norm_eps: expected 0 or a positive number"),
        ({"rms_norm_eps": float("nan")}, ValueError, "rms_norm_eps: expected 0 or a positive number"),
        ({"rms_norm_eps": "1e-6"}, TypeError, "rms_norm_eps: expected float, got '1e-6'"),
    ],
)
def test_bad_arguments(call, changes, error, message):
    with pytest.raises(error, match=f"{call.__name__}: .*{message}"):
        call(Inputs.of(replace(CASE, num_tokens=2), CPU), CASE, **changes)
