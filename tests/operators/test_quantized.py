"""pre and post_pre in float8: which stream and h_pre, gradients straight through, `out=`, PyTorch's rules.

Would catch: a layer's input of the stream before `post`, of another h_pre or in another dtype than asked; a gradient
that is rounded to float8, lost without a word, or another than that of `pre` with its norm; a buffer that is copied.
"""

import pytest
import torch
from differentiable import QUANTIZED, requiring, upstream
from helpers import CPU, assert_same_bits
from test_operators import check_operators, operator

import mhc_tilelang as mhc
from mhc_tilelang import launch, operators, ops
from mhc_tilelang.checking.families.aggregate_norm import EPS, rms_norm_weight
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.errors import GradientError

CASE = Case(4, 192, torch.bfloat16, 6)  # a group and a half
SPEC = CASE.spec
OF = {"pre_quantized": "pre", "post_pre_quantized": "post_pre"}
FORMS = [(name, delayed) for name in QUANTIZED for delayed in (False, True)]
every_form = pytest.mark.parametrize(("name", "delayed"), FORMS)


def arguments(name, delayed, case=CASE):
    """Return the arguments by name, in the order of the operator."""
    drawn = {**vars(Inputs.of(case, CPU)), "rms_norm_weight": rms_norm_weight(case, CPU)}
    taken = getattr(operators, name).inputs
    return {one: drawn[one] for one in taken if delayed or one != "h_pre"}


def call(name, tensors, **options):
    """The public function; its results, flat."""
    results = getattr(mhc, name)(**tensors, spec=SPEC, rms_norm_eps=EPS, **options)
    at = next(k for k, one in enumerate(results) if isinstance(one, mhc.Quantized))
    return (*results[:at], *(one for one in results[at] if one is not None), *results[at + 1 :])


def plain(name, tensors):
    """The function that writes layer_input in the stream's dtype."""
    return getattr(ops, OF[name])(**tensors, spec=SPEC, rms_norm_eps=EPS)


@pytest.mark.parametrize("ue8m0", [False, True])
@every_form
def test_results(name, delayed, ue8m0):
    """All but values and scales have the bits of the plain function; those are of the same stream and h_pre."""
    tensors = arguments(name, delayed)
    got, expected = call(name, tensors, ue8m0=ue8m0, keeps_layer_input=True), plain(name, tensors)
    first = len(got) - len(expected) - 1 if name == "post_pre_quantized" else 0
    assert_same_bits([*got[:first], *got[first + 2 :]], expected)
    x = expected[0] if first else tensors["x"]
    h_pre = (
        tensors["h_pre"] if delayed else ops.coefficients(x, *(tensors[p] for p in ("phi", "alpha", "bias")), SPEC)[0]
    )
    by_launch = launch.aggregate_quantized(x, h_pre, tensors["rms_norm_weight"], EPS, power_of_two=ue8m0)
    assert_same_bits(got[first : first + 2], by_launch)
    alone = call(name, tensors, ue8m0=ue8m0)
    assert_same_bits(alone, [*got[: first + 2], *got[first + 3 :]])
    assert (got[first].dtype, got[first + 1].shape) == (torch.float8_e4m3fn, (6, 2))


def test_what_comes_back():
    """Values times scales; (values, scales) is what DeepGEMM takes."""
    quantized, h_post, h_res = mhc.pre_quantized(**arguments("pre_quantized", False), spec=SPEC, keeps_layer_input=True)
    values, scales, layer_input = quantized
    spread = torch.cat([scales[:, :1].expand(-1, 128), scales[:, 1:].expand(-1, 64)], -1)
    assert torch.equal(quantized.dequantize(), values.float() * spread)
    assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16
    # Half a spacing is a sixteenth at most; below 2^-6 of the scale it is 2^-10.
    error = (quantized.dequantize() - layer_input.float()).abs()
    assert (error <= layer_input.float().abs() / 16 + spread * 2**-9).all()
    assert (h_post.shape, h_res.shape) == ((6, 4), (6, 4, 4))


@every_form
def test_gradients_go_straight_through(name, delayed):
    """Gradients are the plain function's to the bit: of layer_input, or of a product of values and scales."""
    tensors = requiring(arguments(name, delayed))
    results = call(name, tensors, keeps_layer_input=True)
    expected = plain(name, tensors)
    g = upstream(expected)
    wanted = torch.autograd.grad(expected, list(tensors.values()), g)
    differentiable = [one for one in results if one.requires_grad]
    assert len(differentiable) == len(results) - 2
    got = torch.autograd.grad(differentiable, list(tensors.values()), g, retain_graph=True)
    assert_same_bits(got, wanted)

    at = next(k for k, one in enumerate(results) if one.dtype == torch.float8_e4m3fn)
    product = Product.apply(*results[at : at + 3])
    through = torch.autograd.grad(product, tensors["rms_norm_weight"], g[at].float(), retain_graph=True)
    assert_same_bits(through, torch.autograd.grad(results[at + 2], tensors["rms_norm_weight"], g[at]))


