"""Identity hyper-connections (H_res = I): functions, modules, streams, against float64.

Would catch: alphas or rows of the two gates that change places, an eps that is lost, a stream whose gradient is scaled
or missing, h_res read where there is none, a token that depends on its batch, n² + 2n rows of two streams taken for 2n
of four.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from differentiable import IDENTITY
from helpers import assert_same_bits, numpy64
from test_operators import check_operators

import mhc_tilelang as mhc
from mhc_tilelang import MHCSpec, compiler, operators, reference
from mhc_tilelang.compiler.simt import executing
from mhc_tilelang.errors import ConversionError

N, C, T = 4, 64, 7  # other tests have these kernels, too
# Every constant has another value, so that one in another's place shows.
SPEC = MHCSpec.hy4(C, pre_eps=3e-3, post_eps=5e-3, rms_eps=2e-3, post_scale=1.5)
U = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def inputs(dtype=torch.float32, spec=SPEC, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, size = spec.num_streams, spec.stream_size

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    parameters = (normal(2 * n, size) * 2 / size**0.5, torch.tensor([0.7, 1.3]), normal(2 * n))
    return normal(T, n, C).to(dtype), normal(T, C).to(dtype), parameters


def relative(got, expected):
    got = numpy64(got) if isinstance(got, torch.Tensor) else got
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
def test_values_and_gradients(dtype):
    """Values and gradients of `pre` and `post` are near float64's, with random upstream gradients.

    A norm of float32 roundings is below 2^-20 here: dots of 256 products are off by 2e-7 of theirs; gradients of phi,
    alpha and bias are sums over seven tokens. Streams are rounded once more, to their dtype, which is U at most of each
    element.
    """
    x, layer_output, parameters = inputs(dtype)
    given = [t.detach().requires_grad_() for t in (x, layer_output, *parameters)]
    x, layer_output, *parameters = given
    layer_input, h_post = mhc.pre(x, *parameters, SPEC)
    x_next = mhc.post(x, layer_output, h_post)
    g = [torch.randn(t.shape, generator=torch.Generator().manual_seed(3)).to(t.dtype) for t in (layer_input, x_next)]
    gradients = torch.autograd.grad([layer_input, x_next], given, g)

    x64, output64, *parameters64 = map(numpy64, given)
    input64, post64 = reference.identity_pre(x64, *parameters64, SPEC)
    assert relative(h_post, post64) < 2**-20
    assert relative(layer_input, input64) < 2**-20 + U[dtype]
    assert relative(x_next, reference.identity_post(x64, output64, post64)) < 2**-20 + U[dtype]
    assert relative(x_next, x64) > 0.1
    g_input, g_next = map(numpy64, g)
    g_x, g_output, g_post = reference.identity_post_backward(g_next, x64, output64, post64)
    g_x_pre, *g_parameters, _ = reference.identity_pre_backward(g_input, g_post, x64, *parameters64, SPEC)
    for got, expected in zip(gradients[:2], (g_x + g_x_pre, g_output), strict=True):
        assert relative(got, expected) < 2**-20 + 2 * U[dtype]  # autograd's sum rounds again
    for got, expected in zip(gradients[2:], g_parameters, strict=True):
        assert relative(got, expected) < 2**-18


def test_a_fault_would_show():
    """The comparisons above are not blind: alphas exchanged, an eps dropped, one row of phi wrong."""
    x, _, (phi, alpha, bias) = inputs()
    expected = reference.identity_pre(*map(numpy64, (x, phi, alpha, bias)), SPEC)
    wrong = phi.clone()
    wrong[N] = 0
    faults = [
        mhc.pre(x, phi, alpha.flip(0), bias, SPEC),
        mhc.pre(x, phi, alpha, bias, replace(SPEC, pre_eps=0.0, post_eps=0.0)),
        mhc.pre(x, wrong, alpha, bias, SPEC),
    ]
    assert all(max(map(relative, fault, expected)) > 1e3 * 2**-20 for fault in faults)


def test_reference_gradients_are_autograds():
    """The float64 formulas, against torch's own differentiation of the forward."""
    x, _, parameters = inputs()
    given = [t.double().requires_grad_() for t in (x, *parameters)]
    x, phi, alpha, bias = given
    flat = x.flatten(1)
    scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + SPEC.rms_eps)
    logits = alpha.repeat_interleave(N) * (flat @ phi.T) * scale + bias
    h_pre = torch.sigmoid(logits[:, :N]) + SPEC.pre_eps
    h_post = SPEC.post_scale * torch.sigmoid(logits[:, N:]) + SPEC.post_eps
    layer_input = (h_pre.unsqueeze(-1) * x).sum(1)
    g = [torch.randn(t.shape, dtype=torch.float64) for t in (layer_input, h_post)]
    expected = torch.autograd.grad([layer_input, h_post], given, g)
    arrays = [numpy64(t) for t in given]
    for got, exact in zip(reference.identity_pre(*arrays, SPEC), (layer_input, h_post), strict=True):
        np.testing.assert_allclose(got, numpy64(exact), rtol=1e-12, atol=1e-14)
    for got, exact in zip(reference.identity_pre_backward(*map(numpy64, g), *arrays, SPEC), expected, strict=False):
        np.testing.assert_allclose(got, numpy64(exact), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "is_delayed"), [*((one, False) for one in IDENTITY), ("identity_pre", True), ("identity_post_pre", True)]
)
def test_operators_keep_pytorchs_rules(name, is_delayed):
    """Schemas, fakes, autograd, with and without a given h_pre."""
    taken = getattr(operators, name).inputs
    x, layer_output, (phi, alpha, bias) = inputs()
    named = {"x": x, "layer_output": layer_output, "phi": phi, "alpha": alpha, "bias": bias}
    named |= {"h_post": torch.rand(T, N), "h_pre": torch.rand(T, N) if is_delayed else None}
    constants = (SPEC.pre_eps, SPEC.rms_eps, SPEC.post_scale, SPEC.post_eps) if "phi" in taken else ()
    check_operators(name, [*(named[one] for one in taken), *constants], is_delayed)


