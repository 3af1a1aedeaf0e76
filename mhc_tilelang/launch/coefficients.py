"""The mappings from a projection's partial sums, of a sublayer and of the head, and their backward.

Tensors come flat and contiguous, [T, …]; `operators` sees to that. A gradient that is not given is None and counts as
zero. Sums over tokens are taken in an order that the sizes fix.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import boundary_plans, plans, projection_plans
from ..spec import MHCSpec
from .aggregate import aggregate_backward
from .operands import Gradient, aligned, placeholder_if_none, stream_kernel
from .partial_sums import sum_partials
from .projection import parallel_blocks
from .sinkhorn import sinkhorn_sizes


def coefficients(
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    plan: projection_plans.ProjectionPlan,
    *,
    is_deferred: bool = False,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial sums, alpha [3], bias [M] -> h_pre [T, n], h_post [T, n], h_res [T, n, n], projected [M + 1, T].

    Where they are `is_deferred`, h_post and h_res are not written: `aggregate_mappings` is to do it. `out`
    has the first three.
    """
    n, num_tokens = spec.num_streams, partial.shape[-1]
    h_pre, h_post, h_res = out or (partial.new_empty(num_tokens, *rest) for rest in ((n,), (n,), (n, n)))
    projected = partial.new_empty(spec.num_coefficients + 1, num_tokens)
    target = compiler.target_of(partial.device)
    kernel = compiler.kernel(
        "coefficients",
        target,
        num_streams=n,
        hidden_size=spec.hidden_size,
        plan=plan,
        block=plans.tokens_per_block(target),
        is_deferred=is_deferred,
        pdl=is_deferred and target in boundary_plans.PDL,
    )
    kernel(
        partial=partial,
        alpha=aligned(alpha),
        bias=aligned(bias),
        h_pre=h_pre,
        h_post=h_post.new_empty(1) if is_deferred else h_post,
        h_res=h_res.new_empty(1) if is_deferred else h_res,
        projected=projected,
        iters=spec.sinkhorn_iters,
        sinkhorn_eps=spec.sinkhorn_eps,
        pre_eps=spec.pre_eps,
        rms_eps=spec.rms_eps,
        post_scale=spec.post_scale,
    )
    return h_pre, h_post, h_res, projected


