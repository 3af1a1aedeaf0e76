"""Launches of an identity hyper-connection (H_res = I), in place of `coefficients` and `post`, both directions.

Tensors come flat and contiguous, [T, …]; `operators` sees to that. Gradients that are not needed are skipped.
"""

from __future__ import annotations

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import boundary_plans, plans, projection_plans
from ..spec import MHCSpec
from .aggregate import aggregate
from .coefficients import partial_sums, split_parameters
from .operands import Gradient, aligned, by_width, channel_kernel, placeholder_if_none, stream_kernel
from .partial_sums import sum_partials
from .post_pre import post_project

Pair = tuple[torch.Tensor, torch.Tensor]


def gate_plan(x: torch.Tensor, rows: int) -> projection_plans.ProjectionPlan:
    """Return the projection's plan: by tiles, for warps that project take four rows for a head of four streams."""
    dtype, platform = dtype_name(x.dtype), compiler.platform_of(x.device)
    return projection_plans.tile_projection_plan(rows, x.shape[-1], dtype, platform)


def gates(
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    plan: projection_plans.ProjectionPlan,
    *,
    out: Pair,
) -> torch.Tensor:
    """Partial sums, alpha [2], bias [2n] -> projected [2n + 1, T]; `out` has h_pre and h_post [T, n]."""
    projected = partial.new_empty(spec.num_coefficients + 1, partial.shape[-1])
    target = compiler.target_of(partial.device)
    kernel = compiler.kernel(
        "coefficients",
        target,
        num_streams=spec.num_streams,
        hidden_size=spec.hidden_size,
        plan=plan,
        block=plans.tokens_per_block(target),
        has_h_res=False,
    )
    kernel(
        partial=partial,
        alpha=aligned(alpha),
        bias=aligned(bias),
        h_pre=out[0],
        h_post=out[1],
        projected=projected,
        pre_eps=spec.pre_eps,
        rms_eps=spec.rms_eps,
        post_scale=spec.post_scale,
        post_eps=spec.post_eps,
    )
    return projected


def gates_backward(
    g_h_pre: Gradient,
    g_h_post: Gradient,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """g_h_pre, g_h_post [T, n], projected [2n + 1, T], alpha [2], bias [2n]
    -> g_projected [2n + 1, T], g_alpha [2], g_bias [2n].
    """
    g_projected = torch.empty_like(projected)
    target = compiler.target_of(projected.device)
    block = plans.tokens_per_block(target)
    kernel = compiler.kernel(
        "coefficients_backward",
        target,
        num_streams=spec.num_streams,
        hidden_size=spec.hidden_size,
        block=block,
        has_g_h_pre=g_h_pre is not None,
        has_g_h_post=g_h_post is not None,
        has_h_res=False,
    )
    partial = partial_sums(projected, block, alpha.numel() + bias.numel())
    kernel(
        g_h_pre=placeholder_if_none(g_h_pre, projected),
        g_h_post=placeholder_if_none(g_h_post, projected),
        projected=projected,
        alpha=aligned(alpha),
        bias=aligned(bias),
        g_projected=g_projected,
        partial=partial,
        post_scale=spec.post_scale,
    )
    return g_projected, *split_parameters(sum_partials(partial), alpha, bias)


def identity_post_pre(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    h_pre: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Launch the boundary: x [T, n, C], layer_output [T, C], h_post [T, n] of the sublayer that ends, phi [2n, K],
    alpha [2], bias [2n] of the one that begins -> projected [2n + 1, T].

    `out` has x_next [T, n, C], layer_input [T, C], h_post and h_pre [T, n]. With an h_pre [T, n] layer_input is
    aggregated with that, in the first of two launches; without, in a third.
    """
    x_next, layer_input, h_post_next, h_pre_next = out
    rows, has_h_pre = phi.shape[0], h_pre is not None
    sizes = (rows, *x.shape[1:], dtype_name(x.dtype), compiler.platform_of(x.device), has_h_pre)
    plan = boundary_plans.tile_post_project_plan(*sizes)
    made = (x_next, layer_input if has_h_pre else None)
    _, partial, _ = post_project(x, layer_output, h_post, None, phi, plan, h_pre=h_pre, out=made)
    projected = gates(partial, alpha, bias, spec, gate_plan(x, rows), out=(h_pre_next, h_post_next))
    if not has_h_pre:
        aggregate(x_next, h_pre_next, out=layer_input)
    return projected


def identity_post(
    x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, *, out: torch.Tensor
) -> torch.Tensor:
    """x [T, n, C], layer_output [T, C], h_post [T, n] -> x_next [T, n, C], which is `out`."""
    layer_dtype = dtype_name(layer_output.dtype)
    kernel = channel_kernel("post", x, x, layer_output, out, layer_dtype=layer_dtype, has_h_res=False)
    kernel(x=x, layer_output=layer_output, h_post=aligned(h_post), h_res=h_post.new_empty(1), x_next=out)
    return out


def identity_post_backward(
    g_x_next: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    *,
    needs_g_layer_output: bool = True,
    needs_g_h_post: bool = True,
) -> tuple[Gradient, Gradient]:
    """g_x_next [T, n, C], layer_output [T, C], h_post [T, n] -> the gradients of the last two, None unless needed.

    That of x is g_x_next.
    """
    wanted = zip((layer_output, h_post), (needs_g_layer_output, needs_g_h_post), strict=True)
    g_layer_output, g_h_post = (torch.empty_like(tensor) if needs else None for tensor, needs in wanted)
    if g_layer_output is None and g_h_post is None:
        return None, None
    _, num_streams, hidden_size = g_x_next.shape
    sizes = (num_streams, hidden_size, g_x_next.element_size())
    tile = plans.post_backward_tile(*sizes, compiler.platform_of(g_x_next.device))
    kernel = stream_kernel(
        "post_backward",
        g_x_next,
        layer_dtype=dtype_name(layer_output.dtype),
        tile=tile,
        needs_g_x=False,
        needs_g_layer_output=needs_g_layer_output,
        needs_g_mappings=needs_g_h_post,
        has_h_res=False,
    )
    unread = g_x_next.new_empty(1)
    kernel(
        g_x_next=by_width(g_x_next, tile),
        x=unread,
        layer_output=by_width(layer_output, tile),
        h_post=aligned(h_post),
        h_res=h_post.new_empty(1),
        g_x=unread,
        g_layer_output=layer_output.new_empty(1) if g_layer_output is None else by_width(g_layer_output, tile),
        g_h_post=placeholder_if_none(g_h_post, h_post),
        g_h_res=h_post.new_empty(1),
    )
    return g_layer_output, g_h_post
