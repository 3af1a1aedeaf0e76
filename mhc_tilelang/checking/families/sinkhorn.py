"""The checks of Sinkhorn alone, and of its backward."""

from __future__ import annotations

import numpy as np

from ... import launch, ops, reference
from .. import plain_torch, tolerance
from ..comparison import Comparison, check, numpy64
from ..inputs import Case, Gradients, Inputs
from ..plain_torch import by_autograd


@check("h_res")
def check_sinkhorn(case: Case, inputs: Inputs) -> list[Comparison]:
    """Sinkhorn alone."""
    spec, logits = case.spec, numpy64(inputs.logits)
    got = ops.sinkhorn(inputs.logits, spec.sinkhorn_iters, spec.sinkhorn_eps)
    plain = plain_torch.sinkhorn(inputs.logits, spec.sinkhorn_iters, spec.sinkhorn_eps)
    expected = reference.sinkhorn(logits, spec.sinkhorn_iters, spec.sinkhorn_eps)
    bound = tolerance.sinkhorn(np.zeros_like(logits), logits, spec.sinkhorn_iters)
    return [Comparison("h_res", numpy64(got), numpy64(plain), expected, bound, np.ones_like(expected))]


@check("g_logits")
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
