"""Bad buffers as `out`: refused by name, with what was expected and what came, before anything is compiled.

Would catch: a buffer that is not looked at, one that shares memory with an argument or with another buffer, a delayed
form without room for its h_pre.
"""

import math
from dataclasses import replace

import pytest
import torch
from refusals import (
    FUNCTIONS,
    PROJECTING,
    SPEC,
    C,
    T,
    arguments_of,
    assert_refused,
    call,
    every_tensor,
    n,
    no_kernel,  # noqa: F401  a fixture
    not_dense,
)

import mhc_tilelang as mhc

pytestmark = pytest.mark.usefixtures("no_kernel")

BUFFERS = {
    "expand": {"out": (T, n, C)},
    "collapse": {"out": (T, C)},
    "aggregate": {"out": (T, C)},
    "sinkhorn": {"out": (T, n, n)},
    "coefficients": {"out[0] (h_pre)": (T, n), "out[1] (h_post)": (T, n), "out[2] (h_res)": (T, n, n)},
    "pre": {"out[0] (layer_input)": (T, C), "out[1] (h_post)": (T, n), "out[2] (h_res)": (T, n, n)},
    "head": {"out": (T, C)},
    "post": {"out": (T, n, C)},
    "post_pre": {
        "out[0] (x_next)": (T, n, C),
        "out[1] (layer_input)": (T, C),
        "out[2] (h_post_next)": (T, n),
        "out[3] (h_res_next)": (T, n, n),
    },
    "expand_pre": {
        "out[0] (x)": (T, n, C),
        "out[1] (layer_input)": (T, C),
        "out[2] (h_post)": (T, n),
        "out[3] (h_res)": (T, n, n),
    },
    "post_head": {"out[0] (x_next)": (T, n, C), "out[1] (output)": (T, C)},
}
every_buffer = pytest.mark.parametrize(("function", "buffer"), [(f, name) for f in FUNCTIONS for name in BUFFERS[f]])


def buffers_of(function, **changed):
    """Good buffers, but for those in `changed`, by name."""
    buffers = {**{name: torch.zeros(shape) for name, shape in BUFFERS[function].items()}, **changed}
    return next(iter(buffers.values())) if len(buffers) == 1 else tuple(buffers.values())


@pytest.mark.parametrize("function", ["pre", "post_pre"])
def test_the_delayed_form(function):
    """h_pre is checked like any other argument, needs a buffer, and a spec may insist on it."""
    assert_refused(ValueError, function, "h_pre", ["[..., 4]", "[6, 5]"], h_pre=torch.zeros(T, 5))
    assert_refused(ValueError, function, "h_pre", [f"[{T}]", "[5]"], h_pre=torch.zeros(5, n))
    assert_refused(TypeError, function, "h_pre", ["float32", "float64"], h_pre=torch.zeros(T, n).double())
    for kind, value in not_dense(torch.zeros(T, n)).items():
        assert_refused(ValueError, function, "h_pre", ["expected a dense tensor", kind], h_pre=value)
    given, out = torch.zeros(T, n), buffers_of(function)
    assert_refused(TypeError, function, "out", ["h_pre_next, got"], h_pre=given, out=out)
    last = f"out[{len(out)}] (h_pre_next)"
    assert_refused(ValueError, function, last, ["[6, 5]"], h_pre=given, out=(*out, torch.zeros(T, 5)))
    overlapping = {"h_pre": given, "out": (*out, given), "norm_weight": None}
    assert_refused(ValueError, function, last, ["overlaps h_pre"], **overlapping)
    assert_refused(ValueError, function, "h_pre", ["delayed_pre", "got None"], spec=replace(SPEC, delayed_pre=True))
    for spec, buffers in ((SPEC, None), (replace(SPEC, delayed_pre=True), (*out, torch.zeros(T, n)))):
        with pytest.raises(pytest.fail.Exception, match="was asked for"):
            call(function, h_pre=given, spec=spec, out=buffers)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_buffers_reach_a_kernel(function):
    """Tests the tests below."""
    with pytest.raises(pytest.fail.Exception, match="was asked for"):
        call(function, out=buffers_of(function))


@every_buffer
def test_bad_buffers(function, buffer):
    """Type, shape, leading dimensions, dtype, device, strides, and one that requires a gradient itself."""
    shape = BUFFERS[function][buffer]
    bad = {
        TypeError: [[1.0], torch.zeros(shape, dtype=torch.float64)],
        ValueError: [
            torch.zeros(*shape[:-1], shape[-1] + 1),
            torch.zeros(T + 1, *shape[1:]),
            torch.zeros(shape, device="meta"),
            torch.zeros(*shape, 2)[..., 0],
            *not_dense(torch.zeros(shape)).values(),
        ],
        mhc.GradientError: [torch.zeros(shape).requires_grad_()],
    }
    for error, values in bad.items():
        for value in values:
            assert_refused(error, function, buffer, [], out=buffers_of(function, **{buffer: value}))


@pytest.mark.parametrize("function", ["coefficients", "pre"])
def test_not_a_tuple_of_buffers(function):
    for out in (torch.zeros(T, n), (torch.zeros(T, n),) * 2, 3):
        assert_refused(TypeError, function, "out", ["expected a tuple of", "h_post, h_res", "got"], out=out)


@every_buffer
def test_buffers_that_overlap(function, buffer):
    """A kernel that reads what it has already overwritten; a wrong number, and no error anywhere."""
    without_norm = {"norm_weight": None} if function in PROJECTING else {}  # that makes another phi
    for name, tensor in arguments_of(function).items():
        if isinstance(tensor, torch.Tensor) and name != "norm_weight":
            shape = BUFFERS[function][buffer]
            memory = torch.zeros(tensor.numel() + math.prod(shape) - 1)  # they share one element
            value, out = memory[: tensor.numel()].view_as(tensor), memory[tensor.numel() - 1 :].view(shape)
            changed = {name: value, "out": buffers_of(function, **{buffer: out}), **without_norm}
            assert_refused(ValueError, function, buffer, [f"overlaps {name}"], **changed)


def test_buffers_that_overlap_each_other():
    memory = torch.zeros(T, n, n)
    out = buffers_of("pre", **{"out[1] (h_post)": memory.view(-1)[: T * n].view(T, n), "out[2] (h_res)": memory})
    assert_refused(ValueError, "pre", "out[2] (h_res)", ["overlaps out[1] (h_post)"], out=out)


@every_tensor
def test_no_gradient_through_buffers(function, argument):
    """An error instead of a result that silently has no gradient."""
    tensor = arguments_of(function)[argument].requires_grad_()
    changed = {argument: tensor, "out": buffers_of(function)}
    assert_refused(mhc.GradientError, function, argument, ["requires a gradient", "out="], **changed)
    with torch.no_grad(), pytest.raises(pytest.fail.Exception, match="was asked for"):
        call(function, **changed)
