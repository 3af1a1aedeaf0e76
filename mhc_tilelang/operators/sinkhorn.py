"""sinkhorn: logits [..., n, n] -> h_res [..., n, n]."""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .declaration import Declaration, Optionals


def _forward(logits: torch.Tensor, iters: int, eps: float, *, out: torch.Tensor) -> None:
    launch.sinkhorn(logits, iters, eps, out=out)


def _backward(g: Any, inputs: Any, _saved: Any, constants: tuple, _needs: Any) -> Optionals:
    return (launch.sinkhorn_backward(g.h_res, inputs.logits, *constants),)


sinkhorn = Declaration(
    "sinkhorn",
    "logits",
    "h_res",
    _forward,
    _backward,
    constants="int iters, float eps",
    aligned=lambda _: "h_res",
)
