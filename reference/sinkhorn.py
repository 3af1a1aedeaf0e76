"""Sinkhorn-Knopp: from logits to a nearly doubly stochastic h_res, Eq. 9 and 19.

h_res[j, i] is the weight of input stream i in output stream j. A column is one input stream spread over the
outputs (Σ over j, axis −2); a row is one output stream gathered from the inputs (Σ over i, axis −1). Columns
come first and rows last: rows sum to 1 after any number of iterations, columns only in the limit.

Backward, exact after any number of iterations. A step t divides by a sum per column or per row; Σ is over its
axis throughout:

    P_t = P_{t−1} / d_t,  d_t = Σ P_{t−1} + eps

    dP_t    = dP_{t−1} / d_t − P_{t−1} / d_t² · Σ dP_{t−1} = (dP_{t−1} − P_t · Σ dP_{t−1}) / d_t
    g_{t−1} = (g_t − Σ g_t·P_t) / d_t           collecting dP_{t−1} in the sum of g_t·dP_t over all j and i
    P_{t−1} = P_t · d_t

So the way back from h_res, the last P_t, takes vectors d_t and no stored matrix. The very first step is a softmax S
over j, and P_0 = S + eps adds a constant:

    dS[j, i]       = S[j, i] · (dlogits[j, i] − Σ_j S[j, i]·dlogits[j, i])
    g_logits[j, i] = S[j, i] · (g_0[j, i] − Σ_j g_0[j, i]·S[j, i])

With eps = 0 a whole row of S may underflow, and the first rows' d_1 with it. P_1 does not where each row's maximum is
taken out as well, and H_0 = g_0·P_0 = P_1 · (g_1 − Σ_i g_1·P_1) needs no more:

    g_logits[j, i] = H_0[j, i]·S/P_0 − S[j, i]·Σ_j H_0[j, i]·S/P_0          S/P_0 = 1 for eps = 0
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64, as_gradient

# The axis that a step sums over: j for columns, i for rows.
COLUMNS, ROWS = -2, -1


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


def first_iteration(logits: Array, eps: float) -> Array:
    """T_r(T_c(exp(logits))), [..., n, n]; for eps = 0 right to rounding however far apart the logits are."""
    if eps:
        return normalize_rows(softmax_columns(logits) + eps, eps)
    below = logits - logits.max(axis=COLUMNS, keepdims=True)
    column_sums = np.exp(below).sum(axis=COLUMNS, keepdims=True)
    return normalize_rows(np.exp(below - below.max(axis=ROWS, keepdims=True)) / column_sums, eps)


def sinkhorn(logits: ArrayLike, iters: int = 20, eps: float = 1e-6) -> Array:
    """T_r(T_c(·)) applied `iters` times to exp(logits).

    The first T_c is a softmax, to which eps is added afterwards; every later step divides by its sum + eps.
    With eps = 0 this is Eq. 9 as printed, for any finite logits.

    Args:
        logits: [..., n, n], [out, in].
        iters: column and row steps, t_max, at least 1.
        eps: constant of every step.

    Returns:
        h_res, [..., n, n].
    """
    _check_iters(iters)
    logits = as_float64("logits", logits, (..., "n", "n"))
    h_res = first_iteration(logits, eps)
    for _ in range(iters - 1):
        h_res = normalize_columns(h_res, eps)
        h_res = normalize_rows(h_res, eps)
    return h_res


def sinkhorn_backward(g_h_res: ArrayLike | None, logits: ArrayLike, iters: int = 20, eps: float = 1e-6) -> Array:
    """g_{t−1} = (g_t − Σ g_t·P_t) / d_t for every step t from the last to the first, then through the softmax.

    Args:
        g_h_res: [..., n, n], [out, in], or None.
        logits, iters, eps: as for `sinkhorn`.

    Returns:
        g_logits, [..., n, n].
    """
    _check_iters(iters)
    logits = as_float64("logits", logits, (..., "n", "n"))
    gradient = as_gradient("g_h_res", g_h_res, logits.shape)

    matrix = first_iteration(logits, eps)
    steps = []
    for axis in [COLUMNS, ROWS] * (iters - 1):
        denominator = matrix.sum(axis=axis, keepdims=True) + eps
        matrix = matrix / denominator
        steps.append((axis, denominator))

    for axis, denominator in reversed(steps):
        gradient = (gradient - (gradient * matrix).sum(axis=axis, keepdims=True)) / denominator
        matrix = matrix * denominator
    weighted = matrix * (gradient - (gradient * matrix).sum(axis=ROWS, keepdims=True))
    softmax = softmax_columns(logits)
    if eps:
        weighted = weighted * softmax / (softmax + eps)
    return weighted - softmax * weighted.sum(axis=COLUMNS, keepdims=True)


def _check_iters(iters: int) -> None:
    if iters < 1:
        raise ValueError(f"iters: expected at least 1, got {iters}")
