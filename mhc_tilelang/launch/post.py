"""post and its backward: plan, outputs unless `out` has them, launch.

Tensors come flat and contiguous, [T, …]; `operators` sees to that. Gradients that are not needed are skipped: None,
neither computed nor written.
"""

from __future__ import annotations

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import plans
from .operands import Gradient, aligned, by_width, channel_kernel, placeholder_if_none, stream_kernel


def post(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n] -> x_next [T, n, C]."""
    x_next = torch.empty_like(x) if out is None else out
    layer_dtype = dtype_name(layer_output.dtype)
    kernel = channel_kernel("post", x, x, layer_output, x_next, layer_dtype=layer_dtype)
    kernel(x=x, layer_output=layer_output, h_post=aligned(h_post), h_res=aligned(h_res), x_next=x_next)
    return x_next


def post_backward(
    g_x_next: torch.Tensor,
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    *,
    needs_g_x: bool = True,
    needs_g_layer_output: bool = True,
    needs_g_mappings: bool = True,
    out: tuple[Gradient, Gradient, Gradient, Gradient] | None = None,
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    """g_x_next and post's arguments, flat -> the gradients of x, layer_output, h_post and h_res; None unless needed.

    `needs_g_mappings` asks for the last two.
    """
    wanted = (needs_g_x, needs_g_layer_output, needs_g_mappings, needs_g_mappings)
    arguments = (x, layer_output, h_post, h_res)
    gradients = out or tuple(torch.empty_like(t) if w else None for t, w in zip(arguments, wanted, strict=True))
    g_x, g_layer_output, g_h_post, g_h_res = map(placeholder_if_none, gradients, arguments)
    _, num_streams, hidden_size = x.shape
    tile = plans.post_backward_tile(num_streams, hidden_size, x.element_size(), compiler.platform_of(x.device))
    kernel = stream_kernel(
        "post_backward",
        x,
        layer_dtype=dtype_name(layer_output.dtype),
        tile=tile,
        needs_g_x=needs_g_x,
        needs_g_layer_output=needs_g_layer_output,
        needs_g_mappings=needs_g_mappings,
    )
    kernel(
        g_x_next=by_width(g_x_next, tile),
        x=by_width(x, tile),
        layer_output=by_width(layer_output, tile),
        h_post=aligned(h_post),
        h_res=aligned(h_res),
        g_x=by_width(g_x, tile) if needs_g_x else g_x,
        g_layer_output=by_width(g_layer_output, tile) if needs_g_layer_output else g_layer_output,
        g_h_post=g_h_post,
        g_h_res=g_h_res,
    )
    return gradients  # type: ignore[return-value]
