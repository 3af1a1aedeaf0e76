"""post_pre: the boundary between two sublayers as one operator, post of the one and pre of the next.

x [..., n, C], layer_output [..., C], h_post [..., n], h_res [..., n, n], phi [M, K], alpha [3], bias [M]
-> x_next [..., n, C], layer_input [..., C], h_post_next [..., n], h_res_next [..., n, n], and for the backward
h_pre_next [..., n] and `projected` [M + 1, T].

The delayed form is given an h_pre; h_pre_next is then a result, with a gradient. With a rms_norm_weight [C],
layer_input is normalised, the layer's own RMSNorm.
"""

from __future__ import annotations

from typing import Any

from .. import launch
from .declaration import Declaration, Optionals, Tensors
from .library import spec_of
from .post import gradients_of_x_next
from .pre import FORM


def _forward(*inputs_and_constants: Any, out: Any) -> Tensors:
    *inputs, h_pre, rms_norm_weight = inputs_and_constants[:9]
    *of_spec, eps = inputs_and_constants[9:]
    arguments: Any = (*inputs, spec_of(inputs[0], *of_spec))
    boundary = launch.post_pre(
        *arguments,
        h_pre=h_pre,
        rms_norm_weight=rms_norm_weight,
        rms_norm_eps=eps,
        out=tuple(out),
    )
    return (boundary.projected,)


def gradients_of_boundary(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    """Launch the backward; shared with `quantized`."""
    *mixed_and_parameters, h_pre, rms_norm_weight = inputs
    *of_spec, eps = constants
    *g_results, g_h_pre_next = g
    aggregated_with = saved.h_pre_next if h_pre is None else h_pre
    kept = (saved.x_next, aggregated_with, saved.projected)
    arguments: Any = (*g_results, *mixed_and_parameters, *kept, spec_of(inputs.x, *of_spec))
    return launch.post_pre_backward(
        *arguments,
        is_delayed=h_pre is not None,
        g_h_pre_next=g_h_pre_next,
        rms_norm_weight=rms_norm_weight,
        rms_norm_eps=eps,
        needs_g_weight=needs.rms_norm_weight,
    )


post_pre = Declaration(
    "post_pre",
    "x layer_output h_post h_res phi alpha bias h_pre? rms_norm_weight?",
    "x_next layer_input h_post_next h_res_next h_pre_next?",
    _forward,
    gradients_of_boundary,
    constants=FORM,
    kept="projected",
    saved="x_next h_pre_next projected",
    aligned=lambda _: "x_next layer_input h_post_next h_res_next h_pre_next",
    shortcut=gradients_of_x_next,
)
