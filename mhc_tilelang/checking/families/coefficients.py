"""The check of the three mappings: projection and coefficients together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ... import launch, ops, reference
from .. import plain_torch, tolerance
from ..comparison import Array, Comparison, check, numpy64
from ..inputs import Case, Inputs


@check("h_pre", "h_post", "h_res")
def check_coefficients(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check the three mappings from the stream: projection and coefficients together."""
    arguments = (inputs.x, inputs.phi, inputs.alpha, inputs.bias)
    got = ops.coefficients(*arguments, case.spec)
    return compare_mappings(case, inputs, got, plain_torch.coefficients(*arguments, case.spec))


def compare_mappings(
    case: Case, inputs: Inputs, got: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]
) -> list[Comparison]:
    """h_pre, h_post and h_res of the stream inputs.x, by a kernel and in plain torch."""
    spec = case.spec
    x, phi, alpha, bias = map(numpy64, (inputs.x, inputs.phi, inputs.alpha, inputs.bias))
    expected = reference.coefficients(x, phi, alpha, bias, spec)
    z, z_bound = logits_of(inputs, inputs.alpha, case)
    _, _, z_res = reference.split_groups(z, case.num_streams)
    bound_pre, bound_post, bound_res = reference.split_groups(z_bound, case.num_streams)
    bounds = (
        tolerance.sigmoid(expected[0] - spec.pre_eps, bound_pre, 1.0) + 2 * tolerance.U32,
        tolerance.sigmoid(expected[1], bound_post, spec.post_scale),
        tolerance.sinkhorn(bound_res, z_res, spec.sinkhorn_iters),
    )
    names = ("h_pre", "h_post", "h_res")
    return [
        Comparison(name, numpy64(g), numpy64(p), e, b, np.ones_like(e))
        for name, g, p, e, b in zip(names, got, plain, expected, bounds, strict=True)
    ]


def logits_of(inputs: Inputs, alpha: torch.Tensor, case: Case) -> tuple[Array, Array]:
    """Return the logits z in float64 and how far a kernel's may be off."""
    spec = case.spec
    plan = launch.projection_plan(inputs.x, inputs.phi.shape[0])
    x, phi, bias = numpy64(inputs.x), numpy64(inputs.phi), numpy64(inputs.bias)
    dots, squares = reference.project(x, phi)
    scale = reference.rms_scale(squares, spec.stream_size, spec.rms_eps)[..., None]
    alpha_rows = reference.alpha_per_row(numpy64(alpha), case.num_streams)
    z = reference.compute_logits(dots, scale[..., 0], alpha_rows, bias)
    dots_bound = tolerance.dots(numpy64(inputs.x.flatten(1)), phi, plan)
    return z, tolerance.logits(z, dots * scale, dots_bound, scale, alpha_rows, spec.stream_size)
