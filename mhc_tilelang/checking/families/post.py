"""The checks of mixing and adding, and of its gradients."""

from __future__ import annotations

import numpy as np

from ... import launch, ops, reference
from ...compiler.kernel import dtype_name
from .. import plain_torch, tolerance
from ..comparison import Comparison, check, compare_each, numpy64
from ..inputs import Case, Gradients, Inputs
from ..plain_torch import by_autograd


@check("x_next")
def check_post(case: Case, inputs: Inputs) -> list[Comparison]:
    """Mix and add."""
    arguments = (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
    got, plain = ops.post(*arguments), plain_torch.post(*arguments)
    exact = [numpy64(argument) for argument in arguments]
    magnitude = reference.post(*map(np.abs, exact))
    bound = tolerance.combination(magnitude, case.num_streams + 1, dtype_name(case.dtype))
    return [Comparison("x_next", numpy64(got), numpy64(plain), reference.post(*exact), bound, magnitude)]


@check("g_x", "g_layer_output", "g_h_post", "g_h_res")
def check_post_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check two mixtures of streams, and n² + n inner products over the channels."""
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
    return compare_each(names, got, plain, expected, bounds, scales)
