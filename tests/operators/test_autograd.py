"""Gradients are those of the kernels to the bit, and those of the reference.

Would catch: the gradient of another argument or output, an upstream gradient read at the wrong strides, a gradient lost
because its neighbours are absent, a kernel launched for a gradient that is not needed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from differentiable import FORMS, FUNCTIONS, gradients, requiring, upstream
from helpers import assert_same_bits, replace_launch

from mhc_tilelang import launch
from mhc_tilelang.checking.inputs import Case

CASE = Case(4, 64, torch.float32, 6)
BF16 = Case(4, 64, torch.bfloat16, 6)
every_function = pytest.mark.parametrize("function", FORMS.values(), ids=FORMS)


@pytest.mark.parametrize("case", [CASE, BF16], ids=["float32", "bfloat16"])
def test_gradients_are_the_kernels(case):
    """Autograd returns, to the bit, the launches' results. Catches arguments that change places."""
    spec = case.spec
    tensors = {name: function.tensors(case) for name, function in FUNCTIONS.items()}

    def autograd(name):
        given = requiring({key: value for key, value in tensors[name].items() if key != "norm_weight"})
        outputs = FUNCTIONS[name].call(given, spec)
        return upstream(outputs), gradients(outputs, given, upstream(outputs)).values()

    g, got = autograd("expand")
    assert_same_bits(got, [launch.expand_backward(*g)])
    g, got = autograd("collapse")
    assert_same_bits(got, [launch.expand(*g, case.num_streams)])
    g, got = autograd("sinkhorn")
    assert_same_bits(got, [launch.sinkhorn_backward(*g, tensors["sinkhorn"]["logits"], 20, 1e-6)])
    g, got = autograd("post")
    assert_same_bits(got, launch.post_backward(*g, *tensors["post"].values()))

    for name in ("coefficients", "pre", "head"):
        x, phi, alpha, bias, _ = tensors[name].values()
        g, got = autograd(name)
        plan = launch.projection_plan(x, phi.shape[0])
        partial = launch.project(x, phi, plan)
        aggregation = {}
        if name == "head":
            h_pre, projected = launch.head_coefficients(partial, alpha, bias, spec, plan)
            backward = launch.head_coefficients_backward
        else:
            h_pre, _, _, projected = launch.coefficients(partial, alpha, bias, spec, plan)
            backward = launch.coefficients_backward
        if name != "coefficients":
            aggregation = {"h_pre": h_pre, "g_layer_input": g[0]}
            g[0] = launch.aggregate_backward(g[0], x)
        g_projected, g_alpha, g_bias = backward(*g, projected, alpha, bias, spec)
        g_x, g_phi = launch.project_backward(g_projected, x, phi, **aggregation)
        assert_same_bits(got, [g_x, g_phi, g_alpha, g_bias])


# Of the norm over all tokens. Float32 rounds to 6e-8, and roundings of a sum of K = 256 terms or of Sinkhorn's 39 steps
# there and back add up as a random walk does: to 16 or 9 times that, 1e-6, which is what is measured. Ten times more
# for room.
TOLERANCE = 1e-5


def assert_near_float64(function, case, tensors, outputs, g_outputs):
    """The gradients of all arguments that require one, given those of some outputs."""
    with_gradient = [k for k, g in enumerate(g_outputs) if g is not None]
    got = gradients([outputs[k] for k in with_gradient], tensors, [g_outputs[k] for k in with_gradient])
    exact = function.reference_backward(g_outputs, tensors, case.spec)
    for name, tensor in tensors.items():
        if name not in got and tensor.requires_grad:  # none: the outputs do not depend on it
            assert not np.any(exact[name]), name
    for name, gradient in got.items():
        assert gradient.shape == tensors[name].shape
        assert gradient.dtype == tensors[name].dtype
        distance = np.linalg.norm(gradient.double().numpy() - exact[name])
        scale = np.linalg.norm(exact[name])
        if name == "alpha":  # a number or three, each a sum over tokens that may nearly cancel: measured before it
            scale = np.linalg.norm(alpha_token_by_token(function, case, tensors, g_outputs))
        assert distance <= TOLERANCE * scale, (function.name, name)


def alpha_token_by_token(function, case, tensors, g_outputs):
    """g_alpha of every token alone, [T, groups]."""
    leading = tensors["x"].ndim - 2 if "x" in tensors else tensors["h"].ndim - 1
    batched = {"h", "x", "layer_output", "h_pre", "h_post", "h_res"} & tensors.keys()
    flat = {name: tensors[name].flatten(0, leading - 1) for name in batched}
    upstream_of = [None if g is None else g.flatten(0, leading - 1) for g in g_outputs]
    return [
        function.reference_backward(
            [None if g is None else g[t : t + 1] for g in upstream_of],
            {**tensors, **{name: tensor[t : t + 1] for name, tensor in flat.items()}},
            case.spec,
        )["alpha"]
        for t in range(len(next(iter(flat.values()))))
    ]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(f, id=name, marks=pytest.mark.full if name in ("post_pre-delayed", "post_head") else ())
        for name, f in FORMS.items()
    ],
)
def test_each_output_alone_and_all(function):
    """Outputs that nothing was made of have no gradient. Catches gradients that go to another output."""
    case = Case(4, 64, torch.float32, 63)
    tensors = requiring(function.tensors(case, (7, 9)))
    outputs = function.call(tensors, case.spec)
    g_outputs = upstream(outputs)
    choices = [[g if k == j else None for k, g in enumerate(g_outputs)] for j in range(len(outputs))] + [g_outputs]
    for choice in choices:
        assert_near_float64(function, case, tensors, function.call(tensors, case.spec), choice)


