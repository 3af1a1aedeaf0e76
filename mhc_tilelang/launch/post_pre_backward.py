"""The backward of a sublayer boundary, launched: as `post_pre`, for the gradients.

    post_pre_backward   coefficients_aggregate_backward, boundary_backward, boundary_sums: three launches; four where
                        there is no kernel for both coefficients and aggregation, which then are one each, or where
                        layer_input is normalised: aggregate_norm_backward is in place of aggregate_backward, with a
                        launch for its partial sums;
                        on a CPU, and with more than four streams, the separate kernels, six launches and two
                        more for their partial sums

Tensors come flat and contiguous, [T, …]. A gradient that is not given is None and counts as zero; nothing of it is
read. Sums over tokens and channels are taken in an order that the sizes fix, those of g_phi as in `project_backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import boundary_plans, plans, projection_plans
from ..spec import MHCSpec
from .aggregate import aggregate_backward, aggregate_norm_backward
from .coefficients import coefficients_aggregate_backward, coefficients_backward, mappings_backward, split_parameters
from .operands import Gradient, aligned, placeholder_if_none, stream_kernel
from .post import post_backward
from .projection import parallel_blocks, project_backward


class BoundaryGradients(NamedTuple):
    """Gradients of the boundary's inputs: the sublayer that ends, then the parameters of the one that begins.

    g_h_pre is the gradient of a given h_pre, g_rms_norm that of a norm's weight; None where there is none, or it is
    zero. g_h_res is None where there is no h_res.
    """

    g_x: torch.Tensor
    g_layer_output: torch.Tensor
    g_h_post: torch.Tensor
    g_h_res: Gradient
    g_phi: torch.Tensor
    g_alpha: torch.Tensor
    g_bias: torch.Tensor
    g_h_pre: Gradient = None
    g_rms_norm: Gradient = None


def post_pre_backward(
    g_x_next: Gradient,
    g_layer_input: Gradient,
    g_h_post_next: Gradient,
    g_h_res_next: Gradient,
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
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
    rms_norm_weight: torch.Tensor | None = None,
    rms_norm_eps: float = 1e-6,
    needs_g_weight: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> BoundaryGradients:
    """Gradients of x_next [T, n, C], layer_input [T, C], h_post [T, n], h_res [T, n, n] that `post_pre`
    returned, its arguments, x_next and projected as it returned them, and the h_pre of the aggregation
    -> gradients of its arguments.

    Where it `is_delayed`, h_pre was given, and g_h_pre_next is the gradient of the one that was returned.
    `needs_g_weight` asks for the gradient of the norm's weight. `out` has g_x and g_layer_output.
    """
    num_tokens, num_streams, _ = x.shape
    g_h_pre, g_norm = None, None
    if g_layer_input is not None and rms_norm_weight is not None:
        g_layer_input, g_h_pre, g_norm = aggregate_norm_backward(
            g_layer_input, x_next, h_pre, rms_norm_weight, rms_norm_eps, needs_g_weight=needs_g_weight
        )
    is_fused = boundary_plans.backward_is_fused(num_streams, compiler.platform_of(x.device))
    is_joined = is_fused and g_h_pre is None and not is_delayed
    if g_layer_input is not None and g_h_pre is None and not (is_joined or is_delayed):
        g_h_pre = aggregate_backward(g_layer_input, x_next)
    if not is_delayed:
        g_h_pre_next = g_h_pre
    needs_g_h_pre = is_delayed and g_layer_input is not None and g_h_pre is None
    if not is_fused:
        g_projected, g_alpha, g_bias = coefficients_backward(
            g_h_pre_next, g_h_post_next, g_h_res_next, projected, alpha, bias, spec
        )
        g_mixed, g_phi = separate_backward(
            g_x_next, g_layer_input, g_projected, x, layer_output, h_pre, h_post, h_res, phi, x_next, out=out
        )
        if needs_g_h_pre and g_layer_input is not None:
            g_h_pre = aggregate_backward(g_layer_input, x_next)
        return BoundaryGradients(*g_mixed, g_phi, g_alpha, g_bias, g_h_pre if is_delayed else None, g_norm)
    g_projected = torch.empty_like(projected)
    mappings = (g_h_post_next, g_h_res_next, projected, alpha, bias, spec)
    if g_layer_input is not None and is_joined:
        partial_parameters = coefficients_aggregate_backward(g_layer_input, x_next, *mappings, out=g_projected)
    else:
        partial_parameters = mappings_backward(g_h_pre_next, *mappings, out=g_projected)
    g_x, g_layer_output, partial_phi, partial_mixing = mixing_backward(
        *(g_x_next, g_layer_input, g_projected, x, layer_output, h_pre, h_post, h_res, phi),
        needs_g_h_pre=needs_g_h_pre,
        out=out,
    )
    g_phi, g_post, g_res, g_summed, g_parameters = boundary_sums(
        partial_phi, partial_mixing, partial_parameters, num_streams, needs_g_h_pre
    )
    if num_tokens == 0:
        g_phi, g_parameters = torch.zeros_like(phi), torch.zeros_like(g_parameters)
    g_pre = (g_summed if needs_g_h_pre else g_h_pre) if is_delayed else None
    g_alpha, g_bias = split_parameters(g_parameters, alpha, bias)
    return BoundaryGradients(g_x, g_layer_output, g_post, g_res, g_phi.view(phi.shape), g_alpha, g_bias, g_pre, g_norm)


def stream_backward(
    g_x_next: Gradient,
    g_layer_input: Gradient,
    g_projected: torch.Tensor,
    h_pre: torch.Tensor,
    phi: torch.Tensor,
    x_next: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All that reaches x_next [T, n, C], from outside and from what was projected and aggregated, and phi's gradient:
    rounded, then added and rounded again.
    """
    g_next, g_phi = torch.empty_like(x_next), torch.empty_like(phi)
    weights = None if g_layer_input is None else h_pre
    project_backward(g_projected, x_next, phi, h_pre=weights, g_layer_input=g_layer_input, out=(g_next, g_phi))
    if g_x_next is not None:
        g_next += g_x_next
    return g_next, g_phi


