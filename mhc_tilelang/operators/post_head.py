"""post_head: the boundary after the last sublayer as one operator, post and then head.

x [..., n, C], layer_output [..., C], h_post [..., n], h_res [..., n, n], phi [n, K], alpha [1], bias [n]
-> x_next [..., n, C], output [..., C], and for the backward h_pre [T, n] and `projected` [n + 1, T].
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from .. import launch
from ..spec import MHCSpec
from .boundary import Seven, flat_inputs, unflat
from .coefficients import Tensors, allocate_projected
from .library import (
    check_buffers,
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

INPUTS = "Tensor x, Tensor layer_output, Tensor h_post, Tensor h_res, Tensor phi, Tensor alpha, Tensor bias"
NAMES = ("x", "layer_output", "h_post", "h_res", "phi", "alpha", "bias")
CONSTANTS = "float pre_eps, float rms_eps"


def _spec(x: torch.Tensor, pre_eps: float, rms_eps: float) -> MHCSpec:
    return spec_of(x.shape[-1], x.shape[-2], pre_eps=pre_eps, rms_eps=rms_eps)


def _allocate_results(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-2], x.shape[-1])


def _allocate(x: torch.Tensor, *rest: Any) -> Tensors:
    h_pre = x.new_empty(prod(x.shape[:-2]), x.shape[-2], dtype=torch.float32)
    return *_allocate_results(x), h_pre, allocate_projected(x, rest[3])


def _write(inputs: Seven, constants: tuple[float, float], results: tuple[torch.Tensor, torch.Tensor]) -> Tensors:
    """Write x_next and output; return h_pre [T, n] and projected [n + 1, T]."""
    x_next, output = results
    out = (flat(x_next, 2), flat(output, 1))
    found = launch.post_head(*flat_inputs(inputs), _spec(inputs[0], *constants), out=out)
    return found.h_pre, found.projected


def _run(*inputs_and_constants: Any) -> Tensors:
    inputs: Any = inputs_and_constants[:7]
    constants: Any = inputs_and_constants[7:]
    results = _allocate_results(inputs[0])
    return *results, *_write(inputs, constants, results)


def _run_out(*inputs_and_constants: Any, x_next: torch.Tensor, output: torch.Tensor) -> None:
    inputs: Any = inputs_and_constants[:7]
    constants: Any = inputs_and_constants[7:]
    buffers = {"out[0] (x_next)": x_next, "out[1] (output)": output}
    check_buffers("post_head", buffers, dict(zip(NAMES, inputs, strict=True)), whole=tuple(buffers)[:1])
    _write(inputs, constants, (x_next, output))


def _allocate_backward(g_x_next: torch.Tensor | None, g_output: torch.Tensor, *rest: Any) -> Tensors:
    return tuple(tensor.new_empty(tensor.shape) for tensor in rest[:7])


def _run_backward(g_x_next: torch.Tensor | None, g_output: torch.Tensor, *rest: Any) -> Tensors:
    inputs: Any = rest[:7]
    (x_next, h_pre, projected), constants = rest[7:10], rest[10:]
    found = launch.post_head_backward(
        flat_or_none(g_x_next, 2),
        flat(g_output, 1),
        *flat_inputs(inputs),
        flat(x_next, 2),
        h_pre.contiguous(),
        projected.contiguous(),
        _spec(inputs[0], *constants),
    )
    gradients = (
        found.g_x,
        found.g_layer_output,
        found.g_h_post,
        found.g_h_res,
        found.g_phi,
        found.g_alpha,
        found.g_bias,
    )
    return tuple(unflat(g, tensor.shape) for g, tensor in zip(gradients, inputs, strict=True))


post_head = define(
    f"post_head({INPUTS}, {CONSTANTS}) -> (Tensor x_next, Tensor output, Tensor h_pre, Tensor projected)",
    _run,
    _allocate,
)
post_head_out = define_out(
    f"post_head_out({INPUTS}, {CONSTANTS}, *, Tensor(a!) x_next, Tensor(b!) output) -> ()", _run_out
)
post_head_backward = define_backward(
    f"post_head_backward(Tensor? g_x_next, Tensor g_output, {INPUTS}, Tensor x_next, Tensor h_pre, Tensor projected, "
    f"{CONSTANTS}) -> ({', '.join(['Tensor'] * 7)})",
    _run_backward,
    _allocate_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
    x_next, _, h_pre, projected = output
    ctx.constants = inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h_pre, projected)
    ctx.save_for_backward(*inputs[:7], x_next, h_pre, projected)


def _backward(ctx: Any, g_x_next: torch.Tensor | None, g_output: torch.Tensor | None, *_: None) -> tuple:
    if g_x_next is None and g_output is None:
        return needed(ctx, ())
    if g_output is None:  # only x_next was used: the head has no gradient
        needs_x, needs_layer_output, *needs_mixing = ctx.needs_input_grad[:4]
        mixed = ctx.saved_tensors[:4]
        return needed(ctx, post_backward(g_x_next, *mixed, needs_x, needs_layer_output, any(needs_mixing)))
    return needed(ctx, post_head_backward(g_x_next, g_output, *ctx.saved_tensors, *ctx.constants))


differentiate(post_head, _backward, _setup_context)