class Product(torch.autograd.Function):
    """An FP8 product: it computes with values and scales, and returns the gradient of layer_input."""

    @staticmethod
    def forward(ctx, values, scales, layer_input):
        ctx.dtype = layer_input.dtype
        return mhc.Quantized(values, scales).dequantize()

    @staticmethod
    def backward(ctx, g):
        return None, None, g.to(ctx.dtype)


@every_form
def test_operators_keep_pytorchs_rules(name, delayed):
    """Fakes and autograd, of which the operator without layer_input has none. PyTorch's other two checks need sums and
    products of float8, which it lacks: here arguments are compared by their bits, and `test_compiled` runs AOTAutograd.
    """
    given = arguments(name, True)
    given["h_pre"] = given["h_pre"] if delayed else None
    of_spec = (SPEC.sinkhorn_iters, SPEC.sinkhorn_eps, SPEC.pre_eps, SPEC.rms_eps, SPEC.post_scale)
    taken = [*given.values(), *of_spec, EPS, True]
    before = [one.clone() for one in given.values() if one is not None]
    checks = {"test_utils": ("test_autograd_registration", "test_faketensor")}
    check_operators(name, taken, delayed, **checks)
    torch.library.opcheck(operator(f"{name}_alone"), tuple(taken), **checks)
    assert_same_bits([one for one in given.values() if one is not None], before)


@every_form
def test_given_buffers(name, delayed):
    """`out=` is written, to the bit, and handed back; twice more, as prepared calls do."""
    tensors = arguments(name, delayed)
    for keeps in (True, False):
        expected = call(name, tensors, keeps_layer_input=keeps)
        for _ in range(3):
            buffers = tuple(torch.zeros_like(one) for one in expected)
            returned = call(name, tensors, keeps_layer_input=keeps, out=buffers)
            assert all(one is buffer for one, buffer in zip(returned, buffers, strict=True))
            assert_same_bits(buffers, expected)
            assert_same_bits(call(name, tensors, keeps_layer_input=keeps), expected)


def test_compiled():
    """One graph, forward and backward, with a type that is no tensor."""
    tensors = requiring(arguments("pre_quantized", False))

    def model(**tensors):
        quantized, h_post, _ = mhc.pre_quantized(**tensors, spec=SPEC, keeps_layer_input=True)
        return Product.apply(*quantized).sum(-1) * h_post[..., 0]

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    g = torch.randn(6)
    for got, expected in zip(*(one(**tensors) for one in (compiled, model)), strict=True):
        assert torch.equal(got, expected)
    gradients = [torch.autograd.grad(one(**tensors), list(tensors.values()), g) for one in (compiled, model)]
    assert_same_bits(*gradients)


def test_shapes_of_fakes():
    tensors = {name: tensor.to("meta") for name, tensor in arguments("post_pre_quantized", True).items()}
    results = call("post_pre_quantized", tensors, keeps_layer_input=True)
    assert [tuple(one.shape) for one in results] == [(6, 4, 192), (6, 192), (6, 2), (6, 192), (6, 4), (6, 4, 4), (6, 4)]


@pytest.mark.parametrize("leading", [(), (2, 3), (0, 3)])
def test_leading_dimensions(leading):
    tensors = arguments("pre_quantized", False)
    expected = call("pre_quantized", tensors)
    tensors["x"] = tensors["x"][:1].view(4, 192) if not leading else tensors["x"][: 6 if all(leading) else 0]
    got = call("pre_quantized", {**tensors, "x": tensors["x"].view(*leading, 4, 192)})
    count = 1 if not leading else 6 if all(leading) else 0
    assert all(tuple(one.shape[: len(leading)]) == leading for one in got)
    assert_same_bits(got, [one[:count] for one in expected])


def test_refusals():
    """Errors name the argument, before a kernel starts."""
    tensors = arguments("pre_quantized", False)
    with pytest.raises(TypeError, match=r"pre_quantized: rms_norm_weight: expected a torch.Tensor, got None"):
        mhc.pre_quantized(**{**tensors, "rms_norm_weight": None}, spec=SPEC)
    with pytest.raises(
        GradientError, match="pre_quantized: keeps_layer_input: expected True where an argument requires"
    ):
        mhc.pre_quantized(**requiring(tensors), spec=SPEC)
    with pytest.raises(TypeError, match=r"pre_quantized: out: expected a tuple of values, scales, h_post, h_res, got"):
        mhc.pre_quantized(**tensors, spec=SPEC, out=(torch.empty(1),))
    buffers = call("pre_quantized", tensors)
    wrong = (buffers[0].view(torch.uint8), *buffers[1:])
    with pytest.raises(TypeError, match=r"out\[0\] \(values\): expected dtype torch.float8_e4m3fn, got torch.uint8"):
        mhc.pre_quantized(**tensors, spec=SPEC, out=wrong)
    hy4 = mhc.MHCSpec.hy4(192)
    of_hy4 = {"phi": torch.zeros(8, 768), "alpha": torch.zeros(2), "bias": torch.zeros(8)}
    with pytest.raises(
        ValueError, match="pre_quantized: rms_norm_weight: expected None with residual_mapping='identity'"
    ):
        mhc.pre_quantized(**{**tensors, **of_hy4}, spec=hy4)
