"""post: x [..., n, C], layer_output [..., C], h_post [..., n], h_res [..., n, n] -> x_next [..., n, C]."""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .library import absent, check_buffers, define, define_backward, define_out, differentiate, flat, needed

Tensors = tuple[torch.Tensor, ...]


def _flatten(x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor) -> Tensors:
    return flat(x, 2), flat(layer_output, 1), flat(h_post, 1), flat(h_res, 2)


def _allocate(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _run(x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor) -> torch.Tensor:
    x_next = x.new_empty(x.shape)
    launch.post(*_flatten(x, layer_output, h_post, h_res), out=flat(x_next, 2))
    return x_next


def _run_out(
    x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, *, out: torch.Tensor
) -> None:
    inputs = {"x": x, "layer_output": layer_output, "h_post": h_post, "h_res": h_res}
    check_buffers("post", {"out": out}, inputs)
    launch.post(*_flatten(x, layer_output, h_post, h_res), out=flat(out, 2))


def _allocate_backward(
    g_x_next: torch.Tensor,
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    needs_x: bool,
    needs_layer_output: bool,
    needs_mixing: bool,
) -> Tensors:
    needed = (needs_x, needs_layer_output, needs_mixing, needs_mixing)
    inputs = (x, layer_output, h_post, h_res)
    return tuple(t.new_empty(t.shape) if need else absent(t) for t, need in zip(inputs, needed, strict=True))


def _run_backward(
    g_x_next: torch.Tensor,
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    needs_x: bool,
    needs_layer_output: bool,
    needs_mixing: bool,
) -> Tensors:
    inputs = (x, layer_output, h_post, h_res)
    gradients = launch.post_backward(
        flat(g_x_next, 2),
        *_flatten(*inputs),
        needs_x=needs_x,
        needs_layer_output=needs_layer_output,
        needs_mixing=needs_mixing,
    )
    return tuple(absent(t) if g is None else g.view(t.shape) for t, g in zip(inputs, gradients, strict=True))


_INPUTS = "Tensor x, Tensor layer_output, Tensor h_post, Tensor h_res"
post = define(f"post({_INPUTS}) -> Tensor", _run, _allocate)
post_out = define_out(f"post_out({_INPUTS}, *, Tensor(a!) out) -> ()", _run_out)
post_backward = define_backward(
    f"post_backward(Tensor g_x_next, {_INPUTS}, bool needs_x, bool needs_layer_output, bool needs_mixing)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _allocate_backward,
)


def _setup_context(ctx: Any, inputs: Tensors, output: torch.Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g_x_next: torch.Tensor | None) -> tuple:
    if g_x_next is None:
        return needed(ctx, ())
    needs_x, needs_layer_output, needs_h_post, needs_h_res = ctx.needs_input_grad
    needs_mixing = needs_h_post or needs_h_res
    gradients = post_backward(g_x_next, *ctx.saved_tensors, needs_x, needs_layer_output, needs_mixing)
    return needed(ctx, gradients)


differentiate(post, _backward, _setup_context)
