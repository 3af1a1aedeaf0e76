"""head: x [..., n, C], phi [n, K], alpha [1], bias [n] -> [..., C].

The operator also returns h_pre [..., n] and `projected` [n + 1, T], which the backward starts from.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from ..spec import MHCSpec
from .declaration import Declaration, Optionals, Tensors
from .library import spec_of

CONSTANTS = "float pre_eps, float rms_eps"


def head_spec(x: torch.Tensor, pre_eps: float, rms_eps: float) -> MHCSpec:
    """Return the spec of a head, from a stream x and its constants."""
    return spec_of(x, pre_eps=pre_eps, rms_eps=rms_eps)


def _forward(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, *constants: float, out: torch.Tensor
) -> Tensors:
    plan = launch.projection_plan(x, phi.shape[0])
    partial = launch.project(x, phi, plan)
    h_pre, projected = launch.head_coefficients(partial, alpha, bias, head_spec(x, *constants), plan)
    launch.aggregate(x, h_pre, out=out)
    return h_pre, projected


def _backward(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    x, phi, alpha, bias = inputs
    g_projected, g_alpha, g_bias = launch.head_coefficients_backward(
        launch.aggregate_backward(g.output, x), saved.projected, alpha, bias, head_spec(x, *constants)
    )
    g_x, g_phi = launch.project_backward(
        g_projected,
        x,
        phi,
        h_pre=saved.h_pre,
        g_layer_input=g.output,
        needs_g_x=needs.x,
        needs_g_phi=needs.phi,
    )
    return g_x, g_phi, g_alpha, g_bias


head = Declaration(
    "head",
    "x phi alpha bias",
    "output",
    _forward,
    _backward,
    constants=CONSTANTS,
    kept="h_pre projected",
    saved="h_pre projected",
)
