"""sinkhorn: logits [..., n, n] -> h_res [..., n, n]."""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .library import check_buffers, define, define_backward, define_out, differentiate, flat


def _allocate(logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _run(logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    h_res = logits.new_empty(logits.shape)
    launch.sinkhorn(flat(logits, 2), iters, eps, out=flat(h_res, 2))
    return h_res


def _run_out(logits: torch.Tensor, iters: int, eps: float, *, out: torch.Tensor) -> None:
    check_buffers("sinkhorn", {"out": out}, {"logits": logits}, whole=("out",))
    launch.sinkhorn(flat(logits, 2), iters, eps, out=flat(out, 2))


def _allocate_backward(g_h_res: torch.Tensor, logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _run_backward(g_h_res: torch.Tensor, logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    return launch.sinkhorn_backward(flat(g_h_res, 2), flat(logits, 2), iters, eps).view(logits.shape)


sinkhorn = define("sinkhorn(Tensor logits, int iters, float eps) -> Tensor", _run, _allocate)
sinkhorn_out = define_out("sinkhorn_out(Tensor logits, int iters, float eps, *, Tensor(a!) out) -> ()", _run_out)
sinkhorn_backward = define_backward(
    "sinkhorn_backward(Tensor g_h_res, Tensor logits, int iters, float eps) -> Tensor",
    _run_backward,
    _allocate_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    logits, *ctx.constants = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits)


def _backward(ctx: Any, g_h_res: torch.Tensor | None) -> tuple:
    if g_h_res is None:
        return None, None, None
    (logits,) = ctx.saved_tensors
    return sinkhorn_backward(g_h_res, logits, *ctx.constants), None, None


differentiate(sinkhorn, _backward, _setup_context)
