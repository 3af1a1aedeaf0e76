"""Sinkhorn-Knopp of one token in one thread's variables (see `warps`): formulas, order and bits of `sinkhorn`.

P is a thread's [n · n] array, row-major as [out, in]; `scale` has n. For kernels of which only some threads iterate.

A reciprocal r of x is the hardware's guess g and one step of Newton's, r = g + (1 - x·g)·g, which is how nvcc divides:
the same bits, without its branch around rare operands, for which the others of a step would have to wait. There are
none here. A sum is at least 1/n² without eps (before a step every row or column adds up to 1, its column or row to n at
most) and at least eps with it, and below 2^126 for an eps up to 2^123; from there on h_res is 0 instead of subnormal.
"""

import tilelang.language as T

from .sinkhorn import iterations
from .warps import fma


@T.macro
def invert(values, at):
    """values[at] = 1 / values[at], with the bits of the division, of a normal number below 2^126."""
    guess = T.alloc_local((1,), T.float32)
    guess[0] = T.call_extern("float32", "tl::fast_rcp", values[at])
    values[at] = fma(fma(-values[at], guess[0], T.float32(1)), guess[0], guess[0])


@T.macro
def sum_columns(scale, P, n):
    """scale[i] = Σ_j P[j, i], ascending."""
    for i in T.unroll(n):
        scale[i] = P[i]
        for j in T.unroll(1, n):
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
        scale[i] = scale[i] + sinkhorn_eps
        invert(scale, i)
        for j in T.unroll(n):
            P[j * n + i] = P[j * n + i] * scale[i]


@T.macro
def normalize_rows(P, scale, n, sinkhorn_eps):
    """P /= Σ_i P + sinkhorn_eps."""
    for j in T.unroll(n):
        scale[j] = P[j * n]
        for i in T.unroll(1, n):
            scale[j] = scale[j] + P[j * n + i]
        scale[j] = scale[j] + sinkhorn_eps
        invert(scale, j)
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
            invert(weights, i)
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
            invert(scale, i)
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
