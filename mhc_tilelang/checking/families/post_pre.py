"""The checks of what is fused across a sublayer boundary: post and pre in one, and their backward.

Every output is compared from the numbers that the launch before it left: what follows x_next from the x_next that the
kernel rounded, the gradients of what was mixed from the kernels' gradients of the projection. So an error shows in the
output where it arises, and a bound holds what one pass rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ... import launch, reference
from ...compiler import platform_of
from ...compiler.kernel import dtype_name
from ...kernels import boundary_plans, projection_plans
from .. import plain_torch, tolerance
from ..comparison import Array, Comparison, check, compare_each, numpy64
from ..inputs import Case, Gradients, Inputs
from ..plain_torch import by_autograd
from .coefficients import compare_mappings
from .coefficients_backward import Logits, comparisons, sublayer_mappings

MIXED = ("g_x", "g_layer_output", "g_h_post", "g_h_res")
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def mixed(inputs: Inputs) -> Four:
    """Return the inputs of `post`."""
    return inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res


@check("x_next", "layer_input", "h_pre", "h_post", "h_res")
def check_post_pre(case: Case, inputs: Inputs) -> list[Comparison]:
    """x_next as of post; layer_input and the mappings as of pre at that x_next. For few tokens in one launch too."""
    return compare_forward(case, inputs, delayed=False)


@check("x_next", "layer_input", "h_pre", "h_post", "h_res")
def check_post_pre_delayed(case: Case, inputs: Inputs) -> list[Comparison]:
    """The outputs of `post_pre`, aggregated with a given h_pre. For few tokens in one launch too."""
    return compare_forward(case, inputs, delayed=True)


def hold_to_one_launch(x: torch.Tensor, rows: int, run: Callable[..., Any]) -> Any:
    """Return what several launches do; NaN for x_next, no result at all, where one has other bits."""
    got = run(schedule=launch.boundary_schedule(x, rows, one_launch=False))
    few = x.shape[0] <= boundary_plans.MOST_TOKENS_AT_ONCE
    if few and boundary_plans.post_pre_plan(launch.projection_plan(x, rows)):
        at_once = run(schedule=launch.boundary_schedule(x, rows, one_launch=True))
        pairs = [(numpy64(result), numpy64(other)) for result, other in zip(at_once, got, strict=True)]
        if not all(np.array_equal(*pair, equal_nan=True) for pair in pairs):
            got = got._replace(x_next=torch.full_like(got.x_next, torch.nan))
    return got


def compare_forward(case: Case, inputs: Inputs, delayed: bool) -> list[Comparison]:
    """All outputs of one of the two."""
    parameters, spec = (inputs.phi, inputs.alpha, inputs.bias), case.spec
    given = inputs.h_pre if delayed else None
    arguments = (*mixed(inputs), *parameters, spec)

    def run(schedule: boundary_plans.BoundarySchedule) -> launch.Boundary:
        return launch.post_pre(*arguments, h_pre=given, schedule=schedule)

    got = hold_to_one_launch(inputs.x, spec.num_coefficients, run)
    plain_next = plain_torch.post(*mixed(inputs))
    plain = plain_torch.coefficients(plain_next, *parameters, spec)
    plain_input = plain_torch.aggregate(plain_next, inputs.h_pre if delayed else plain[0])
    dtype, n = dtype_name(case.dtype), case.num_streams

    exact = [numpy64(argument) for argument in mixed(inputs)]
    magnitude = reference.post(*map(np.abs, exact))
    bound = tolerance.combination(magnitude, n + 1, dtype)
    following = replace(inputs, x=got.x_next)
    mappings = compare_mappings(case, following, (got.h_pre, got.h_post, got.h_res), plain)

    x_next = numpy64(got.x_next)
    h_pre = numpy64(inputs.h_pre) if delayed else mappings[0].expected
    input_magnitude = reference.aggregate(np.abs(x_next), h_pre)
    input_bound = tolerance.combination(input_magnitude, n, dtype)
    if not delayed:
        input_bound = input_bound + reference.aggregate(np.abs(x_next), mappings[0].bound)
    expected_input = reference.aggregate(x_next, h_pre)
    return [
        Comparison("x_next", x_next, numpy64(plain_next), reference.post(*exact), bound, magnitude),
        Comparison(
            "layer_input", numpy64(got.layer_input), numpy64(plain_input), expected_input, input_bound, input_magnitude
        ),
        *mappings,
    ]


@check(*MIXED, "g_phi", "g_alpha", "g_bias")
def check_post_pre_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check all seven gradients."""
    spec, parameters, upstream = case.spec, (inputs.phi, inputs.alpha, inputs.bias), Gradients.of(case, inputs.x.device)
    forward = launch.post_pre(*mixed(inputs), *parameters, spec)
    g_input, of_mappings = upstream.g_h, (upstream.g_h_post, upstream.g_h_res)
    got = launch.post_pre_backward(
        upstream.g_x,
        g_input,
        *of_mappings,
        *mixed(inputs),
        *parameters,
        forward.x_next,
        forward.h_pre,
        forward.projected,
        spec,
    )
    plain = plain_gradients(case, inputs, upstream)
    g_mappings = (launch.aggregate_backward(g_input, forward.x_next), *of_mappings)
    g_projected, *_ = launch.coefficients_backward(
        g_mappings[0], *of_mappings, forward.projected, *parameters[1:], spec
    )
    at = Logits(g_mappings, forward.projected, inputs.alpha, inputs.bias, spec)
    of_logits = comparisons(at, (g_projected, got.g_alpha, got.g_bias), sublayer_mappings(spec))[2:]
    of_logits = [replace(one, torch=numpy64(p)) for one, p in zip(of_logits, plain[5:], strict=True)]
    return [*compare_mixing(case, inputs, upstream, g_projected, forward, got, plain[:5]), *of_logits]


