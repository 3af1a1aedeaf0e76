"""Sinkhorn's gradient unrolled and implicit: how far each is from the exact one.

Implicit. Let P = diag(u)·exp(z)·diag(v) with row sums r and column sums c that do not change. A change of the logits
gives dP = P ∘ (dz + a·1ᵀ + 1·bᵀ), with a and b such that its rows and columns sum to zero. That map is its own adjoint:

    g_z = P ∘ (G − a·1ᵀ − 1·bᵀ)        r∘a + P·b = (P∘G)·1,    Pᵀ·a + c∘b = (P∘G)ᵀ·1

The system is singular along (1, −1), which changes nothing; adding the projector on it picks one solution. Where the
iterations have not converged, P depends on z otherwise, and g_z is the gradient of another function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ... import ops, reference
from .convergence import Matrices


@dataclass(frozen=True)
class Error:
    """Relative error of a method's gradient, ‖difference‖ / ‖exact‖: median and 99th percentile over matrices."""

    scale: float
    iters: int
    method: str
    median: float
    p99: float


def implicit(g_h_res: torch.Tensor, h_res: torch.Tensor) -> torch.Tensor:
    """g_h_res, h_res [T, n, n] -> g_logits [T, n, n], in their dtype."""
    n = h_res.shape[-1]
    weighted = h_res * g_h_res
    rows, columns = torch.diag_embed(h_res.sum(-1)), torch.diag_embed(h_res.sum(-2))
    system = torch.cat([torch.cat([rows, h_res], -1), torch.cat([h_res.mT, columns], -1)], -2)
    free = torch.cat([h_res.new_ones(n), -h_res.new_ones(n)]) / (2 * n) ** 0.5
    sums = torch.cat([weighted.sum(-1), weighted.sum(-2)], -1)
    solved = torch.linalg.solve(system + torch.outer(free, free), sums)
    a, b = solved.split(n, -1)
    return weighted - h_res * (a.unsqueeze(-1) + b.unsqueeze(-2))


def measure(
    logits: Matrices, scales: Sequence[float], iters: Sequence[int], eps: float, seed: int, device: torch.device
) -> list[Error]:
    """Return a result per scale, number of iterations and method, for one random upstream gradient a matrix."""
    upstream = np.random.default_rng(seed + 1).standard_normal(logits.shape).astype(np.float32).astype(np.float64)
    g_h_res = torch.from_numpy(upstream)
    errors = []
    for scale in scales:
        narrow = torch.from_numpy(scale * logits).float()
        wide = narrow.double().numpy()
        for count in iters:
            exact = torch.from_numpy(reference.sinkhorn_backward(upstream, wide, count, eps))
            h_res = torch.from_numpy(reference.sinkhorn(wide, count, eps))
            leaf = narrow.to(device).requires_grad_()
            computed = ops.sinkhorn(leaf, count, eps)
            (unrolled,) = torch.autograd.grad(computed, leaf, g_h_res.float().to(device))
            found = {
                "unrolled": unrolled.cpu(),
                "implicit, float64": implicit(g_h_res, h_res),
                "implicit, float32": implicit(g_h_res.float(), computed.detach().cpu()),
            }
            errors += [Error(scale, count, method, *quantiles(got, exact)) for method, got in found.items()]
    return errors


def quantiles(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Median and 99th percentile of the relative errors."""
    relative = (got.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    median, p99 = torch.quantile(relative, torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return median, p99