def separate_backward(
    g_x_next: Gradient,
    g_layer_input: Gradient,
    g_projected: torch.Tensor,
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_pre: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    x_next: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Run separate kernels for `mixing_backward` and its sums: gradients of x, layer_output, h_post, h_res, then of
    phi.

    `out` has the first two.
    """
    g_next, g_phi = stream_backward(g_x_next, g_layer_input, g_projected, h_pre, phi, x_next)
    g_x, g_layer_output = out or (torch.empty_like(x), torch.empty_like(layer_output))
    g_post, g_res = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (h_post, h_res))
    of_mixing = (g_x, g_layer_output, g_post, g_res)
    post_backward(g_next, x, layer_output, h_post, h_res, out=of_mixing)
    return of_mixing, g_phi


def mixing_backward(
    g_x_next: Gradient,
    g_layer_input: Gradient,
    g_projected: torch.Tensor,
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_pre: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor | None,
    phi: torch.Tensor,
    *,
    needs_g_h_pre: bool = False,
    plan: boundary_plans.BoundaryBackwardPlan | projection_plans.WarpsPlan | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel `boundary_backward`: gradients of the stream and the layer's output, g_projected [M + 1, T] as of
    `coefficients_backward`, what was mixed, the h_pre of the aggregation, phi [M, K]
    -> g_x [T, n, C], g_layer_output [T, C], and partial sums: of g_phi [ranges, M·K], and [channel blocks, n² + n, T]
    of g_h_post[j], g_h_res[j] for each j; n² + 2n where it `needs_g_h_pre`, with g_h_pre[j]. `out` has g_x and
    g_layer_output. Without h_res H_res is the identity, and there are no sums for g_h_res.
    """
    num_tokens, n, hidden_size = x.shape
    rows = phi.shape[0]
    plan = plan or backward_plan(x, layer_output, rows)
    tiles_per_range = boundary_plans.tiles_per_range(num_tokens, plan, hidden_size, parallel_blocks(x.device))
    ranges = max(1, -(-num_tokens // (tiles_per_range * plan.tokens)))
    partial_phi = phi.new_empty(ranges, rows, n, hidden_size)
    num_sums = n + (0 if h_res is None else n * n) + (n if needs_g_h_pre else 0)
    partial_mixing = phi.new_empty(-(-hidden_size // plan.channels), num_sums, num_tokens)
    g_x, g_layer_output = out or (torch.empty_like(x), torch.empty_like(layer_output))
    kernel = stream_kernel(
        "boundary_backward",
        x,
        layer_dtype=dtype_name(layer_output.dtype),
        plan=plan,
        has_g_x_next=g_x_next is not None,
        has_g_layer_input=g_layer_input is not None,
        needs_g_h_pre=needs_g_h_pre,
        **({"has_h_res": False} if h_res is None else {}),
    )
    kernel(
        g_x_next=placeholder_if_none(g_x_next, x),
        g_layer_input=placeholder_if_none(g_layer_input, x),
        g_projected=g_projected,
        x=aligned(x),
        layer_output=aligned(layer_output),
        h_pre=placeholder_if_none(None if g_layer_input is None else h_pre, phi),
        h_post=aligned(h_post),
        h_res=placeholder_if_none(h_res, phi),
        phi=aligned(phi).view(rows, n, hidden_size),
        g_x=g_x,
        g_layer_output=g_layer_output,
        partial_phi=partial_phi,
        partial_mixing=partial_mixing,
        tiles_per_range=tiles_per_range,
    )
    return g_x, g_layer_output, partial_phi.view(ranges, -1), partial_mixing


def backward_plan(
    x: torch.Tensor, layer_output: torch.Tensor, rows: int
) -> boundary_plans.BoundaryBackwardPlan | projection_plans.WarpsPlan:
    """The plan by which the backward of a boundary of these tensors is fused, for a phi of `rows` rows."""
    _, n, hidden_size = x.shape
    sizes = (rows, n, hidden_size, dtype_name(x.dtype), compiler.platform_of(x.device))
    return boundary_plans.boundary_backward_plan(
        *sizes, dtype_name(layer_output.dtype), compiler.shared_bytes(x.device)
    )


def boundary_sums(
    partial_phi: torch.Tensor,
    partial_mixing: torch.Tensor,
    partial_parameters: torch.Tensor,
    num_streams: int,
    needs_g_h_pre: bool = False,
    has_h_res: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, Gradient, Gradient, torch.Tensor]:
    """The partial sums of `mixing_backward` and `coefficients_backward` added up
    -> g_phi [M·K], g_h_post [T, n], g_h_res [T, n, n], g_h_pre [T, n] or None, and of alpha and bias [3 + M].

    g_h_res is None without h_res.
    """
    n, num_tokens = num_streams, partial_mixing.shape[2]
    has_ranges = partial_phi.shape[0] > 1  # one range of tokens: its partial sum is the sum
    g_phi = partial_phi.new_empty(partial_phi.shape[1]) if has_ranges else partial_phi[0]
    g_h_post, g_parameters = (
        partial_phi.new_empty(shape) for shape in ((num_tokens, n), (partial_parameters.shape[1],))
    )
    g_h_res = partial_phi.new_empty(num_tokens, n * n) if has_h_res else None
    g_h_pre = partial_phi.new_empty(num_tokens, n) if needs_g_h_pre else None
    kernel = compiler.kernel(
        "boundary_sums",
        compiler.target_of(partial_phi.device),
        num_streams=n,
        needs_g_h_pre=needs_g_h_pre,
        has_ranges=has_ranges,
        lanes=plans.partial_lanes(partial_parameters.shape[0]),
        block=plans.PARTIAL_THREADS,
        **({} if has_h_res else {"has_h_res": False}),
    )
    kernel(
        partial_phi=partial_phi,
        partial_mixing=partial_mixing,
        partial_parameters=partial_parameters,
        g_phi=g_phi,
        g_h_post=g_h_post,
        g_h_res=placeholder_if_none(g_h_res, partial_phi),
        g_h_pre=placeholder_if_none(g_h_pre, partial_phi),
        g_parameters=g_parameters,
    )
    g_res = None if g_h_res is None else g_h_res.view(num_tokens, n, n)
    return g_phi, g_h_post, g_res, g_h_pre, g_parameters
