"""expand: h [..., C] -> x [..., n, C]; collapse: x -> h, the sum over streams. Each is the other's backward.

collapse_mean: x -> h, the mean over streams: the aggregation by a constant h_pre. Nothing is kept for its backward.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .declaration import Declaration
from .library import differentiate


def _expand(h: torch.Tensor, num_streams: int, *, out: torch.Tensor) -> None:
    launch.expand(h, num_streams, out=out)


def _collapse(x: torch.Tensor, *, out: torch.Tensor) -> None:
    launch.expand_backward(x, out=out)


def _collapse_mean(x: torch.Tensor, *, out: torch.Tensor) -> None:
    num_tokens, num_streams, _ = x.shape
    launch.aggregate(x, x.new_full((num_tokens, num_streams), 1 / num_streams, dtype=torch.float32), out=out)


expand = Declaration("expand", "h", "x", _expand, constants="int num_streams")
collapse = Declaration("collapse", "x", "h", _collapse)
collapse_mean = Declaration("collapse_mean", "x", "h", _collapse_mean)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.num_streams = inputs[0].shape[-2]


def _expand_backward(_ctx: Any, g_x: torch.Tensor | None) -> tuple:
    return None if g_x is None else collapse(g_x), None


def _collapse_backward(ctx: Any, g_h: torch.Tensor | None) -> torch.Tensor | None:
    return None if g_h is None else expand(g_h, ctx.num_streams)


def _collapse_mean_backward(ctx: Any, g_h: torch.Tensor | None) -> torch.Tensor | None:
    return None if g_h is None else expand(g_h / ctx.num_streams, ctx.num_streams)  # one rounding: copies are exact


differentiate(expand.operator, _expand_backward, lambda ctx, *_: ctx.set_materialize_grads(False))
differentiate(collapse.operator, _collapse_backward, _setup_context)
differentiate(collapse_mean.operator, _collapse_mean_backward, _setup_context)
