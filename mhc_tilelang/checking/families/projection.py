"""The checks of the projection, and of its backward with and without the share of the aggregation."""

from __future__ import annotations

import numpy as np
import torch

from ... import launch, reference
from ...compiler import platform_of
from ...compiler.kernel import dtype_name
from ...kernels import projection_plans
from .. import plain_torch, tolerance
from ..comparison import Array, Comparison, check, compare_each, numpy64
from ..inputs import Case, Gradients, Inputs


@check("dots", "squares")
def check_project(_case: Case, inputs: Inputs) -> list[Comparison]:
    """Check the partial sums, added up in float64: the dots of each half of phi, and the lanes of Σx²."""
    plan = launch.projection_plan(inputs.x, inputs.phi.shape[0])
    total = numpy64(launch.project(inputs.x, inputs.phi, plan)).sum(0)
    halves = total[: plan.halves * plan.rows].reshape(plan.halves, plan.rows, -1)
    dots, squares = halves.sum(0).T, total[plan.halves * plan.rows :].sum(0)
    plain_dots, plain_squares = plain_torch.project(inputs.x, inputs.phi)

    x, phi = numpy64(inputs.x.flatten(1)), numpy64(inputs.phi)
    expected_dots, expected_squares = reference.project(numpy64(inputs.x), phi)
    root_sum_squares = np.sqrt(np.square(x) @ np.square(phi).T)
    bound = tolerance.dots(x, phi, plan)
    return [
        Comparison("dots", dots, numpy64(plain_dots), expected_dots, bound, root_sum_squares),
        Comparison(
            "squares", squares, numpy64(plain_squares), expected_squares, tolerance.sum_squares(x), expected_squares
        ),
    ]


@check("g_x", "g_phi")
def check_project_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check both products."""
    return compare_projection(case, inputs, aggregated=False)


@check("g_x", "g_phi")
def check_project_backward_aggregated(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check both products with the aggregation's share of g_x, another kernel."""
    return compare_projection(case, inputs, aggregated=True)


def compare_projection(case: Case, inputs: Inputs, aggregated: bool) -> list[Comparison]:
    """g_x and g_phi of one of the two."""
    x, phi, gradients = inputs.x, inputs.phi, Gradients.of(case, inputs.x.device)
    g_projected, g_layer_input = gradients.g_projected, gradients.g_h
    h_pre = inputs.h_pre if aggregated else torch.zeros_like(inputs.h_pre)
    given = (h_pre, g_layer_input) if aggregated else (None, None)
    got = launch.project_backward(g_projected, x, phi, h_pre=given[0], g_layer_input=given[1])

    def formula(g_dots: Array, rho: Array, wide: Array, rows: Array, weights: Array, narrow: Array) -> list[Array]:
        through_dots, g_phi = reference.project_backward(g_dots.T, rho / 2, wide, rows)
        return [through_dots + reference.aggregate_backward(narrow, wide, weights)[0], g_phi]

    exact = [numpy64(t) for t in (g_projected[:-1], g_projected[-1], x, phi, h_pre, g_layer_input)]
    expected = formula(*exact)
    magnitude, _ = formula(*map(np.abs, exact))
    scales = [np.sqrt(square) for square in formula(*map(np.square, exact))]
    sizes = (phi.shape[0], case.hidden_size, dtype_name(case.dtype), platform_of(x.device), x.shape[1])
    plan = projection_plans.projection_backward_plan(*sizes)
    split = tolerance.split_error(plan)
    bounds = [
        tolerance.combination(magnitude, phi.shape[0] + 3, dtype_name(case.dtype)) + split * scales[0],
        tolerance.inner_products(scales[1], max(case.num_tokens, 1)) + split * scales[1],
    ]
    flat = x.flatten(1).float()
    plain_x = (g_projected[:-1].T @ phi + g_projected[-1, :, None] * flat).view(x.shape)
    plain_x = (plain_x + h_pre[..., None] * g_layer_input.float()[:, None]).to(x.dtype)
    plain = (plain_x, g_projected[:-1] @ flat)
    return compare_each(("g_x", "g_phi"), got, plain, expected, bounds, scales)