def head_coefficients(
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    plan: projection_plans.ProjectionPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums, alpha [1], bias [n] -> h_pre [T, n], projected [n + 1, T]."""
    n, num_tokens = spec.num_streams, partial.shape[-1]
    h_pre, projected = partial.new_empty(num_tokens, n), partial.new_empty(n + 1, num_tokens)
    target = compiler.target_of(partial.device)
    kernel = compiler.kernel(
        "head_coefficients",
        target,
        num_streams=n,
        hidden_size=spec.hidden_size,
        plan=plan,
        block=plans.tokens_per_block(target),
    )
    kernel(
        partial=partial,
        alpha=aligned(alpha),
        bias=aligned(bias),
        h_pre=h_pre,
        projected=projected,
        pre_eps=spec.pre_eps,
        rms_eps=spec.rms_eps,
    )
    return h_pre, projected


def coefficients_backward(
    g_h_pre: Gradient,
    g_h_post: Gradient,
    g_h_res: Gradient,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the mappings, projected [M + 1, T], alpha [3], bias [M]
    -> g_projected [M + 1, T], g_alpha [3], g_bias [M].
    """
    g_projected = torch.empty_like(projected) if out is None else out[0]
    partial = mappings_backward(g_h_pre, g_h_post, g_h_res, projected, alpha, bias, spec, out=g_projected)
    g_alpha, g_bias = split_parameters(sum_partials(partial), alpha, bias)
    if out is None:
        return g_projected, g_alpha, g_bias
    return g_projected, out[1].copy_(g_alpha), out[2].copy_(g_bias)


def mappings_backward(
    g_h_pre: Gradient,
    g_h_post: Gradient,
    g_h_res: Gradient,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """The kernel of `coefficients_backward`: writes g_projected to `out`, returns the gradients of alpha and bias with
    their sums over tokens still in parts, [blocks, 3 + M].
    """
    target = compiler.target_of(projected.device)
    capacity, block = sinkhorn_sizes(spec.num_streams, spec.sinkhorn_iters, target)
    kernel = compiler.kernel(
        "coefficients_backward",
        target,
        num_streams=spec.num_streams,
        hidden_size=spec.hidden_size,
        capacity=capacity,
        block=block,
        by_threads=boundary_plans.mappings_by_threads(spec.num_streams, compiler.platform_of(projected.device)),
        has_g_h_pre=g_h_pre is not None,
        has_g_h_post=g_h_post is not None,
        has_g_h_res=g_h_res is not None,
    )
    return run_in_parts(
        *(kernel, block, projected, alpha, bias, out),
        g_h_pre=placeholder_if_none(g_h_pre, projected),
        g_h_post=placeholder_if_none(g_h_post, projected),
        g_h_res=placeholder_if_none(g_h_res, projected),
        iters=spec.sinkhorn_iters,
        sinkhorn_eps=spec.sinkhorn_eps,
        post_scale=spec.post_scale,
    )


def coefficients_aggregate_backward(
    g_layer_input: torch.Tensor,
    x: torch.Tensor,
    g_h_post: Gradient,
    g_h_res: Gradient,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """`aggregate_backward` of g_layer_input [T, C] and x [T, n, C], and with its g_h_pre `mappings_backward`: in one
    launch where there is a kernel for it. With an identity spec, whose mappings are `gates`, there has to be one.
    """
    if not joins_coefficients(x):
        g_h_pre = aggregate_backward(g_layer_input, x)
        return mappings_backward(g_h_pre, g_h_post, g_h_res, projected, alpha, bias, spec, out=out)
    num_tokens, n, _ = x.shape
    capacity = 1
    if not spec.is_identity:
        capacity, _ = sinkhorn_sizes(n, spec.sinkhorn_iters, compiler.target_of(x.device))
    plan = boundary_plans.CoefficientsAggregateBackwardPlan(capacity)
    tokens = boundary_plans.joined_tokens(num_tokens, plan, max(1, parallel_blocks(x.device) // 2))
    kernel = stream_kernel(
        "coefficients_aggregate_backward",
        x,
        plan=plan,
        has_g_h_post=g_h_post is not None,
        has_g_h_res=g_h_res is not None,
        **({"has_h_res": False} if spec.is_identity else {}),
    )
    return run_in_parts(
        *(kernel, tokens, projected, alpha, bias, out),
        g_layer_input=aligned(g_layer_input),
        x=aligned(x),
        g_h_post=placeholder_if_none(g_h_post, projected),
        g_h_res=placeholder_if_none(g_h_res, projected),
        iters=spec.sinkhorn_iters,
        sinkhorn_eps=spec.sinkhorn_eps,
        post_scale=spec.post_scale,
        tokens=tokens,
    )


def joins_coefficients(x: torch.Tensor) -> bool:
    """Whether `coefficients_aggregate_backward` is one launch for the stream x."""
    _, n, hidden_size = x.shape
    return boundary_plans.joins_coefficients(n, hidden_size, dtype_name(x.dtype), compiler.platform_of(x.device))


def head_coefficients_backward(
    g_h_pre: torch.Tensor, projected: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, spec: MHCSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """g_h_pre [T, n], projected [n + 1, T], alpha [1], bias [n] -> g_projected [n + 1, T], g_alpha [1], g_bias [n]."""
    g_projected = torch.empty_like(projected)
    partial = head_mapping_backward(g_h_pre, projected, alpha, bias, spec, out=g_projected)
    return g_projected, *split_parameters(sum_partials(partial), alpha, bias)


def head_mapping_backward(
    g_h_pre: torch.Tensor,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """The kernel of `head_coefficients_backward`: writes g_projected to `out`, returns the gradients of alpha and bias
    with their sums over tokens still in parts, [blocks, 1 + n].
    """
    target = compiler.target_of(projected.device)
    block = plans.tokens_per_block(target)
    kernel = compiler.kernel(
        "head_coefficients_backward",
        target,
        num_streams=spec.num_streams,
        hidden_size=spec.hidden_size,
        block=block,
    )
    return run_in_parts(kernel, block, projected, alpha, bias, out, g_h_pre=aligned(g_h_pre))


def run_in_parts(
    kernel: Any,
    block: int,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    g_projected: torch.Tensor,
    **others: Any,
) -> torch.Tensor:
    """Run a mapping's backward, of `block` tokens a block; return the gradients of alpha and bias in parts: a row a
    block, of zeros where there is no token.
    """
    num_partials, elements = -(-projected.shape[-1] // block), alpha.numel() + bias.numel()
    partial = projected.new_empty(num_partials, elements) if num_partials else projected.new_zeros(1, elements)
    of_parameters = {"alpha": aligned(alpha), "bias": aligned(bias), "partial": partial}
    kernel(projected=projected, g_projected=g_projected, **of_parameters, **others)
    return partial


def split_parameters(total: torch.Tensor, *like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of alpha and bias, which lie behind one another, each in memory of its own."""
    split: Any = torch.split_with_sizes_copy
    g_alpha, g_bias = split(total, [each.numel() for each in like])
    return g_alpha, g_bias
