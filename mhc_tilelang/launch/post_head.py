"""The boundary after the last sublayer, launched: `post`, then `head`, forward and backward.

    post_head            three launches: post_project on the head's phi, its coefficients, and the aggregation
    post_head_backward   aggregate_backward, head_coefficients_backward, boundary_backward, boundary_sums: four
                         launches; the separate kernels where `post_pre_backward` takes them

Tensors come flat, [T, …], checked and contiguous; `operators` sees to that. Results have the bits of `post`, then the
head's kernels. Sums over tokens and channels are taken in the order of `post_pre_backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..compiler import platform_of
from ..kernels import boundary_plans
from ..spec import MHCSpec
from .aggregate import aggregate, aggregate_backward
from .coefficients import head_coefficients, head_coefficients_backward, head_mapping_backward, split_parameters
from .post_pre import post_project
from .post_pre_backward import BoundaryGradients, Gradient, boundary_sums, mixing_backward, separate_backward
from .projection import projection_plan


class LastBoundary(NamedTuple):
    """Results of the last boundary, and what its backward needs besides the inputs: x_next, h_pre, `projected`."""

    x_next: torch.Tensor
    output: torch.Tensor
    h_pre: torch.Tensor
    projected: torch.Tensor


def post_head(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> LastBoundary:
    """x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n] of the sublayer that ends, phi [n, K],
    alpha [1], bias [n] of the head -> x_next [T, n, C], output [T, C], h_pre [T, n], projected [n + 1, T].

    `out` has the first two.
    """
    next_buffer, output = out or (torch.empty_like(x), None)
    x_next, partial, _ = post_project(x, layer_output, h_post, h_res, phi, out=(next_buffer, None))
    plan = projection_plan(x, phi.shape[0])
    h_pre, projected = head_coefficients(partial, alpha, bias, spec, plan)
    return LastBoundary(x_next, aggregate(x_next, h_pre, out=output), h_pre, projected)


def post_head_backward(
    g_x_next: Gradient,
    g_output: torch.Tensor,
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
) -> BoundaryGradients:
    """Gradients of x_next [T, n, C], None where it was not used, and output [T, C] that `post_head` returned, its
    arguments, and x_next, h_pre and projected as it returned them -> gradients of its arguments.
    """
    g_pre, mixed = aggregate_backward(g_output, x_next), (x, layer_output)
    if not boundary_plans.backward_is_fused(spec.num_streams, platform_of(x.device)):
        g_projected, g_alpha, g_bias = head_coefficients_backward(g_pre, projected, alpha, bias, spec)
        g_mixed, g_phi = separate_backward(g_x_next, g_output, g_projected, *mixed, h_pre, h_post, h_res, phi, x_next)
        return BoundaryGradients(*g_mixed, g_phi, g_alpha, g_bias)
    g_projected = torch.empty_like(projected)
    partial_parameters = head_mapping_backward(g_pre, projected, alpha, bias, spec, out=g_projected)
    g_x, g_layer_output, partial_phi, partial_mixing = mixing_backward(
        g_x_next, g_output, g_projected, *mixed, h_pre, h_post, h_res, phi
    )
    g_phi, g_post, g_res, _, g_parameters = boundary_sums(
        partial_phi, partial_mixing, partial_parameters, spec.num_streams
    )
    if x.shape[0] == 0:
        g_phi, g_parameters = torch.zeros_like(phi), torch.zeros_like(g_parameters)
    g_alpha, g_bias = split_parameters(g_parameters, alpha, bias)
    return BoundaryGradients(g_x, g_layer_output, g_post, g_res, g_phi.view(phi.shape), g_alpha, g_bias)
