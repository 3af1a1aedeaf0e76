"""The layer's input in float8 with a scale for every 128 channels, launched: alone, and behind a projection.

    aggregate_quantized                n·C read, C bytes and the scales written; C elements more beside them if asked
    coefficients_and_quantize          the mappings of a sublayer, and its input by its own h_pre or a given one

Tensors come flat and contiguous, [T, …]; `operators` sees to that. The layer's RMSNorm is a part of it, as in
`aggregate_norm`, whose bits layer_input has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import plans, projection_plans
from ..spec import MHCSpec
from .beside import coefficients_beside
from .coefficients import coefficients
from .operands import aligned, by_width, stream_kernel

Quantized = tuple[torch.Tensor, ...]  # values, scales, and layer_input where it is wanted


class RMSNorm(NamedTuple):
    """The layer's own: weight [C] and eps."""

    weight: torch.Tensor
    eps: float


def aggregate_quantized(
    x: torch.Tensor,
    h_pre: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    power_of_two: bool = False,
    has_layer_input: bool = False,
    out: Quantized | None = None,
) -> Quantized:
    """x [T, n, C], h_pre [T, n], weight [C] -> values [T, C] in float8_e4m3fn, scales [T, ⌈C / 128⌉], and with
    `has_layer_input` layer_input [T, C]. Scales are powers of two if asked. `out` has them, and says which.
    """
    num_tokens, _, hidden_size = x.shape
    tile = plans.quantized_tile(hidden_size, x.element_size(), compiler.platform_of(x.device))
    row = by_width(weight, tile)
    values, scales, *beside = out or (
        x.new_empty(num_tokens, hidden_size, dtype=torch.float8_e4m3fn),
        h_pre.new_empty(num_tokens, plans.num_scales(hidden_size)),
        *([x.new_empty(num_tokens, hidden_size)] if has_layer_input else []),
    )
    kernel = stream_kernel(
        "aggregate_quantized",
        x,
        weight_dtype=dtype_name(weight.dtype),
        tile=tile,
        has_layer_input=bool(beside),
    )
    kernel(
        x=by_width(x, tile),
        h_pre=aligned(h_pre),
        weight=row,
        values=values.view(-1, *row.shape),
        scales=scales,
        layer_input=beside[0].view(-1, *row.shape) if beside else x.new_empty(1),
        eps=eps,
        power_of_two=int(power_of_two),
    )
    return values, scales, *beside


def coefficients_and_quantize(
    x: torch.Tensor,
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    plan: projection_plans.ProjectionPlan,
    norm: RMSNorm,
    power_of_two: bool,
    *,
    h_pre: torch.Tensor | None,
    quantized: Quantized,
    mappings: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """x [T, n, C] and its partial sums, alpha [3], bias [M] -> projected [M + 1, T].

    Into `quantized` goes what `aggregate_quantized` gives, of h_pre [T, n] where one is given, else of the sublayer's
    own; into `mappings` the latter, h_post and h_res.
    """
    given = (partial, alpha, bias, spec, plan)
    if h_pre is None:
        *_, projected = coefficients(*given, out=mappings)
    else:
        projected = coefficients_beside(*given, out=mappings)
    weights = mappings[0] if h_pre is None else h_pre
    aggregate_quantized(x, weights, norm.weight, norm.eps, power_of_two=power_of_two, out=quantized)
    return projected
