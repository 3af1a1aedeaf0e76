"""The check of the model's output: projection, coefficients and aggregation together."""

from __future__ import annotations

import numpy as np
import torch

from ... import ops, reference
from ...compiler.kernel import dtype_name
from .. import plain_torch, tolerance
from ..comparison import Comparison, check, numpy64
from ..inputs import Case, Inputs
from .coefficients import logits_of


@check("h")
def check_head(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check the model's output from the stream: projection, coefficients and aggregation together."""
    n, spec = case.num_streams, case.spec
    phi, alpha, bias = inputs.phi[:n].contiguous(), inputs.alpha[:1], inputs.bias[:n]
    got = ops.head(inputs.x, phi, alpha, bias, spec)
    return [compare_head(case, inputs, got, plain_torch.head(inputs.x, phi, alpha, bias, spec))]


def compare_head(case: Case, inputs: Inputs, got: torch.Tensor, plain: torch.Tensor) -> Comparison:
    """Compare a head's output of the stream inputs.x, by a kernel and in plain torch; phi has a head's rows or more."""
    n, spec = case.num_streams, case.spec
    phi, alpha, bias = inputs.phi[:n], inputs.alpha[:1], inputs.bias[:n]
    x, exact = numpy64(inputs.x), (numpy64(phi), numpy64(alpha), numpy64(bias))
    expected = reference.head(x, *exact, spec)
    h_pre = reference.head_coefficients(x, *exact, spec)
    # Rows 0 … n − 1 of phi with alpha[0] are what `coefficients` has as its pre rows.
    _, z_bound = logits_of(inputs, inputs.alpha, case)
    gate_bound = tolerance.sigmoid(h_pre - spec.pre_eps, z_bound[..., :n], 1.0) + 2 * tolerance.U32
    magnitude = reference.aggregate(np.abs(x), h_pre)
    bound = tolerance.combination(magnitude, n, dtype_name(case.dtype))
    bound = bound + reference.aggregate(np.abs(x), gate_bound)
    return Comparison("h", numpy64(got), numpy64(plain), expected, bound, magnitude)