@every_function
def test_each_input_alone(function):
    """One argument requires a gradient: the same bits as if all did."""
    tensors = function.tensors(CASE, (2, 3))
    every = requiring(tensors)
    outputs = function.call(every, CASE.spec)
    expected = gradients(outputs, every, upstream(outputs))
    for name in tensors:
        one = requiring(tensors, (name,))
        outputs = function.call(one, CASE.spec)
        got = gradients(outputs, one, upstream(outputs))
        assert list(got) == [name]
        assert_same_bits(got.values(), [expected[name]])


@every_function
def test_upstream_gradients_of_any_strides(function):
    """Transposed and expanded ones, as autograd makes them, give the bits of their contiguous copies."""
    tensors = requiring(function.tensors(CASE, (2, 3)))
    outputs = function.call(tensors, CASE.spec)
    kinds = {
        "transposed": [g.transpose(0, 1).contiguous().transpose(0, 1) for g in upstream(outputs)],
        "expanded": [
            g.expand(output.shape) for g, output in zip(upstream([o[:1] for o in outputs]), outputs, strict=True)
        ],
    }
    for g_outputs in kinds.values():
        assert not any(g.is_contiguous() for g in g_outputs)
        got, expected = (
            gradients(function.call(tensors, CASE.spec), tensors, g)
            for g in (g_outputs, [g.contiguous() for g in g_outputs])
        )
        assert_same_bits(got.values(), expected.values())


@pytest.fixture
def launched(monkeypatch):
    """The backward launches of a test: their names, and of `project_backward` and `post_backward` what was needed."""
    calls = []

    def counted(name, launch_one):
        def call(*args, **kwargs):
            needs = [
                key.removeprefix("needs_g_") for key, value in kwargs.items() if key.startswith("needs_") and value
            ]
            if needs or not any(key.startswith("needs_") for key in kwargs):  # else it launches nothing
                calls.append(" ".join([name.removesuffix("_backward"), *needs]))
            return launch_one(*args, **kwargs)

        return call

    for family in ("expand", "sinkhorn", "aggregate", "coefficients", "head_coefficients", "project", "post"):
        name = f"{family}_backward"
        replace_launch(monkeypatch, name, counted(name, getattr(launch, name)))
    return calls


@pytest.mark.parametrize(
    ("name", "wanted", "outputs", "expected"),
    [
        ("pre", ("x",), (0, 1, 2), ["aggregate", "coefficients", "project x"]),
        ("pre", ("phi",), (0, 1, 2), ["aggregate", "coefficients", "project phi"]),
        ("pre", ("x", "phi"), (0,), ["aggregate", "coefficients", "project x phi"]),
        ("pre", ("alpha", "bias"), (0,), ["aggregate", "coefficients"]),
        ("pre", ("x",), (1, 2), ["coefficients", "project x"]),
        ("pre-delayed", ("x",), (0, 1, 2, 3), ["coefficients", "project x"]),
        ("pre-delayed", ("h_pre",), (0,), ["aggregate", "coefficients"]),
        ("pre-delayed", ("h_pre", "bias"), (3,), ["coefficients"]),
        ("coefficients", ("bias",), (0, 1, 2), ["coefficients"]),
        ("coefficients", ("phi",), (2,), ["coefficients", "project phi"]),
        ("head", ("x",), (0,), ["aggregate", "head_coefficients", "project x"]),
        ("head", ("norm_weight",), (0,), ["aggregate", "head_coefficients", "project phi"]),
        ("head", ("alpha",), (0,), ["aggregate", "head_coefficients"]),
        ("expand_pre", ("h",), (0, 1, 2, 3), ["aggregate", "expand", "coefficients", "expand", "project x", "expand"]),
        ("expand_pre", ("phi",), (0, 2), ["coefficients", "expand", "project phi"]),
        ("expand_pre", ("alpha",), (0, 3), ["coefficients"]),
        ("expand_pre", ("h", "phi"), (0,), ["expand"]),
        ("post_head", ("x",), (0,), ["post x"]),
        ("post", ("x",), (0,), ["post x"]),
        ("post", ("layer_output",), (0,), ["post layer_output"]),
        ("post", ("h_res",), (0,), ["post mappings"]),
        ("post", ("x", "h_post"), (0,), ["post x mappings"]),
    ],
)
def test_no_needless_launch(name, wanted, outputs, expected, launched):
    """Frozen arguments and unused outputs cost nothing: neither a kernel nor zeros to run one on."""
    tensors = requiring(FORMS[name].tensors(CASE), wanted)
    results = FORMS[name].call(tensors, CASE.spec)
    results = [results[k] for k in outputs]
    launched.clear()  # expand_pre's forward adds up weights by the kernel that adds up streams
    gradients(results, tensors, upstream(results))
    assert launched == expected