def test_a_token_alone_has_the_bits_that_it_has_in_a_batch():
    x, _, parameters = inputs()
    whole, alone = mhc.pre(x, *parameters, SPEC), mhc.pre(x[3:4], *parameters, SPEC)
    assert_same_bits([part[3:4] for part in whole], alone)


def test_the_gradient_of_x_next_is_handed_on():
    """g_x is g_x_next itself: H_res is the identity."""
    x, layer_output, _ = inputs()
    x_next = mhc.post(x.requires_grad_(), layer_output, torch.rand(T, N))
    g = torch.randn_like(x_next)
    (g_x,) = torch.autograd.grad(x_next, x, g)
    assert g_x.data_ptr() == g.data_ptr()


@pytest.mark.parametrize("delayed", [False, True])
def test_streams(delayed):
    """Three sublayers of modules, reduced by a head, against the float64 stream; another h_pre when delayed."""
    spec = replace(SPEC, delayed_pre=delayed)
    torch.manual_seed(1)
    connections = [mhc.HyperConnection(spec, sublayer) for sublayer in range(3)]
    for module in connections:
        assert module.phi.shape == (2 * N, spec.stream_size)
        assert 0.004 < module.phi.std() < 0.008
        torch.nn.init.normal_(module.bias)
        torch.nn.init.ones_(module.alpha)
    h = torch.randn(T, C)
    stream = mhc.ResidualStream(h, N)
    for module in connections:
        stream.write(torch.tanh(stream.read(module)))
    got = stream.reduce("mean")
    sublayers = [
        reference.Sublayer(np.tanh, **{name: numpy64(p.detach()) for name, p in module.named_parameters()})
        for module in connections
    ]
    expected = reference.run_stream(numpy64(h), sublayers, spec, reduction="mean")
    assert relative(got, expected) < 2**-20
    head = mhc.HyperHead(spec)
    torch.testing.assert_close(stream.reduce(head), got, rtol=0.05, atol=0.02)  # 1/n each at first, and n·pre_eps
    assert len(mhc.ResidualStream.from_streams(stream.x, *([torch.rand(T, N)] * delayed)).read(connections[0])) == T


def test_refusals():
    """Errors name the argument, before a kernel starts."""
    x, layer_output, parameters = inputs()
    h_post, h_res = torch.rand(T, N), torch.rand(T, N, N)
    with pytest.raises(TypeError, match=r"post_pre: h_res: expected None, got a tensor .*'identity'"):
        mhc.post_pre(x, layer_output, h_post, h_res, *parameters, SPEC)
    sinkhorn = MHCSpec(C)
    of_sinkhorn = (torch.zeros(24, N * C), torch.zeros(3), torch.zeros(24))
    with pytest.raises(TypeError, match=r"post_pre: h_res: expected a torch.Tensor, got None .*'sinkhorn'"):
        mhc.post_pre(x, layer_output, h_post, None, *of_sinkhorn, sinkhorn)
    with pytest.raises(ValueError, match=r"pre: rms_norm_weight: expected None with residual_mapping='identity'"):
        mhc.pre(x, *parameters, SPEC, rms_norm_weight=torch.ones(C))
    with pytest.raises(ValueError, match=r"pre: phi: expected shape \[8, 256\], got \[24, 256\]"):
        mhc.pre(x, *of_sinkhorn, SPEC)
    with pytest.raises(ValueError, match=r"residual_mapping: expected 'sinkhorn' or 'identity', got 'none'"):
        MHCSpec(C, residual_mapping="none")
    with pytest.raises(ValueError, match="post_eps: expected 0 beside residual_mapping='sinkhorn'"):
        MHCSpec(C, post_eps=1e-6)


