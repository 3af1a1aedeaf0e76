"""The checks of expand and pre in one, before the first sublayer, and of their backward.

As in `post_pre`, every output is compared from the numbers that the launch before it left.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ... import launch, reference
from ...compiler import platform_of
from ...compiler.kernel import dtype_name
from ...kernels import projection_plans
from .. import plain_torch, tolerance
from ..comparison import Array, Comparison, check, numpy64
from ..inputs import Case, Gradients, Inputs
from ..plain_torch import by_autograd
from .coefficients import compare_mappings
from .coefficients_backward import Logits, comparisons, sublayer_mappings

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def parameters(inputs: Inputs) -> Three:
    """Return the parameters of the sublayer that begins."""
    return inputs.phi, inputs.alpha, inputs.bias


@check("x", "layer_input", "h_pre", "h_post", "h_res")
def check_expand_pre(case: Case, inputs: Inputs) -> list[Comparison]:
    """x as of expand; layer_input and the mappings as of pre at that x.

    The bounds are those of a projection of all streams. Here phi is summed over them first, which leaves less to round,
    of a phi whose streams are independent.
    """
    spec, dtype, n = case.spec, dtype_name(case.dtype), case.num_streams
    got = launch.expand_pre(inputs.h, *parameters(inputs), spec)
    plain_x = plain_torch.expand(inputs.h, n)
    plain = plain_torch.coefficients(plain_x, *parameters(inputs), spec)
    plain_input = plain_torch.aggregate(plain_x, plain[0])
    mappings = compare_mappings(case, replace(inputs, x=plain_x), (got.h_pre, got.h_post, got.h_res), plain)

    x = reference.expand(numpy64(inputs.h), n)
    h_pre = mappings[0].expected
    magnitude = reference.aggregate(np.abs(x), h_pre)
    bound = tolerance.combination(magnitude, n, dtype) + reference.aggregate(np.abs(x), mappings[0].bound)
    return [
        Comparison("x", numpy64(got.x), numpy64(plain_x), x, np.zeros_like(x), np.ones_like(x)),
        Comparison(
            "layer_input",
            numpy64(got.layer_input),
            numpy64(plain_input),
            reference.aggregate(x, h_pre),
            bound,
            magnitude,
        ),
        *mappings,
    ]


@check("g_h", "g_phi", "g_alpha", "g_bias")
def check_expand_pre_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check all four gradients."""
    spec, n, h = case.spec, case.num_streams, inputs.h
    upstream = Gradients.of(case, h.device)
    forward = launch.expand_pre(h, *parameters(inputs), spec)
    given = (upstream.g_x, upstream.g_h, upstream.g_h_post, upstream.g_h_res)
    left = (forward.h_pre, forward.projected)
    got = launch.expand_pre_backward(*given, h, *parameters(inputs), *left, spec)

    def outputs(*arguments: torch.Tensor) -> torch.Tensor:
        given_h, phi, alpha, bias = arguments
        x = plain_torch.expand(given_h, n)
        results = (x, *plain_torch.pre(x, phi, alpha, bias, spec))
        return torch.cat([result.float().flatten() for result in results])

    gradient = torch.cat([each.float().flatten() for each in given])
    plain = by_autograd(outputs, gradient, h, *parameters(inputs))
    g_h_pre = launch.aggregate_backward(upstream.g_h, forward.x)
    g_mappings = (g_h_pre, *given[2:])
    g_projected, *_ = launch.coefficients_backward(*g_mappings, forward.projected, inputs.alpha, inputs.bias, spec)
    at = Logits(g_mappings, forward.projected, inputs.alpha, inputs.bias, spec)
    of_logits = comparisons(at, (g_projected, *got[2:]), sublayer_mappings(spec))[2:]
    of_logits = [replace(one, torch=numpy64(p)) for one, p in zip(of_logits, plain[2:], strict=True)]

    tensors = (upstream.g_x, g_projected[:-1], g_projected[-1], h, inputs.phi, forward.h_pre, upstream.g_h)
    exact = [numpy64(tensor) for tensor in tensors]
    expected, magnitude = gradient_of_h(*exact), gradient_of_h(*map(np.abs, exact))
    g_dots, phi_sum = exact[1], exact[4].reshape(-1, n, case.hidden_size).sum(1)
    dots_scale = np.sqrt(np.square(g_dots).T @ np.square(phi_sum))
    plan = projection_plans.projection_backward_plan(
        spec.num_coefficients, case.hidden_size, dtype_name(case.dtype), platform_of(h.device), num_streams=1
    )
    split = tolerance.split_error(plan)
    # The sum over g_x and the rest are rounded, then added and rounded again.
    terms = spec.num_coefficients + 2 * n + 4
    bound = 2 * tolerance.combination(magnitude, terms, dtype_name(case.dtype)) + split * dots_scale
    g_phi = np.tile(g_dots @ exact[3], n)
    phi_scale = np.tile(np.sqrt(np.square(g_dots) @ np.square(exact[3])), n)
    phi_bound = tolerance.inner_products(phi_scale, max(case.num_tokens, 1)) + split * phi_scale
    assert got[0] is not None
    assert got[1] is not None
    return [
        Comparison("g_h", numpy64(got[0]), numpy64(plain[0]), expected, bound, magnitude),
        Comparison("g_phi", numpy64(got[1]), numpy64(plain[1]), g_phi, phi_bound, phi_scale),
        *of_logits,
    ]


def gradient_of_h(
    g_x: Array, g_dots: Array, rho: Array, h: Array, phi: Array, h_pre: Array, g_layer_input: Array
) -> Array:
    """g_h from the gradients of x, of its projection and of the layer's input, stream by stream."""
    x = reference.expand(h, g_x.shape[1])
    through_dots, _ = reference.project_backward(g_dots.T, rho / 2, x, phi)
    through_input, _ = reference.aggregate_backward(g_layer_input, x, h_pre)
    return reference.expand_backward(g_x + through_dots + through_input, h, g_x.shape[1])
