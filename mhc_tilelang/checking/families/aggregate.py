"""The checks of the aggregation by a given h_pre, with the mappings beside it, and of its gradients."""

from __future__ import annotations

import numpy as np
import torch

from ... import launch, reference
from ...compiler.kernel import dtype_name
from .. import plain_torch, tolerance
from ..comparison import Comparison, check, compare_each, numpy64
from ..inputs import Case, Gradients, Inputs
from ..plain_torch import by_autograd
from .coefficients import compare_mappings


@check("layer_input")
def check_aggregate(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check the aggregation alone, for a given h_pre."""
    return [compare_input(case, inputs, launch.aggregate(inputs.x, inputs.h_pre))]


def compare_input(case: Case, inputs: Inputs, got: torch.Tensor) -> Comparison:
    """Compare a kernel's layer_input of inputs.x and inputs.h_pre."""
    x, h_pre, plain = numpy64(inputs.x), numpy64(inputs.h_pre), plain_torch.aggregate(inputs.x, inputs.h_pre)
    magnitude = reference.aggregate(np.abs(x), np.abs(h_pre))
    bound = tolerance.combination(magnitude, case.num_streams, dtype_name(case.dtype))
    expected = reference.aggregate(x, h_pre)
    return Comparison("layer_input", numpy64(got), numpy64(plain), expected, bound, magnitude)


@check("layer_input", "h_pre", "h_post", "h_res")
def check_aggregate_mappings(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check the aggregation by a given h_pre, and what is made beside it: the mappings of the same stream."""
    parameters, spec = (inputs.phi, inputs.alpha, inputs.bias), case.spec
    plan = launch.projection_plan(inputs.x, spec.num_coefficients)
    partial_sums = launch.project(inputs.x, inputs.phi, plan)
    h_pre, _, _, projected = launch.coefficients(partial_sums, *parameters[1:], spec, plan, is_deferred=True)
    layer_input, *mappings = launch.aggregate_mappings(inputs.x, inputs.h_pre, projected, *parameters[1:], spec)
    plain = plain_torch.coefficients(inputs.x, *parameters, spec)
    return [
        compare_input(case, inputs, layer_input),
        *compare_mappings(case, inputs, (h_pre, *mappings), plain),
    ]


@check("g_h_pre")
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


@check("g_x", "g_h_pre")
def check_aggregate_gradients(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check the inner products of `aggregate_backward`, and a product an element of the stream."""
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
    return compare_each(("g_x", "g_h_pre"), got, plain, expected, bounds, scales)