def test_conversion_tells_two_streams_from_four():
    """8 rows: 2n of n = 4, or n² + 2n of n = 2. The scale says which."""
    state = mhc.HyperConnection(SPEC).state_dict()
    theirs = mhc.convert.transformers.export_state(state)
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {"fn": (8, 256), "scale": (2,), "base": (8,)}
    back = mhc.convert.transformers.import_state(theirs)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    with pytest.raises((ConversionError, ValueError), match=r"import_state: fn: expected shape \[8, 4·C\]"):
        mhc.convert.transformers.import_state({**theirs, "fn": theirs["fn"][:6]})


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_as_cuda(dtype):
    """The kernels that tilelang generates for a GPU, executed on the CPU: the same values and gradients."""
    results = []
    for where in (nullcontext(), executing()):
        x, layer_output, parameters = inputs(dtype)
        given = [t.detach().requires_grad_() for t in (x, layer_output, *parameters)]
        x, layer_output, *parameters = given
        with where:
            layer_input, h_post = mhc.pre(x, *parameters, SPEC)
            x_next = mhc.post(x, layer_output, h_post)
            g = [torch.ones_like(layer_input) - 2 * layer_input.detach(), torch.cos(x_next.detach())]
            gradients = torch.autograd.grad([layer_input, x_next], given, g)
            boundary = mhc.post_pre(x, layer_output, h_post, None, *parameters, SPEC)
        results.append([layer_input, h_post, x_next, *gradients, *boundary])
    for got, expected in zip(*results, strict=True):
        # phi is split in two for tensor cores: 2^-18 of each of its elements, and g is of what was rounded.
        assert relative(got, numpy64(expected)) < 2**-16 + 4 * U[dtype]


@pytest.mark.parametrize("delayed", [False, True])
def test_boundary(delayed):
    """`post_pre` has the bits of `post`, then `pre`; its gradients are theirs, but for the order of float32 sums.

    Would catch: a gradient of x_next that is dropped where it is also an output, a third launch in the delayed form.
    """
    x, layer_output, parameters = inputs()
    h_post, h_pre = torch.rand(T, N), torch.rand(T, N)
    given = [t.clone().requires_grad_() for t in (x, layer_output, h_post, *parameters, *([h_pre] if delayed else []))]
    x, layer_output, h_post, phi, alpha, bias, *rest = given
    keywords = {"h_pre": rest[0]} if delayed else {}
    x_next = mhc.post(x, layer_output, h_post)
    separate = (x_next, *mhc.pre(x_next, phi, alpha, bias, SPEC, **keywords))
    fused = mhc.post_pre(x, layer_output, h_post, None, phi, alpha, bias, SPEC, **keywords)
    assert_same_bits(fused, separate)
    out = tuple(torch.full_like(t, float("nan")) for t in fused)
    with torch.no_grad():
        mhc.post_pre(x, layer_output, h_post, None, phi, alpha, bias, SPEC, **keywords, out=out)
    assert_same_bits(out, fused)
    g = [torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for t in fused]
    for used in (slice(None), slice(1), slice(1, None)):
        wanted = [
            torch.autograd.grad(r[used], given, g[used], retain_graph=True, allow_unused=True)
            for r in (fused, separate)
        ]
        for got, expected in zip(*wanted, strict=True):
            if expected is None or not expected.any():
                assert got is None or not got.any()
            else:
                assert relative(got, numpy64(expected)) < 2**-20
    assert [one.family for one in launches(x, layer_output, h_post, phi, alpha, bias, keywords)] == (
        ["post_project", "gates"] + ["aggregate"] * (not delayed)
    )


def launches(x, layer_output, h_post, phi, alpha, bias, keywords):
    """Return the kernels that a boundary launches."""
    seen = []
    kernel = compiler.kernel
    with pytest.MonkeyPatch.context() as patch:

        def noted(family, *arguments, **parameters):
            seen.append(SimpleNamespace(family=family))
            return kernel(family, *arguments, **parameters)

        patch.setattr(compiler, "kernel", noted)
        mhc.post_pre(x, layer_output, h_post, None, phi, alpha, bias, SPEC, **keywords)
    return seen
