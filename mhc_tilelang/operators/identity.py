"""Identity hyper-connections (H_res = I): gates, identity_pre, identity_post and identity_post_pre, without h_res.

    gates          x [..., n, C], phi [2n, K], alpha [2], bias [2n] -> h_pre [..., n], h_post [..., n]
    identity_pre   the same, and the streams aggregated, as in `pre`  -> layer_input [..., C], h_post, h_pre_next
    identity_post  x, layer_output [..., C], h_post -> x_next [..., n, C]
    identity_post_pre   the last two, the stream read and written once for `post` and the projection; its backward is
                        that of `post_pre` without h_res

`gates` and `identity_pre` also return `projected` [2n + 1, T], which the backward starts from. The gradient of x in
`identity_post` is that of x_next, handed on as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from ..spec import MHCSpec
from .declaration import Declaration, Optionals, Tensors
from .library import spec_of

CONSTANTS = "float pre_eps, float rms_eps, float post_scale, float post_eps"


def _spec(x: torch.Tensor, constants: tuple) -> MHCSpec:
    pre_eps, rms_eps, post_scale, post_eps = constants
    named = {"pre_eps": pre_eps, "rms_eps": rms_eps, "post_scale": post_scale, "post_eps": post_eps}
    return spec_of(x, residual_mapping="identity", **named)


def _gates(x: torch.Tensor, phi: torch.Tensor, alpha: Any, bias: Any, constants: tuple, out: Any) -> torch.Tensor:
    plan = launch.projection_plan(x, phi.shape[0])
    return launch.gates(launch.project(x, phi, plan), alpha, bias, _spec(x, constants), plan, out=tuple(out))[2]


def _gates_forward(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, *constants: float, out: Any
) -> Tensors:
    return (_gates(x, phi, alpha, bias, constants, out),)


def _gates_backward(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    x, phi, alpha, bias = inputs
    arguments: Any = (*g, saved.projected, alpha, bias, _spec(x, constants))
    g_projected, *rest = launch.gates_backward(*arguments)
    return *launch.project_backward(g_projected, x, phi, needs_g_x=needs.x, needs_g_phi=needs.phi), *rest


def _pre_forward(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor | None,
    *constants: float,
    out: Any,
) -> Tensors:
    layer_input, h_post, h_pre_next = out
    if h_pre is None:
        plan = launch.projection_plan(x, phi.shape[0])
        of_gates = (launch.project(x, phi, plan), alpha, bias, _spec(x, constants), plan)
        return (launch.gates_and_aggregate(x, *of_gates, out=(layer_input, h_pre_next, h_post)),)
    projected = _gates(x, phi, alpha, bias, constants, (h_pre_next, h_post))
    launch.aggregate(x, h_pre, out=layer_input)
    return (projected,)


def _pre_backward(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    x, phi, alpha, bias, given = inputs
    h_pre = saved.h_pre_next if given is None else given
    g_h_pre, aggregation = None, {}
    if g.layer_input is not None:
        aggregation = {"h_pre": h_pre, "g_layer_input": g.layer_input}
        if given is None or needs.h_pre:
            g_h_pre = launch.aggregate_backward(g.layer_input, x)
    g_own = g_h_pre if given is None else g.h_pre_next
    g_projected, g_alpha, g_bias = launch.gates_backward(
        g_own, g.h_post, saved.projected, alpha, bias, _spec(x, constants)
    )
    g_x, g_phi = launch.project_backward(g_projected, x, phi, needs_g_x=needs.x, needs_g_phi=needs.phi, **aggregation)
    return g_x, g_phi, g_alpha, g_bias, g_h_pre


def _post_forward(*inputs: torch.Tensor, out: torch.Tensor) -> None:
    launch.identity_post(*inputs, out=out)


def _post_backward(g: Any, inputs: Any, _saved: Any, _constants: tuple, needs: Any) -> Optionals:
    _, layer_output, h_post = inputs
    found = launch.identity_post_backward(
        g.x_next, layer_output, h_post, needs_g_layer_output=needs.layer_output, needs_g_h_post=needs.h_post
    )
    return g.x_next.clone() if needs.x else None, *found  # an operator returns no argument of its own


def _hand_on(g: Any, inputs: Any, needs: Any) -> Optionals:
    """g_x_next itself for g_x: nothing is copied."""
    _, *rest = identity_post.operator_backward(g.x_next, *inputs, False, *needs[1:])
    return (g.x_next, *rest)


def _boundary_forward(*inputs_and_constants: Any, out: Any) -> Tensors:
    h_pre, constants = inputs_and_constants[6], inputs_and_constants[7:]
    arguments: Any = (*inputs_and_constants[:6], _spec(inputs_and_constants[0], constants))
    return (launch.identity_post_pre(*arguments, h_pre=h_pre, out=tuple(out)).projected,)


def _boundary_backward(g: Any, inputs: Any, saved: Any, constants: tuple, needs: Any) -> Optionals:
    *mixed_and_parameters, given = inputs
    kept = (saved.x_next, saved.h_pre_next if given is None else given, saved.projected)
    found = launch.identity_post_pre_backward(
        *(g.x_next, g.layer_input, g.h_post_next, *mixed_and_parameters, *kept, _spec(inputs.x, constants)),
        is_delayed=given is not None,
        g_h_pre_next=g.h_pre_next,
    )
    return *found[:3], *found[4:8]


PARAMETERS = "x phi alpha bias"
gates = Declaration(
    "gates",
    PARAMETERS,
    "h_pre h_post",
    _gates_forward,
    _gates_backward,
    constants=CONSTANTS,
    kept="projected",
    saved="projected",
    aligned=lambda _: "h_pre h_post",
)
identity_pre = Declaration(
    "identity_pre",
    f"{PARAMETERS} h_pre?",
    "layer_input h_post h_pre_next?",
    _pre_forward,
    _pre_backward,
    constants=CONSTANTS,
    kept="projected",
    saved="h_pre_next projected",
    aligned=lambda _: "h_post h_pre_next",
)
identity_post = Declaration(
    "identity_post", "x layer_output h_post", "x_next", _post_forward, _post_backward, shortcut=_hand_on
)


def _of_x_next(g: Any, inputs: Any, needs: Any) -> Optionals | None:
    """Return `identity_post`'s gradients if only x_next of a boundary was used, else None."""
    if any(one is not None for one in g[1:]):
        return None
    _, *rest = identity_post.operator_backward(g.x_next, *inputs[:3], False, *needs[1:3])
    return (g.x_next, *rest, *(None,) * 4)


identity_post_pre = Declaration(
    "identity_post_pre",
    "x layer_output h_post phi alpha bias h_pre?",
    "x_next layer_input h_post_next h_pre_next?",
    _boundary_forward,
    _boundary_backward,
    constants=CONSTANTS,
    kept="projected",
    saved="x_next h_pre_next projected",
    aligned=lambda inputs: "x_next h_post_next h_pre_next" + (" layer_input" if inputs.h_pre is not None else ""),
    shortcut=_of_x_next,
)
