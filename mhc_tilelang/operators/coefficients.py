"""coefficients: x [..., n, C], phi [M, K], alpha [3], bias [M] -> h_pre [..., n], h_post [..., n], h_res [..., n, n].

The operator also returns `projected` [M + 1, T], a projection's scaled dots and the scale of every token, which
the backward starts from.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .declaration import Declaration, Optionals, Tensors
from .library import spec_of

CONSTANTS = "int iters, float sinkhorn_eps, float pre_eps, float rms_eps, float post_scale"


def _forward(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, *constants: float, out: Any
) -> Tensors:
    plan = launch.projection_plan(x, phi.shape[0])
    partial = launch.project(x, phi, plan)
    return launch.coefficients(partial, alpha, bias, spec_of(x, *constants), plan, out=tuple(out))[3:]


def _backward(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    x, phi, alpha, bias = inputs
    arguments: Any = (*g, saved.projected, alpha, bias, spec_of(x, *constants))
    g_projected, g_alpha, g_bias = launch.coefficients_backward(*arguments)
    g_x, g_phi = launch.project_backward(g_projected, x, phi, needs_g_x=needs.x, needs_g_phi=needs.phi)
    return g_x, g_phi, g_alpha, g_bias


coefficients = Declaration(
    "coefficients",
    "x phi alpha bias",
    "h_pre h_post h_res",
    _forward,
    _backward,
    constants=CONSTANTS,
    kept="projected",
    saved="projected",
    aligned=lambda _: "h_pre h_post h_res",
)
