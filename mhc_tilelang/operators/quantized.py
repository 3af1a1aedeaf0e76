"""pre and post_pre with the layer's own RMSNorm, whose layer input comes in float8_e4m3fn with scales.

    pre_quantized        values [..., C], scales [..., ⌈C / 128⌉] and layer_input [..., C]; h_post, h_res, h_pre_next
    post_pre_quantized   x_next [..., n, C], and the same of the sublayer that begins
    X_alone              without layer_input

Values and scales have no gradient. Straight through, what they stand for has that of layer_input, whose backward is
`pre`'s and `post_pre`'s; without it there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import launch
from .declaration import Declaration, Optionals, Tensors
from .library import spec_of
from .post import gradients_of_x_next
from .post_pre import gradients_of_boundary
from .pre import FORM, gradients_of_pre

CONSTANTS = f"{FORM}, bool power_of_two"
PARAMETERS = "phi alpha bias h_pre? rms_norm_weight"


def _pre_forward(x: torch.Tensor, *inputs_and_constants: Any, out: Any) -> Tensors:
    phi = inputs_and_constants[0]
    plan = launch.projection_plan(x, phi.shape[0])
    return (_quantize(x, launch.project(x, phi, plan), plan, *inputs_and_constants[1:], out=out),)


def _post_pre_forward(x: torch.Tensor, *inputs_and_constants: Any, out: Any) -> Tensors:
    x_next, *rest = out
    *mixed_and_phi, alpha, bias, h_pre, weight = inputs_and_constants[:8]
    _, partial, _ = launch.post_project(x, *mixed_and_phi, out=(x_next, None))
    plan = launch.projection_plan(x, mixed_and_phi[-1].shape[0])
    arguments = (alpha, bias, h_pre, weight, *inputs_and_constants[8:])
    return (_quantize(x_next, partial, plan, *arguments, out=rest),)


def _quantize(
    x: torch.Tensor,
    partial: torch.Tensor,
    plan: Any,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor | None,
    weight: torch.Tensor,
    *constants: Any,
    out: Any,
) -> torch.Tensor:
    """`projected`; into `out` values, scales, layer_input unless it is missing, h_post, h_res and h_pre_next."""
    *quantized, h_post, h_res, h_pre_next = out
    *of_spec, eps, power_of_two = constants
    return launch.coefficients_and_quantize(
        x,
        partial,
        alpha,
        bias,
        spec_of(x, *of_spec),
        plan,
        launch.RMSNorm(weight, eps),
        power_of_two,
        h_pre=h_pre,
        quantized=tuple(quantized),
        mappings=(h_pre_next, h_post, h_res),
    )


def _pre_backward(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    return gradients_of_pre(g, inputs, saved, constants[:-1], needs)


def _post_pre_backward(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    results = (g.x_next, g.layer_input, g.h_post_next, g.h_res_next, g.h_pre_next)
    return gradients_of_boundary(results, inputs, saved, constants[:-1], needs)


def _declare(
    name: str,
    inputs: str,
    results: str,
    forward: Callable[..., Tensors],
    backward: Callable[..., Optionals],
    saved: str,
    **more: Any,
) -> tuple[Declaration, Declaration]:
    """The operator with layer_input, and the one without."""
    more |= {"constants": CONSTANTS, "kept": "projected", "saved": saved}
    alone = results.replace("layer_input ", "")
    return (
        Declaration(name, inputs, results, forward, backward, aligned=_all(results), **more),
        Declaration(
            f"{name}_alone", inputs, alone, forward, aligned=_all(alone), constants=CONSTANTS, kept="projected"
        ),
    )


def _all(results: str) -> Callable[[Any], str]:
    return lambda _: results.replace("?", "")


pre_quantized, pre_quantized_alone = _declare(
    "pre_quantized",
    f"x {PARAMETERS}",
    "values scales layer_input h_post h_res h_pre_next?",
    _pre_forward,
    _pre_backward,
    "h_pre_next projected",
)
post_pre_quantized, post_pre_quantized_alone = _declare(
    "post_pre_quantized",
    f"x layer_output h_post h_res {PARAMETERS}",
    "x_next values scales layer_input h_post_next h_res_next h_pre_next?",
    _post_pre_forward,
    _post_pre_backward,
    "x_next h_pre_next projected",
    shortcut=gradients_of_x_next,
)
