"""The backward of pre with the layer's own norm: the kernel, then the gradients of pre and post_pre.

Would catch: a norm that is held constant, a weight's gradient that lacks r or a token, channels left out at the end of
a row, a gradient of h_pre that a rounded g_u was used for, one that is lost in one of the forms.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from differentiable import NORMED, gradients, requiring, upstream
from helpers import CPU, DTYPES, STREAMS, assert_matches_float64, assert_same_bits, every_n_and_dtype, named
from helpers_backward import BACKWARD

from mhc_tilelang import HyperConnection, MHCSpec, ResidualStream, convert, launch, ops
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.families.aggregate_norm import EPS
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.kernels import boundary_plans, plans

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
FUNCTION = BACKWARD["aggregate_norm_backward"]
KEPT = plans.MAX_THREADS * plans.KEPT_CHANNELS
CASES = every_n_and_dtype(127)
CASES += [named("width", Case(4, size, torch.bfloat16, 5)) for size in (1, 7, 200, 1000, 333)]
CASES += [named("tokens", Case(4, 192, torch.bfloat16, tokens)) for tokens in (0, 1, 3, 16, 17)]
CASES += [named("nothing-kept", Case(2, KEPT + 8, torch.bfloat16, 18))]
CASES += [
    named("full-cross", Case(n, size, dtype, 63, seed=1), pytest.mark.full)
    for n in STREAMS
    for dtype in DTYPES
    for size in (1, 7, 64, 200, 333, 1000, 2560, 7168, KEPT + 1)
]


@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_float64(case):
    assert_matches_float64("aggregate_norm_backward", case)


@pytest.mark.parametrize("case", [CASE, Case(8, 1031, torch.float32, 5), Case(2, KEPT + 8, torch.float16, 18)])
def test_gpu_tile_matches_float64(case, monkeypatch):
    """Tiles that hang over; the last one reads x twice, and adds up the weight's gradient in memory."""
    tile = plans.norm_tile(case.hidden_size, case.dtype.itemsize, "cuda")
    monkeypatch.setattr(plans, "norm_tile", lambda *_: tile)
    assert_matches_float64("aggregate_norm_backward", case)


def test_without_the_weights_gradient():
    """The other two are the same to the bit, whatever shares a block."""
    arguments = FUNCTION.arguments(CASE)
    g_u, g_h_pre, g_weight = FUNCTION(arguments, needs_g_weight=False).values()
    assert g_weight is None
    assert_same_bits([g_u, g_h_pre], list(FUNCTION(arguments).values())[:2])


def test_each_token_adds_to_the_weights_gradient_once():
    """Rows of ones and eps 0: u is a constant, r its inverse, so g_w is the sum of g over tokens, exact in integers."""
    case = Case(4, 200, torch.float32, 1000)
    arguments = {**FUNCTION.arguments(case), "eps": 0.0}
    g = arguments["g_layer_input"].sign()
    ones = {name: torch.ones_like(arguments[name]) for name in ("x", "h_pre")}
    got = FUNCTION({**arguments, **ones, "g_layer_input": g})["g_weight"]
    np.testing.assert_array_equal(numpy64(got), numpy64(g).sum(0))


def test_a_gradient_along_the_result_is_none():
    """A gradient along u vanishes: with a weight of one and no eps the norm ignores the size of u.

    Catches an r that is held constant: r·g would be left.
    """
    case = replace(CASE, dtype=torch.float32)
    arguments = {**FUNCTION.arguments(case), "weight": torch.ones(case.hidden_size), "eps": 0.0}
    normed = launch.aggregate_norm(arguments["x"], arguments["h_pre"], arguments["weight"], 0.0)
    got = FUNCTION({**arguments, "g_layer_input": normed})
    scale = np.abs(FUNCTION.float64(arguments)["g_u"]).max()
    assert np.abs(numpy64(got["g_u"])).max() < 2e-6 * scale  # 333 channels, 20 roundings of 6e-8 in r³·D


@pytest.mark.parametrize("name", NORMED)
def test_gradients_of_the_function(name):
    """Every form, all outputs at once, to 1e-5 of the norm over all tokens (see `test_autograd`)."""
    function, case = NORMED[name], Case(4, 64, torch.float32, 63)
    tensors = requiring(function.tensors(case))
    outputs = function.call(tensors, case.spec)
    g_outputs = upstream(outputs)
    got, exact = gradients(outputs, tensors, g_outputs), function.reference_backward(g_outputs, tensors, case.spec)
    assert set(got) == set(exact) == set(function.arguments)
    for argument, gradient in got.items():
        distance = np.linalg.norm(numpy64(gradient) - exact[argument])
        assert distance <= 1e-5 * np.linalg.norm(exact[argument]), argument


@pytest.mark.parametrize("name", ["post_pre-normed", "post_pre-delayed-normed"])
def test_the_separate_backward(name, monkeypatch):
    """The kernels that a GPU takes at n = 8 in place of the fused ones: a rounding more of g_x, float32 here."""
    monkeypatch.setattr(boundary_plans, "backward_is_fused", lambda *_: False)
    test_gradients_of_the_function(name)


def test_frozen_and_unused():
    """A frozen weight is not summed for; layer_input that nothing was made of gives the weight zeros."""
    function, case = NORMED["post_pre-normed"], Case(4, 64, torch.float32, 6)
    frozen = requiring(function.tensors(case), ("x", "phi"))
    outputs = function.call(frozen, case.spec)
    every = requiring(function.tensors(case))
    expected = gradients(function.call(every, case.spec), every, upstream(outputs))
    got = gradients(outputs, frozen, upstream(outputs))
    assert_same_bits(got.values(), [expected[name] for name in got])
    outputs = function.call(every, case.spec)
    g_weight = torch.autograd.grad(outputs[2], every["rms_norm_weight"], upstream(outputs)[2])[0]
    assert not g_weight.any()


