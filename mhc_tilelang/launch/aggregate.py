"""The aggregation Σ_i h_pre[i]·x[i], alone and with the layer's own RMSNorm, and the backward of both.

    aggregate        n·C read, C written
    aggregate_norm   the same, normalised: a block has a whole row

Tensors come flat and contiguous, [T, …]; `operators` sees to that. The kernels of the norm and of both backwards read
16 bytes at a time and fix the order of their sums by the sizes alone, so on a GPU tensors that start elsewhere are
copied; a result's buffer starts on 16 bytes.
"""

from __future__ import annotations

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import plans
from .operands import Gradient, aligned, by_width, channel_kernel, placeholder_if_none, stream_kernel
from .partial_sums import sum_partials
from .projection import parallel_blocks


def aggregate(x: torch.Tensor, h_pre: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, n, C], h_pre [T, n] -> layer_input [T, C]."""
    layer_input = x.new_empty(x.shape[0], x.shape[2]) if out is None else out
    channel_kernel("aggregate", x, x, layer_input)(x=x, h_pre=aligned(h_pre), layer_input=layer_input)
    return layer_input


def aggregate_norm(
    x: torch.Tensor, h_pre: torch.Tensor, weight: torch.Tensor | None, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, n, C], h_pre [T, n], weight [C] float32 or of x's dtype -> layer_input [T, C]; `aggregate` without one."""
    if weight is None:
        return aggregate(x, h_pre, out=out)
    layer_input = x.new_empty(x.shape[0], x.shape[2]) if out is None else out
    tile = plans.norm_tile(x.shape[2], x.element_size(), compiler.platform_of(x.device))
    kernel = stream_kernel("aggregate_norm", x, weight_dtype=dtype_name(weight.dtype), tile=tile)
    kernel(
        x=by_width(x, tile),
        h_pre=aligned(h_pre),
        weight=by_width(weight, tile),
        layer_input=layer_input.view(-1, *by_width(weight, tile).shape),
        eps=eps,
    )
    return layer_input


def aggregate_backward(
    g_layer_input: torch.Tensor, x: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """g_layer_input [T, C], x [T, n, C] -> g_h_pre [T, n]."""
    num_tokens, num_streams, hidden_size = x.shape
    g_h_pre = x.new_empty(num_tokens, num_streams, dtype=torch.float32) if out is None else out
    tile = plans.reduction_tile(hidden_size, x.element_size(), compiler.platform_of(x.device))
    kernel = stream_kernel("aggregate_backward", x, tile=tile)
    kernel(g_layer_input=by_width(g_layer_input, tile), x=by_width(x, tile), g_h_pre=g_h_pre)
    return g_h_pre


def aggregate_gradients(
    g_layer_input: torch.Tensor,
    x: torch.Tensor,
    h_pre: torch.Tensor,
    *,
    needs_g_x: bool = True,
    needs_g_h_pre: bool = True,
    out: tuple[Gradient, Gradient] | None = None,
) -> tuple[Gradient, Gradient]:
    """g_layer_input [T, C], x [T, n, C], h_pre [T, n] -> g_x [T, n, C] and g_h_pre [T, n], None unless needed."""
    wanted = zip((x, h_pre), (needs_g_x, needs_g_h_pre), strict=True)
    g_x, g_h_pre = out or (torch.empty_like(tensor) if needs else None for tensor, needs in wanted)
    if g_x is None:
        return None, None if g_h_pre is None else aggregate_backward(g_layer_input, x, out=g_h_pre)
    tile = plans.reduction_tile(x.shape[2], x.element_size(), compiler.platform_of(x.device))
    kernel = stream_kernel("aggregate_gradients", x, tile=tile, needs_g_h_pre=needs_g_h_pre)
    kernel(
        g_layer_input=by_width(g_layer_input, tile),
        x=by_width(x, tile) if needs_g_h_pre else x.new_empty(1),
        h_pre=aligned(h_pre),
        g_x=by_width(g_x, tile),
        g_h_pre=placeholder_if_none(g_h_pre, h_pre),
    )
    return g_x, g_h_pre


def aggregate_norm_backward(
    g_layer_input: torch.Tensor,
    x: torch.Tensor,
    h_pre: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    needs_g_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """g_layer_input [T, C], x [T, n, C], h_pre [T, n], weight [C]
    -> g_u [T, C], the gradient of what `aggregate` gives, in x's dtype; g_h_pre [T, n]; g_weight [C] in the
    weight's dtype, None unless needed.
    """
    num_tokens, num_streams, hidden_size = x.shape
    g_u, g_h_pre = torch.empty_like(g_layer_input), torch.empty_like(h_pre)
    platform = compiler.platform_of(x.device)
    tile = plans.norm_backward_tile(num_streams, hidden_size, x.element_size(), platform)
    shared = plans.norm_tokens(num_tokens, tile, platform, parallel_blocks(x.device))
    tokens_per_block = shared if needs_g_weight else 1
    partial = h_pre.new_empty(-(-num_tokens // tokens_per_block), hidden_size) if needs_g_weight else None
    kernel = stream_kernel(
        "aggregate_norm_backward",
        x,
        weight_dtype=dtype_name(weight.dtype),
        tile=tile,
        needs_g_weight=needs_g_weight,
    )
    kernel(
        g_layer_input=by_width(g_layer_input, tile),
        x=by_width(x, tile),
        h_pre=aligned(h_pre),
        weight=by_width(weight, tile),
        g_u=by_width(g_u, tile),
        g_h_pre=g_h_pre,
        partial=placeholder_if_none(None if partial is None else by_width(partial, tile), h_pre),
        tokens_per_block=tokens_per_block,
        eps=eps,
    )
    if partial is None:
        return g_u, g_h_pre, None
    if num_tokens == 0:
        return g_u, g_h_pre, torch.zeros_like(weight)
    return g_u, g_h_pre, sum_partials(partial).to(weight.dtype)
