"""One check per kernel: what it computed, what it should have computed, and how far off it may be.

A check returns `Comparison`s, one per output. `compare` reduces one to numbers: an output passes when every
element is within its bound, and what is reported is the element that comes closest to its bound or exceeds
it most, its error and its bound both divided by the output's scale there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .. import launch, ops, reference
from ..compiler.kernel import dtype_name
from . import plain_torch, tolerance
from .inputs import Case, Inputs

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One output: the kernel's and plain torch's values, float64's, the bound and the scale of each element."""

    output: str
    got: Array
    torch: Array
    expected: Array
    bound: Array
    scale: Array


@dataclass(frozen=True)
class Verdict:
    """A comparison in numbers, relative to the output's scale."""

    error: float
    tolerance: float
    torch_error: float
    passed: bool


def compare(comparison: Comparison) -> Verdict:
    """The worst element of an output; NaN and infinity are errors wherever the reference has neither."""
    error, bound = worst(comparison.got, comparison)
    torch_error, _ = worst(comparison.torch, comparison)
    return Verdict(error, bound, torch_error, bool(error <= bound))


def worst(values: Array, comparison: Comparison) -> tuple[float, float]:
    """Error and bound, over scale, of the element whose error is the largest share of its bound."""
    if values.shape != comparison.expected.shape:
        return float("inf"), 0.0
    if not values.size:
        return 0.0, 0.0
    distance = np.abs(values - comparison.expected)
    distance[~np.isfinite(values) & np.isfinite(comparison.expected)] = np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(distance == 0, 0.0, distance / comparison.bound)
    at = np.unravel_index(np.argmax(share), share.shape)
    scale = comparison.scale[at] or 1.0
    return float(distance[at] / scale), float(comparison.bound[at] / scale)


def numpy64(tensor: torch.Tensor) -> Array:
    """A tensor's exact values in float64."""
    return tensor.detach().cpu().double().numpy()


def check_expand(case: Case, inputs: Inputs) -> list[Comparison]:
    """A copy: nothing may differ."""
    expected = reference.expand(numpy64(inputs.h), case.num_streams)
    got, plain = ops.expand(inputs.h, case.num_streams), plain_torch.expand(inputs.h, case.num_streams)
    return [Comparison("x", numpy64(got), numpy64(plain), expected, np.zeros_like(expected), np.ones_like(expected))]


def check_project(_case: Case, inputs: Inputs) -> list[Comparison]:
    """The partial sums, added up in float64: the dots of each half of phi, and the lanes of Σx²."""
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


def check_coefficients(case: Case, inputs: Inputs) -> list[Comparison]:
    """From the stream to the three mappings: projection and coefficients together."""
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
    """The logits z in float64 and how far a kernel's may be off."""
    spec = case.spec
    plan = launch.projection_plan(inputs.x, inputs.phi.shape[0])
    x, phi, bias = numpy64(inputs.x), numpy64(inputs.phi), numpy64(inputs.bias)
    dots, squares = reference.project(x, phi)
    scale = reference.rms_scale(squares, spec.stream_size, spec.rms_eps)[..., None]
    alpha_rows = reference.alpha_per_row(numpy64(alpha), case.num_streams)
    z = reference.compute_logits(dots, scale[..., 0], alpha_rows, bias)
    dots_bound = tolerance.dots(numpy64(inputs.x.flatten(1)), phi, plan)
    return z, tolerance.logits(z, dots * scale, dots_bound, scale, alpha_rows, spec.stream_size)


def check_sinkhorn(case: Case, inputs: Inputs) -> list[Comparison]:
    """Sinkhorn alone."""
    spec, logits = case.spec, numpy64(inputs.logits)
    got = ops.sinkhorn(inputs.logits, spec.sinkhorn_iters, spec.sinkhorn_eps)
    plain = plain_torch.sinkhorn(inputs.logits, spec.sinkhorn_iters, spec.sinkhorn_eps)
    expected = reference.sinkhorn(logits, spec.sinkhorn_iters, spec.sinkhorn_eps)
    bound = tolerance.sinkhorn(np.zeros_like(logits), logits, spec.sinkhorn_iters)
    return [Comparison("h_res", numpy64(got), numpy64(plain), expected, bound, np.ones_like(expected))]


def check_aggregate(case: Case, inputs: Inputs) -> list[Comparison]:
    """The aggregation alone, for a given h_pre."""
    return [compare_input(case, inputs, launch.aggregate(inputs.x, inputs.h_pre))]


def compare_input(case: Case, inputs: Inputs, got: torch.Tensor) -> Comparison:
    """A kernel's layer_input of inputs.x and inputs.h_pre."""
    x, h_pre, plain = numpy64(inputs.x), numpy64(inputs.h_pre), plain_torch.aggregate(inputs.x, inputs.h_pre)
    magnitude = reference.aggregate(np.abs(x), np.abs(h_pre))
    bound = tolerance.combination(magnitude, case.num_streams, dtype_name(case.dtype))
    expected = reference.aggregate(x, h_pre)
    return Comparison("layer_input", numpy64(got), numpy64(plain), expected, bound, magnitude)


def check_post(case: Case, inputs: Inputs) -> list[Comparison]:
    """Mix and add."""
    arguments = (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
    got, plain = ops.post(*arguments), plain_torch.post(*arguments)
    exact = [numpy64(argument) for argument in arguments]
    magnitude = reference.post(*map(np.abs, exact))
    bound = tolerance.combination(magnitude, case.num_streams + 1, dtype_name(case.dtype))
    return [Comparison("x_next", numpy64(got), numpy64(plain), reference.post(*exact), bound, magnitude)]


def check_head(case: Case, inputs: Inputs) -> list[Comparison]:
    """From the stream to the model's output: projection, coefficients and aggregation together."""
    n, spec = case.num_streams, case.spec
    phi, alpha, bias = inputs.phi[:n].contiguous(), inputs.alpha[:1], inputs.bias[:n]
    got = ops.head(inputs.x, phi, alpha, bias, spec)
    return [compare_head(case, inputs, got, plain_torch.head(inputs.x, phi, alpha, bias, spec))]


def compare_head(case: Case, inputs: Inputs, got: torch.Tensor, plain: torch.Tensor) -> Comparison:
    """A head's output of the stream inputs.x, by a kernel and in plain torch; phi has a head's rows or more."""
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


CHECKS: dict[str, Callable[[Case, Inputs], list[Comparison]]] = {
    "expand": check_expand,
    "project": check_project,
    "coefficients": check_coefficients,
    "sinkhorn": check_sinkhorn,
    "aggregate": check_aggregate,
    "post": check_post,
    "head": check_head,
}
