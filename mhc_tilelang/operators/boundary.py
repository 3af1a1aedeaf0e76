"""post_pre: the boundary between two sublayers as one operator, post of the one and pre of the next.

x [..., n, C], layer_output [..., C], h_post [..., n], h_res [..., n, n], phi [M, K], alpha [3], bias [M]
-> x_next [..., n, C], layer_input [..., C], h_post [..., n], h_res [..., n, n], and for the backward h_pre [..., n]
and `projected` [M + 1, T].

The delayed form is given an h_pre; the one that it returns is then a result, with a gradient. With a rms_norm_weight
[C], layer_input is normalised, the layer's own RMSNorm.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .coefficients import CONSTANTS, Tensors, allocate, allocate_projected
from .library import (
    absent,
    check_buffers,
    contiguous,
    define,
    define_backward,
    define_out,
    differentiate,
    flat,
    flat_or_none,
    needed,
    spec_of,
)
from .post import post_backward

INPUTS = (
    "Tensor x, Tensor layer_output, Tensor h_post, Tensor h_res, Tensor phi, Tensor alpha, Tensor bias, Tensor? h_pre, "
    "Tensor? rms_norm_weight"
)
FORM = f"{CONSTANTS}, float rms_norm_eps"
TRAILING = (2, 1, 1, 2)  # dimensions of the first four inputs that are not tokens


Seven = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]  # of INPUTS, all but h_pre and rms_norm_weight


def flat_inputs(inputs: Seven) -> Seven:
    """Contiguous, and leading dimensions flattened to tokens; parameters have none."""
    x, layer_output, h_post, h_res = (flat(t, trailing) for t, trailing in zip(inputs[:4], TRAILING, strict=True))
    phi, alpha, bias = (tensor.contiguous() for tensor in inputs[4:])
    return x, layer_output, h_post, h_res, phi, alpha, bias


def unflat(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A fresh tensor with its leading dimensions back, which is no view to anyone: an operator returns none."""
    return torch.ops.aten._unsafe_view(tensor, shape)


def _allocate(x: torch.Tensor, *rest: Any) -> Tensors:
    phi = rest[3]
    h_pre, h_post, h_res = allocate(x)
    layer_input = x.new_empty(*x.shape[:-2], x.shape[-1])
    return x.new_empty(x.shape), layer_input, h_post, h_res, h_pre, allocate_projected(x, phi)


def _launch(*inputs_and_constants: Any, out: Any = None) -> launch.Boundary:
    inputs, (h_pre, rms_norm_weight, *constants, eps) = inputs_and_constants[:7], inputs_and_constants[7:]
    return launch.post_pre(
        *flat_inputs(inputs),
        spec_of(inputs[0].shape[-1], inputs[0].shape[-2], *constants),
        h_pre=flat_or_none(h_pre, 1),
        rms_norm_weight=contiguous(rms_norm_weight),
        rms_norm_eps=eps,
        out=out,
    )


def _run(*inputs_and_constants: Any) -> Tensors:
    boundary = _launch(*inputs_and_constants)
    *leading, n, hidden_size = inputs_and_constants[0].shape
    shapes = (
        (*leading, n, hidden_size),
        (*leading, hidden_size),
        (*leading, n),
        (*leading, n, n),
        (*leading, n),
        boundary.projected.shape,
    )
    return tuple(unflat(tensor, shape) for tensor, shape in zip(boundary, shapes, strict=True))


def _run_out(
    *inputs_and_constants: Any,
    x_next: torch.Tensor,
    layer_input: torch.Tensor,
    h_post_next: torch.Tensor,
    h_res_next: torch.Tensor,
    h_pre_next: torch.Tensor | None = None,
) -> None:
    names = ("x", "layer_output", "h_post", "h_res", "phi", "alpha", "bias", "h_pre", "rms_norm_weight")
    inputs = {name: t for name, t in zip(names, inputs_and_constants, strict=False) if t is not None}
    written = {
        "x_next": x_next,
        "layer_input": layer_input,
        "h_post": h_post_next,
        "h_res": h_res_next,
        "h_pre": h_pre_next,
    }
    named = {f"out[{k}] ({name})": t for k, (name, t) in enumerate(written.items()) if t is not None}
    check_buffers("post_pre", named, inputs, whole=tuple(named))
    if h_pre_next is None:
        h_pre_next = torch.empty_like(h_post_next)
    out = (flat(x_next, 2), flat(layer_input, 1), flat(h_post_next, 1), flat(h_res_next, 2), flat(h_pre_next, 1))
    _launch(*inputs_and_constants, out=out)


