"""expand: h [..., C] -> x [..., n, C]; collapse: x -> h, the sum over streams. Each is the other's backward."""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .library import check_buffers, define, define_out, differentiate, flat


def _allocate(h: torch.Tensor, num_streams: int) -> torch.Tensor:
    return h.new_empty(*h.shape[:-1], num_streams, h.shape[-1])


def _run(h: torch.Tensor, num_streams: int) -> torch.Tensor:
    x = _allocate(h, num_streams)
    launch.expand(flat(h, 1), num_streams, out=flat(x, 2))
    return x


def _run_out(h: torch.Tensor, num_streams: int, *, out: torch.Tensor) -> None:
    check_buffers("expand", {"out": out}, {"h": h})
    launch.expand(flat(h, 1), num_streams, out=flat(out, 2))


def _allocate_collapsed(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-2], x.shape[-1])


def _run_collapse(x: torch.Tensor) -> torch.Tensor:
    h = _allocate_collapsed(x)
    launch.expand_backward(flat(x, 2), out=flat(h, 1))
    return h


def _run_collapse_out(x: torch.Tensor, *, out: torch.Tensor) -> None:
    check_buffers("collapse", {"out": out}, {"x": x})
    launch.expand_backward(flat(x, 2), out=flat(out, 1))


expand = define("expand(Tensor h, int num_streams) -> Tensor", _run, _allocate)
expand_out = define_out("expand_out(Tensor h, int num_streams, *, Tensor(a!) out) -> ()", _run_out)
collapse = define("collapse(Tensor x) -> Tensor", _run_collapse, _allocate_collapsed)
collapse_out = define_out("collapse_out(Tensor x, *, Tensor(a!) out) -> ()", _run_collapse_out)


def _setup_expand(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.set_materialize_grads(False)


def _expand_backward(ctx: Any, g_x: torch.Tensor | None) -> tuple:
    return None if g_x is None else collapse(g_x), None


def _setup_collapse(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.num_streams = inputs[0].shape[-2]


def _collapse_backward(ctx: Any, g_h: torch.Tensor | None) -> torch.Tensor | None:
    return None if g_h is None else expand(g_h, ctx.num_streams)


differentiate(expand, _expand_backward, _setup_expand)
differentiate(collapse, _collapse_backward, _setup_collapse)
