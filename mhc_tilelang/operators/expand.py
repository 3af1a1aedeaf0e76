"""expand: h [..., C] -> x [..., n, C]; collapse: x -> h, the sum over streams. Each is the other's backward.

collapse_mean: x -> h, the mean over streams: the aggregation by a constant h_pre. Nothing is kept for its backward.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _expand_backward(_ctx: Any, g_x: torch.Tensor | None) -> tuple:
    return (None if g_x is None else collapse(g_x),)


def _collapse_backward(ctx: Any, g_h: torch.Tensor | None) -> tuple:
    return (None if g_h is None else expand(g_h, ctx.num_streams),)


def _note_streams(ctx: Any, inputs: Sequence[torch.Tensor], _output: torch.Tensor) -> None:
    ctx.num_streams = inputs[0].shape[-2]


def _collapse_mean_backward(ctx: Any, g_h: torch.Tensor | None) -> tuple:
    # One rounding: copies are exact.
    return (None if g_h is None else expand(g_h / ctx.num_streams, ctx.num_streams),)


expand.function = differentiate(expand.operator, _expand_backward, lambda *_: None)
collapse.function = differentiate(collapse.operator, _collapse_backward, _note_streams)
collapse_mean.function = differentiate(collapse_mean.operator, _collapse_mean_backward, _note_streams)
