"""Sinkhorn-Knopp: from logits to a nearly doubly stochastic h_res, Eq. 9 and 19.

h_res[j, i] is the weight of input stream i in output stream j. A column is one input stream spread over the
outputs (Σ over j, axis −2); a row is one output stream gathered from the inputs (Σ over i, axis −1). Columns
come first and rows last: rows sum to 1 after any number of iterations, columns only in the limit.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64


def softmax_columns(logits: Array) -> Array:
    """exp(logits[j, i]) / Σ_j exp(logits[j, i]), with each column's maximum taken out first; [..., n, n]."""
    weights = np.exp(logits - logits.max(axis=-2, keepdims=True))
    return weights / weights.sum(axis=-2, keepdims=True)


def normalize_columns(h_res: Array, eps: float) -> Array:
    """T_c: h_res[j, i] / (Σ_j h_res[j, i] + eps); [..., n, n]."""
    return h_res / (h_res.sum(axis=-2, keepdims=True) + eps)


def normalize_rows(h_res: Array, eps: float) -> Array:
    """T_r: h_res[j, i] / (Σ_i h_res[j, i] + eps); [..., n, n]."""
    return h_res / (h_res.sum(axis=-1, keepdims=True) + eps)


def sinkhorn(logits: ArrayLike, iters: int = 20, eps: float = 1e-6) -> Array:
    """T_r(T_c(·)) applied `iters` times to exp(logits).

    The first T_c is a softmax, to which eps is added afterwards; every later step divides by its sum + eps.
    With eps = 0 this is Eq. 9 as printed, and a row wholly 746 or more below its columns' maxima gives NaN.

    Args:
        logits: [..., n, n], [out, in].
        iters: column and row steps, t_max, at least 1.
        eps: of every step.

    Returns:
        h_res, [..., n, n].
    """
    if iters < 1:
        raise ValueError(f"iters: expected at least 1, got {iters}")
    logits = as_float64("logits", logits, (..., "n", "n"))
    h_res = softmax_columns(logits) + eps
    h_res = normalize_rows(h_res, eps)
    for _ in range(iters - 1):
        h_res = normalize_columns(h_res, eps)
        h_res = normalize_rows(h_res, eps)
    return h_res
