"""expand: h [..., C] -> x [..., n, C]."""

from __future__ import annotations

from typing import Any

import torch

from .. import launch, launch_backward
from .library import check_buffers, define, define_backward, define_out, differentiate, flat


def _allocate(h: torch.Tensor, num_streams: int) -> torch.Tensor:
    return h.new_empty(*h.shape[:-1], num_streams, h.shape[-1])


def _run(h: torch.Tensor, num_streams: int) -> torch.Tensor:
    x = _allocate(h, num_streams)
    launch.expand(flat(h, 1), num_streams, out=flat(x, 2))
    return x


def _run_out(h: torch.Tensor, num_streams: int, *, out: torch.Tensor) -> None:
    check_buffers("expand", {"out": out}, {"h": h})
    launch.expand(flat(h, 1), num_streams, out=flat(out, 2))


def _allocate_backward(g_x: torch.Tensor) -> torch.Tensor:
    return g_x.new_empty(*g_x.shape[:-2], g_x.shape[-1])


def _run_backward(g_x: torch.Tensor) -> torch.Tensor:
    return launch_backward.expand_backward(flat(g_x, 2)).view(*g_x.shape[:-2], g_x.shape[-1])


expand = define("expand(Tensor h, int num_streams) -> Tensor", _run, _allocate)
expand_out = define_out("expand_out(Tensor h, int num_streams, *, Tensor(a!) out) -> ()", _run_out)
expand_backward = define_backward("expand_backward(Tensor g_x) -> Tensor", _run_backward, _allocate_backward)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_x: torch.Tensor | None) -> tuple:
    return None if g_x is None else expand_backward(g_x), None


differentiate(expand, _backward, _setup_context)
