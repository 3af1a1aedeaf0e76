"""expand and its backward, which is `collapse`: plan, outputs unless `out` has them, launch.

Tensors come flat and contiguous, [T, …]; `operators` sees to that.
"""

from __future__ import annotations

import torch

from .operands import channel_kernel


def expand(h: torch.Tensor, num_streams: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """h [T, C] -> [T, n, C]."""
    x = h.new_empty(h.shape[0], num_streams, h.shape[1]) if out is None else out
    channel_kernel("expand", x, h, x)(h=h, x=x)
    return x


def expand_backward(g_x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """g_x [T, n, C] -> g_h [T, C]."""
    g_h = g_x.new_empty(g_x.shape[0], g_x.shape[2]) if out is None else out
    channel_kernel("expand_backward", g_x, g_x, g_h)(g_x=g_x, g_h=g_h)
    return g_h
