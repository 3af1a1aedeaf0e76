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
    phi, alpha, bias, h_pre, weight, *of_spec, eps, power_of_two = inputs_and_constants
    *quantized, h_post, h_res, h_pre_next = out
    plan = launch.projection_plan(x, phi.shape[0])
    projected = launch.coefficients_and_quantize(
        x,
        launch.project(x, phi, plan),
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
    return (projected,)


def _post_pre_forward(*inputs_and_constants: Any, out: Any) -> Tensors:
    *mixed_and_parameters, h_pre, weight = inputs_and_constants[:9]
    *of_spec, eps, power_of_two = inputs_and_constants[9:]
    arguments: Any = (*mixed_and_parameters, spec_of(mixed_and_parameters[0], *of_spec), weight, eps)
    *_, projected = launch.post_pre_quantized(*arguments, power_of_two=power_of_two, h_pre=h_pre, out=tuple(out))
    return (projected,)


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
