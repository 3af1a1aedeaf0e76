"""post_head: the boundary after the last sublayer as one operator, post and then head.

x [..., n, C], layer_output [..., C], h_post [..., n], h_res [..., n, n], phi [n, K], alpha [1], bias [n]
-> x_next [..., n, C], output [..., C], and for the backward h_pre [..., n] and `projected` [n + 1, T].
"""

from __future__ import annotations

from typing import Any

from .. import launch
from .declaration import Declaration, Optionals, Tensors
from .head import CONSTANTS, head_spec
from .post import gradients_of_x_next


def _forward(*inputs_and_constants: Any, out: Any) -> Tensors:
    inputs, constants = inputs_and_constants[:7], inputs_and_constants[7:]
    arguments: Any = (*inputs, head_spec(inputs[0], *constants))
    found = launch.post_head(*arguments, out=tuple(out))
    return found.h_pre, found.projected


def _backward(g: Any, inputs: Any, saved: Any, constants: tuple, _needs: Any) -> Optionals:
    arguments: Any = (*g, *inputs, *saved, head_spec(inputs.x, *constants))
    return launch.post_head_backward(*arguments)[:7]


post_head = Declaration(
    "post_head",
    "x layer_output h_post h_res phi alpha bias",
    "x_next output",
    _forward,
    _backward,
    constants=CONSTANTS,
    kept="h_pre projected",
    saved="x_next h_pre projected",
    aligned=lambda _: "x_next",
    shortcut=gradients_of_x_next,
)
