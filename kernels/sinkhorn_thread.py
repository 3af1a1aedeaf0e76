"""Sinkhorn-Knopp of one token in one thread's variables (see `warps`): formulas, order and bits of `sinkhorn`.

P is a thread's [n · n] array, row-major as [out, in]; `scale` has n. For kernels of which only some threads iterate.
"""

import tilelang.language as T

from .sinkhorn import iterations


@T.macro
def sum_columns(scale, P, n):
    """scale[i] = Σ_j P[j, i], from zero, ascending."""
    for i in T.unroll(n):
        scale[i] = 0.0
        for j in T.unroll(n):
            scale[i] = scale[i] + P[j * n + i]


@T.macro
def max_columns(scale, P, n):
    """scale[i] = max_j P[j, i]."""
    for i in T.unroll(n):
        scale[i] = P[i]
        for j in T.unroll(n):
            scale[i] = T.max(scale[i], P[j * n + i])


@T.macro
def normalize_columns(P, scale, n, sinkhorn_eps):
    """P /= Σ_j P + sinkhorn_eps."""
    sum_columns(scale, P, n)
    for i in T.unroll(n):
        scale[i] = 1.0 / (scale[i] + sinkhorn_eps)
        for j in T.unroll(n):
            P[j * n + i] = P[j * n + i] * scale[i]


@T.macro
def normalize_rows(P, scale, n, sinkhorn_eps):
    """P /= Σ_i P + sinkhorn_eps."""
    for j in T.unroll(n):
        scale[j] = 0.0
        for i in T.unroll(n):
            scale[j] = scale[j] + P[j * n + i]
        scale[j] = 1.0 / (scale[j] + sinkhorn_eps)
        for i in T.unroll(n):
            P[j * n + i] = P[j * n + i] * scale[j]


@T.macro
def first_iteration(P, scale, n, sinkhorn_eps):
    """The first columns, as a softmax, and rows, of logits P."""
    weights = T.alloc_local((n,), T.float32)
    max_columns(scale, P, n)
    if sinkhorn_eps == 0:
        for j in T.unroll(n):
            for i in T.unroll(n):
                P[j * n + i] = P[j * n + i] - scale[i]
        for i in T.unroll(n):
            weights[i] = 0.0
            for j in T.unroll(n):
                weights[i] = weights[i] + T.exp(P[j * n + i])
            weights[i] = 1.0 / weights[i]
        for j in T.unroll(n):
            scale[j] = P[j * n]
            for i in T.unroll(n):
                scale[j] = T.max(scale[j], P[j * n + i])
            for i in T.unroll(n):
                P[j * n + i] = T.exp(P[j * n + i] - scale[j]) * weights[i]
    else:
        for j in T.unroll(n):
            for i in T.unroll(n):
                P[j * n + i] = T.exp(P[j * n + i] - scale[i])
        sum_columns(scale, P, n)
        for i in T.unroll(n):
            scale[i] = 1.0 / scale[i]
            for j in T.unroll(n):
                P[j * n + i] = P[j * n + i] * scale[i] + sinkhorn_eps
    normalize_rows(P, scale, n, sinkhorn_eps)


@T.macro
def sinkhorn_token(P, n, iters, sinkhorn_eps):
    """Turn the token's logits P into h_res."""
    scale = T.alloc_local((n,), T.float32)
    first_iteration(P, scale, n, sinkhorn_eps)
    for _ in iterations(iters - 1):
        normalize_columns(P, scale, n, sinkhorn_eps)
        normalize_rows(P, scale, n, sinkhorn_eps)
