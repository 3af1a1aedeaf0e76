"""Sinkhorn-Knopp, backward: exact after any number of iterations, with nothing saved but the logits.

A step divides by a sum over its axis (j for columns, i for rows; Σ is over it throughout):

    P_t = P_{t−1} / d_t,  d_t = Σ P_{t−1} + eps        g_{t−1} = (g_t − Σ g_t · P_t) / d_t

In H_t = g_t · P_t the division cancels against P_{t−1} = P_t · d_t. So, from the last step to the first, starting with
P = h_res and H = g_h_res · P:

    H = H − P · Σ H ;  P = P · d_t

The first step is a softmax over j, P_0 = S + eps, and g_logits = S · (g_0 − Σ_j g_0 · S), so that

    H = H · S / (S + eps) ;  g_logits = H − S · Σ_j H

The way back needs the vectors d_t and no stored matrix: the forward is run again on chip and keeps them, n values a
step in shared memory, and P is rebuilt from its last value. There is room for `capacity` iterations: 20 take 19 KB a
warp at n = 4. The first rows' d_1 is not kept: their step takes P_1 alone, which is why it may underflow where eps = 0.
S is computed afresh from the logits, since P_0 − eps would lose its small elements.

One token is one thread, as in the forward; H and P are 2·n² registers.
"""

import tilelang.language as T

from .sinkhorn import a_token_a_thread, first_iteration, iterations, softmax


@T.macro
def normalize_keeping(P, scale, denominators, step, num_streams, block, sinkhorn_eps, axis):
    """`sinkhorn.normalize`, which also keeps the sums + eps as denominators[step]."""
    T.reduce_sum(P, scale, dim=axis)
    for k, t in T.Parallel(num_streams, block):
        scale[k, t] += sinkhorn_eps
        denominators[step, k, t] = scale[k, t]
        scale[k, t] = 1.0 / scale[k, t]
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        P[j, i, t] *= scale[i if axis == 0 else j, t]


@T.macro
def subtract_share(H, P, sums, num_streams, block, axis):
    """H = H − P · Σ H."""
    T.reduce_sum(H, sums, dim=axis)
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        H[j, i, t] = T.ieee_fmaf(-P[j, i, t], sums[i if axis == 0 else j, t], H[j, i, t])


@T.macro
def undo_normalize(H, P, sums, denominators, step, num_streams, block, axis):
    """H = H − P · Σ H ;  P = P · d."""
    subtract_share(H, P, sums, num_streams, block, axis)
    for k, t in T.Parallel(num_streams, block):
        sums[k, t] = denominators[step, k, t]
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        P[j, i, t] *= sums[i if axis == 0 else j, t]


@T.macro
def undo_softmax(H, S, sums, num_streams, block, sinkhorn_eps):
    """H = H · S / (S + sinkhorn_eps), then g_logits = H − S · Σ_j H."""
    if sinkhorn_eps > 0:
        for j, i, t in T.Parallel(num_streams, num_streams, block):
            H[j, i, t] *= S[j, i, t] / (S[j, i, t] + sinkhorn_eps)
    T.reduce_sum(H, sums, dim=0)
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        H[j, i, t] = T.ieee_fmaf(-S[j, i, t], sums[i, t], H[j, i, t])


@T.macro
def sinkhorn_backward_inplace(g, logits, num_streams, block, capacity, iters, sinkhorn_eps):
    """Turn g_h_res [n, n, block], a fragment with the tokens last, into g_logits; `logits` is such a tile, shared.

    There may be as many iterations as `capacity`.
    """
    n = num_streams
    P = T.alloc_fragment((n, n, block), T.float32)
    sums = T.alloc_fragment((n, block), T.float32)
    denominators = T.alloc_shared((2 * capacity - 2, n, block), T.float32)
    T.annotate_layout({P: a_token_a_thread(n, n, block), sums: a_token_a_thread(n, block)})
    for j, i, t in T.Parallel(n, n, block):
        P[j, i, t] = logits[j, i, t]
    first_iteration(P, sums, n, block, sinkhorn_eps)
    for k in iterations(iters - 1):
        normalize_keeping(P, sums, denominators, 2 * k, n, block, sinkhorn_eps, axis=0)
        normalize_keeping(P, sums, denominators, 2 * k + 1, n, block, sinkhorn_eps, axis=1)
    for j, i, t in T.Parallel(n, n, block):
        g[j, i, t] *= P[j, i, t]
    for k in iterations(iters - 1):
        undo_normalize(g, P, sums, denominators, 2 * (iters - 2 - k) + 1, n, block, axis=1)
        undo_normalize(g, P, sums, denominators, 2 * (iters - 2 - k), n, block, axis=0)
    subtract_share(g, P, sums, n, block, axis=1)
    for j, i, t in T.Parallel(n, n, block):
        P[j, i, t] = logits[j, i, t]
    softmax(P, sums, n, block)
    undo_softmax(g, P, sums, n, block, sinkhorn_eps)


def sinkhorn_backward_kernel(num_streams: int, capacity: int, block: int):
    """g_h_res, logits [T, n, n] -> g_logits [T, n, n], float32; `block` tokens a block, one thread each.

    iters may be 1 to `capacity`.
    """
    n = num_streams
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def sinkhorn_backward(
        g_h_res: T.Tensor[(num_tokens, n, n), T.float32],
        logits: T.Tensor[(num_tokens, n, n), T.float32],
        g_logits: T.Tensor[(num_tokens, n, n), T.float32],
        iters: T.int32,
        sinkhorn_eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, block), threads=block) as tile:
            g = T.alloc_fragment((n, n, block), T.float32)
            z = T.alloc_shared((n, n, block), T.float32)
            T.annotate_layout({g: a_token_a_thread(n, n, block)})
            first = tile * block
            for j, i, t in T.Parallel(n, n, block):
                g[j, i, t] = T.if_then_else(first + t < num_tokens, g_h_res[first + t, j, i], 0.0)
            for j, i, t in T.Parallel(n, n, block):
                z[j, i, t] = T.if_then_else(first + t < num_tokens, logits[first + t, j, i], 0.0)
            sinkhorn_backward_inplace(g, z, n, block, capacity, iters, sinkhorn_eps)
            for j, i, t in T.Parallel(n, n, block):
                if first + t < num_tokens:
                    g_logits[first + t, j, i] = g[j, i, t]

    return sinkhorn_backward
