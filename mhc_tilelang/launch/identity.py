"""What an identity hyper-connection (H_res = I) launches in place of `coefficients`, `post` and the boundary, both
directions.

    identity_post_pre            post_project, coefficients_aggregate; gates and aggregate for the second where tiles
                                 project; post_project and gates in the delayed form; one launch for few tokens
    identity_post_pre_backward   coefficients_aggregate_backward, boundary_backward, boundary_sums: three launches;
                                 aggregate_backward and gates_backward for the first where it is not joined, and the
                                 separate kernels where `post_pre_backward` takes them

Tensors come flat and contiguous, [T, …]; `operators` sees to that. Gradients that are not needed are skipped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import boundary_plans, plans, projection_plans
from ..spec import MHCSpec
from .aggregate import aggregate, aggregate_backward
from .coefficients import coefficients_aggregate_backward, joins_coefficients, run_in_parts, split_parameters
from .mappings import coefficients_aggregate, joins_aggregation
from .operands import Gradient, aligned, by_width, channel_kernel, placeholder_if_none, stream_kernel
from .partial_sums import sum_partials
from .post_pre import boundary_schedule, post_pre_at_once, post_project
from .post_pre_backward import BoundaryGradients, boundary_sums, mixing_backward, stream_backward
from .projection import projection_plan

Pair = tuple[torch.Tensor, torch.Tensor]


class IdentityBoundary(NamedTuple):
    """Results of a boundary without h_res; `Boundary` has the others."""

    x_next: torch.Tensor
    layer_input: torch.Tensor
    h_post: torch.Tensor
    h_pre: torch.Tensor
    projected: torch.Tensor


def gates(
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    plan: projection_plans.ProjectionPlan,
    *,
    out: Pair | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial sums, alpha [2], bias [2n] -> h_pre, h_post [T, n], which `out` has, and projected [2n + 1, T]."""
    h_pre, h_post = out or (partial.new_empty(partial.shape[-1], spec.num_streams) for _ in range(2))
    projected = partial.new_empty(spec.num_coefficients + 1, partial.shape[-1])
    target = compiler.target_of(partial.device)
    kernel = compiler.kernel(
        "gates",
        target,
        num_streams=spec.num_streams,
        hidden_size=spec.hidden_size,
        plan=plan,
        block=plans.tokens_per_block(target),
    )
    kernel(
        partial=partial,
        alpha=aligned(alpha),
        bias=aligned(bias),
        h_pre=h_pre,
        h_post=h_post,
        projected=projected,
        pre_eps=spec.pre_eps,
        rms_eps=spec.rms_eps,
        post_scale=spec.post_scale,
        post_eps=spec.post_eps,
    )
    return h_pre, h_post, projected


