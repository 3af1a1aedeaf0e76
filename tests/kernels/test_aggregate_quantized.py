"""The layer's input in float8: the kernel, its scales, what is no number, against float64 and DeepGEMM's formula.

Would catch: a scale of another group, token or step, a peak that misses lanes or a rest of channels, y rounded to the
stream's dtype before it is quantised, a scale rounded down, a quotient that is off by a bit, NaN that a maximum
swallows, a token's bits that depend on its batch.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, DTYPES, assert_matches_float64, assert_same_bits, map_tokens, named

from mhc_tilelang import launch, reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.families.aggregate_norm import EPS, rms_norm_weight
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.compiler.simt import executing
from mhc_tilelang.kernels import plans
from mhc_tilelang.kernels.aggregate_quantized import ONE_OF_LARGEST

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)  # two groups and 77 channels
KEPT = plans.MAX_THREADS * plans.KEPT_CHANNELS
LEAST = torch.tensor(1e-4) / 448
# Of float16 the kernels below; its tile is bfloat16's.
CASES = [named("dtype", replace(CASE, dtype=t), [pytest.mark.full] * (t == torch.float16)) for t in DTYPES]
CASES += [named("streams", Case(8, 256, torch.bfloat16, 5)), named("nothing-kept", Case(2, KEPT + 8, torch.float16, 2))]
CASES += [named("width", Case(4, size, torch.bfloat16, 3), pytest.mark.full) for size in (1, 127, 128, 129, 2560)]


def quantized(inputs, case, **changes):
    weight = rms_norm_weight(case, CPU)
    return launch.aggregate_quantized(inputs.x, inputs.h_pre, **{"weight": weight, "eps": EPS, **changes})


def by_formula(y, ue8m0):
    """DeepGEMM's per_token_cast_to_fp8 of float32 numbers, in torch."""
    groups = plans.num_scales(y.shape[-1])
    padded = torch.nn.functional.pad(y, (0, groups * 128 - y.shape[-1])).unflatten(-1, (groups, 128))
    scales = padded.abs().amax(-1).clamp(1e-4) / 448
    if ue8m0:
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    values = (padded * (1 / scales).unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values.flatten(-2)[:, : y.shape[-1]].contiguous(), scales


@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_float64(case):
    assert_matches_float64("aggregate_quantized", case)


@pytest.mark.parametrize("case", [CASE, pytest.param(Case(2, KEPT + 128, torch.float32, 2), marks=pytest.mark.full)])
def test_gpu_tile_matches_float64(case, monkeypatch):
    """Tiles that hang over, several groups a step; the last one reads x twice."""
    tile = plans.norm_tile(case.hidden_size, case.dtype.itemsize, "cuda")
    monkeypatch.setattr(plans, "norm_tile", lambda *_: tile)
    assert_matches_float64("aggregate_quantized", case)


@pytest.mark.parametrize("ue8m0", [pytest.param(False, marks=pytest.mark.full), True])  # as CUDA both are below
def test_bits_are_those_of_the_formula(ue8m0):
    """A float32 stream's layer_input is y itself: equal to the bit, rows of all sizes."""
    case = replace(CASE, dtype=torch.float32)
    inputs = Inputs.of(case, CPU)
    weight = rms_norm_weight(case, CPU) * torch.logspace(-16, 9, case.hidden_size)
    got = quantized(inputs, case, weight=weight, power_of_two=ue8m0, has_layer_input=True)
    assert_same_bits(got[:2], by_formula(got[2], ue8m0))
    assert (got[1] == (2.0**-22 if ue8m0 else LEAST)).any()  # a group of which all is below 1e-4


@pytest.mark.parametrize("size", [1e-9, 1.0, 3e30, float("inf")])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_bits_as_cuda(ue8m0, size):
    """The same of a GPU's code, which divides without divisions; one channel's weight has this size."""
    case = Case(4, 72, torch.float32, 3)
    inputs = Inputs.of(case, CPU)
    weight = torch.linspace(1e-6, 1e-4, case.hidden_size)
    weight[20] = size
    with executing() as launches:
        *got, y = quantized(inputs, case, weight=weight, power_of_two=ue8m0, has_layer_input=True)
    expected = by_formula(y, ue8m0)
    assert launches
    assert (got[1] == torch.inf).all() == (size == torch.inf)
    assert_same_bits(got[1:], expected[1:])
    for each in (*got[:1], *expected[:1]):  # a NaN's sign is none of the formula
        each.view(torch.uint8)[each.isnan()] = 0x7F
    assert_same_bits(got[:1], expected[:1])


def test_every_quotient():
    """x / 448 by a product and the step that adds what it is off: all 2^23 mantissas; powers of two shift what follows.

    Every product and sum here has less than 53 bits, so that float64 holds it and one rounding is the fma's.
    """
    x = np.arange(1 << 23, 1 << 24, dtype=np.float64)
    guess = (x * ONE_OF_LARGEST).astype(np.float32)
    left = x - 448 * guess.astype(np.float64)
    assert (left.astype(np.float32) == left).all()
    quotient = (guess.astype(np.float64) + left * ONE_OF_LARGEST).astype(np.float32)
    expected = x.astype(np.float32) / np.float32(448)
    assert (quotient == expected).all()
    assert (guess != expected).any()  # the product alone is no quotient


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_input_is_that_of_the_norm(dtype):
    """Bits are equal, and values and scales are the same without it."""
    case = replace(CASE, dtype=dtype)
    inputs, weight = Inputs.of(case, CPU), rms_norm_weight(case, CPU)
    *got, layer_input = quantized(inputs, case, has_layer_input=True)
    assert_same_bits([layer_input], [launch.aggregate_norm(inputs.x, inputs.h_pre, weight, EPS)])
    assert_same_bits(got, quantized(inputs, case))


def test_largest_numbers():
    """448 in every group; with a power of two, which may be up to twice as large, more than 224."""
    inputs = Inputs.of(CASE, CPU)
    for ue8m0, least in ((False, 448), (True, 224)):
        values, _ = quantized(inputs, CASE, power_of_two=ue8m0)
        peaks = torch.nn.functional.pad(values.float().abs(), (0, 51)).unflatten(-1, (3, 128)).amax(-1)
        assert ((peaks >= least) & (peaks <= 448)).all()


def test_nothing_is_rounded_before():
    """Of bfloat16 numbers, layer_input is rounded and a good part of its e4m3 numbers differ; float64 says who is
    right. One rounding to e4m3 is off by a sixteenth at most; one to bfloat16 before it moves what lies near a tie.
    """
    inputs = Inputs.of(CASE, CPU)
    values, scales, layer_input = quantized(inputs, CASE, has_layer_input=True)
    twice, _ = by_formula(layer_input.float(), False)
    u = reference.aggregate(numpy64(inputs.x), numpy64(inputs.h_pre))
    exact, exact_scales = reference.quantize(reference.rms_norm(u, numpy64(rms_norm_weight(CASE, CPU)), EPS))
    wrong = [np.count_nonzero(numpy64(each.float()) != exact) for each in (values, twice)]
    assert wrong[0] < 20 < 200 < wrong[1]
    np.testing.assert_allclose(numpy64(scales), exact_scales, rtol=1e-6)


def test_a_group_of_zeros():
    """A row of zeros, and a weight of zeros: the scale of 1e-4, and zeros."""
    inputs, weight = Inputs.of(CASE, CPU), rms_norm_weight(CASE, CPU)
    weight[128:256] = 0
    inputs.x[3] = 0
    values, scales = quantized(inputs, CASE, weight=weight)
    assert (scales[3] == LEAST).all()
    assert (scales[:, 1] == LEAST).all()
    assert not values[3].float().any()
    assert not values[:, 128:256].float().any()
    assert (scales[4, ::2] > LEAST).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_what_is_no_number_stays_in_its_group(value, ue8m0):
    """One channel's weight is none: its group dequantises to NaN, and the other two are what they were."""
    inputs, weight = Inputs.of(CASE, CPU), rms_norm_weight(CASE, CPU)
    expected = quantized(inputs, CASE, weight=weight, power_of_two=ue8m0)
    weight[200] = value
    values, scales = quantized(inputs, CASE, weight=weight, power_of_two=ue8m0)
    assert (scales[:, 1] == torch.inf).all()
    assert (values[:, 128:256].float() * scales[:, 1:2]).isnan().all()
    assert set(values[:, 128:256].view(torch.uint8).unique().tolist()) <= {0, 0x80, 0x7F}
    kept = [*range(128), *range(256, 333)]
    assert_same_bits([values[:, kept], scales[:, ::2]], [expected[0][:, kept], expected[1][:, ::2]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_token(value):
    inputs = Inputs.of(CASE, CPU)
    expected = quantized(inputs, CASE)
    inputs.x[7, 1, 5] = value
    got = quantized(inputs, CASE)
    others = [token for token in range(CASE.num_tokens) if token != 7]
    assert_same_bits([part[others] for part in got], [part[others] for part in expected])
    assert (got[0][7, :128].float() * got[1][7, 0]).isnan().all()


def test_a_token_has_the_same_bits_in_every_batch():
    inputs = Inputs.of(CASE, CPU)
    whole = quantized(inputs, CASE, has_layer_input=True)
    for tokens in (slice(0, 0), slice(0, 1), slice(20, 47), slice(62, 63)):
        part = quantized(map_tokens(inputs, lambda t, tokens=tokens: t[tokens]), CASE, has_layer_input=True)
        assert_same_bits(part, [output[tokens] for output in whole])
