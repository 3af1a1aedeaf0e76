"""pre: x [..., n, C], phi [M, K], alpha [3], bias [M] -> layer_input [..., C], h_post [..., n], h_res [..., n, n].

The operator also returns h_pre_next and `projected`, which the backward starts from.

The delayed form is given an h_pre and aggregates with that; h_pre_next is then a result, with a gradient. x is read
twice in either form, by the projection and by the aggregation: of a stream only the first sublayer is read here,
`post_pre` reads the others.

With a rms_norm_weight [C], the layer's own RMSNorm is part of the aggregation, and of its backward.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .coefficients import CONSTANTS
from .declaration import Declaration, Optionals, Tensors
from .library import spec_of

FORM = f"{CONSTANTS}, float rms_norm_eps"


def _forward(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor | None,
    rms_norm_weight: torch.Tensor | None,
    *constants: float,
    out: Any,
) -> Tensors:
    layer_input, h_post, h_res, h_pre_next = out
    *of_spec, eps = constants
    plan = launch.projection_plan(x, phi.shape[0])
    partial = launch.project(x, phi, plan)
    coefficients = (partial, alpha, bias, spec_of(x, *of_spec), plan)
    mappings = (h_pre_next, h_post, h_res)
    if h_pre is None and rms_norm_weight is None:
        return (launch.coefficients_and_aggregate(x, *coefficients, out=(layer_input, *mappings)),)
    if h_pre is None:
        *_, projected = launch.coefficients(*coefficients, out=mappings)
    else:
        projected = launch.coefficients_beside(*coefficients, out=mappings)
    launch.aggregate_norm(x, h_pre_next if h_pre is None else h_pre, rms_norm_weight, eps, out=layer_input)
    return (projected,)


def gradients_of_pre(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    """Launch the backward; shared with `quantized`."""
    x, phi, alpha, bias, given, weight = inputs
    *of_spec, eps = constants
    g_layer_input, g_h_pre, g_weight = g.layer_input, None, None
    h_pre = saved.h_pre_next if given is None else given
    if g_layer_input is not None and weight is not None:
        g_layer_input, g_h_pre, g_weight = launch.aggregate_norm_backward(
            g_layer_input, x, h_pre, weight, eps, needs_g_weight=needs.rms_norm_weight
        )
    elif g_layer_input is not None and (given is None or needs.h_pre):
        g_h_pre = launch.aggregate_backward(g_layer_input, x)
    g_h_pre_next = g_h_pre if given is None else g.h_pre_next
    g_projected, g_alpha, g_bias = launch.coefficients_backward(
        g_h_pre_next, g.h_post, g.h_res, saved.projected, alpha, bias, spec_of(x, *of_spec)
    )
    aggregation = {} if g_layer_input is None else {"h_pre": h_pre, "g_layer_input": g_layer_input}
    g_x, g_phi = launch.project_backward(g_projected, x, phi, needs_g_x=needs.x, needs_g_phi=needs.phi, **aggregation)
    return g_x, g_phi, g_alpha, g_bias, g_h_pre, g_weight


pre = Declaration(
    "pre",
    "x phi alpha bias h_pre? rms_norm_weight?",
    "layer_input h_post h_res h_pre_next?",
    _forward,
    gradients_of_pre,
    constants=FORM,
    kept="projected",
    saved="h_pre_next projected",
    aligned=lambda inputs: "h_post h_res h_pre_next" + (" layer_input" if inputs.rms_norm_weight is not None else ""),
)
