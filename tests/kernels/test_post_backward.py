"""post, backward: two mixtures of streams and n² + n inner products, each alone or together.

Would catch: h_res or its gradient transposed, channels left out at the end of a row, a gradient that is computed
though it was not asked for, or that changes with what else is asked for.
"""

from itertools import product

import numpy as np
import pytest
import torch
from helpers import CPU, DTYPES, MIXED_DTYPES, STREAMS, assert_matches_float64, assert_same_bits, fma32
from helpers_backward import BACKWARD

from mhc_tilelang import reference
from mhc_tilelang.checking import tolerance
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.compiler.kernel import dtype_name
from mhc_tilelang.kernels import plans

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
FUNCTION = BACKWARD["post_backward"]
SUBSETS = list(product([False, True], repeat=3))


@pytest.mark.parametrize("case", [CASE, Case(8, 1031, torch.float32, 5)])
def test_gpu_tile_matches_float64(case, monkeypatch):
    """Tiles of 256 and 512 channels, the last of which hangs over."""
    tile = plans.reduction_tile(case.hidden_size, case.dtype.itemsize, "cuda")
    monkeypatch.setattr(plans, "reduction_tile", lambda *_: tile)
    assert_matches_float64("post_backward", case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", STREAMS)
def test_bits_of_the_mixtures(n, dtype):
    """acc = fma(h_res[j, i], g[j], acc) and fma(h_post[j], g[j], acc), j ascending from 0, then one rounding."""
    arguments = FUNCTION.arguments(Case(n, 192, dtype, 127))
    g, h_post, h_res = (arguments[name].float().numpy() for name in ("g_x_next", "h_post", "h_res"))
    g_x, g_layer_output = np.zeros_like(g), np.zeros_like(g[:, 0])
    for j in range(n):
        g_x = fma32(h_res[:, j, :, None], g[:, j, None], g_x)
        g_layer_output = fma32(h_post[:, j, None], g[:, j], g_layer_output)
    got = FUNCTION(arguments)
    expected = [torch.from_numpy(values).to(dtype) for values in (g_x, g_layer_output)]
    assert_same_bits([got["g_x"], got["g_layer_output"]], expected)


@pytest.mark.parametrize("n", STREAMS)
def test_each_channel_counts_once(n):
    """Zeros and ones: the gradients of h_post and h_res are counts of channels, exact in every dtype."""
    arguments = FUNCTION.arguments(Case(n, 333, torch.bfloat16, 7))
    arguments = {name: (tensor > 0).to(tensor.dtype) for name, tensor in arguments.items()}
    got, expected = FUNCTION(arguments), FUNCTION.float64(arguments)
    for name in ("g_h_post", "g_h_res"):
        np.testing.assert_array_equal(numpy64(got[name]), expected[name])


@pytest.mark.parametrize(("stream", "layer", "mixing"), SUBSETS)
def test_every_subset_of_gradients(stream, layer, mixing):
    """The bits of the full call, None for the rest; what only the rest needs is NaN here, so a read shows."""
    arguments = FUNCTION.arguments(CASE)
    full = FUNCTION(arguments)
    unread = [] if mixing else ["x", "layer_output"]
    unread += [] if stream else ["h_res"]
    unread += [] if layer else ["h_post"]
    arguments |= {name: torch.full_like(arguments[name], torch.nan) for name in unread}
    got = FUNCTION(arguments, needs_g_x=stream, needs_g_layer_output=layer, needs_g_mappings=mixing)
    wanted = dict(zip(FUNCTION.outputs, (stream, layer, mixing, mixing), strict=True))
    assert {name: tensor is not None for name, tensor in got.items()} == wanted
    asked_for = [name for name in wanted if wanted[name]]
    assert_same_bits([got[name] for name in asked_for], [full[name] for name in asked_for])


@pytest.mark.parametrize(("dtype", "layer_dtype"), MIXED_DTYPES)
@pytest.mark.parametrize("size", [192, 333])
def test_a_layer_of_another_dtype(size, dtype, layer_dtype):
    """16 bits in a float32 stream, or the reverse. Catches the stream's dtype in the layer's place, two roundings."""
    case = Case(4, size, dtype, 63)
    arguments = FUNCTION.arguments(case)
    arguments["layer_output"] = arguments["layer_output"].to(layer_dtype)
    got, expected = FUNCTION(arguments), FUNCTION.float64(arguments)
    assert [tensor.dtype for tensor in got.values()] == [dtype, layer_dtype, torch.float32, torch.float32]
    exact = [numpy64(tensor) for tensor in arguments.values()]
    magnitudes = dict(zip(FUNCTION.outputs, reference.post_backward(*map(np.abs, exact)), strict=True))
    squares = dict(zip(FUNCTION.outputs, reference.post_backward(*map(np.square, exact)), strict=True))
    for name, tensor in got.items():
        if name in ("g_x", "g_layer_output"):
            bound = tolerance.combination(magnitudes[name], 4, dtype_name(tensor.dtype))
        else:
            bound = tolerance.inner_products(np.sqrt(squares[name]), size)
        assert (np.abs(numpy64(tensor) - expected[name]) <= bound).all(), name


def test_float16_results_overflow_to_infinity():
    """Beyond 65504, as IEEE rounds. Catches a clamp."""
    inputs = Inputs.of(Case(4, 64, torch.float16, 3), CPU)
    arguments = FUNCTION.arguments(Case(4, 64, torch.float16, 3))
    arguments["h_post"] = torch.full_like(inputs.h_post, 1e6)
    got = FUNCTION(arguments)["g_layer_output"]
    assert torch.isinf(got).float().mean() > 0.9
    assert not torch.isnan(got).any()
