"""sinkhorn and its backward, whose kernels are built for a capacity of iterations.

Tensors come flat and contiguous, [T, …]; `operators` sees to that.
"""

from __future__ import annotations

import torch

from .. import compiler
from ..errors import GradientError
from ..kernels import plans
from .operands import aligned


def sinkhorn(logits: torch.Tensor, iters: int, eps: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """logits [T, n, n] -> h_res [T, n, n]."""
    target = compiler.target_of(logits.device)
    h_res = torch.empty_like(logits) if out is None else out
    kernel = compiler.kernel(
        "sinkhorn",
        target,
        num_streams=logits.shape[-1],
        block=plans.tokens_per_block(target),
    )
    kernel(logits=aligned(logits), h_res=h_res, iters=iters, sinkhorn_eps=eps)
    return h_res


def sinkhorn_backward(
    g_h_res: torch.Tensor, logits: torch.Tensor, iters: int, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """g_h_res, logits [T, n, n] -> g_logits [T, n, n]."""
    num_streams = logits.shape[-1]
    g_logits = torch.empty_like(logits) if out is None else out
    target = compiler.target_of(logits.device)
    capacity, block = sinkhorn_sizes(num_streams, iters, target)
    kernel = compiler.kernel("sinkhorn_backward", target, num_streams=num_streams, capacity=capacity, block=block)
    kernel(g_h_res=aligned(g_h_res), logits=aligned(logits), g_logits=g_logits, iters=iters, sinkhorn_eps=eps)
    return g_logits


def sinkhorn_sizes(num_streams: int, iters: int, target: str) -> tuple[int, int]:
    """Iterations that Sinkhorn's backward has room for, and tokens of its block. Raises GradientError where none has
    room for so many.
    """
    kind = "cpu" if target == "cpu" else "cuda"
    capacity, block = plans.sinkhorn_backward_sizes(num_streams, iters, kind)
    if not capacity:
        most = max(plans.sinkhorn_backward_blocks(num_streams, kind))
        raise GradientError(
            f"sinkhorn: the backward keeps a vector per step on the chip: expected at most {most} iterations for "
            f"{num_streams} streams on {kind}, got {iters}"
        )
    return capacity, block
