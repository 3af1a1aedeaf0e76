"""The checks of the copy to n streams, and of their sum."""

from __future__ import annotations

import numpy as np

from ... import launch, ops, reference
from ...compiler.kernel import dtype_name
from .. import plain_torch, tolerance
from ..comparison import Comparison, check, numpy64
from ..inputs import Case, Gradients, Inputs
from ..plain_torch import by_autograd


@check("x")
def check_expand(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check a copy: nothing may differ."""
    expected = reference.expand(numpy64(inputs.h), case.num_streams)
    got, plain = ops.expand(inputs.h, case.num_streams), plain_torch.expand(inputs.h, case.num_streams)
    return [Comparison("x", numpy64(got), numpy64(plain), expected, np.zeros_like(expected), np.ones_like(expected))]


@check("g_h")
def check_expand_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check the sum over the streams."""
    g_x = Gradients.of(case, inputs.h.device).g_x
    got, exact, n = launch.expand_backward(g_x), numpy64(g_x), case.num_streams
    expected = reference.expand_backward(exact, numpy64(inputs.h), n)
    [plain] = by_autograd(lambda h: plain_torch.expand(h, n), g_x, inputs.h)
    magnitude = np.abs(exact).sum(1)
    bound = tolerance.combination(magnitude, n, dtype_name(case.dtype))
    return [Comparison("g_h", numpy64(got), numpy64(plain), expected, bound, magnitude)]
