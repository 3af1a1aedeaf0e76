"""The layer's input in float8 with a scale for every 128 channels, launched: alone, and behind a projection.

    aggregate_quantized                n·C read, C bytes and the scales written; C elements more beside them if asked
    coefficients_and_quantize          the mappings of a sublayer, and its input by its own h_pre or a given one
    post_pre_quantized                 post_project, and the two launches of coefficients_and_quantize

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
from .post_pre import post_project
from .projection import projection_plan

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
    tile = plans.quantized_tile(x.shape[2], x.element_size(), compiler.platform_of(x.device))
    row = by_width(weight, tile)
    values, scales, *beside = out or empty_quantized(x, has_layer_input)
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


def empty_quantized(x: torch.Tensor, has_layer_input: bool) -> Quantized:
    """Buffers for the layer's input of a stream x [T, n, C]."""
    num_tokens, _, hidden_size = x.shape
    return (
        x.new_empty(num_tokens, hidden_size, dtype=torch.float8_e4m3fn),
        x.new_empty(num_tokens, plans.num_scales(hidden_size), dtype=torch.float32),
        *([x.new_empty(num_tokens, hidden_size)] if has_layer_input else []),
    )


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


def post_pre_quantized(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    weight: torch.Tensor,
    eps: float,
    *,
    power_of_two: bool = False,
    has_layer_input: bool = False,
    h_pre: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Arguments of `post_pre`, weight [C] and eps of the layer's norm -> x_next [T, n, C]; of the sublayer that begins
    what `aggregate_quantized` gives, h_post, h_res, h_pre; projected [M + 1, T]. `out` has all but the last.
    """
    x_next, *quantized, h_post_next, h_res_next, h_pre_next = out or (
        torch.empty_like(x),
        *empty_quantized(x, has_layer_input),
        *(torch.empty_like(one) for one in (h_post, h_res, h_post)),
    )
    _, partial, _ = post_project(x, layer_output, h_post, h_res, phi, out=(x_next, None))
    projected = coefficients_and_quantize(
        x_next,
        partial,
        alpha,
        bias,
        spec,
        projection_plan(x, phi.shape[0]),
        RMSNorm(weight, eps),
        power_of_two,
        h_pre=h_pre,
        quantized=tuple(quantized),
        mappings=(h_pre_next, h_post_next, h_res_next),
    )
    return x_next, *quantized, h_post_next, h_res_next, h_pre_next, projected
