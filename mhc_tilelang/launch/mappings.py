"""The layer's input from a projection, launched, and the mappings that are needed only after the layer.

    coefficients_and_aggregate   both, with h_post and h_res made where the plan says
    coefficients_aggregate       in one launch, where warps projected
    aggregate_mappings           the aggregation, and beside it h_post and h_res

Tensors come flat, [T, …], checked and contiguous. Results have the bits of `coefficients`, then `aggregate`, whichever
of the two makes the mappings. docs/critical-path.md has the reasons.
"""

from __future__ import annotations

import torch

from .. import compiler
from ..kernels import boundary_plans, plans, projection_plans
from ..spec import MHCSpec
from .aggregate import aggregate
from .coefficients import coefficients
from .operands import aligned, alignment, placeholder_if_none, stream_kernel
from .projection import parallel_blocks


def coefficients_and_aggregate(
    x: torch.Tensor,
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    plan: projection_plans.ProjectionPlan,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """x [T, n, C] and its partial sums, alpha [3], bias [M] -> projected [M + 1, T].

    `out` has layer_input [T, C], h_pre [T, n], h_post [T, n] and h_res [T, n, n].
    """
    layer_input, h_pre, h_post, h_res = out
    if joins_aggregation(x, layer_input, plan):
        return coefficients_aggregate(x, partial, alpha, bias, spec, plan, out=out)
    is_deferred = boundary_plans.defers_mappings(compiler.platform_of(x.device))
    mappings = (h_pre, h_post, h_res)
    *_, projected = coefficients(partial, alpha, bias, spec, plan, is_deferred=is_deferred, out=mappings)
    if is_deferred:
        aggregate_mappings(x, h_pre, projected, alpha, bias, spec, out=(layer_input, h_post, h_res))
    else:
        aggregate(x, h_pre, out=layer_input)
    return projected


def joins_aggregation(x: torch.Tensor, layer_input: torch.Tensor, plan: projection_plans.ProjectionPlan) -> bool:
    """Whether coefficients and aggregation are one launch: after a projection of two or four streams by
    warps, in whole 16-byte accesses.
    """
    by_warps = isinstance(plan, projection_plans.WarpProjectionPlan) and x.shape[1] in projection_plans.WARP_STREAMS
    return by_warps and alignment(x, layer_input) == plans.MAX_ACCESS_BYTES


def coefficients_aggregate(
    x: torch.Tensor,
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    projection: projection_plans.ProjectionPlan,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> torch.Tensor:
    """Launch coefficients and aggregation as one kernel, where `joins_aggregation`; no h_res for identity."""
    layer_input, h_pre, h_post, h_res = out
    num_tokens, _, hidden_size = x.shape
    projected = partial.new_empty(spec.num_coefficients + 1, num_tokens)
    assert isinstance(projection, projection_plans.WarpProjectionPlan)
    plan = boundary_plans.CoefficientsAggregatePlan(projection)
    kernel = stream_kernel("coefficients_aggregate", x, plan=plan, **({"has_h_res": False} if h_res is None else {}))
    kernel(
        x=x,
        partial=partial,
        alpha=aligned(alpha),
        bias=aligned(bias),
        layer_input=layer_input,
        h_pre=h_pre,
        h_post=h_post,
        h_res=placeholder_if_none(h_res, projected),
        projected=projected,
        iters=spec.sinkhorn_iters,
        sinkhorn_eps=spec.sinkhorn_eps,
        pre_eps=spec.pre_eps,
        rms_eps=spec.rms_eps,
        post_scale=spec.post_scale,
        post_eps=spec.post_eps,
        parts=boundary_plans.aggregating_parts(num_tokens, hidden_size, plan, parallel_blocks(x.device) // 2),
    )
    return projected


def aggregate_mappings(
    x: torch.Tensor,
    h_pre: torch.Tensor,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, n, C], h_pre [T, n], projected [M + 1, T] as of `coefficients`, alpha [3], bias [M]
    -> layer_input [T, C], h_post [T, n], h_res [T, n, n], which `out` has.
    """
    num_tokens, n, hidden_size = x.shape
    layer_input, h_post, h_res = out or (
        x.new_empty(num_tokens, hidden_size),
        h_pre.new_empty(num_tokens, n),
        h_pre.new_empty(num_tokens, n, n),
    )
    starts = alignment(x, layer_input)
    platform, target = compiler.platform_of(x.device), compiler.target_of(x.device)
    kernel = stream_kernel(
        "aggregate_mappings",
        x,
        plan=boundary_plans.aggregate_mappings_plan(n, hidden_size, x.element_size(), platform, starts),
        pdl=target in boundary_plans.PDL,
    )
    kernel(
        x=x,
        h_pre=aligned(h_pre),
        projected=projected,
        alpha=aligned(alpha),
        bias=aligned(bias),
        layer_input=layer_input,
        h_post=h_post,
        h_res=h_res,
        iters=spec.sinkhorn_iters,
        sinkhorn_eps=spec.sinkhorn_eps,
        post_scale=spec.post_scale,
    )
    return layer_input, h_post, h_res
