"""One check per backward kernel, as `kernels` has one per forward kernel.

Each takes random upstream gradients and is compared with what the reference derives from the very numbers that the
kernel got. The two that pass through the logits are in `coefficients_backward`. How the gradients of a whole function
come out of these kernels is the tests' business.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .. import launch, reference
from ..compiler import platform_of
from ..compiler.kernel import dtype_name
from ..kernels import projection_plans
from . import plain_torch, tolerance
from .coefficients_backward import check_coefficients_backward, check_head_coefficients_backward
from .inputs import Case, Gradients, Inputs
from .kernels import Array, Comparison, numpy64
from .plain_torch import by_autograd


def check_expand_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """The sum over the streams."""
    g_x = Gradients.of(case, inputs.h.device).g_x
    got, exact, n = launch.expand_backward(g_x), numpy64(g_x), case.num_streams
    expected = reference.expand_backward(exact, numpy64(inputs.h), n)
    [plain] = by_autograd(lambda h: plain_torch.expand(h, n), g_x, inputs.h)
    magnitude = np.abs(exact).sum(1)
    bound = tolerance.combination(magnitude, n, dtype_name(case.dtype))
    return [Comparison("g_h", numpy64(got), numpy64(plain), expected, bound, magnitude)]


def check_sinkhorn_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Sinkhorn alone."""
    spec, g_h_res = case.spec, Gradients.of(case, inputs.logits.device).g_h_res
    constants = spec.sinkhorn_iters, spec.sinkhorn_eps
    got = launch.sinkhorn_backward(g_h_res, inputs.logits, *constants)
    [plain] = by_autograd(lambda logits: plain_torch.sinkhorn(logits, *constants), g_h_res, inputs.logits)
    gradient, logits = numpy64(g_h_res), numpy64(inputs.logits)
    expected = reference.sinkhorn_backward(gradient, logits, *constants)
    bound = tolerance.sinkhorn_backward(gradient, np.zeros_like(logits), logits, spec.sinkhorn_iters)
    return [Comparison("g_logits", numpy64(got), numpy64(plain), expected, bound, np.ones_like(expected))]


def check_aggregate_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """n inner products over the channels."""
    g = Gradients.of(case, inputs.x.device).g_h
    got = launch.aggregate_backward(g, inputs.x)
    [plain] = by_autograd(lambda h_pre: plain_torch.aggregate(inputs.x, h_pre), g, inputs.h_pre)
    x, gradient = numpy64(inputs.x), numpy64(g)
    _, expected = reference.aggregate_backward(gradient, x, numpy64(inputs.h_pre))
    scale = np.sqrt(np.einsum("tc,tic->ti", np.square(gradient), np.square(x)))
    return [
        Comparison(
            "g_h_pre", numpy64(got), numpy64(plain), expected, tolerance.inner_products(scale, case.hidden_size), scale
        )
    ]


def check_aggregate_gradients(case: Case, inputs: Inputs) -> list[Comparison]:
    """The same inner products, and a product an element of the stream."""
    g = Gradients.of(case, inputs.x.device).g_h
    got = launch.aggregate_gradients(g, inputs.x, inputs.h_pre)
    plain = by_autograd(plain_torch.aggregate, g, inputs.x, inputs.h_pre)
    arguments = [numpy64(t) for t in (g, inputs.x, inputs.h_pre)]
    expected = reference.aggregate_backward(*arguments)
    magnitude, _ = reference.aggregate_backward(*map(np.abs, arguments))
    scales = [magnitude, np.sqrt(np.einsum("tc,tic->ti", *(np.square(t) for t in arguments[:2])))]
    bounds = [
        tolerance.combination(magnitude, 1, dtype_name(case.dtype)),
        tolerance.inner_products(scales[1], case.hidden_size),
    ]
    return [
        Comparison(name, numpy64(g), numpy64(p), e, b, s)
        for name, g, p, e, b, s in zip(("g_x", "g_h_pre"), got, plain, expected, bounds, scales, strict=True)
    ]


def check_post_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Two mixtures of streams, and n² + n inner products over the channels."""
    arguments = (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
    g_x_next = Gradients.of(case, inputs.x.device).g_x
    got = launch.post_backward(g_x_next, *arguments)
    plain = by_autograd(plain_torch.post, g_x_next, *arguments)
    exact = [numpy64(argument) for argument in arguments]
    gradient, dtype, n = numpy64(g_x_next), dtype_name(case.dtype), case.num_streams
    expected = reference.post_backward(gradient, *exact)
    magnitudes = reference.post_backward(np.abs(gradient), *map(np.abs, exact))[:2]
    squares = reference.post_backward(np.square(gradient), *map(np.square, exact))[2:]
    scales = (*magnitudes, *map(np.sqrt, squares))
    bounds = [tolerance.combination(magnitude, n, dtype) for magnitude in magnitudes]
    bounds += [tolerance.inner_products(scale, case.hidden_size) for scale in scales[2:]]
    names = ("g_x", "g_layer_output", "g_h_post", "g_h_res")
    return [
        Comparison(name, numpy64(g), numpy64(p), e, b, s)
        for name, g, p, e, b, s in zip(names, got, plain, expected, bounds, scales, strict=True)
    ]


def check_project_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Both products."""
    return compare_projection(case, inputs, aggregated=False)


def check_project_backward_aggregated(case: Case, inputs: Inputs) -> list[Comparison]:
    """Both products, with what the aggregation adds to g_x: another kernel."""
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
    return [
        Comparison(name, numpy64(g), numpy64(p), e, b, s)
        for name, g, p, e, b, s in zip(("g_x", "g_phi"), got, plain, expected, bounds, scales, strict=True)
    ]


CHECKS: dict[str, Callable[[Case, Inputs], list[Comparison]]] = {
    "expand_backward": check_expand_backward,
    "sinkhorn_backward": check_sinkhorn_backward,
    "aggregate_backward": check_aggregate_backward,
    "aggregate_gradients": check_aggregate_gradients,
    "post_backward": check_post_backward,
    "project_backward": check_project_backward,
    "project_backward_aggregated": check_project_backward_aggregated,
    "coefficients_backward": check_coefficients_backward,
    "head_coefficients_backward": check_head_coefficients_backward,
}
