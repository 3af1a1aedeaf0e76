"""The checks of post and head in one, after the last sublayer, and of their backward.

As in `post_pre`, every output is compared from the numbers that the launch before it left.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ... import launch, reference
from ...compiler.kernel import dtype_name
from .. import plain_torch, tolerance
from ..comparison import Comparison, check, numpy64
from ..inputs import Case, Gradients, Inputs
from ..plain_torch import by_autograd
from .coefficients_backward import Logits, comparisons
from .expand_pre import parameters
from .head import compare_head
from .post_pre import MIXED, compare_mixing, mixed


def of_head(case: Case, inputs: Inputs) -> Inputs:
    """Return the inputs with a head's parameters: the first rows of a sublayer's."""
    n = case.num_streams
    return replace(inputs, phi=inputs.phi[:n].contiguous(), alpha=inputs.alpha[:1], bias=inputs.bias[:n])


@check("x_next", "h")
def check_post_head(case: Case, inputs: Inputs) -> list[Comparison]:
    """x_next as of post; the output as of head at that x_next."""
    of_last = of_head(case, inputs)
    got = launch.post_head(*mixed(inputs), *parameters(of_last), case.spec)
    plain_next = plain_torch.post(*mixed(inputs))
    exact = [numpy64(argument) for argument in mixed(inputs)]
    magnitude = reference.post(*map(np.abs, exact))
    bound = tolerance.combination(magnitude, case.num_streams + 1, dtype_name(case.dtype))
    plain = plain_torch.head(plain_next, *parameters(of_last), case.spec)
    return [
        Comparison("x_next", numpy64(got.x_next), numpy64(plain_next), reference.post(*exact), bound, magnitude),
        compare_head(case, replace(inputs, x=got.x_next), got.output, plain),
    ]


@check(*MIXED, "g_phi", "g_alpha", "g_bias")
def check_post_head_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check all seven gradients."""
    spec, of_last, upstream = case.spec, of_head(case, inputs), Gradients.of(case, inputs.x.device)
    forward = launch.post_head(*mixed(inputs), *parameters(of_last), spec)
    left = (forward.x_next, forward.h_pre, forward.projected)
    got = launch.post_head_backward(upstream.g_x, upstream.g_h, *mixed(inputs), *parameters(of_last), *left, spec)

    def outputs(*arguments: torch.Tensor) -> torch.Tensor:
        x, layer_output, h_post, h_res, *of_parameters = arguments
        x_next = plain_torch.post(x, layer_output, h_post, h_res)
        phi, alpha, bias = of_parameters
        results = (x_next, plain_torch.head(x_next, phi, alpha, bias, spec))
        return torch.cat([result.float().flatten() for result in results])

    gradient = torch.cat([each.float().flatten() for each in (upstream.g_x, upstream.g_h)])
    plain = by_autograd(outputs, gradient, *mixed(inputs), *parameters(of_last))
    g_h_pre = launch.aggregate_backward(upstream.g_h, forward.x_next)
    rest = (forward.projected, of_last.alpha, of_last.bias, spec)
    g_projected, *_ = launch.head_coefficients_backward(g_h_pre, *rest)
    of_logits = comparisons(
        Logits((g_h_pre,), *rest), (g_projected, got.g_alpha, got.g_bias), lambda z: (torch.sigmoid(z),)
    )[2:]
    of_logits = [replace(one, torch=numpy64(p)) for one, p in zip(of_logits, plain[5:], strict=True)]
    return [*compare_mixing(case, of_last, upstream, g_projected, forward, got, plain[:5]), *of_logits]
