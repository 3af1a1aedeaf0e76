"""expand_pre: the boundary before the first sublayer as one operator, expand and then pre.

h [..., C], phi [M, K], alpha [3], bias [M]
-> x [..., n, C], layer_input [..., C], h_post [..., n], h_res [..., n, n], and for the backward h_pre [..., n] and
`projected` [M + 1, T]. phi says how many streams there are.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from ..spec import MHCSpec
from .coefficients import CONSTANTS
from .declaration import Declaration, Optionals, Tensors
from .expand import collapse
from .library import spec_of_sizes


def _spec(h: torch.Tensor, phi: torch.Tensor, constants: tuple) -> MHCSpec:
    return spec_of_sizes(h.shape[-1], phi.shape[1] // h.shape[-1], *constants)


def _forward(
    h: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, *constants: float, out: Any
) -> Tensors:
    x, layer_input, h_post, h_res = out
    h_pre = torch.empty_like(h_post)
    buffers = (x, layer_input, h_post, h_res, h_pre)
    return h_pre, launch.expand_pre(h, phi, alpha, bias, _spec(h, phi, constants), out=buffers).projected


def _backward(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    arguments: Any = (*g, *inputs, *saved, _spec(inputs.h, inputs.phi, constants))
    return launch.expand_pre_backward(*arguments, needs_g_h=needs.h, needs_g_phi=needs.phi)


def _gradients_of_x(g: Any, _inputs: Any, _needs: Any) -> Optionals | None:
    """Return the gradients if only x was used, else None; phi, alpha and bias have none then."""
    g_x, *others = g
    return None if any(one is not None for one in others) else (collapse(g_x), None, None, None)


expand_pre = Declaration(
    "expand_pre",
    "h phi alpha bias",
    "x layer_input h_post h_res",
    _forward,
    _backward,
    constants=CONSTANTS,
    kept="h_pre projected",
    saved="h_pre projected",
    aligned=lambda _: "x h_post h_res",
    shortcut=_gradients_of_x,
)