def gates_and_aggregate(
    x: torch.Tensor,
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    plan: projection_plans.ProjectionPlan,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """x [T, n, C] and its partial sums, alpha [2], bias [2n] -> projected [2n + 1, T], in one launch or two.

    `out` has layer_input [T, C], h_pre [T, n] and h_post [T, n].
    """
    layer_input, h_pre, h_post = out
    if joins_aggregation(x, layer_input, plan):
        return coefficients_aggregate(x, partial, alpha, bias, spec, plan, out=(*out, None))
    *_, projected = gates(partial, alpha, bias, spec, plan, out=(h_pre, h_post))
    aggregate(x, h_pre, out=layer_input)
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
    partial = gate_mappings_backward(g_h_pre, g_h_post, projected, alpha, bias, spec, out=g_projected)
    return g_projected, *split_parameters(sum_partials(partial), alpha, bias)


def gate_mappings_backward(
    g_h_pre: Gradient,
    g_h_post: Gradient,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """The kernel of `gates_backward`: writes g_projected to `out`, returns the gradients of alpha and bias with their
    sums over tokens still in parts, [blocks, 2 + 2n].
    """
    target = compiler.target_of(projected.device)
    block = plans.tokens_per_block(target)
    kernel = compiler.kernel(
        "gates_backward",
        target,
        num_streams=spec.num_streams,
        hidden_size=spec.hidden_size,
        block=block,
        has_g_h_pre=g_h_pre is not None,
        has_g_h_post=g_h_post is not None,
    )
    return run_in_parts(
        *(kernel, block, projected, alpha, bias, out),
        g_h_pre=placeholder_if_none(g_h_pre, projected),
        g_h_post=placeholder_if_none(g_h_post, projected),
        post_scale=spec.post_scale,
    )


def identity_post_pre(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    h_pre: torch.Tensor | None = None,
    schedule: boundary_plans.BoundarySchedule | None = None,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> IdentityBoundary:
    """Launch the boundary: x [T, n, C], layer_output [T, C], h_post [T, n] of the sublayer that ends, phi [2n, K],
    alpha [2], bias [2n] of the one that begins -> x_next [T, n, C], layer_input [T, C], h_post and h_pre [T, n], which
    `out` has, and projected [2n + 1, T].

    With an h_pre [T, n] layer_input is aggregated with that, in the launch that makes x_next. `schedule` as in
    `post_pre`.
    """
    x_next, layer_input, h_post_next, h_pre_next = out or (
        *(torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2])),
        *(torch.empty_like(h_post, memory_format=torch.contiguous_format) for _ in range(2)),
    )
    schedule = schedule or boundary_schedule(x, phi.shape[0])
    if schedule.one_launch:
        every = (x_next, layer_input, h_pre_next, h_post_next, None)
        projected = post_pre_at_once(x, layer_output, h_post, None, phi, alpha, bias, spec, h_pre=h_pre, out=every)
        if projected is not None:
            return IdentityBoundary(x_next, layer_input, h_post_next, h_pre_next, projected)
        schedule = boundary_schedule(x, phi.shape[0], one_launch=False)
    made = (x_next, None if h_pre is None else layer_input)
    _, partial, _ = post_project(x, layer_output, h_post, None, phi, h_pre=h_pre, schedule=schedule, out=made)
    of_gates = (partial, alpha, bias, spec, projection_plan(x, phi.shape[0]))
    if h_pre is None:
        projected = gates_and_aggregate(x_next, *of_gates, out=(layer_input, h_pre_next, h_post_next))
    else:
        *_, projected = gates(*of_gates, out=(h_pre_next, h_post_next))
    return IdentityBoundary(x_next, layer_input, h_post_next, h_pre_next, projected)


def identity_post_pre_backward(
    g_x_next: Gradient,
    g_layer_input: Gradient,
    g_h_post_next: Gradient,
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    x_next: torch.Tensor,
    h_pre: torch.Tensor,
    projected: torch.Tensor,
    spec: MHCSpec,
    *,
    is_delayed: bool = False,
    g_h_pre_next: Gradient = None,
) -> BoundaryGradients:
    """As `post_pre_backward`, without h_res: gradients of x_next [T, n, C], layer_input [T, C], h_post [T, n]; the
    arguments of `identity_post_pre`, x_next, the h_pre of the aggregation and projected -> gradients of its arguments.
    """
    _, n, _ = x.shape
    is_fused = boundary_plans.backward_is_fused(n, compiler.platform_of(x.device))
    needs_g_h_pre = is_delayed and g_layer_input is not None
    g_h_pre, g_projected = None, torch.empty_like(projected)
    gates_kept = (projected, alpha, bias, spec)
    if g_layer_input is not None and not is_delayed and is_fused and joins_coefficients(x):
        given = (g_layer_input, x_next, g_h_post_next, None)
        partial_parameters = coefficients_aggregate_backward(*given, *gates_kept, out=g_projected)
    else:
        if g_layer_input is not None and not is_delayed:
            g_h_pre = aggregate_backward(g_layer_input, x_next)
        g_gate = g_h_pre_next if is_delayed else g_h_pre
        partial_parameters = gate_mappings_backward(g_gate, g_h_post_next, *gates_kept, out=g_projected)
    if not is_fused:
        g_x, g_phi = stream_backward(g_x_next, g_layer_input, g_projected, h_pre, phi, x_next)
        g_layer_output, g_post = identity_post_backward(g_x, layer_output, h_post)
        if needs_g_h_pre and g_layer_input is not None:
            g_h_pre = aggregate_backward(g_layer_input, x_next)
        g_parameters = sum_partials(partial_parameters)
    else:
        g_x, g_layer_output, partial_phi, partial_mixing = mixing_backward(
            *(g_x_next, g_layer_input, g_projected, x, layer_output, h_pre, h_post, None, phi),
            needs_g_h_pre=needs_g_h_pre,
        )
        g_phi, g_post, _, g_summed, g_parameters = boundary_sums(
            partial_phi, partial_mixing, partial_parameters, n, needs_g_h_pre, has_h_res=False
        )
        g_h_pre = g_summed if needs_g_h_pre else g_h_pre
        if x.shape[0] == 0:
            g_phi, g_parameters = torch.zeros_like(phi), torch.zeros_like(g_parameters)
    g_alpha, g_bias = split_parameters(g_parameters, alpha, bias)
    of_parameters = (g_phi.view(phi.shape), g_alpha, g_bias)
    gradients: Any = (g_x, g_layer_output, g_post, None, *of_parameters, g_h_pre if is_delayed else None)
    return BoundaryGradients(*gradients)


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