def plain_gradients(case: Case, inputs: Inputs, upstream: Gradients) -> tuple[torch.Tensor, ...]:
    """The gradients by torch's autograd, in the order of the arguments."""

    def outputs(*arguments: torch.Tensor) -> torch.Tensor:
        x, layer_output, given_post, given_res, phi, alpha, bias = arguments
        x_next = plain_torch.post(x, layer_output, given_post, given_res)
        layer_input, h_post, h_res = plain_torch.pre(x_next, phi, alpha, bias, case.spec)
        return torch.cat([output.float().flatten() for output in (x_next, layer_input, h_post, h_res)])

    given = (upstream.g_x, upstream.g_h, upstream.g_h_post, upstream.g_h_res)
    gradient = torch.cat([each.float().flatten() for each in given])
    return by_autograd(outputs, gradient, *mixed(inputs), inputs.phi, inputs.alpha, inputs.bias)


def compare_mixing(
    case: Case,
    inputs: Inputs,
    upstream: Gradients,
    g_projected: torch.Tensor,
    forward: launch.Boundary | launch.LastBoundary | launch.IdentityBoundary,
    got: launch.BoundaryGradients,
    plain: tuple[torch.Tensor, ...],
) -> list[Comparison]:
    """The gradients of what was mixed, and of phi."""
    rows, dtype, n = inputs.phi.shape[0], dtype_name(case.dtype), case.num_streams
    target = platform_of(inputs.x.device)
    sizes, fused = (case.hidden_size, dtype, target), boundary_plans.backward_is_fused(n, target)
    if fused:
        split = tolerance.split_error(boundary_plans.boundary_backward_plan(rows, n, *sizes))
    else:  # whose halves may be of another dtype
        split = tolerance.split_error(projection_plans.projection_backward_plan(rows, *sizes, n))

    def reaching(
        outside: Array, g_dots: Array, rho: Array, x_next: Array, phi: Array, h_pre: Array, g_input: Array
    ) -> tuple[Array, Array]:
        """The gradient that reaches x_next, and that of phi."""
        through_dots, g_phi = reference.project_backward(g_dots.T, rho / 2, x_next, phi)
        return outside + through_dots + reference.aggregate_backward(g_input, x_next, h_pre)[0], g_phi

    tensors = (upstream.g_x, g_projected[:-1], g_projected[-1], forward.x_next, inputs.phi, forward.h_pre, upstream.g_h)
    terms = [numpy64(tensor) for tensor in tensors]
    g, g_phi = reaching(*terms)
    magnitude, _ = reaching(*map(np.abs, terms))
    g_scale, phi_scale = (np.sqrt(square) for square in reaching(*map(np.square, terms)))
    g_bound = magnitude * (rows + 4) * tolerance.U32 + split * g_scale  # float32 until it is mixed
    if not fused:  # what pre sends back is rounded, then added and rounded again
        rounded = np.abs(g - terms[0]) + np.abs(g) + 2 * g_bound
        g_bound += tolerance.combination(rounded, 0, dtype)

    exact = [numpy64(argument) for argument in mixed(inputs)]
    expected = reference.post_backward(g, *exact)
    magnitudes = reference.post_backward(magnitude, *map(np.abs, exact))[:2]
    squares = [np.square(argument) for argument in exact]
    scales = [np.sqrt(square) for square in reference.post_backward(np.square(g), *squares)[2:]]
    reach_wide = reference.post_backward(g_bound, *map(np.abs, exact))[:2]
    reach_sums = [np.sqrt(square) for square in reference.post_backward(np.square(g_bound), *squares)[2:]]
    bounds = [
        *(tolerance.combination(m, n, dtype) + reach for m, reach in zip(magnitudes, reach_wide, strict=True)),
        *(  # errors of g at many channels, independent
            tolerance.inner_products(scale, case.hidden_size) + 3 * reach
            for scale, reach in zip(scales, reach_sums, strict=True)
        ),
        tolerance.inner_products(phi_scale, max(case.num_tokens, 1)) + split * phi_scale,
    ]
    values = (got.g_x, got.g_layer_output, got.g_h_post, got.g_h_res, got.g_phi)
    return compare_each((*MIXED, "g_phi"), values, plain, (*expected, g_phi), bounds, (*magnitudes, *scales, phi_scale))
