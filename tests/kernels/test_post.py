"""post: within its bound everywhere, and to the bit what its contract says: one fma chain, one rounding.

Would catch: h_res transposed, another order of the sum, a product rounded before it is added, cut or doubly
rounded results, subnormals flushed to zero.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    STREAMS,
    fma32,
)

from mhc_tilelang import ops, reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}


def arguments(inputs):
    return inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res


def float64(inputs, case):
    return (reference.post(*map(numpy64, arguments(inputs))),)


def contract(x, layer_output, h_post, h_res):
    """acc = h_post[j]·F, then acc = fma(h_res[j, i], x[i], acc), i ascending: float32, not yet rounded to dtype."""
    x, layer_output, h_post, h_res = (t.float().numpy() for t in (x, layer_output, h_post, h_res))
    acc = h_post[:, :, None] * layer_output[:, None]
    for i in range(x.shape[1]):
        acc = fma32(h_res[:, :, i, None], x[:, None, i], acc)
    return acc


def bits(array):
    return array.view({2: np.uint16, 4: np.uint32}[array.itemsize])


def assert_contract(x, layer_output, h_post, h_res):
    got = ops.post(x, layer_output, h_post, h_res)
    with np.errstate(over="ignore"):
        expected = contract(x, layer_output, h_post, h_res).astype(NUMPY[x.dtype])
    storage = torch.int16 if x.dtype.itemsize == 2 else torch.int32
    np.testing.assert_array_equal(bits(got.view(storage).numpy()), bits(expected))
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", STREAMS)
def test_bits_of_the_contract(n, dtype):
    """Coefficients have 24 bits, where an unfused product or another order moves bits."""
    inputs = Inputs.of(Case(n, 192, dtype, 127), CPU)
    assert_contract(*arguments(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_layer_is_rounded_once(dtype):
    """It is rounded with the stream, not before: within half an ulp of float64, and float32's own errors.

    A layer's output that is rounded first, as the last lines show, is off by more and has other bits.
    """
    case = Case(4, 192, dtype, 127, layer_dtype=torch.float32)
    x, layer_output, h_post, h_res = arguments(Inputs.of(case, CPU))
    expected = assert_contract(x, layer_output, h_post, h_res)
    rounded = ops.post(x, layer_output.to(dtype), h_post, h_res)
    exact = [numpy64(tensor) for tensor in (x, layer_output, h_post, h_res)]
    of_float32 = reference.post(*map(np.abs, exact)) * 6 * 2.0**-24  # a product and four fmas, then some
    half_ulp = np.exp2(np.floor(np.log2(np.abs(reference.post(*exact))))) * torch.finfo(dtype).eps / 2

    def share_within(got):
        return (np.abs(got.astype(np.float64) - reference.post(*exact)) <= half_ulp + of_float32).mean()

    assert share_within(expected) == 1
    assert share_within(numpy64(rounded)) < 0.95
    assert (numpy64(rounded) != expected.astype(np.float64)).mean() > 0.05


def test_contract_tells_orders_apart():
    """Tests the test above: streams in descending order, or products rounded first, give other bits."""
    x, layer_output, h_post, h_res = arguments(Inputs.of(Case(4, 192, torch.float32, 127), CPU))
    ascending = contract(x, layer_output, h_post, h_res)
    descending = contract(x.flip(1), layer_output, h_post, h_res.flip(2))
    unfused = sum((h_res[:, :, i, None] * x[:, None, i] for i in range(4)), h_post[..., None] * layer_output[:, None])
    assert (ascending != descending).mean() > 0.1
    assert (ascending != unfused.numpy()).mean() > 0.1


@pytest.mark.parametrize(
    ("dtype", "mantissa_bits", "exponents"),
    [(torch.bfloat16, 7, range(-149, 128)), (torch.float16, 10, range(-26, 18))],
    ids=["bfloat16", "float16"],
)
@pytest.mark.parametrize("width", [None, 7], ids=["vectors-and-tail", "scalars"])
def test_rounding_at_every_midpoint(dtype, mantissa_bits, exponents, width):
    """Every midpoint between neighbours in every binade, and the float32 on either side of it, both signs.

    Catches ties away from even, cut or stochastic rounding, subnormals flushed, a missing or early overflow
    to infinity, in rows that are converted by vectors and in rows too short for one. A token is a binade 2^e
    (many tokens, for short rows); a channel is a mantissa, brought as three pieces of `dtype` that add up to it
    exactly; h_res scales them by 2^e.
    """
    midpoints = 1 + (2 * np.arange(2**mantissa_bits) + 1) / 2 ** (mantissa_bits + 1)
    around = np.float32([midpoints - 2.0**-23, midpoints, midpoints + 2.0**-23]).ravel()
    mantissas = np.concatenate([around, -around, np.float32([1, -1])])
    pieces = []
    for _ in range(3):
        rest = mantissas - sum(pieces, np.float32(0))
        pieces.append(rest.astype(NUMPY[dtype]).astype(np.float32))
    assert (sum(pieces) == mantissas).all()

    rows = torch.from_numpy(np.stack(pieces)).to(dtype).unflatten(1, (-1, width or len(mantissas)))  # [3, rows, C]
    scale = torch.tensor([2.0**e for e in exponents], dtype=torch.float64).float().repeat_interleave(rows.shape[1])
    x = torch.zeros(len(scale), 4, rows.shape[2], dtype=dtype)
    x[:, :3] = rows.transpose(0, 1).repeat(len(exponents), 1, 1)
    h_res = torch.zeros(len(scale), 4, 4)
    h_res[:, 1, :3] = scale[:, None]
    arguments = x, torch.zeros_like(x[:, 0]), torch.zeros(len(scale), 4), h_res
    expected, sums = assert_contract(*arguments)[:, 1], contract(*arguments)[:, 1]

    finest = np.float64(ml_dtypes.finfo(NUMPY[dtype]).smallest_subnormal)
    finite = np.isfinite(expected)
    assert not finite.all()
    distance = np.abs(expected[finite].astype(np.float64) - sums[finite])
    assert (distance == finest / 2).sum() > 100  # ties among the subnormals