def _allocate_backward(*arguments: Any) -> Tensors:
    *inputs, h_pre, rms_norm_weight = arguments[5:14]
    needs_weight = arguments[-1]
    like_pre, like_weight = (inputs[2] if t is None else t for t in (h_pre, rms_norm_weight))
    return (
        *(t.new_empty(t.shape) for t in inputs),
        absent(like_pre) if h_pre is None else like_pre.new_empty(like_pre.shape),
        like_weight.new_empty(like_weight.shape) if needs_weight else absent(inputs[2]),
    )


def _run_backward(*arguments: Any) -> Tensors:
    gradients, inputs, (given_pre, rms_norm_weight) = arguments[:5], arguments[5:12], arguments[12:14]
    x_next, h_pre, projected, *constants, eps, needs_weight = arguments[14:]
    g_x_next, g_layer_input, g_h_post_next, g_h_res_next, g_h_pre_next = (
        flat_or_none(g, trailing) for g, trailing in zip(gradients, (2, 1, 1, 2, 1), strict=True)
    )
    x = inputs[0]
    found = launch.post_pre_backward(
        g_x_next,
        g_layer_input,
        g_h_post_next,
        g_h_res_next,
        *flat_inputs(inputs),
        flat(x_next, 2),
        flat(h_pre, 1),
        projected.contiguous(),
        spec_of(x.shape[-1], x.shape[-2], *constants),
        given_pre=flat_or_none(given_pre, 1),
        g_h_pre_next=g_h_pre_next,
        rms_norm_weight=contiguous(rms_norm_weight),
        rms_norm_eps=eps,
        needs_weight=needs_weight,
    )
    *of_inputs, g_pre, g_weight = found
    shaped = (unflat(g, tensor.shape) for g, tensor in zip(of_inputs, inputs, strict=True))
    g_pre = absent(h_pre) if g_pre is None else unflat(g_pre, h_pre.shape)
    return (*shaped, g_pre, absent(h_pre) if g_weight is None else g_weight)


RESULTS = (
    "Tensor x_next, Tensor layer_input, Tensor h_post_next, Tensor h_res_next, Tensor h_pre_next, Tensor projected"
)
GRADIENTS = "Tensor? g_x_next, Tensor? g_layer_input, Tensor? g_h_post_next, Tensor? g_h_res_next, Tensor? g_h_pre_next"
BUFFERS = (
    "Tensor(a!) x_next, Tensor(b!) layer_input, Tensor(c!) h_post_next, Tensor(d!) h_res_next, "
    "Tensor(e!)? h_pre_next=None"
)

post_pre = define(f"post_pre({INPUTS}, {FORM}) -> ({RESULTS})", _run, _allocate)
post_pre_out = define_out(f"post_pre_out({INPUTS}, {FORM}, *, {BUFFERS}) -> ()", _run_out)
post_pre_backward = define_backward(
    f"post_pre_backward({GRADIENTS}, {INPUTS}, Tensor x_next, Tensor h_pre_next, Tensor projected, {FORM}, "
    f"bool needs_weight) -> ({', '.join(['Tensor'] * 9)})",
    _run_backward,
    _allocate_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
    *tensors, h_pre, rms_norm_weight = inputs[:9]
    x_next, *_, h_pre_next, projected = output
    ctx.constants = inputs[9:]
    ctx.set_materialize_grads(False)
    ctx.delayed = h_pre is not None
    ctx.mark_non_differentiable(*((projected,) if ctx.delayed else (h_pre_next, projected)))
    ctx.save_for_backward(*tensors, h_pre, rms_norm_weight, x_next, h_pre_next, projected)


def _backward(ctx: Any, *g_outputs: torch.Tensor | None) -> tuple:
    if all(g is None for g in g_outputs):
        return needed(ctx, ())
    if all(g is None for g in g_outputs[1:]):  # only x_next was used: what begins there has no gradient
        needs_x, needs_layer_output, *needs_mixing = ctx.needs_input_grad[:4]
        mixed = ctx.saved_tensors[:4]
        return needed(ctx, post_backward(g_outputs[0], *mixed, needs_x, needs_layer_output, any(needs_mixing)))
    gradients = post_pre_backward(*g_outputs[:5], *ctx.saved_tensors, *ctx.constants, ctx.needs_input_grad[8])
    return needed(ctx, gradients)


differentiate(post_pre, _backward, _setup_context)