def test_the_aggregations_share_is_of_the_rounded_g_u():
    """Kernels after the norm's backward take g_u as it was written: the chain of launches, to the bit."""
    inputs, g, spec = Inputs.of(CASE, CPU), Gradients.of(CASE, CPU).g_h, CASE.spec
    arguments = FUNCTION.arguments(CASE)
    leaves = requiring({name: getattr(inputs, name) for name in ("x", "phi", "alpha", "bias")})
    layer_input, *_ = ops.pre(
        *leaves.values(), spec, rms_norm_weight=arguments["weight"].requires_grad_(), rms_norm_eps=EPS
    )
    got = torch.autograd.grad(layer_input, [*leaves.values(), arguments["weight"]], g)
    with torch.no_grad():
        *_, h_pre, projected = torch.ops.mhc_tilelang.pre(*vars_of(inputs), None, None, *constants_of(spec), EPS)
        g_u, g_h_pre, g_weight = launch.aggregate_norm_backward(g, inputs.x, h_pre, arguments["weight"], EPS)
        g_projected, g_alpha, g_bias = launch.coefficients_backward(
            g_h_pre, None, None, projected, inputs.alpha, inputs.bias, spec
        )
        g_x, g_phi = launch.project_backward(g_projected, inputs.x, inputs.phi, h_pre=h_pre, g_layer_input=g_u)
    assert_same_bits(got, [g_x, g_phi, g_alpha, g_bias, g_weight])


def vars_of(inputs):
    return inputs.x, inputs.phi, inputs.alpha, inputs.bias


def constants_of(spec):
    return spec.sinkhorn_iters, spec.sinkhorn_eps, spec.pre_eps, spec.rms_eps, spec.post_scale


@pytest.mark.parametrize("delayed", [False, True], ids=["ordinary", "delayed"])
def test_a_stream_of_connections_with_norms(delayed):
    """Three sublayers through `ResidualStream`, boundaries fused, as their plain twins and a norm in plain torch.

    In float32, where u before the norm is rounded no further: to 1e-5 of each gradient's norm, as above.
    """
    spec = MHCSpec(hidden_size=64, delayed_pre=delayed)
    generator = torch.Generator().manual_seed(3)
    normed = [HyperConnection(spec, k, rms_norm_eps=1e-5) for k in range(3)]
    plain = [HyperConnection(spec, k) for k in range(3)]
    weights = [torch.nn.Parameter(torch.empty(64).uniform_(0.5, 1.5, generator=generator)) for _ in range(3)]
    for one, other, weight in zip(normed, plain, weights, strict=True):
        other.phi.data.normal_(std=0.05, generator=generator)
        one.load_state_dict({**other.state_dict(), "rms_norm_weight": weight.detach().clone()})
        assert one.rms_norm_weight.dtype == torch.float32
    h = torch.randn(9, 64, generator=generator)
    g = torch.randn(9, 64, generator=generator)

    def run(connections, norms):
        stream = ResidualStream(h)
        for connection, norm in zip(connections, norms, strict=True):
            stream.write(torch.tanh(norm(stream.read(connection))))
        result = stream.reduce("sum")
        named_parameters = [dict(c.named_parameters()) for c in connections]
        shared = [p for names in named_parameters for name, p in names.items() if name != "rms_norm_weight"]
        scales = [c.rms_norm_weight for c in connections] if connections is normed else weights
        return result, torch.autograd.grad(result, [*shared, *scales], g)

    got = run(normed, [lambda u: u] * 3)
    expected = run(plain, [lambda u, w=w: torch.nn.functional.rms_norm(u, (64,), w, 1e-5) for w in weights])
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(got[1], expected[1], strict=True):
        assert other.any()
        assert torch.linalg.vector_norm(one - other) <= 1e-5 * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("kind", [HyperConnection, convert.RowsFirstConnection])
def test_every_connection_of_the_kind_normalises(kind):
    """Catches a subclass that takes the option and ignores it."""
    spec, x = MHCSpec(hidden_size=64), Inputs.of(Case(4, 64, torch.bfloat16, 6), CPU).x
    layer_input, *mappings = kind(spec, rms_norm_eps=1e-5)(x)
    u, *others = kind(spec)(x)
    assert_same_bits([m.detach() for m in mappings], [o.detach() for o in others])
    expected = torch.nn.functional.rms_norm(u.float(), (64,), eps=1e-5)
    torch.testing.assert_close(layer_input.float(), expected, rtol=2.0**-7, atol=1e-6)  # two roundings against one


def test_a_connection_owns_the_weight():
    """It starts at one, is float32 in a bfloat16 model, and is not there without an eps."""
    spec = MHCSpec(hidden_size=64)
    connection = HyperConnection(spec, rms_norm_eps=1e-5).to(torch.bfloat16)
    assert connection.rms_norm_weight.dtype == torch.float32
    assert torch.equal(connection.rms_norm_weight, torch.ones(64))
    assert "rms_norm_eps=1e-05" in repr(connection)
    bare = HyperConnection(spec)
    assert bare.rms_norm_weight is None
    assert "rms_norm_weight" not in bare.state_dict()
    with pytest.raises(ValueError, match="HyperConnection: rms_norm_eps: expected 0 or a positive number"):
        HyperConnection(spec, rms_norm_eps=-1e-5)
