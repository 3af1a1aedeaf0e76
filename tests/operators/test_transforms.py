"""PyTorch's transforms of a function: checkpointing, torch.func, autocast, accumulation; and those it refuses.

Would catch: a gradient that is lost, doubled or silently zero under one of them.
"""

from __future__ import annotations

import pytest
import torch
from differentiable import FUNCTIONS, gradients, requiring, upstream
from helpers import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mhc_tilelang as mhc
from mhc_tilelang.checking.inputs import Case

CASE = Case(4, 64, torch.float32, 6)
SPEC = CASE.spec
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


class Sublayer(torch.nn.Module):
    """A connection around a linear layer: everything that a model trains."""

    def __init__(self) -> None:
        super().__init__()
        drawn = FUNCTIONS["pre"].tensors(CASE)
        self.phi, self.alpha, self.bias, self.norm_weight = (
            torch.nn.Parameter(drawn[name]) for name in ("phi", "alpha", "bias", "norm_weight")
        )
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x):
        layer_input, h_post, h_res = mhc.pre(x, self.phi, self.alpha, self.bias, SPEC, norm_weight=self.norm_weight)
        return mhc.post(x, self.layer(layer_input), h_post, h_res)


def stream_and_upstream():
    x = FUNCTIONS["pre"].tensors(CASE)["x"]
    return x.requires_grad_(), upstream((x,))[0]


def gradients_of(module, x, x_next, g_x_next):
    wanted = {"x": x, **dict(module.named_parameters())}
    return gradients((x_next,), wanted, [g_x_next])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    """The forward runs once more in the backward: the same bits."""
    module, (x, g) = Sublayer(), stream_and_upstream()
    expected = gradients_of(module, x, module(x), g)
    checkpoint(module, x, use_reentrant=use_reentrant).backward(g)
    assert_same_bits([x.grad, *(p.grad for p in module.parameters())], expected.values())


def test_gradients_accumulate():
    """Two backward calls add. Catches a gradient that is written over."""
    module, (x, g) = Sublayer(), stream_and_upstream()
    first = gradients_of(module, x, module(x), g)
    for factor in (1.0, 2.0):
        module(x).backward(factor * g)
    second = gradients_of(module, x, module(x), 2.0 * g)
    expected = [a + b for a, b in zip(first.values(), second.values(), strict=True)]
    assert_same_bits([x.grad, *(p.grad for p in module.parameters())], expected)


def test_functional_call_and_grad():
    """torch.func: the bits of autograd's. It refuses operators of torch.library.custom_op."""
    module, (x, g) = Sublayer(), stream_and_upstream()
    expected = gradients_of(module, x, module(x), g)

    def loss(parameters, x):
        return (torch.func.functional_call(module, parameters, (x,)) * g).sum()

    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    by_parameter, by_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x.detach())
    assert_same_bits([by_x, *by_parameter.values()], expected.values())


@every_function
def test_vmap(function):
    """One more leading dimension, or a loop over it: the same bits."""
    tensors = function.tensors(CASE, (2, 3))
    expected = function.call(tensors, SPEC)
    axes = [None if name in ("phi", "alpha", "bias", "norm_weight") else 0 for name in tensors]

    def one(*values):
        return function.call(dict(zip(tensors, values, strict=True)), SPEC)

    assert_same_bits(torch.vmap(one, in_dims=tuple(axes))(*tensors.values()), expected)


