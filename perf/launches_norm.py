"""The kernels that aggregate and normalise, as `launches` has the others.

`launch_norm` decides the same from tensors.
"""

from __future__ import annotations

from typing import Any

from ..kernels import plans
from .calls import Call, Launch

NORM = ("pre_norm", "pre_norm_backward")
EPS = 1e-6  # no byte depends on it


def pre_norm(call: Call) -> tuple[Launch, ...]:
    """x, h_pre, weight -> layer_input."""
    return (Launch("pre_norm", _parameters(call), call.tokens),)


def pre_norm_backward(call: Call) -> Launch:
    """g_u, g_h_pre, and a row of partial sums of g_weight a block."""
    tokens_per_block = plans.norm_tokens(call.case.shape.num_tokens)
    num_partials = -(-call.case.shape.num_tokens // tokens_per_block)
    sizes = {**call.tokens, "num_partials": num_partials, "tokens_per_block": tokens_per_block}
    return Launch("pre_norm_backward", {**_parameters(call), "weights": True}, sizes)


def _parameters(call: Call) -> dict[str, Any]:
    tile = plans.norm_tile(call.spec.hidden_size, call.case.shape.itemsize, call.target)
    return {**call.stream, "weight_dtype": "float32", "eps": EPS, "tile": tile}
