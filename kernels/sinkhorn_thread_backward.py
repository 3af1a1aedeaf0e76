"""Sinkhorn's backward of one token in one thread's variables: formulas, order and bits of `sinkhorn_backward`.

H and P are a thread's [n · n] arrays, row-major as [out, in]; `scale` has n. The denominators that the way back needs
lie in shared memory, row step · n + k, a column a thread.
"""

import tilelang.language as T

from .sinkhorn import iterations
from .sinkhorn_thread import first_iteration, invert, max_columns, sum_columns
from .warps import fma


def element(k, other, axis, n):
    """Where P has what is summed up with others to sum k of an axis: columns are axis 0."""
    return other * n + k if axis == 0 else k * n + other


@T.macro
def sum_along(scale, P, n, axis):
    """scale[k] = Σ P over the axis, from zero, ascending."""
    for k in T.unroll(n):
        scale[k] = 0.0
        for other in T.unroll(n):
            scale[k] = scale[k] + P[element(k, other, axis, n)]


@T.macro
def normalize_keeping(P, scale, denominators, step, column, n, sinkhorn_eps, axis):
    """P /= Σ P + sinkhorn_eps, the sums + eps being kept as the step's denominators."""
    sum_along(scale, P, n, axis)
    for k in T.unroll(n):
        scale[k] = scale[k] + sinkhorn_eps
        denominators[step * n + k, column] = scale[k]
        invert(scale, k)
        for other in T.unroll(n):
            P[element(k, other, axis, n)] = P[element(k, other, axis, n)] * scale[k]


@T.macro
def subtract_share(H, P, scale, n, axis):
    """H = H − P · Σ H."""
    sum_along(scale, H, n, axis)
    for k in T.unroll(n):
        for other in T.unroll(n):
            at = element(k, other, axis, n)
            H[at] = fma(-P[at], scale[k], H[at])


@T.macro
def undo_normalize(H, P, scale, denominators, step, column, n, axis):
    """H = H − P · Σ H ;  P = P · d."""
    subtract_share(H, P, scale, n, axis)
    for k in T.unroll(n):
        scale[k] = denominators[step * n + k, column]
        for other in T.unroll(n):
            P[element(k, other, axis, n)] = P[element(k, other, axis, n)] * scale[k]


@T.macro
def softmax(P, scale, n):
    """P = exp(P − max_j P) / Σ_j exp(…)."""
    max_columns(scale, P, n)
    for j in T.unroll(n):
        for i in T.unroll(n):
            P[j * n + i] = T.exp(P[j * n + i] - scale[i])
    sum_columns(scale, P, n)
    for i in T.unroll(n):
        scale[i] = 1.0 / scale[i]
        for j in T.unroll(n):
            P[j * n + i] = P[j * n + i] * scale[i]


@T.macro
def sinkhorn_token_backward(H, logits, denominators, column, n, iters, sinkhorn_eps):
    """Turn the token's g_h_res H into g_logits; `logits` are left as they are."""
    P = T.alloc_local((n * n,), T.float32)
    scale = T.alloc_local((n,), T.float32)
    for m in T.unroll(n * n):
        P[m] = logits[m]
    first_iteration(P, scale, n, sinkhorn_eps)
    for k in iterations(iters - 1):
        normalize_keeping(P, scale, denominators, 2 * k, column, n, sinkhorn_eps, axis=0)
        normalize_keeping(P, scale, denominators, 2 * k + 1, column, n, sinkhorn_eps, axis=1)
    for m in T.unroll(n * n):
        H[m] = H[m] * P[m]
    for k in iterations(iters - 1):
        undo_normalize(H, P, scale, denominators, 2 * (iters - 2 - k) + 1, column, n, axis=1)
        undo_normalize(H, P, scale, denominators, 2 * (iters - 2 - k), column, n, axis=0)
    subtract_share(H, P, scale, n, axis=1)
    for m in T.unroll(n * n):
        P[m] = logits[m]
    softmax(P, scale, n)
    if sinkhorn_eps > 0:
        for m in T.unroll(n * n):
            H[m] = H[m] * (P[m] / (P[m] + sinkhorn_eps))
    subtract_share(H, P, scale, n, axis=0)