@pytest.mark.filterwarnings("ignore:.*torch.get_autocast_gpu_dtype")
def test_autocast():
    """Coefficients are as without autocast; the layer's output is bfloat16 beside a float32 stream."""
    tensors, (x, g) = FUNCTIONS["coefficients"].tensors(CASE), stream_and_upstream()
    expected = FUNCTIONS["coefficients"].call(tensors, SPEC)
    module = Sublayer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(FUNCTIONS["coefficients"].call(tensors, SPEC), expected)
        layer_input, h_post, h_res = mhc.pre(x, module.phi, module.alpha, module.bias, SPEC)
        layer_output = module.layer(layer_input)
        x_next = mhc.post(x, layer_output, h_post, h_res)
    assert (layer_input.dtype, layer_output.dtype, x_next.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert_same_bits([x_next], [mhc.post(x, layer_output.float(), h_post, h_res)])
    got = torch.autograd.grad(x_next, (layer_output, x, module.phi), g, retain_graph=True)
    assert [tensor.dtype for tensor in got] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize(
    "name", ["post", *(pytest.param(f, marks=pytest.mark.full) for f in ("post_pre", "post_head"))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_layer_output(name, dtype):
    """Under a float32 stream it counts as its float32 value, and its gradient is rounded once."""
    tensors = FUNCTIONS[name].tensors(CASE)
    narrow = {**tensors, "layer_output": tensors["layer_output"].to(dtype)}
    wide = {**narrow, "layer_output": narrow["layer_output"].float()}
    results = []
    for given in (requiring(narrow), requiring(wide)):
        outputs = FUNCTIONS[name].call(given, SPEC)
        results.append([*outputs, *gradients(outputs, given, upstream(outputs)).values()])
    results[1][len(outputs) + 1] = results[1][len(outputs) + 1].to(dtype)
    assert_same_bits(*results)


@every_function
def test_second_derivatives_are_refused(function):
    """Both ways to ask are refused. Catches a gradient of a gradient that is zero and says nothing."""
    tensors = requiring(function.tensors(CASE))
    outputs = function.call(tensors, SPEC)
    first = torch.autograd.grad(outputs, list(tensors.values()), upstream(outputs), create_graph=True)
    if function.name in (
        "expand",
        "collapse",
    ):  # linear, so that its gradient depends on nothing but what came from above
        assert not any(gradient.requires_grad for gradient in first)
        return
    with pytest.raises(mhc.GradientError, match=f"{function.name}: no second derivative"):
        torch.autograd.grad(first, list(tensors.values()), upstream(first), allow_unused=True)

    def loss(*values):
        outputs = function.call(dict(zip(tensors, values, strict=True)), SPEC)
        return sum((output * g).sum() for output, g in zip(outputs, upstream(outputs), strict=True))

    def norm_of_gradient(*values):
        return torch.func.grad(loss)(*values).square().sum()

    values = [tensor.detach() for tensor in tensors.values()]
    with pytest.raises(mhc.GradientError, match=f"{function.name}: no second derivative"):
        torch.func.grad(norm_of_gradient, argnums=1 if len(values) > 1 else 0)(*values)


@every_function
def test_forward_mode_is_refused(function):
    """torch.func.jvp alone, over and under grad. Catches a tangent that is dropped."""
    tensors = function.tensors(CASE)
    values = tuple(tensors.values())

    def loss(*values):
        return function.call(dict(zip(tensors, values, strict=True)), SPEC)[0].square().sum()

    transforms = [
        lambda: torch.func.jvp(loss, values, values),
        lambda: torch.func.jvp(torch.func.grad(loss), values, values),
        lambda: torch.func.grad(lambda *v: torch.func.jvp(loss, v, values)[1])(*values),
    ]
    for transform in transforms:
        with pytest.raises(mhc.GradientError, match=rf"{function.name}.*forward-mode gradients"):
            transform()


@every_function
def test_without_memory_of_their_own(function):
    """Fake tensors, function transforms, lazy negation: the value counts, not what lies in memory."""
    tensors = function.tensors(CASE)
    expected = function.call(tensors, SPEC)

    def call(*values):
        return function.call(dict(zip(tensors, values, strict=True)), SPEC)

    assert_same_bits(torch.func.functionalize(call)(*tensors.values()), expected)
    assert_same_bits(call(*(torch._neg_view(-tensor) for tensor in tensors.values())), expected)
    with FakeTensorMode() as mode:
        fake = call(*(mode.from_tensor(tensor) for tensor in tensors.values()))
    assert [(o.shape, o.dtype, o.stride()) for o in fake] == [(o.shape, o.dtype, o.stride()) for o in expected]
