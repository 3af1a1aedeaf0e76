"""The boundary before the first sublayer, launched: `expand` and `pre` of n equal streams, forward and backward.

    expand_pre            expand_project, coefficients, the sum of h_pre, and the aggregation of one stream
    expand_project        the stream, and its projection from the one read of h
    expand_pre_backward   the kernels of pre's backward on one stream, and expand's

Tensors come flat, [T, …], checked and contiguous; `operators` sees to that. A gradient that is not given is None and
counts as zero. The equations are in `kernels.expand_project`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import boundary_plans, projection_plans
from ..spec import MHCSpec
from .aggregate import aggregate, aggregate_backward
from .coefficients import coefficients, coefficients_backward
from .expand import expand, expand_backward
from .operands import Gradient, aligned, stream_kernel
from .projection import parallel_blocks, project_backward, split_phi


class FirstBoundary(NamedTuple):
    """Results of the first boundary, and what its backward needs besides the inputs: h_pre and `projected`."""

    x: torch.Tensor
    layer_input: torch.Tensor
    h_post: torch.Tensor
    h_res: torch.Tensor
    h_pre: torch.Tensor
    projected: torch.Tensor


class FirstGradients(NamedTuple):
    """Gradients of the first boundary's inputs; the first two are None where they are not needed."""

    g_h: Gradient
    g_phi: Gradient
    g_alpha: torch.Tensor
    g_bias: torch.Tensor


def expand_pre(
    h: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: tuple[torch.Tensor, ...] | None = None,
) -> FirstBoundary:
    """h [T, C], phi [M, K], alpha [3], bias [M] -> x [T, n, C], layer_input [T, C], h_post [T, n], h_res [T, n, n],
    h_pre [T, n], projected [M + 1, T].

    `out` has the first five.
    """
    x, layer_input, h_post, h_res, h_pre = out or (None,) * 5
    plan = expand_project_plan(h, phi.shape[0], phi.shape[1] // h.shape[1])
    x, partial = expand_project(h, phi, plan, out=x)
    mappings = None
    if h_pre is not None and h_post is not None and h_res is not None:
        mappings = (h_pre, h_post, h_res)
    h_pre, h_post, h_res, projected = coefficients(partial, alpha, bias, spec, plan.projection, out=mappings)
    layer_input = aggregate(h.unsqueeze(1), total_h_pre(h_pre), out=layer_input)
    return FirstBoundary(x, layer_input, h_post, h_res, h_pre, projected)


def expand_project(
    h: torch.Tensor,
    phi: torch.Tensor,
    plan: boundary_plans.ExpandProjectPlan | None = None,
    *,
    schedule: boundary_plans.BoundarySchedule | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h [T, C], phi [M, K] -> x [T, n, C], partial sums [slabs, slab_rows, T] as of `project`.

    `plan` and `schedule` are picked unless given; neither moves a bit as long as the plan's chunks are those of
    `project`. `out` has x.
    """
    (num_tokens, hidden_size), rows = h.shape, phi.shape[0]
    num_streams = phi.shape[1] // hidden_size
    plan = plan or expand_project_plan(h, rows, num_streams)
    schedule = schedule or boundary_plans.boundary_schedule(num_tokens, hidden_size, plan, parallel_blocks(h.device))
    x = h.new_empty(num_tokens, num_streams, hidden_size) if out is None else out
    partial = h.new_empty((schedule.slabs, plan.projection.slab_rows, num_tokens), dtype=torch.float32)
    kernel = stream_kernel("expand_project", x, plan=plan)
    operand = aligned(phi).view(rows, num_streams, hidden_size)
    if isinstance(plan.projection, projection_plans.WarpProjectionPlan):
        operand = split_phi(operand, plan.projection, sums_streams=True)
    kernel(h=aligned(h), phi=operand, x=x, partial=partial, chunks_per_split=schedule.chunks_per_split)
    return x, partial


def expand_project_plan(h: torch.Tensor, rows: int, num_streams: int) -> boundary_plans.ExpandProjectPlan:
    """Return the plan by which h is projected on a phi of `rows` rows for `num_streams` equal streams."""
    platform = compiler.platform_of(h.device)
    return boundary_plans.expand_project_plan(rows, num_streams, h.shape[-1], dtype_name(h.dtype), platform)


def expand_pre_backward(
    g_x: Gradient,
    g_layer_input: Gradient,
    g_h_post: Gradient,
    g_h_res: Gradient,
    h: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor,
    projected: torch.Tensor,
    spec: MHCSpec,
    *,
    needs_g_h: bool = True,
    needs_g_phi: bool = True,
) -> FirstGradients:
    """Gradients of x [T, n, C], layer_input [T, C], h_post [T, n], h_res [T, n, n] that `expand_pre` returned, its
    arguments, and h_pre and projected as it returned them
    -> gradients of its arguments, g_h [T, C], g_phi [M, K], g_alpha [3], g_bias [M].
    """
    n, one_stream = spec.num_streams, h.unsqueeze(1)
    g_h_pre = total_pre = None
    if g_layer_input is not None:
        g_h_pre = aggregate_backward(g_layer_input, one_stream).expand(-1, n).contiguous()
        total_pre = total_h_pre(h_pre) if needs_g_h else None
    g_projected, g_alpha, g_bias = coefficients_backward(g_h_pre, g_h_post, g_h_res, projected, alpha, bias, spec)
    if not (needs_g_h or needs_g_phi):
        return FirstGradients(None, None, g_alpha, g_bias)
    g_projected[-1] *= n  # ρ is that of each stream
    g_h, g_phi = project_backward(
        g_projected,
        one_stream,
        expand_backward(aligned(phi).view(-1, n, spec.hidden_size)),
        h_pre=total_pre,
        g_layer_input=g_layer_input,
        needs_g_x=needs_g_h,
        needs_g_phi=needs_g_phi,
    )
    if g_h is not None:
        g_h = g_h.squeeze(1)
        if g_x is not None:
            g_h += expand_backward(g_x)
    if g_phi is not None:
        g_phi = expand(g_phi, n).view(phi.shape)
    return FirstGradients(g_h, g_phi, g_alpha, g_bias)


def total_h_pre(h_pre: torch.Tensor) -> torch.Tensor:
    """h_pre [T, n] -> Σ_j h_pre[j] [T, 1], streams in ascending order: what adds up streams adds up weights too."""
    return expand_backward(h_pre.unsqueeze(-1))
