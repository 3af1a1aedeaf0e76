"""Liger-Kernel's `LigerMHC` (from its source; its Triton kernels are not run here).

    phi         [n·C, M]   phi transposed; float16 unless it was made otherwise
    b           [M]        bias
    alpha_pre, alpha_post, alpha_res   scalars: alpha
    layer.*                the wrapped layer's own weights, which are left to you

Its h_res is [out, in] as here and its res columns lie as our res rows do, but its Sinkhorn normalises rows first and
columns last: `RowsFirstConnection` computes the same, a `HyperConnection` the other order. Its pre_eps is 0.
"""

from __future__ import annotations

import torch

from ..spec import MHCSpec
from . import state as checks
from .state import Converted, State

ALPHAS = ("alpha_pre", "alpha_post", "alpha_res")
NAMES = ("phi", "b", *ALPHAS)


def spec(hidden_size: int, num_streams: int = 4, **changes: float) -> MHCSpec:
    """`LigerMHC`'s defaults: no pre_eps, every other eps 1e-6, 20 iterations."""
    return MHCSpec(hidden_size, **{"num_streams": num_streams, "pre_eps": 0.0, **changes})  # type: ignore[arg-type]


def import_state(state: State) -> Converted:
    """Convert a `LigerMHC`'s state to phi, alpha, bias of `RowsFirstConnection`. phi is its phi transposed, a view."""
    function = "liger.import_state"
    theirs = {name: tensor for name, tensor in state.items() if not name.startswith("layer.")}
    checks.take(function, theirs, NAMES)
    phi, bias = theirs["phi"], theirs["b"]
    n = checks.streams_of(function, "b", bias.numel())
    checks.check_shape(function, "b", bias, (n * n + 2 * n,))
    if phi.ndim != 2 or phi.shape[1] != bias.numel() or phi.shape[0] == 0 or phi.shape[0] % n:
        hint = " (transposed?)" if phi.ndim == 2 and phi.shape[0] == bias.numel() else ""
        raise ValueError(f"{function}: phi: expected shape [{n}·C, {bias.numel()}], got {list(phi.shape)}{hint}")
    for name in ALPHAS:
        checks.check_shape(function, name, theirs[name], ())
    return {"phi": phi.T, "alpha": torch.stack([theirs[name] for name in ALPHAS]), "bias": bias}


def export_state(state: State) -> Converted:
    """phi, alpha, bias of a `RowsFirstConnection` -> a `LigerMHC`'s own five tensors, views of ours.

    Load them with strict=False, or beside its `layer.*`. Its phi is in float16 by default, and loading rounds to that.
    """
    checks.ours("liger.export_state", state)
    alphas = dict(zip(ALPHAS, state["alpha"].unbind(), strict=True))
    return {"phi": state["phi"].T, "b": state["bias"], **alphas}
