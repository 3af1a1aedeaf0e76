"""The check of the aggregation with the layer's RMSNorm in float8: numbers times scales, and the scales by themselves.

A number is off by half of e4m3's spacing in units of its group's scale, on top of what the norm before it may be off;
the spacing is that of the larger of the binades that the bound reaches.
"""

from __future__ import annotations

import numpy as np
import torch

from ... import launch, reference
from ...reference.quantization import GROUP, LARGEST, spread
from .. import plain_torch
from ..comparison import Array, Comparison, check, numpy64
from ..inputs import Case, Inputs
from ..tolerance import U32
from .aggregate_norm import EPS, Normed, check_aggregate_norm, rms_norm_weight


@check("values", "scales", "layer_input", "values_ue8m0")
def check_aggregate_quantized(case: Case, inputs: Inputs) -> list[Comparison]:
    """Float32 scales beside a layer_input, and powers of two without one: rows of mean square one share those, so that
    they are no comparison of their own. One that is wrong shows in what values times scales are off.
    """
    weight, at = rms_norm_weight(case, inputs.x.device), Normed.of(case, inputs)
    y = reference.rms_norm(at.u, at.weight, EPS)
    plain = plain_torch.aggregate_normed32(inputs.x, inputs.h_pre, weight, EPS)
    arguments = (inputs.x, inputs.h_pre, weight, EPS)
    values, scales, layer_input = launch.aggregate_quantized(*arguments, has_layer_input=True)
    found = [*compare_quantized(y, at.normed_bound, (values, scales), plain)]
    [normed] = check_aggregate_norm(case, inputs)
    found.append(Comparison("layer_input", numpy64(layer_input), *(normed.torch, normed.expected), *bounds_of(normed)))
    rounded = launch.aggregate_quantized(*arguments, power_of_two=True)
    return found + compare_quantized(y, at.normed_bound, rounded, plain, power_of_two=True)[:1]


def bounds_of(comparison: Comparison) -> tuple[Array, Array]:
    """Bound and scale."""
    return comparison.bound, comparison.scale


def compare_quantized(
    y: Array,
    y_bound: Array,
    got: tuple[torch.Tensor, ...],
    plain: torch.Tensor,
    power_of_two: bool = False,
) -> list[Comparison]:
    """e4m3 numbers and scales of y [T, C], which a kernel has to within y_bound."""
    values, scales = numpy64(got[0]), numpy64(got[1])
    _, expected = reference.quantize(y, power_of_two)
    # Largest magnitudes are off by no more than the worst of their group, and one division rounds.
    scales_bound = largest_of_groups(y_bound) / LARGEST + 2 * U32 * expected
    if power_of_two:  # the next one up is as right as this only where a bound reaches it
        exact = reference.quantize(y)[1]
        other = reference.quantize(dequantized_peaks(exact + scales_bound), True)[1]
        least = reference.quantize(dequantized_peaks(exact - scales_bound), True)[1]
        scales_bound = np.maximum(other - expected, expected - least)
    unit = spread(np.where(np.abs(scales - expected) <= scales_bound, scales, expected), y.shape[-1])
    _, exponent = np.frexp((np.abs(y) + y_bound) / unit)
    half = np.ldexp(0.5, np.maximum(exponent - 4, -9)) * unit
    bound = half + y_bound + 4 * U32 * np.abs(y)  # 1 / scale and the product round, too
    suffix = "_ue8m0" if power_of_two else ""
    plain_values, plain_scales = map(numpy64, plain_torch.quantize(plain, power_of_two))
    dequantized = reference.dequantize(values, scales)
    return [
        Comparison(
            f"values{suffix}", dequantized, reference.dequantize(plain_values, plain_scales), y, bound, LARGEST * unit
        ),
        Comparison("scales", scales, plain_scales, expected, scales_bound, expected),
    ]


def largest_of_groups(values: Array) -> Array:
    """Return the largest value of every group of channels, [T, ⌈C / 128⌉]."""
    starts = range(0, values.shape[-1], GROUP)
    return np.stack([values[..., start : start + GROUP].max(-1, initial=0.0) for start in starts], -1)


def dequantized_peaks(scales: Array) -> Array:
    """Rows whose groups' largest magnitudes have these scales."""
    return np.repeat(scales * LARGEST, GROUP, -1)
