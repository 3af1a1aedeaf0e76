"""post: x [..., n, C], layer_output [..., C], h_post [..., n], h_res [..., n, n] -> x_next [..., n, C]."""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .declaration import Declaration, Optionals


def _forward(*inputs: torch.Tensor, out: torch.Tensor) -> None:
    launch.post(*inputs, out=out)


def _backward(g: Any, inputs: Any, _saved: Any, _constants: tuple, needs: Any) -> Optionals:
    return launch.post_backward(
        g.x_next,
        *inputs,
        needs_g_x=needs.x,
        needs_g_layer_output=needs.layer_output,
        needs_g_mappings=needs.h_post or needs.h_res,
    )


post = Declaration("post", "x layer_output h_post h_res", "x_next", _forward, _backward)


def gradients_of_x_next(g: Any, inputs: Any, needs: Any) -> Optionals | None:
    """Return `post`'s gradients if only x_next of a boundary was used, else None; what begins there has none."""
    g_x_next, *others = g
    if any(one is not None for one in others):
        return None
    mixed = post.gradients((g_x_next,), inputs[:4], (), needs[:4])
    return (*mixed, *(None,) * (len(inputs) - 4))
