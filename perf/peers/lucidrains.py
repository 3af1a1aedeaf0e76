"""lucidrains' `hyper-connections`: its Sinkhorn, which is ours without eps.

The rest is another function. Its coefficients come from each stream's own RMS norm and from weights that all streams
share ([C, n + 1], against phi's [n² + 2n, n·C]), so no phi of ours makes the two equal, and width and depth of its
connection are not offered without them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from .peer import Call, Function, Inputs, Outputs, Peer, copy_to

MODULE = "hyper_connections.manifold_constrained_hyper_connections"
ANOTHER = "another function: a norm per stream, and weights that the streams share"


def load(_device: torch.device) -> Peer:
    """Import its mHC module."""
    return declare(import_module(MODULE).sinkhorn_knopps)


def declare(sinkhorn_knopps: Callable[..., torch.Tensor]) -> Peer:
    """Return the functions, over `sinkhorn_knopps(logits, iters)`."""

    def sinkhorn(inputs: Inputs, outputs: Outputs) -> Call:
        """Logits -> h_res: its first axis sums first, which are our columns."""
        logits, iters = inputs["logits"], inputs["iters"]
        return Call(lambda: sinkhorn_knopps(logits, iters=iters), copy_to(outputs, "h_res"))

    # Against eps = 1e-6 in every sum and after the softmax; measured for logits of standard deviation 2.
    without_eps = {"allowed": 2e-4, "because": "it has no eps"}
    return Peer({"sinkhorn": Function("sinkhorn_knopps", sinkhorn, **without_eps)}, otherwise=ANOTHER)  # type: ignore[arg-type]
