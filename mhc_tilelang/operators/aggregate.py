"""aggregate: x [..., n, C], h_pre [..., n] -> layer_input [..., C], by an h_pre that is given."""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .declaration import Declaration, Optionals


def _forward(x: torch.Tensor, h_pre: torch.Tensor, *, out: torch.Tensor) -> None:
    launch.aggregate(x, h_pre, out=out)


def _backward(g: Any, inputs: Any, _saved: Any, _constants: tuple, needs: Any) -> Optionals:
    return launch.aggregate_gradients(g.layer_input, *inputs, needs_g_x=needs.x, needs_g_h_pre=needs.h_pre)


aggregate = Declaration("aggregate", "x h_pre", "layer_input", _forward, _backward)
