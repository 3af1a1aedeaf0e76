"""Plain torch for what gives the layer's input in float8. Arguments as in `mhc_tilelang.launch`; the last ones are
outputs.
"""

from __future__ import annotations

import torch

from ...checking import plain_torch
from ...spec import MHCSpec
from .baselines import Form


def aggregate_quantized(
    x: torch.Tensor,
    h_pre: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    values: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """The formulas as written: sum, norm and DeepGEMM's cast, in float32."""
    got_values, got_scales = plain_torch.quantize(plain_torch.aggregate_normed32(x, h_pre, weight, eps))
    values.copy_(got_values)
    scales.copy_(got_scales)


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
    x_next: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    h_post_next: torch.Tensor,
    h_res_next: torch.Tensor,
    h_pre_next: torch.Tensor,
) -> None:
    """The formulas as written, one after the other."""
    x_next.copy_(plain_torch.post(x, layer_output, h_post, h_res))
    mappings = plain_torch.coefficients(x_next, phi, alpha, bias, spec)
    for output, result in zip((h_pre_next, h_post_next, h_res_next), mappings, strict=True):
        output.copy_(result)
    aggregate_quantized(x_next, h_pre_next, weight, eps, values, scales)


FORMS: dict[str, tuple[Form, ...]] = {
    "aggregate_quantized": (Form("as written", aggregate_quantized),),
    "post_pre_quantized": (Form("as written", post_pre_quantized),),
}
